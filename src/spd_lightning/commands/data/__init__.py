"""The command data: preview, prepare, regenerate, vocab; each one a module of its own."""

from __future__ import annotations

import re
from functools import partial
from importlib import import_module

from spd_lightning.commands.parsing import did_you_mean
from spd_lightning.errors import InputError

#: Step -> what it does, in the order in which they are used.
STEPS = {
    "prepare": "read, clean, split and decontaminate a corpus",
    "preview": "see what the target would learn from: tokens, mask, lengths",
    "regenerate": "let the target write the responses",
    "vocab": "count a draft vocabulary and report what it covers",
}
_FLAGS = (
    (r"data\.cleaning\.(\w+)", "--"),
    (r"data\.chat\.(template|arguments)", "--chat-"),
    (r"data\.(?:chat\.)?(date|turns|cache|max_length|tokenizer)\b", "--"),
)
_HELP = """\
spd-lightning data: from any chat corpus to training data that is right

Usage: spd-lightning data STEP [arguments]

{steps}

Each step reads what the one before wrote, or any other source, and can be stopped and started again.
`spd-lightning data STEP --help` explains a step.

Example
  spd-lightning data prepare documentation:train --out build/docs --limit 2000
  spd-lightning data preview build/docs/train.jsonl --tokenizer tiny
  spd-lightning data regenerate build/docs/train.jsonl --target tiny --out build/docs/regenerated
  spd-lightning data vocab build/docs/regenerated/train.jsonl --tokenizer tiny --size 2048 --out build/docs/vocab.json
  spd-lightning fit --config tiny --data.train build/docs/regenerated/train.jsonl \\
      --model.head.draft_vocabulary build/docs/vocab.json"""


def run(argv: list[str]) -> int:
    """`spd-lightning data STEP`."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        width = max(map(len, STEPS))
        print(_HELP.format(steps="\n".join(f"  {step:<{width}}  {what}" for step, what in STEPS.items())))
        return 0
    if name not in STEPS:
        raise InputError(
            f"unknown step {name!r} of spd-lightning data: expected one of {', '.join(STEPS)}."
            f"{did_you_mean(name, STEPS)}"
        )
    try:
        return int(import_module(f"spd_lightning.commands.data.{name}").run(rest) or 0)
    except InputError as error:
        raise InputError(in_flags(str(error))) from error


def in_flags(message: str) -> str:
    """A message with the flags of these commands in place of a recipe's fields, which `fit` would name."""
    for field, prefix in _FLAGS:
        message = re.sub(field, partial(_flag, prefix), message)
    return message


def _flag(prefix: str, field: re.Match[str]) -> str:
    return prefix + field[1].replace("_", "-")
