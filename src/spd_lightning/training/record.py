"""What a run leaves behind besides weights: its directory, and run.json, rewritten atomically as results come in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from spd_lightning.errors import InputError
from spd_lightning.files import write_whole
from spd_lightning.provenance import command_line, commit, now, versions
from spd_lightning.training.data import SpdDataModule

_RUN_DIRECTORY = "SPD_RUN_DIRECTORY"


@dataclass
class RunRecord:
    """run.json: everything needed to know what a run was and what came out; rewritten atomically at every step."""

    directory: Path
    config: dict[str, Any]
    argv: list[str] = field(default_factory=command_line)
    began: str = field(default_factory=now)
    seconds: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    #: Where else the run is logged: id, project and mode of its W&B run.
    tracking: dict[str, Any] = field(default_factory=dict)
    #: When the run began earlier and how each part of it ended, where it was resumed in its own directory.
    resumed: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def going_on(cls, directory: Path, config: dict[str, Any]) -> RunRecord:
        """The record of a run that goes on in its directory, or begins there."""
        record = cls(directory, config)
        try:
            earlier = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return record
        # one that says it is running was killed
        part = {"began": earlier["began"], "status": earlier["status"].replace("running", "killed")}
        record.resumed = [*earlier.get("resumed", []), part]
        record.seconds = earlier["seconds"]
        record.tracking = earlier.get("tracking", {})
        return record

    @rank_zero_only
    def save(self) -> None:
        content = asdict(self) | {"directory": self.directory.name, "commit": commit(), "versions": versions()}
        content["config"] = self.config
        write_whole(self.directory / "run.json", json.dumps(content, indent=2, default=str) + "\n", "run_dir:")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and save the record when it ends, whatever ends it."""
        began = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self._spent(name, began)
            self.fail(error)
            raise
        self._spent(name, began)
        self.save()

    def _spent(self, name: str, began: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 2)

    def fail(self, error: BaseException, how: str = "failed") -> None:
        """Save how the run ended; a disk that takes no more must not hide the error that says so."""
        named = f"{type(error).__name__}: " if how == "failed" else ""
        self.status = f"{how}: {named}{error}"
        with suppress(InputError):
            self.save()


def new_run_directory(wanted: Path) -> Path:
    """`wanted`, or `wanted-2`, `wanted-3`, ... where it holds a run already: a run never overwrites another.

    Only the first process of a run creates it; the others write nothing and get what it was called, if they know.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return Path(os.environ.get(_RUN_DIRECTORY, wanted))
    path = _first_free(wanted)
    os.environ[_RUN_DIRECTORY] = str(path)  # for the processes that a launcher starts from this one
    return path


def run_directory_in_place(wanted: Path) -> Path:
    """`wanted` itself, for a run that goes on there."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_create(wanted, error) from error
    return wanted


def _cannot_create(wanted: Path, error: OSError) -> InputError:
    return InputError(f"run_dir={str(wanted)!r} cannot be created: {error.strerror}. Set run_dir.")


def _first_free(wanted: Path) -> Path:
    number, path = 1, wanted
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if path.is_dir() and not any(path.iterdir()):
                return path
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
        except OSError as error:
            raise _cannot_create(wanted, error) from error


def fingerprint(data: SpdDataModule) -> dict[str, Any]:
    """What the run learns from and is tested on: size, and the fingerprint that names its tokens."""
    result = {}
    for name, store in (("train", data.train_samples), ("validation", data.validation_set)):
        if store is None:  # streamed
            continue
        figures = store.manifest
        result[name] = {
            "samples": figures["samples"],
            "tokens": figures["tokens"],
            "labelled_share": round(figures["labels"] / figures["tokens"], 4),
            "fingerprint": store.path.name,
            "rows": figures["tally"],
        }
    return result


def plain(config: Any) -> Any:
    """A jsonargparse namespace as plain dicts and lists."""
    if hasattr(config, "as_dict"):
        return plain(config.as_dict())
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config
