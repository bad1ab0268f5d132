"""The commands fit and validate: their help, the names of recipes, and whatever can be refused before Lightning loads.

Importing Lightning takes seconds, so everything here works on strings and YAML alone; the parser that knows all fields
is `spd_lightning.training.cli`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from spd_lightning.commands.parsing import closest, did_you_mean
from spd_lightning.errors import InputError
from spd_lightning.files import recipe_folder

#: Top-level keys of a recipe, with what they hold.
SECTIONS = {
    "seed_everything": "seed of everything random (default 0)",
    "run_dir": "folder of this run; a run never overwrites another, it takes run_dir-2, run_dir-3, ...",
    "ckpt_path": "fit: resume from it, last = go on in run_dir where it stands; validate: measure it",
    "model": "the frozen target, its stages, the head, the optimisation",
    "data": "conversations to train and validate on, batches",
    "decoding": "real decoding at every validation: acceptance p and speedup S, losslessness, drift",
    "final": "real decoding at the end, on prompts that no validation has seen",
    "tracking": "where the run can be followed: W&B, TensorBoard, CSV; sample generations",
    "survival": "when the state is saved, what is skipped, how long a silent rank is waited for",
    "trainer": "Lightning's Trainer: steps, devices, precision, strategy, loggers",
}
_SWITCHES = ("config", "print_config", "help", "help-fields")

_HELP = """\
{prog}: {summary}

Usage: {prog} --config RECIPE [--config OVERLAY ...] [--SECTION.FIELD VALUE ...]

A recipe is one flat YAML file with these keys:
{sections}

Put together from left to right, so that later values win:
  --config tiny                    a recipe by name, or any YAML file by its path
  --config tiny --config my.yaml   an overlay: my.yaml holds only what differs
  --model.learning_rate 3e-4       one field; --model.learning_rate=3e-4 is the same
Interpolations see the result of all of it: with `tokenizer: ${{model.target}}` under `data:` the tokenizer follows
--model.target. Names in ${{...}} start at the top level; ${{oc.env:NAME}} is an environment variable.

Recipes
{recipes}

Examples
{examples}

More
  --help-fields [SECTION]          every field with its type and default, of one section or of all (takes seconds)
  --print_config                   print the complete, resolved configuration and stop
"""
_SUMMARIES = {
    "fit": "train a speculation head for a frozen target, with real decoding at every validation",
    "validate": "teacher-forced loss and acceptance in real decoding, without training",
}
_EXAMPLES = {
    "fit": """\
  spd-lightning fit --config tiny
  spd-lightning fit --config tiny --run_dir runs/lr --model.learning_rate 5e-4 --trainer.max_steps 100
  spd-lightning fit --config tiny --ckpt_path last                       resume, or begin, in run_dir
  spd-lightning fit --config llama31 --trainer.devices 8 --trainer.strategy deepspeed_stage_2
  torchrun --nnodes 4 --nproc_per_node 8 ... -m spd_lightning fit --config llama31_70b      docs/scale.md""",
    "validate": """\
  spd-lightning validate --config tiny --ckpt_path runs/tiny/checkpoints/last.ckpt
  spd-lightning validate --config tiny --ckpt_path runs/tiny/checkpoints/last.ckpt --decoding.prompts 64""",
}


def fit(argv: list[str]) -> int:
    """`spd-lightning fit`."""
    return _run("fit", argv)


def validate(argv: list[str]) -> int:
    """`spd-lightning validate`."""
    return _run("validate", argv)


def _run(command: str, argv: list[str]) -> int:
    prog = f"spd-lightning {command}"
    if "-h" in argv or "--help" in argv:
        print(help_text(command))
        return 0
    if "--help-fields" in argv:
        return _print_fields(prog, argv)
    if not argv:
        raise InputError(f"{prog} needs a configuration, for example --config tiny. See {prog} --help")
    # jsonargparse prints what it has read so far: interpolations are resolved only if the switch comes last
    switches = [word for word in argv if word.startswith("--print_config")]
    arguments = resolve_config_names([word for word in argv if word not in switches]) + switches
    files = config_files(arguments)
    check_files(files)
    check_arguments(arguments, files)
    _require_training_extra(prog)
    from spd_lightning.training import cli

    return cli.run(command, arguments, files)


def help_text(command: str) -> str:
    """The hand-written help: how a configuration is put together, not every field of it."""
    sections = "\n".join(f"  {name:<16} {what}" for name, what in SECTIONS.items())
    recipes = recipe_files()
    width = max(map(len, recipes), default=0)
    listed = [f"  {name:<{width}}  {_header(path)}" for name, path in recipes.items()] or ["  (none found)"]
    return _HELP.format(
        prog=f"spd-lightning {command}",
        summary=_SUMMARIES[command],
        sections=sections,
        recipes="\n".join(listed),
        examples=_EXAMPLES[command],
    ).rstrip()


def _print_fields(prog: str, argv: list[str]) -> int:
    after = argv[argv.index("--help-fields") + 1 :]
    section = after[0] if after and not after[0].startswith("-") else None
    if section is not None and section not in SECTIONS:
        raise InputError(
            f"--help-fields {section}: expected one of {', '.join(SECTIONS)}.{did_you_mean(section, SECTIONS)}"
        )
    _require_training_extra(prog)
    from spd_lightning.training import cli

    print(cli.fields_help(prog, section))
    return 0


def _require_training_extra(prog: str) -> None:
    missing = [name for name in ("lightning", "omegaconf", "docstring_parser") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{prog} needs the training extra ({', '.join(missing)} not installed): pip install 'spd_lightning[train]'"
        )


# -- recipes by name -------------------------------------------------------------------------------------------------


def recipe_files() -> dict[str, Path]:
    """Recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def resolve_config_names(argv: Sequence[str]) -> list[str]:
    """The arguments with every `--config NAME` replaced by the recipe's path; an existing file wins over a name."""
    resolved, previous = [], ""
    for word in argv:
        if previous in ("--config", "-c"):
            word = _config_path(word)
        elif word.startswith("--config="):
            word = f"--config={_config_path(word.removeprefix('--config='))}"
        resolved.append(word)
        previous = word
    if previous in ("--config", "-c"):
        raise InputError(f"{previous} needs a value: the name of a recipe or a YAML file.")
    return resolved


