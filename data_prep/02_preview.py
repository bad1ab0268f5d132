"""Step 2: look before training. Samples as the target would learn from them, and figures of the first 1000 rows.

    python data_prep/02_preview.py build/chats/train.jsonl --tokenizer Qwen/Qwen3-8B --html build/preview.html

What to look for: is every answer labelled to its end-of-turn token, and nothing else? Are control tokens special, not
spelled out? Does --max-length cut much? Which rows are bad, and why? Change nothing before these are right.

The same as `spd-lightning data preview`, whose --help explains every argument.
"""

import sys

from spd_lightning.cli import main

raise SystemExit(main(["data", "preview", *sys.argv[1:]]))
