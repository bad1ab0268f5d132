"""A head as a folder: model.safetensors and a sealed config.json, and nothing in them that could run.

config.json holds the fields of `HeadConfig`, the identity of the target, size and SHA-256 of the weights, and a *seal*:
the SHA-256 of everything else in it. So each change of either file, by an accident on a disk or an editor, is found
before a head is made of it. The seal is no signature: whoever wants to deceive can compute it anew, and every field is
checked against the tensors that are really there before anything of their size is allocated.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from spd_lightning.errors import InputError, first_line
from spd_lightning.files import write_whole
from spd_lightning.head.config import HeadConfig
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.identity import TargetIdentity

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
#: What `export` adds and loading does not need: where the head comes from, and the digests of all files.
PROVENANCE_FILE = "provenance.json"
FORMAT = "spd-head/2"
#: What heads are stored in; other types of numbers in a file are no weights.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST_CONFIG = 64 * 2**20  # bytes; the ids of a vocabulary of a million fit


def save_head(head: SpeculationHead, directory: Path) -> None:
    """Write model.safetensors and config.json, each under a temporary name first; weights before config, so that a
    folder with a config is complete.

    Raises:
        InputError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    temporary = directory / f".{WEIGHTS_FILE}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(weights, temporary, metadata={"format": "pt"})
        content = config_fields(head, temporary)
        temporary.replace(directory / WEIGHTS_FILE)
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    write_whole(directory / CONFIG_FILE, _one_field_per_line(content))


def config_fields(head: SpeculationHead, weights: Path) -> dict[str, Any]:
    """The content of config.json for a head whose weights are in a file."""
    content = {
        "format": FORMAT,
        **asdict(head.config),
        "target": asdict(head.origin),
        "weights": {"bytes": weights.stat().st_size, "sha256": file_digest(weights)},
    }
    return content | {"seal": _seal(content)}


def read_head(folder: Path) -> SpeculationHead:
    """The head of a folder, in the dtype it is stored in.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    content = read_config(folder / CONFIG_FILE)
    path, expected = folder / WEIGHTS_FILE, content["weights"]
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise InputError(f"{path} is truncated or of another head: expected {expected['bytes']} bytes, not {size}.")
        found = file_digest(path)
        if found != expected["sha256"]:
            raise InputError(
                f"{path} is damaged or of another head: its SHA-256 is {found[:16]}..., config.json says "
                f"{expected['sha256'][:16]}... Copy or export the head again."
            )
        # copies: a process must survive that a file which it has mapped is overwritten
        weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}): the file is missing or damaged.") from error
    config, origin = parse_config(content, folder / CONFIG_FILE)
    head = head_from(config, weights, path)
    head.origin = origin
    return head


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a sealed config.json, its outer form checked.

    Raises:
        InputError: no JSON object, another format, a broken seal.
    """
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise InputError(f"{path} is larger than {_LARGEST_CONFIG >> 20} MiB: that is no head's config.")
        content = json.loads(path.read_bytes(), object_pairs_hook=_distinct, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable head config: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f'{path} does not describe a speculation head: expected "format": "{FORMAT}", found {str(found)[:40]!r}. '
            "A head of an earlier version is exported again from its checkpoint."
        )
    seal = content.pop("seal", None)
    try:
        expected = _seal(content)
    except (ValueError, RecursionError) as error:  # 1e999 is JSON, and no number
        raise InputError(f"{path} is not a readable head config: {first_line(error)}") from error
    if seal != expected:
        raise InputError(
            f"{path} was changed after it was written: its seal is {str(seal)[:16]!r}, its content gives "
            f"{expected[:16]!r}. Copy or export the head again."
        )
    weights = content.get("weights")
    if not isinstance(weights, dict) or type(weights.get("bytes")) is not int or type(weights.get("sha256")) is not str:
        raise InputError(f"{path}: weights={str(weights)[:80]}: expected an object with bytes and sha256.")
    if "target" not in content:
        raise InputError(f"{path} does not say which target the head is for: expected the field target.")
    return content


def parse_config(content: Mapping[str, Any], where: Path) -> tuple[HeadConfig, TargetIdentity]:
    """The head and its target among the fields of a config.json; InputError for unknown or impossible ones."""
    names = {field.name for field in fields(HeadConfig)}
    if unknown := sorted(set(content) - names - {"format", "target", "weights"}):
        raise InputError(f"{where}: unknown fields {str(unknown)[:200]}; expected {sorted(names)}.")
    try:
        config = HeadConfig(**{name: value for name, value in content.items() if name in names})
        return config, TargetIdentity.from_fields(content["target"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {first_line(error)}") from error


def head_from(config: HeadConfig, weights: Mapping[str, Tensor], where: Path) -> SpeculationHead:
    """A head made of these tensors (not of copies), every one present, of the right shape and a float.

    Everything is compared on the meta device, so a hostile config cannot allocate more than the file holds. Weights
    of several dtypes become float32.

    Raises:
        InputError: naming the file and the first tensor that is wrong.
    """
    from huggingface_hub.errors import StrictDataclassError

    if max(config.num_layers, len(config.anchors)) > len(weights):
        raise InputError(
            f"{where} does not hold the head that its config describes: {config.num_layers} layers and "
            f"{len(config.anchors)} anchors need more than its {len(weights)} tensors."
        )
    try:
        with torch.device("meta"):
            head = SpeculationHead(config)
    except (KeyError, RuntimeError, TypeError, ValueError, OverflowError, StrictDataclassError) as error:
        # an activation or RoPE that nobody knows, sizes that no tensor can have
        raise InputError(f"The config of {where} describes no head: {type(error).__name__}: {error}") from error
    expected = {name: tensor.shape for name, tensor in head.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = [
        f"{name}: expected {_shape(expected.get(name))}, found {_shape(found.get(name))}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    wrong += [
        f"{name}: expected floats, found {tensor.dtype}"
        for name, tensor in sorted(weights.items())
        if tensor.dtype not in FLOATS
    ]
    if wrong:
        raise InputError(
            f"{where} does not hold the head that its config describes ({len(wrong)} tensors): {wrong[0]}."
        )
    for name, tensor in weights.items():  # a view of a small storage can have any shape
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{where} does not hold the head that its config describes: {name} has too few numbers.")
    dtypes = {tensor.dtype for tensor in weights.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    head.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    head.make_tables()
    return head


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _one_field_per_line(content: Mapping[str, Any]) -> str:
    """JSON that people can read although a draft vocabulary has a hundred thousand ids."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a field appears twice")
    return made


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _shape(shape: torch.Size | None) -> str:
    return "no such tensor" if shape is None else str(list(shape))
