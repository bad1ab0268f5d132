"""A corpus as clean JSON lines: train.jsonl, heldout.jsonl and a manifest that says what became of every row.

Conversations are named by a digest of their content, and of equal ones the first is kept; the digests lie in a database
on disk, so that memory does not grow with the corpus. Files appear under their names when all of them are complete.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import IO, Any

from spd_lightning.data.cleaning import Cleaner, Cleaning
from spd_lightning.data.parallel import chunks, ordered_map
from spd_lightning.data.progress import Progress
from spd_lightning.data.reading import Row, count_rows, read
from spd_lightning.data.sources import Source
from spd_lightning.data.tally import Tally
from spd_lightning.errors import InputError, first_line

FILES = {"train": "train.jsonl", "heldout": "heldout.jsonl"}
_Lines = list[tuple[str, str, str]]  # digest, side, line


@dataclass(frozen=True)
class Preparation:
    """What to prepare.

    Args:
        sources: the corpus; weights are for training and change nothing here.
        cleaning: what is dropped.
        heldout_share: share of conversations that goes to heldout.jsonl, by a digest of their openings.
        limit: rows to read; None: all.
        streaming: read hub sets without downloading them first.
    """

    sources: tuple[Source, ...]
    cleaning: Cleaning = Cleaning()
    heldout_share: float = 0.02
    limit: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_share < 1:
            raise InputError(f"--heldout-share {self.heldout_share}: expected a number from 0 to below 1.")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit}: expected at least 1.")

    def settings(self) -> dict[str, Any]:
        """What the output depends on, as plain values."""
        files = [source.fingerprint() for source in self.sources], self.cleaning.fingerprint()
        return json.loads(json.dumps([asdict(self), files, version("spd_lightning")], default=str))


@dataclass(frozen=True)
class _Work:
    """Rows to lines, in any process."""

    cleaner: Cleaner

    def __call__(self, rows: Sequence[Row]) -> tuple[_Lines, Tally]:
        kept, tally = self.cleaner(rows)
        lines: _Lines = []
        for row, found in kept:
            digest = found.content_digest
            content = found.as_row() | {"id": digest, "source": row.place}
            lines.append((digest, self.cleaner.side(found), json.dumps(content, ensure_ascii=False)))
        return lines, tally


def prepare(
    preparation: Preparation, folder: Path, workers: int = 0, progress: Progress | None = None
) -> tuple[dict[str, Any], bool]:
    """Write a corpus into a folder.

    Args:
        preparation: what to prepare.
        folder: receives train.jsonl, heldout.jsonl and manifest.json.
        workers: processes that parse and clean, besides this one.
        progress: told how many rows are read.

    Returns:
        The manifest, and whether it was made now: a folder that holds the same preparation is left as it is.

    Raises:
        InputError: too many bad rows, nothing left, or a folder that holds something else.
    """
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # another process with the same arguments waits, and finds the work done
            return _prepare(preparation, folder, workers, progress)
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"--out {str(folder)!r} cannot be written: {first_line(error)}.") from error


def _prepare(
    preparation: Preparation, folder: Path, workers: int, progress: Progress | None
) -> tuple[dict[str, Any], bool]:
    settings = preparation.settings()
    if (folder / "manifest.json").is_file():
        found = _manifest(folder / "manifest.json")
        if found.get("settings") == settings:
            return found, False
        raise InputError(
            f"--out {str(folder)!r} holds another corpus (its manifest.json says which): name another folder, or "
            "delete that one."
        )
    if taken := [name for name in FILES.values() if (folder / name).exists()]:
        raise InputError(f"--out {str(folder)!r} holds {taken[0]} already, without a manifest: name another folder.")
    temporary = folder / ".prepare"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir()
    try:
        manifest = _write(preparation, temporary, workers, progress) | {"settings": settings}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in (*FILES.values(), "manifest.json"):  # the manifest last: with it, the folder is complete
            if (temporary / name).exists():
                (temporary / name).replace(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest, True


def _manifest(path: Path) -> dict[str, Any]:
    """What a manifest holds; nothing, where it is none of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(preparation: Preparation, folder: Path, workers: int, progress: Progress | None) -> dict[str, Any]:
    sources, cleaning = preparation.sources, preparation.cleaning
    work = _Work(Cleaner(sources, cleaning, heldout_share=preparation.heldout_share))
    total = count_rows(sources)
    if preparation.limit is not None:
        total = preparation.limit if total is None else min(total, preparation.limit)
    rows = islice(read(sources, preparation.streaming), preparation.limit)
    tally, counts, began = Tally(), {side: 0 for side in FILES}, time.time()
    seen = _Seen(folder / "digests.sqlite")
    sides = [side for side in FILES if side == "train" or preparation.heldout_share]
    with ExitStack() as open_files:
        open_files.callback(seen.close)
        files: dict[str, IO[str]] = {
            side: open_files.enter_context(open(folder / FILES[side], "w", encoding="utf-8")) for side in sides
        }
        for lines, counted in ordered_map(work, chunks(rows), workers):
            tally.add(counted)
            tally.check("SOURCE", cleaning.max_bad_share, "data.cleaning.max_bad_share", over=False)
            for digest, side, line in lines:
                if seen.before(digest):
                    tally.left_out["duplicate"] += 1
                    tally.kept -= 1
                    continue
                files[side].write(line + "\n")
                counts[side] += 1
            if progress is not None:
                progress(tally.read, total)
    tally.check("SOURCE", cleaning.max_bad_share, "data.cleaning.max_bad_share")
    if not counts["train"]:
        raise InputError("SOURCE: nothing is left to train on. " + " ".join(x.strip() for x in tally.lines()))
    return {
        "conversations": counts,
        "tally": tally.as_dict(),
        "argv": sys.argv[1:],
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - began, 2),
    }


class _Seen:
    """Digests that have come before, on disk."""

    def __init__(self, path: Path) -> None:
        self.database = sqlite3.connect(path)
        # nothing to recover: a run that is killed begins anew
        self.database.execute("PRAGMA synchronous = OFF")
        self.database.execute("PRAGMA journal_mode = OFF")
        self.database.execute("CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def before(self, digest: str) -> bool:
        """Whether it has come before; from now on it has."""
        cursor = self.database.execute("INSERT OR IGNORE INTO digests VALUES (?)", (bytes.fromhex(digest),))
        return cursor.rowcount == 0

    def close(self) -> None:
        path = self.database.execute("PRAGMA database_list").fetchone()[2]
        self.database.close()
        Path(path).unlink()
