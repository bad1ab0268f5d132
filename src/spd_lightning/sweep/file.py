"""A W&B sweep file, read as W&B's agent reads it, so that one file serves `wandb sweep` and `sweep --local`.

Only what both sides understand alike is accepted; anything else is refused by its name.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spd_lightning.errors import InputError

_KEYS = {
    "program", "command", "method", "metric", "parameters", "early_terminate", "run_cap", "name", "description",
    "project", "entity",
}  # fmt: skip
_EARLY = {"type", "min_iter", "eta"}
_PARAMETER = {"value", "values", "min", "max", "distribution", "q"}
_DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
_METHODS = ("bayes", "random", "grid")


@dataclass(frozen=True)
class Parameter:
    """What a field may be.

    Attributes:
        values: one of them; a single one is a constant.
        low, high: or a number between them, both included.
        log: drawn by its logarithm.
        step: multiples of it only; 1 for integers.
    """

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    integer: bool = False


@dataclass(frozen=True)
class SweepFile:
    """A sweep.

    Attributes:
        command: words with ${macros}, as W&B's agent renders them.
        metric, maximise: what is optimised.
        parameters: by field.
        min_iter, eta: of hyperband: a run goes on past its min_iter eta^k-th value only among the best 1 / eta; None:
            every run is finished.
        run_cap: trials in all; None: no end.
    """

    path: Path
    name: str
    program: str
    command: tuple[str, ...]
    method: str
    metric: str
    maximise: bool
    parameters: Mapping[str, Parameter]
    min_iter: int | None = None
    eta: int = 3
    run_cap: int | None = None

    def render(self, values: Mapping[str, Any]) -> list[str]:
        """The command line of one trial, word by word the one that W&B's agent makes."""
        words: list[str] = []
        for word in self.command:
            words += _rendered(word, self.program, values)
        return words


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        InputError: naming what is wrong in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file (UTF-8): {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a sweep with method, metric and parameters.")
    if unknown := set(content) - _KEYS:
        raise InputError(f"{path}: {sorted(unknown)[0]}: not a key of a sweep that is known here: {sorted(_KEYS)}.")
    method = _choice(path, "method", content.get("method"), _METHODS)
    metric = content.get("metric")
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise InputError(f"{path}: metric: expected name and goal, found {metric!r}.")
    goal = _choice(path, "metric.goal", metric.get("goal", "minimize"), ("maximize", "minimize"))
    command = content.get("command", _DEFAULT_COMMAND)
    if not isinstance(command, (list, tuple)) or not command or not all(isinstance(word, str) for word in command):
        raise InputError(f"{path}: command: expected a list of words, found {command!r}.")
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise InputError(f"{path}: parameters: expected fields and their values, found {parameters!r}.")
    early = content.get("early_terminate")
    if early is not None and (not isinstance(early, dict) or early.get("type") != "hyperband"):
        raise InputError(f"{path}: early_terminate: expected type hyperband, found {early!r}.")
    if early is not None:
        _only(f"{path}: early_terminate", early, _EARLY)
    return SweepFile(
        path=path,
        name=str(content.get("name") or path.stem),
        program=str(content.get("program", "spd_lightning")),
        command=tuple(command),
        method=method,
        metric=metric["name"],
        maximise=goal == "maximize",
        parameters={str(key): _parameter(path, str(key), value) for key, value in parameters.items()},
        min_iter=None if early is None else _whole(path, "early_terminate.min_iter", early.get("min_iter", 1)),
        eta=3 if early is None else _whole(path, "early_terminate.eta", early.get("eta", 3), least=2),
        run_cap=None if content.get("run_cap") is None else _whole(path, "run_cap", content["run_cap"]),
    )


def _parameter(path: Path, name: str, content: Any) -> Parameter:
    where = f"{path}: parameters.{name}"
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected value, values or min and max, found {content!r}.")
    if "parameters" in content:
        raise InputError(f"{where}: nested parameters reach a command as one dict: write the field with dots instead.")
    _only(where, content, _PARAMETER)
    if "value" in content:
        return Parameter(values=(content["value"],))
    kind = content.get("distribution")
    if "values" in content and kind in (None, "categorical"):
        if not isinstance(content["values"], list) or not content["values"]:
            raise InputError(f"{where}.values: expected a list, found {content['values']!r}.")
        return Parameter(values=tuple(content["values"]))
    low, high = content.get("min"), content.get("max")
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in (low, high)) or not low <= high:  # type: ignore[operator]
        raise InputError(f"{where}: expected value, values, or numbers min and max, found {content!r}.")
    assert isinstance(low, (int, float)) and isinstance(high, (int, float))
    whole = isinstance(low, int) and isinstance(high, int)
    kind = kind or ("int_uniform" if whole else "uniform")
    if kind not in ("int_uniform", "uniform", "q_uniform", "log_uniform_values"):
        raise InputError(
            f"{where}.distribution={kind!r}: expected categorical, int_uniform, uniform, q_uniform or "
            "log_uniform_values."
        )
    if kind == "log_uniform_values" and low <= 0:
        raise InputError(f"{where}.min={low}: a logarithm needs more than 0.")
    step = content.get("q", 1.0)
    if isinstance(step, bool) or not isinstance(step, (int, float)) or step <= 0:
        raise InputError(f"{where}.q={step!r}: expected a number above 0.")
    if kind == "q_uniform" and abs(low / step - round(low / step)) > 1e-9:  # there: multiples of q; here: min + k q
        raise InputError(f"{where}.min={low}: expected a multiple of q={step}.")
    return Parameter(
        low=low,
        high=high,
        log=kind == "log_uniform_values",
        step=1 if kind == "int_uniform" else step if kind == "q_uniform" else None,
        integer=kind == "int_uniform",
    )


def _only(where: str, content: Mapping[str, Any], known: set[str]) -> None:
    if unknown := set(content) - known:
        raise InputError(f"{where}: {sorted(map(str, unknown))[0]} is not known here: {sorted(known)}.")


def _choice(path: Path, name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise InputError(f"{path}: {name}={value!r}: expected {', '.join(known)}.")
    return str(value)


def _whole(path: Path, name: str, value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise InputError(f"{path}: {name}={value!r}: expected an integer of at least {least}.")
    return value


def _rendered(word: str, program: str, values: Mapping[str, Any]) -> list[str]:
    """What W&B's agent makes of one word of a command (wandb.wandb_agent.Agent._command_run)."""
    flags = [f"--{name}={value}" for name, value in values.items()]
    whole = {
        "${env}": [] if sys.platform == "win32" else ["/usr/bin/env"],
        "${interpreter}": ["python"],
        "${program}": [program],
        "${args}": flags,
        "${args_no_hyphens}": [flag.removeprefix("--") for flag in flags],
        "${args_no_boolean_flags}": [
            flag if not isinstance(value, bool) else f"--{name}"
            for (name, value), flag in zip(values.items(), flags, strict=True)
            if value is not False
        ],
        "${args_json}": [json.dumps(dict(values))],
    }
    if word in whole:
        return whole[word]
    if word.startswith("${envvar:") and word.endswith("}"):
        return [os.environ.get(word.removeprefix("${envvar:").removesuffix("}"), "")]
    if word.startswith("${"):
        raise InputError(f"command: {word} is no macro that is known here: {', '.join(whole)}, ${{envvar:NAME}}.")
    return [word]
