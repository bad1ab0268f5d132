"""Step 4: count a draft vocabulary on the responses that the target wrote, and see what it costs and saves.

    python data_prep/04_vocabulary.py build/regenerated/train.jsonl --target Qwen/Qwen3-8B --coverage 0.99 \
        --out build/vocabulary.json

The table compares sizes: a small vocabulary makes the head's lm_head fast, but each token outside it is a certain
rejection. Needed only where the head is not hidden behind a stage with all ids; then give the file to a run:

    spd-lightning fit --config qwen3_8b --model.head.draft_vocabulary build/vocabulary.json

The same as `spd-lightning data vocab`, whose --help explains every argument.
"""

import sys

from spd_lightning.cli import main

raise SystemExit(main(["data", "vocab", *sys.argv[1:]]))
