"""The step prepare: any corpus as clean JSON lines, split, without duplicates and benchmark prompts."""

from __future__ import annotations

from spd_lightning.commands.data import common
from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError

_ABOUT = """\
Read a corpus in any chat format and write train.jsonl, heldout.jsonl and manifest.json: one {"id", "messages"} per
line, without duplicates, without benchmark prompts. What cannot be used is counted, with its place. The held-out side
is chosen by a digest of each conversation's first question: it stays the same when responses are regenerated."""

_EXAMPLES = f"""\
{common.SOURCES}

examples
  spd-lightning data prepare documentation:train --out build/docs
  spd-lightning data prepare gsm8k/train.jsonl --decontaminate gsm8k/test.jsonl --out build/gsm8k
  spd-lightning data prepare HuggingFaceH4/ultrachat_200k,split=train_sft HuggingFaceTB/smoltalk,config=all \\
      --out build/mix --heldout-share 0.01 --workers 8
  spd-lightning data prepare mlabonne/open-perfectblend --streaming --limit 100000 --out build/blend"""


def parser() -> CommandParser:
    """The arguments of prepare."""
    made = CommandParser("spd-lightning data prepare", _ABOUT, _EXAMPLES)
    common.add_sources(made)
    made.add_argument("--out", required=True, metavar="DIR", help="receives the files; never overwritten")
    made.add_argument(
        "--heldout-share", type=float, default=0.02, metavar="X", help="share that goes to heldout.jsonl (0.02)"
    )
    made.add_argument("--limit", type=int, metavar="N", help="read N rows only")
    made.add_argument("--streaming", action="store_true", help="read hub sets without downloading them first")
    made.add_argument("--workers", type=int, default=0, metavar="N", help="processes that clean (0: this one)")
    common.add_cleaning(made)
    return made


def run(argv: list[str]) -> int:
    """`spd-lightning data prepare`."""
    options = parser().parse_args(argv)
    if options.workers < 0:
        raise InputError(f"--workers {options.workers}: expected at least 0.")
    from spd_lightning.data.prepare import FILES, Preparation, prepare
    from spd_lightning.data.progress import progress_bar
    from spd_lightning.data.tally import Tally

    preparation = Preparation(
        common.sources(options), common.cleaning(options), options.heldout_share, options.limit, options.streaming
    )
    folder = common.output_folder(options.out)
    with progress_bar("preparing") as progress:
        manifest, made = prepare(preparation, folder, options.workers, progress)
    print("\n".join(Tally.from_dict(manifest["tally"]).lines()))
    for side, count in manifest["conversations"].items():
        if count:
            print(f"{folder / FILES[side]}: {count} conversations")
    print(f"{manifest['seconds']} s" if made else "made before with the same arguments, nothing to do")
    print(f"Try next:\n  spd-lightning data preview {folder / FILES['train']} --tokenizer TARGET")
    return 0
