"""The parser behind fit and validate: one documented field = one flag = one line of the YAML.

LightningCLI without its subcommands (each parser then has the recipe's keys at its root, so `${model.target}` means
what it says) and in the parser mode that resolves interpolations after everything is merged, command line included.
jsonargparse's errors list every type that did not match; here they become one line with the key, what was expected and
the closest key there is.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from spd_lightning.commands.fit import SECTIONS, set_in
from spd_lightning.commands.parsing import closest
from spd_lightning.errors import InputError
from spd_lightning.training.strategies import check_name as check_strategy_name
from spd_lightning.training.strategies import register as register_strategies

Classes = tuple[type, type, type, type, type, type]
_REDUCED = "It is recommended to use .self.log"  # counts are reduced across ranks before they are logged


class SpdCLI(LightningCLI):
    """A parsed recipe and the objects it describes.

    Attributes:
        config: the configuration with every interpolation resolved; `parser.dump(config)` is YAML that repeats it.
        model, datamodule, trainer: the objects. The callback of `decoding` is among the trainer's.
    """

    def __init__(self, prog: str, arguments: Sequence[str], classes: Classes, fields_only: bool = False) -> None:
        module, data, self.decoding_class, self.final_class, self.tracking_class, self.survival_class = classes
        register_strategies()
        self.prog, self.fields_only = prog, fields_only
        # Lightning advertises its cloud products whenever a trainer is built
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "💡 Tip" not in r.getMessage())
        super().__init__(
            module,
            data,
            run=False,
            args=list(arguments),
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # hyperparameters are what the classes were given, nothing else
            # the data module shards and orders its samples itself; Lightning's sampler would shuffle them again
            # and real decoding draws its own bar below Lightning's, which rich's live display would garble
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [TQDMProgressBar()]},
            parser_kwargs={
                "prog": prog,
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "allow_abbrev": False,
                "description": "Every field, with its type and default.",
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, required=True, help=SECTIONS["run_dir"])
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=SECTIONS["ckpt_path"])
        parser.add_lightning_class_args(self.decoding_class, "decoding")
        parser.add_class_arguments(self.final_class, "final", instantiate=False)
        parser.add_class_arguments(self.tracking_class, "tracking", instantiate=False)
        parser.add_class_arguments(self.survival_class, "survival", instantiate=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # LightningCLI's own method warns whenever `args` are given and sys.argv holds some too
        if self.fields_only:
            self.config = None
            return
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """LightningCLI would look for a subcommand here."""

    def _set_seed(self) -> None:
        if not self.fields_only:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        if self.fields_only:
            return
        assert self.config is not None
        if self.config["trainer.precision"] is None:
            # float32 master weights under bfloat16 arithmetic where a GPU does the work, plain float32 on a CPU
            self.config["trainer.precision"] = "bf16-mixed" if self._uses_gpu() else "32-true"
        if self.config["trainer.enable_progress_bar"] is False:
            self.trainer_defaults["callbacks"] = []
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        assert self.config is not None
        check_strategy_name(self.config["trainer.strategy"])
        try:
            return super().instantiate_trainer(**kwargs)
        except InputError:
            raise
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            # Lightning checks combinations (accelerator, strategy, precision, ...) when it builds the trainer
            raise InputError(f"trainer: {shorten(str(error))}") from error

    def _uses_gpu(self) -> bool:
        assert self.config is not None
        wanted = self.config["trainer.accelerator"]
        return wanted in ("gpu", "cuda") or (wanted == "auto" and torch.cuda.is_available())

    @property
    def known_keys(self) -> list[str]:
        """Every field that can be set, with dots."""
        found = [action.dest for action in self.parser._actions]
        sections = {dest.partition(".")[0] for dest in found if "." in dest}
        hidden = {"help", "print_config", "config"} | sections
        return [dest for dest in found if dest not in hidden and not dest.endswith(".help")]


def project_classes() -> Classes:
    """The classes whose fields are the sections model, data, decoding, final, tracking and survival."""
    from spd_lightning.training.data import SpdDataModule
    from spd_lightning.training.module import SpdModule
    from spd_lightning.training.run import FinalEvaluation
    from spd_lightning.training.survival import Survival
    from spd_lightning.training.tracking import Tracking
    from spd_lightning.training.validation import DecodingValidation

    return SpdModule, SpdDataModule, DecodingValidation, FinalEvaluation, Tracking, Survival


def run(command: str, arguments: Sequence[str], files: Sequence[Path]) -> int:
    """Parse, then hand over to `spd_lightning.training.run`."""
    _quiet()
    cli = parse(f"spd-lightning {command}", arguments, files, project_classes())
    from spd_lightning.training import run as runs
    from spd_lightning.training.survival import StoppedError
    from spd_lightning.training.tracking import in_sweep

    try:
        runs.fit(cli) if command == "fit" else runs.validate(cli)
    except StoppedError as stopped:
        rank_zero_only(print)(str(stopped), file=sys.stderr, flush=True)
        if in_sweep():  # its agent takes a status for a failure, and gives up after a few; a signal is none
            signal.signal(stopped.signal, signal.SIG_DFL)
            os.kill(os.getpid(), stopped.signal)
        return 128 + stopped.signal  # as a shell reports a signal
    except MisconfigurationException as error:
        raise InputError(f"trainer: {shorten(str(error))}") from error
    except SystemExit:
        if cli.trainer.interrupted:  # Lightning's way to end after Ctrl-C
            raise KeyboardInterrupt from None
        raise
    return 0


def _quiet() -> None:
    """Keep the output readable: no device inventory, no loading bars, no warnings about the frozen part."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # the target's modules are in eval mode on purpose, and the small data sets here need no worker processes
    for message in (
        "Found .* module.* in eval mode",
        ".*does not have many workers",
        ".*LeafSpec.*is deprecated",
        "You're resuming from a checkpoint that ended before the epoch ended",  # the sampler knows where it was
        "Checkpoint directory .* exists and is not empty",
        "`torch.distributed.*` is deprecated",  # by DeepSpeed, in every step
        "When saving the DeepSpeed Stage 3 checkpoint",  # which any strategy resumes, and export reads
        _REDUCED,
    ):
        warnings.filterwarnings("ignore", message)


