"""What has been written so far, on disk: whole lines that survive a kill at any point, and who may write them.

A folder belongs to one input and one set of settings. Each rank appends to a journal of its own, one line per unit of
work, so a unit is either there or not; only the last line can be torn, and the next start cuts it away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spd_lightning.errors import InputError
from spd_lightning.files import write_whole

Record = dict[str, Any]


class Journal:
    """The journal of one rank, open for appending; the file is locked until `close` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self._lock = _lock(path)
        _cut(path)
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, record: Record) -> None:
        """One line, on the disk when this returns."""
        line = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Run again to go on.") from error

    def close(self) -> None:
        os.close(self._file)
        self._lock.release()


def _lock(path: Path) -> Any:
    """The lock of a journal, held; it is given back when the process ends, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another process writes {path} now: let it end, or write elsewhere (--rank, --out, --output)."
        ) from error
    return lock


def _cut(path: Path) -> None:
    """Cut away what a killed process left of a line."""
    if not path.is_file():
        return
    end = 0
    for start, line in whole_lines(path):
        end = start + len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Complete lines and where they start; a torn last line is left out.

    Raises:
        InputError: a damaged line before the last.
    """
    start, torn = 0, None
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if torn is not None:
                raise InputError(f"{path}: line {torn} is damaged: remove that line to write its conversations again.")
            if line.endswith(b"}\n") and line.startswith(b"{"):
                yield start, line
            else:
                torn = number  # a power cut may leave zeros
            start += len(line)


Place = tuple[Path, int]


def read_journals(folder: Path) -> Iterator[tuple[Place, Record]]:
    """All lines of all ranks' journals, with their places; the last one of each may just be being written."""
    for path in sorted(folder.glob("rank-*.lines")):
        for start, line in whole_lines(path):
            try:
                yield (path, start), json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: the line at byte {start} is damaged ({error}): remove it.") from error


class Workplace:
    """The output folder: its journals, the settings they were made with, its final file and manifest.

    Args:
        folder: the folder.
        name: stem of the final file.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.journals = folder, folder / "journal"
        self.output, self.manifest = folder / f"{name}.jsonl", folder / "manifest.json"
        self._settings = self.journals / "settings"

    def lock(self) -> Any:
        """Held while settings or final files are written."""
        from filelock import FileLock

        self._prepare()
        return FileLock(self.journals / "lock")

    def _prepare(self) -> None:
        try:
            self.journals.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {str(self.folder)!r} cannot be written: {error.strerror}.") from error

    def claim(self, settings: Record) -> None:
        """Make the folder this run's own.

        Raises:
            InputError: it holds the work of other settings, or a file of other origin in the place of the output.
        """
        with self.lock():
            if self._settings.is_file():
                self.refuse_others(settings)
            elif self.output.exists():
                raise InputError(
                    f"--out {str(self.folder)!r} holds {self.output.name} of other origin: expected a folder of its "
                    "own. Choose another --out or --name."
                )
            else:
                write_whole(self._settings, json.dumps(settings, indent=2) + "\n")

    def refuse_others(self, settings: Record) -> None:
        """InputError where the folder holds the work of other settings; those not given here are not compared."""
        if not self._settings.is_file():
            return
        known = flat(json.loads(self._settings.read_text(encoding="utf-8")))
        wanted = flat(json.loads(json.dumps(settings)))
        differs = [f"{n} was {known.get(n)!r}, now {value!r}" for n, value in wanted.items() if known.get(n) != value]
        if differs:
            raise InputError(
                f"--out {str(self.folder)!r} holds the work of other settings: {'; '.join(differs)}. Give the same "
                "again, another --out, or --overwrite to start anew."
            )

    def finished(self, output: Record) -> Record | None:
        """The manifest, where everything is done and the final file was made with the same `output` settings."""
        if not (self._settings.is_file() and self.manifest.is_file() and self.output.is_file()):
            return None
        manifest: Record = json.loads(self.manifest.read_text(encoding="utf-8"))
        return manifest if manifest["output"] == output and not manifest["failed"] else None

    def clear(self) -> None:
        """Remove what this command wrote here.

        Raises:
            InputError: another process is at work in the folder.
        """
        if not self._settings.is_file():
            return
        journals = list(self.journals.glob("rank-*.lines"))
        for path in journals:
            _lock(path).release()
        with self.lock():
            for path in (self.output, self.manifest, *journals, self._settings):  # the settings vouch for the rest
                path.unlink(missing_ok=True)

    def open_journal(self, rank: int) -> Journal:
        return Journal(self.journals / f"rank-{rank:05d}.lines")


def flat(settings: Record, prefix: str = "") -> Record:
    """Settings within settings as dotted names."""
    found: Record = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
