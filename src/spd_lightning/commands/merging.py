"""The configuration that recipes, overlays and --SECTION.FIELD words make together, read without Lightning.

The parser that knows all fields (`spd_lightning.training.cli`) imports Lightning and would refuse GPUs that this
machine does not have. So the command plan merges files and words itself, and looks at a few fields only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spd_lightning.commands.fit import read_yaml
from spd_lightning.commands.parsing import closest, did_you_mean
from spd_lightning.errors import InputError

#: The fields that memory depends on, with fit's defaults.
FIELDS: dict[str, Any] = {
    "model.target": "tiny",
    "model.loading.revision": None,
    "model.loading.dtype": "auto",
    "model.loading.attention": "auto",
    "model.loading.device_map": None,
    "model.loading.quantization": "none",
    "model.loading.offline": False,
    "model.loading.trust_remote_code": False,
    "model.num_stages": None,
    "model.stage_layers": None,
    "model.head.kind": "auto",
    "model.head.num_layers": 2,
    "model.head.anchors": None,
    "model.head.draft_vocabulary": None,
    "model.head.intermediate_size": None,
    "model.restart_rate": 0.15,
    "model.restart_draws": 1,
    "model.loss_chunk": 1024,
    "model.activation_checkpointing": False,
    "data.max_length": 512,
    "data.batch_size": 16,
    "data.global_batch_size": None,
    "data.packing": "auto",
    "trainer.accelerator": "auto",
    "trainer.devices": "auto",
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
    "trainer.precision": None,
    "trainer.accumulate_grad_batches": 1,
}


def merged(arguments: Sequence[str], files: Sequence[Path]) -> dict[str, Any]:
    """The configuration that files and --SECTION.FIELD words make together, later ones winning."""
    content: dict[str, Any] = {}
    for path in files:
        content = _update(content, read_yaml(path))
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            if word != "-c":
                raise InputError(f"unexpected argument {word!r}. Fields are written --SECTION.FIELD VALUE.")
            next(words, None)
            continue
        flag, joined, value = word[2:].partition("=")
        if not joined:
            found = next(words, None)
            if found is None:
                raise InputError(f"--{flag} needs a value.")
            value = found
        if flag == "config" or flag.endswith("+"):  # appended to a list: no list here can be
            continue
        content = _update(content, _nested(flag.split("."), _value(value)))
    _refuse_near_misses(content)
    return content


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    return {path[0]: _nested(path[1:], value) if len(path) > 1 else value}


def _update(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts merged, `other` winning."""
    result = dict(one)
    for key, value in other.items():
        before = result.get(key)
        result[key] = _update(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def _refuse_near_misses(content: Mapping[str, Any], prefix: str = "") -> None:
    """A field that is nearly one of those the plan depends on is a misspelt one."""
    groups = {key.rpartition(".")[0] for key in FIELDS}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in FIELDS:
            continue
        if isinstance(value, dict) and (name in groups or any(group.startswith(f"{name}.") for group in groups)):
            _refuse_near_misses(value, f"{name}.")
        elif prefix:
            siblings = [field for field in FIELDS if field.rpartition(".")[0] == prefix[:-1]]
            near = closest(name, siblings)
            if near is not None and _differ_by_few_letters(name, near):
                raise InputError(f"unknown field {name}. Did you mean --{near}?")


def _differ_by_few_letters(one: str, other: str) -> bool:
    from difflib import SequenceMatcher

    return SequenceMatcher(None, one.rpartition(".")[2], other.rpartition(".")[2]).ratio() > 0.87


@dataclass(frozen=True)
class Config:
    """A merged configuration; fields that nobody set have fit's defaults."""

    content: Mapping[str, Any]

    def __getitem__(self, field: str) -> Any:
        value = self._found(field, FIELDS.get(field))
        seen = {field}
        while isinstance(value, str) and (link := re.fullmatch(r"\$\{([\w.:]+)\}", value)):
            if link[1] in seen:
                raise InputError(f"{field}: {value} refers to itself.")
            seen.add(link[1])
            kind, _, name = link[1].partition(":")
            value = _value(os.environ.get(name, "null")) if kind == "oc.env" else self._found(link[1], None)
        return value

    def _found(self, field: str, default: Any) -> Any:
        value: Any = self.content
        for key in field.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    def integer(self, field: str) -> int:
        """A field that must be at least 1."""
        value = self[field]
        if type(value) is not int or value < 1:
            raise InputError(f"{field}={value!r}: expected an integer of at least 1.")
        return value

    def truth(self, field: str) -> bool:
        """A field that must be true or false."""
        value = self[field]
        if not isinstance(value, bool):
            raise InputError(f"{field}={value!r}: expected true or false.")
        return value

    def choice(self, field: str, known: Sequence[str]) -> str:
        """A field that must be one of some words."""
        value = str(self[field])
        if value not in known:
            raise InputError(f"{field}={value!r}: expected {', '.join(known)}.{did_you_mean(value, known)}")
        return value