def _config_path(name: str) -> str:
    if Path(name).is_file():
        return name
    recipes = recipe_files()
    if name.removesuffix(".yaml") in recipes:
        return str(recipes[name.removesuffix(".yaml")])
    raise InputError(
        f"--config {name}: no such file, and no recipe of that name. Recipes: {', '.join(recipes) or 'none'}."
        f"{did_you_mean(Path(name).stem, recipes)}"
    )


def _header(path: Path) -> str:
    """First comment line of a recipe."""
    first = next(iter(path.read_text(encoding="utf-8").splitlines()), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


# -- checks that need no parser --------------------------------------------------------------------------------------


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The files that --config names, in order."""
    pairs = zip(["", *arguments], arguments, strict=False)
    separate = {index: word for index, (before, word) in enumerate(pairs) if before in ("--config", "-c")}
    joined = {i: w.removeprefix("--config=") for i, w in enumerate(arguments) if w.startswith("--config=")}
    return [Path(word) for _, word in sorted({**separate, **joined}.items())]


def check_files(files: Sequence[Path]) -> None:
    """Refuse files that are no YAML mapping or hold unknown top-level keys."""
    for path in files:
        content = read_yaml(path)
        for key in content:
            if key not in SECTIONS:
                raise InputError(
                    f"{path}: unknown key {key!r}, expected {', '.join(SECTIONS)}.{did_you_mean(str(key), SECTIONS)}"
                )


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a dict (interpolations unresolved)."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        found = "nothing (comments alone?)" if content is None else f"{content!r:.60}"
        raise InputError(f"{path}: expected a mapping with the keys {', '.join(SECTIONS)}, found {found}.")
    return content


def check_arguments(arguments: Sequence[str], files: Sequence[Path]) -> None:
    """Refuse arguments whose section does not exist, and a checkpoint that is not there."""
    for word in arguments:
        if word.startswith("--"):
            flag = word[2:].partition("=")[0]
            section = flag.partition(".")[0].removesuffix("+")
            if section not in SECTIONS and section not in _SWITCHES:
                raise InputError(f"unknown argument --{flag}.{_suggest(flag, files)}")
    checkpoint = last_value("ckpt_path", arguments, files)
    if not isinstance(checkpoint, str) or "${" in checkpoint or checkpoint == "last":
        return
    if not Path(checkpoint).exists():
        raise InputError(f"ckpt_path={checkpoint!r} does not exist: expected last or a checkpoint of an earlier run.")


def _suggest(flag: str, files: Sequence[Path]) -> str:
    """A correction of a flag: from the sections, else from the fields that the given files name."""
    section, dot, rest = flag.partition(".")
    match = closest(section, SECTIONS)
    if match:
        return f" Did you mean --{match}{dot}{rest}?"
    fields = [field for path in files for field in dotted_keys(read_yaml(path)) if field.endswith(f".{section}")]
    if fields:
        return f" Did you mean --{fields[0]}?"
    return f" Fields are written --SECTION.FIELD; the sections are {', '.join(SECTIONS)}."


def last_value(key: str, arguments: Sequence[str], files: Sequence[Path]) -> Any:
    """What a top-level key is set to in the end: by the arguments, else by the last file that has it."""
    value = None
    for path in files:
        value = read_yaml(path).get(key, value)
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before == f"--{key}":
            value = word
        elif word.startswith(f"--{key}="):
            value = word.partition("=")[2]
    return None if value in ("null", "") else value


def dotted_keys(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """model.target, model.num_stages, ...: every key of nested dicts."""
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")


def set_in(key: str, arguments: Sequence[str], files: Sequence[Path]) -> str:
    """Where a field got its value: "the command line", a file, or "" where nobody set it."""
    if any(word == f"--{key}" or word.startswith((f"--{key}=", f"--{key}.")) for word in arguments):
        return "the command line"
    for path in reversed(files):
        if key in dotted_keys(read_yaml(path)):
            return str(path)
    return ""
