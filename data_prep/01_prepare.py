"""Step 1: read a corpus in any chat format; clean, deduplicate, decontaminate and split it.

    python data_prep/01_prepare.py HuggingFaceH4/ultrachat_200k,split=train_sft --out build/ultrachat

Writes train.jsonl, heldout.jsonl and manifest.json into --out. The same as `spd-lightning data prepare`.
"""

import sys

from spd_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["data", "prepare", *sys.argv[1:]]))
