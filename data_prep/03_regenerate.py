"""Step 3: the target writes the responses of a corpus; the same as `spd-lightning data regenerate`.

A head learns to draft what its target says, so its training conversations should be the target's own. Every response
is written anew, turn by turn; prompts stay. The target runs in this process, or behind an OpenAI-compatible server.
Stop it at any time and run the same command again: it goes on where it was.

    python data_prep/03_regenerate.py documentation:train --target tiny --max-new-tokens 64 --out build/docs/regenerated
    python data_prep/03_regenerate.py build/mix/train.jsonl --base-url http://localhost:8000/v1 --out build/mix/answers

`--help` explains every argument; manifest.json in the output folder says what was done.
"""

import sys

from spd_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["data", "regenerate", *sys.argv[1:]]))
