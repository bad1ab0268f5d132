"""HardwareProfile: how long the parts of a cycle take for one target on one kind of machine, in milliseconds.

`spd-lightning profile` measures one, or computes one from a memory bandwidth (`roofline`). A file of it is JSON, and is
what `plan --hardware` and `decoding.hardware` read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from spd_lightning.errors import InputError
from spd_lightning.files import recipe_folder, write_whole

FORMAT = "spd-hardware/1"


@dataclass(frozen=True)
class HeadCosts:
    """Milliseconds of one draft, linear in what a head's size depends on (docs/speed.md)."""

    fixed: float
    """Whatever the size: collecting rows, final norm, choosing the token."""
    layer: float
    """Each decoder layer."""
    aggregation: float
    """Each H x H of the W_k; m anchors have m (m + 1) / 2 of them, because W_k is (k + 1) H -> H."""
    thousand_ids: float
    """Each thousand ids of the draft vocabulary."""

    def of(self, num_layers: int, anchors: int, draft_ids: int) -> float:
        """Milliseconds of a draft by such a head."""
        squares = anchors * (anchors + 1) // 2
        return self.fixed + num_layers * self.layer + squares * self.aggregation + draft_ids / 1e3 * self.thousand_ids


@dataclass(frozen=True)
class LinkCosts:
    """Milliseconds of handing over between two ranks."""

    send: float = 0.0
    """A rank is busy per cycle with what it hands over and takes."""
    latency: float = 0.0
    """From there until the other rank has it."""
    tell: float = 0.0
    """The last rank is busy with telling one other rank a verdict."""


@dataclass(frozen=True)
class HardwareProfile:
    """Costs of a target's parts for one token, as a stage's rank pays them while its neighbours work.

    Attributes:
        target: id or folder of the target.
        device: processor or GPU of one rank.
        dtype: of target and head.
        plain: milliseconds per token of plain decoding, alone on one rank's hardware.
        embedding, layers, verification: of the stages' parts; verification is final norm, lm_head and verdict.
        head, link: see there.
        vocabulary: size V of the target's vocabulary.
        measured: whether a clock was read; False for a profile that was computed.
        made: provenance.
    """

    target: str
    device: str
    dtype: str
    plain: float
    embedding: float
    layers: tuple[float, ...]
    verification: float
    head: HeadCosts
    link: LinkCosts
    vocabulary: int
    measured: bool
    made: Mapping[str, Any] = field(default_factory=dict)

    def check_fits(self, num_layers: int, vocabulary: int, named: str) -> None:
        """Refuse a target of another depth or vocabulary; `named`: the flag or field that named this profile."""
        for what, theirs, ours in (
            ("layers", len(self.layers), num_layers),
            ("token ids", self.vocabulary, vocabulary),
        ):
            if theirs != ours:
                raise InputError(
                    f"{named} is a profile of {self.target} with {theirs} {what}, but the target has {ours}. Make one "
                    "with spd-lightning profile --target."
                )

    def write(self, path: Path, flag: str = "--output") -> None:
        content = {"format": FORMAT, "unit": "milliseconds", **asdict(self)}
        write_whole(path, json.dumps(content, indent=1) + "\n", flag)


def read_profile(name: str, named: str) -> HardwareProfile:
    """The profile of a file, or of a name such as `cpu_tiny` that the recipes come with.

    Args:
        named: the flag or field, for errors.

    Raises:
        InputError: it is not there, or is no profile.
    """
    path = Path(name)
    if not path.is_file():
        known = profile_files()
        if name not in known:
            raise InputError(
                f"{named} {name}: no such file, and no profile of that name ({', '.join(known) or 'there are none'}). "
                "Make one with spd-lightning profile."
            )
        path = known[name]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f'its "format" is not {FORMAT!r}')
        return _profile(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        detail = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{named} {name} is no hardware profile: {detail}.") from error


def profile_files() -> dict[str, Path]:
    """Profiles that come with the recipes, by name."""
    return {path.stem: path for path in sorted((recipe_folder() / "hardware").glob("*.json"))}


def _profile(content: Mapping[str, Any]) -> HardwareProfile:
    values = {one.name: content[one.name] for one in fields(HardwareProfile)}
    values["layers"] = tuple(_cost(f"layers[{i}]", cost) for i, cost in enumerate(values["layers"]))
    for name in ("plain", "embedding", "verification"):
        values[name] = _cost(name, values[name])
    for name, kind in (("head", HeadCosts), ("link", LinkCosts)):
        parts = {one.name: _cost(f"{name}.{one.name}", content[name][one.name]) for one in fields(kind)}
        values[name] = kind(**parts)
    if not values["layers"] or not values["plain"]:
        raise ValueError("layers must not be empty, nor plain 0")
    if type(values["vocabulary"]) is not int or values["vocabulary"] < 1:
        raise ValueError(f"vocabulary={values['vocabulary']!r}, expected a number of ids")
    return HardwareProfile(**values)


def _cost(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r}, expected milliseconds of at least 0")
    return float(value)