def parse(prog: str, arguments: Sequence[str], files: Sequence[Path], classes: Classes) -> SpdCLI:
    """Build the objects that the arguments describe.

    Raises:
        InputError: for anything wrong with them, in one line.
    """
    try:
        return SpdCLI(prog, arguments, classes)
    except OmegaConfBaseException as error:
        raise InputError(_explain_interpolation(error, _known_keys(prog, classes))) from error
    except argparse.ArgumentError as error:
        line, key = explain(str(error), _known_keys(prog, classes))
        origin = set_in(key, arguments, files) if key else ""
        raise InputError(f"{line} (set by {origin})" if origin else line) from error


def fields_help(prog: str, section: str | None, classes: Classes | None = None) -> str:
    """jsonargparse's help: every field, or those of one section."""
    parser = SpdCLI(prog, [], classes or project_classes(), fields_only=True).parser
    if section is not None:
        keep = [
            group
            for group in parser._action_groups
            if any(a.dest == section or a.dest.startswith(f"{section}.") for a in group._group_actions)
        ]
        parser._action_groups = keep
        for group in keep:
            group._group_actions = [a for a in group._group_actions if a.dest.partition(".")[0] == section]
    parser.usage = f"{prog} --config RECIPE [--SECTION.FIELD VALUE ...]"
    return str(parser.format_help()).rstrip()


def _known_keys(prog: str, classes: Classes) -> list[str]:
    return SpdCLI(prog, [], classes, fields_only=True).known_keys


# -- jsonargparse's and OmegaConf's errors in one line ---------------------------------------------------------------


def explain(message: str, known: Sequence[str]) -> tuple[str, str | None]:
    """One line for an error of jsonargparse, and the key it is about (None if there is none)."""
    if found := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        key = f"{found[1]}.{found[2]}"
        return f"unknown field {key}.{_suggest(key, known)}", key
    if found := re.match(r"Option '([\w.]+)' is not accepted", message):
        return f"unknown field {found[1]}.{_suggest(found[1], known)}", found[1]
    if message.startswith("unrecognized arguments: "):
        return _unrecognized(message.split(": ", 1)[1].split()[0], known), None
    if found := re.match(r"the following arguments are required: (.*)", message):
        names = found[1].split(", ")
        ways = " and ".join(f"--{name}" for name in names)
        return f"not set: {', '.join(names)}. Give a recipe (--config tiny) or {ways}", None
    if found := re.match(r"argument --([\w.]+): expected one argument", message):
        return f"--{found[1]} needs a value", None
    if found := re.match(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL):
        return f"{found[1]}: {_expectation(found[2])}", found[1]
    return shorten(message), None


def _unrecognized(word: str, known: Sequence[str]) -> str:
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        hint = f" Write --{word}" if flag in known else " Fields are written --SECTION.FIELD VALUE"
        return f"unexpected argument {word!r}.{hint}"
    return f"unknown field {flag.lstrip('-')}.{_suggest(flag.lstrip('-'), known, prefix='--')}"


def _suggest(key: str, known: Sequence[str], prefix: str = "") -> str:
    """The closest key: within the same section first, then the same name elsewhere."""
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if section and k.startswith(f"{section}.")}
    elsewhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    match = closest(name, siblings)
    best = siblings[match] if match else elsewhere.get(name) or closest(key, known)
    return f" Did you mean {prefix}{best}?" if best else f" See --help-fields {section}".rstrip()


def _expectation(detail: str) -> str:
    """What was expected and what was found, from jsonargparse's list of types that did not match."""
    nested = re.findall(r"Problem with given class_path '([^']*)':\s*([^\n]*)", detail)
    if nested:
        return f"{nested[0][0]}: {shorten(nested[0][1])}"
    expected = dict.fromkeys(
        _type_name(kind) for kind in re.findall(r"Expected an? (.*?)(?:\. Got value|\n|$)", detail)
    )
    value = re.search(r"(?:Got value|Given value): (.*)", detail)
    if not expected or not value:
        return shorten(detail)
    # null is what an optional field also takes: worth saying last
    names = sorted(expected, key=lambda name: name == "null")
    return f"expected {' or '.join(names)}, found {shorten(value[1], 80)}"


def _type_name(kind: str) -> str:
    kind = kind.strip().rstrip(".")
    if found := re.match(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {found[1]}"
    kind = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind)
    return {"NoneType": "null", "bool": "true/false", "dot import path string": "an import path"}.get(kind, kind)


def _explain_interpolation(error: OmegaConfBaseException, known: Sequence[str]) -> str:
    message, *details = str(error).splitlines()
    where = next((line.split(":", 1)[1].strip() for line in details if "full_key:" in line), "")
    if found := re.match(r"Interpolation key '([^']*)' not found", message):
        message = f"${{{found[1]}}} names no field.{_suggest(found[1], known)}"
    elif found := re.search(r"Environment variable '([^']*)' not found", message):
        message = f"the environment variable {found[1]} is not set"
    elif message.startswith("Recursive interpolation"):
        message = "its ${...} leads back to itself"
    else:
        message = f"cannot be interpolated: {shorten(message)}"
    return f"{where}: {message}" if where else message


def shorten(text: str, width: int = 300) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."
