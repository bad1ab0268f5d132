"""What is known of a head besides its weights: how it was trained, what was measured, where it was published.

Everything comes from a record that somebody's run left: run.json, a record of `bench`, or the provenance.json of an
earlier export. A metric is taken over only if it was measured with the very weights that are exported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from spd_lightning.errors import InputError, first_line
from spd_lightning.export.check import within
from spd_lightning.head.digest import matches
from spd_lightning.head.folder import PROVENANCE_FILE, read_head
from spd_lightning.head.loading import HeadSource
from spd_lightning.head.module import SpeculationHead


@dataclass(frozen=True)
class Metric:
    """Acceptance and speedup of a head in real decoding of one prompt set at one temperature.

    Attributes:
        prompts: what the prompt set is called; `category` of it, None: all of it.
        count: prompts; new_tokens: at most, per prompt.
        acceptance: p; interval: its 95 % interval; accepted_per_restart: A; theoretical_speedup: S.
        wall_clock_speedup: None where no engine with parallel stages measured it.
        weights: dtype of the head's weights that were measured.
        identical: greedy outputs that equal plain decoding, of `count`; None if that was not compared.
        date, commit: of the record; record: what kind it is.
    """

    prompts: str
    count: int
    new_tokens: int
    temperature: float
    acceptance: float
    accepted_per_restart: float | None
    theoretical_speedup: float | None
    interval: tuple[float, float] | None = None
    wall_clock_speedup: float | None = None
    category: str | None = None
    identical: int | None = None
    weights: str | None = None
    date: str | None = None
    commit: str | None = None
    record: str = "run"


@dataclass(frozen=True)
class Background:
    """See the module.

    Attributes:
        source: name and kind of what was exported.
        training: command, data, date, commit and versions of the run, as far as known.
        metrics: what was measured with these weights.
        published: entries of a published version-11 config that `HeadConfig` has no field for.
        certificate: of an earlier export with the same weights.
        plots: pictures of the run.
        notes: what could not be taken over, and why.
    """

    source: Mapping[str, Any]
    training: Mapping[str, Any] | None = None
    metrics: Sequence[Metric] = ()
    published: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None
    plots: Sequence[Path] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def background_of(found: HeadSource, head: SpeculationHead) -> Background:
    """What lies beside a head: its run's record, or what an earlier export said of it.

    Raises:
        InputError: a record that lies there cannot be read.
    """
    source = {"name": found.run.name if found.run else found.path.name, "kind": "run" if found.run else found.kind}
    if found.run is not None:
        return _of_run(found, head, source)
    if found.kind == "version 11":
        from spd_lightning.head.version11 import published_fields

        return Background(source, published=published_fields(found.path))
    if found.kind == "folder" and (found.path / PROVENANCE_FILE).is_file():
        return _of_export(found.path, source)
    return Background(source, notes=("it lies in no run: how it was trained and measured is not known",))


def _of_run(found: HeadSource, head: SpeculationHead, source: dict[str, Any]) -> Background:
    assert found.run is not None
    record = read_json(found.run / "run.json")
    config, results = record.get("config") or {}, record.get("results") or {}
    training = {
        "command": record.get("argv"),
        "began": record.get("began"),
        "status": record.get("status"),
        "commit": record.get("commit"),
        "versions": record.get("versions"),
        "train": config.get("data", {}).get("train"),
        "validation": config.get("data", {}).get("validation"),
        "tokens": results.get("tokens"),
        "seconds": record.get("seconds"),
        "data": record.get("data"),
    }
    notes = []
    metrics: Sequence[Metric] = ()
    if not results.get("final"):
        notes.append("the run has not decoded its final prompts: nothing was measured")
    elif not _same_weights(found.run / "head", head):
        notes.append("the run measured another checkpoint than the exported one: its figures are left out")
    else:
        metrics = tuple(_metrics_of_run(record, dtype_name(head)))
    plots = sorted((found.run / "plots").glob("*.png")) if metrics else []
    return Background(source, without_paths(training), metrics, plots=plots, notes=tuple(notes))


def _metrics_of_run(record: Mapping[str, Any], weights: str) -> Iterable[Metric]:
    results = record["results"]
    lossless = results.get("lossless") or {}
    for row in results["final"]:
        if row["drafter"] == "trained head" and row["acceptance"] is not None:
            yield Metric(
                prompts=str(without_paths(record["config"]["data"].get("validation") or "held-out part of the data")),
                count=results["prompts"],
                new_tokens=results["max_new_tokens"],
                temperature=row["temperature"],
                acceptance=row["acceptance"],
                accepted_per_restart=row["accepted_per_restart"],
                theoretical_speedup=row["theoretical_speedup"],
                interval=_pair(row.get("acceptance_interval")),
                identical=lossless.get("identical") if row["temperature"] == 0 else None,
                weights=weights,
                date=record.get("began"),
                commit=record.get("commit"),
            )


def _same_weights(folder: Path, head: SpeculationHead) -> bool:
    try:
        other = read_head(folder)
    except InputError:
        return False
    theirs = other.state_dict()
    return other.config == head.config and all(torch.equal(t, theirs[name]) for name, t in head.state_dict().items())


def _of_export(folder: Path, source: dict[str, Any]) -> Background:
    """An earlier export: its story goes on."""
    told = read_json(folder / PROVENANCE_FILE)
    try:
        metrics = tuple(metric_from(fields) for fields in told.get("metrics") or ())
        plots = [folder / name for name in told.get("plots") or () if within(name)]
    except (TypeError, AttributeError) as error:
        raise InputError(f"{folder / PROVENANCE_FILE} is damaged: {first_line(error)}") from error
    return Background(
        told.get("source") or source,
        told.get("training"),
        metrics,
        told.get("published"),
        told.get("certificate"),
        [plot for plot in plots if plot.is_file()],
        tuple(told.get("notes") or ()),
    )


def metric_from(fields: Mapping[str, Any]) -> Metric:
    """Of the fields in a provenance.json."""
    return Metric(**{**fields, "interval": _pair(fields.get("interval"))})


def metric_fields(metric: Metric) -> dict[str, Any]:
    """For a provenance.json."""
    return asdict(metric)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} cannot be read: expected a JSON object, found {type(content).__name__}.")
    return content


def metrics_of_bench(path: Path, heads: Sequence[SpeculationHead]) -> list[Metric]:
    """The rows of a record of `bench` that was made with this head, as it was stored or as it is exported.

    Raises:
        InputError: no such record, or one of another head.
    """
    record = read_json(path)
    if record.get("quality") is False:
        raise InputError(f"--bench {path} was made with --forced-acceptance: it says nothing about a head's quality.")
    try:
        if not any(matches(head, record["head"]["digest"]) for head in heads):
            raise InputError(
                f"--bench {path} measured another head: its weights have the digest {record['head']['digest'][:16]}..."
            )
        return [
            Metric(
                prompts=row["prompts"],
                category=row["category"],
                count=row["count"],
                new_tokens=record["settings"]["max_new_tokens"],
                temperature=row["temperature"],
                acceptance=row["acceptance"],
                accepted_per_restart=row["accepted_per_restart"],
                theoretical_speedup=row["theoretical_speedup"],
                interval=_pair(row["acceptance_interval"]),
                wall_clock_speedup=row["wall_clock_speedup"],
                identical=row["identical"],
                weights=record["head"]["dtype"],
                date=record["date"],
                commit=record["commit"],
                record="bench",
            )
            for row in record["metrics"]
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"--bench {path} is no record of spd-lightning bench: {first_line(error)}") from error


def without_paths(value: Any) -> Any:
    """The same without folders of this machine: a path that leaves the working directory becomes its last part.

    Also in `--flag=path`.
    """
    if isinstance(value, Mapping):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    flag, sign, rest = value.rpartition("=")
    if rest.startswith(("/", "~", "../")):
        return flag + sign + PurePosixPath(rest).name
    if re.match(r"[A-Za-z]:\\", rest):
        return flag + sign + PureWindowsPath(rest).name
    return value


def dtype_name(head: SpeculationHead) -> str:
    """Such as bfloat16."""
    return str(head.dtype).removeprefix("torch.")


def _pair(values: Any) -> tuple[float, float] | None:
    return None if values is None else (float(values[0]), float(values[1]))
