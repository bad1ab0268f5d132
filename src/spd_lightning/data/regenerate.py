"""The target writes the responses of a corpus: what is to do, in which units, and the file that comes of it.

A head learns to draft what the target says, so it should see what the target says. Everything here follows from the
input and the settings: the order of units, their seeds, the final file. Kills, restarts and the number of ranks change
nothing but the time that passes.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spd_lightning.data.cleaning import Cleaner
from spd_lightning.data.conversations import Conversation
from spd_lightning.data.dialogue import Dialogue, Unit, Writer, Written, is_plain_answer
from spd_lightning.data.journal import Journal, Place, Record, Workplace, read_journals, write_whole
from spd_lightning.data.parallel import chunks
from spd_lightning.data.progress import progress_bar
from spd_lightning.data.reading import read
from spd_lightning.data.sources import digest
from spd_lightning.data.tally import Bad, Tally
from spd_lightning.errors import InputError

#: Units among which conversations are sorted by length.
WINDOW = 16
#: Conversations after which a session is stopped for its share of failures.
ENOUGH = 100


@dataclass(frozen=True)
class Survey:
    """What an input holds.

    Attributes:
        tally: of its rows.
        content: digest of the conversations, in order.
    """

    tally: Tally
    content: str

    @property
    def conversations(self) -> int:
        return self.tally.kept


def conversations(cleaner: Cleaner, tally: Tally) -> Iterator[Conversation]:
    """Conversations with a response to write, in the input's order; a second one of the same id becomes id#2.

    Args:
        cleaner: sources and filters.
        tally: counts what became of each row.
    """
    used: dict[str, int] = {}
    for rows in chunks(read(cleaner.sources)):
        kept, counted = cleaner(rows)
        for row, found in kept:
            if found.text is not None:
                counted.add_bad(Bad("a plain text, which has no responses", row.place))
            elif not any(map(is_plain_answer, found.messages)):
                counted.left_out["nothing but tool calls to write"] += 1
            else:
                yield replace(found, id=_unused(found.id, used))
                continue
            counted.kept -= 1
        tally.add(counted)


def _unused(name: str, used: dict[str, int]) -> str:
    if name not in used:
        used[name] = 1
        return name
    while (found := f"{name}#{used[name] + 1}") in used:
        used[name] += 1
    used[name] += 1
    used[found] = 1
    return found


def survey(cleaner: Cleaner, name: str, flag: str) -> Survey:
    """Read the whole input once, before anything expensive.

    Args:
        cleaner: sources and filters.
        name: the flag that the sources come from; `flag` the one that sets the tolerated share, for errors.

    Raises:
        InputError: too many bad rows, or nothing to write.
    """
    tally, content = Tally(), ""
    with progress_bar("reading", "conversations") as progress:
        for number, found in enumerate(conversations(cleaner, tally)):
            content = digest(
                content, found.id, found.content_digest, json.dumps(found.tools, sort_keys=True, default=str)
            )
            if number % 1000 == 0:
                tally.check(name, cleaner.cleaning.max_bad_share, flag, over=False)
                progress(number, None)
    tally.check(name, cleaner.cleaning.max_bad_share, flag)
    if not tally.kept:
        raise InputError(f"{name}: no conversation has a response to write. " + " ".join(tally.lines()))
    return Survey(tally, content)


def units(found: Iterator[Conversation], size: int) -> Iterator[Unit]:
    """Units of `size` conversations of similar length; the same ones whoever asks."""
    count = 0
    for window in chunks((Dialogue(number, each) for number, each in enumerate(found)), size * WINDOW):
        if size > 1:
            window.sort(key=lambda dialogue: (_length(dialogue.given), dialogue.number))
        for part in chunks(window, size):
            yield Unit(count, part)
            count += 1


def _length(given: Conversation) -> int:
    return sum(len(str(message["content"])) for message in given.messages)


@dataclass(frozen=True)
class Job:
    """What is to be written, by whom.

    Args:
        cleaner: sources and filters.
        surveyed: what they hold.
        place: the output folder, claimed for these settings.
        settings: what decides the text.
        unit_size: conversations per unit.
        rank, ranks: this process writes every `ranks`-th unit.
        drop_unfinished: leave conversations with a cut response out of the final file.
        max_failed_share: share of conversations that may fail.
        argv: the command, for the manifest.
    """

    cleaner: Cleaner
    surveyed: Survey
    place: Workplace
    settings: Record
    unit_size: int
    rank: int = 0
    ranks: int = 1
    drop_unfinished: bool = False
    max_failed_share: float = 0.05
    argv: tuple[str, ...] = ()

    @property
    def output(self) -> Record:
        """What decides the final file besides the text."""
        return {"name": self.place.output.name, "drop_unfinished": self.drop_unfinished}

    @property
    def unit_count(self) -> int:
        return -(-self.surveyed.conversations // self.unit_size)

    def run(self, writer: Writer) -> Record | None:
        """Write this rank's share; the manifest, where it was the last one to end.

        Raises:
            InputError: nothing more can be written, or too much failed.
        """
        journal = self.place.open_journal(self.rank)
        try:
            self._write(writer, journal)
        finally:
            journal.close()
        with self.place.lock():
            found = Finished.read(self.place, self.unit_count)
            if found.missing:
                return None
            return self._assemble(found, writer.facts)

    def _write(self, writer: Writer, journal: Journal) -> None:
        finished = Finished.read(self.place, self.unit_count)
        mine = set(range(self.rank, self.unit_count, self.ranks))
        todo = mine - finished.units.keys()
        if not todo:
            return
        session = _Session(self, journal, total=self._conversations(mine), done=self._conversations(mine - todo))
        waiting = (unit for unit in units(conversations(self.cleaner, Tally()), self.unit_size) if unit.number in todo)
        with progress_bar(f"rank {self.rank}" if self.ranks > 1 else "writing", "conversations") as progress:
            progress(session.done, session.total)
            writer.write(waiting, partial(session.record, progress))

    def _conversations(self, numbers: Iterable[int]) -> int:
        """How many the units of these numbers hold; the last one may be smaller."""
        last = self.surveyed.conversations - (self.unit_count - 1) * self.unit_size
        return sum(last if number == self.unit_count - 1 else self.unit_size for number in numbers)

    def _assemble(self, found: Finished, facts: Record) -> Record:
        """The final file and its manifest, from the journals."""
        failed = sum(found.failed.values())
        share = failed / self.surveyed.conversations
        if share > self.max_failed_share:
            raise InputError(_too_many_failures(failed, self.surveyed.conversations, found.failed, self))
        self.place.manifest.unlink(missing_ok=True)  # it vouches for the file
        totals = found.write(self.place, self.drop_unfinished)
        if not totals["conversations"]:
            self.place.output.unlink()
            raise InputError(f"no conversation was written: {totals['dropped'] or dict(found.failed)}.")
        manifest = {
            "argv": list(self.argv),
            "version": _version(),
            "settings": self.settings,
            "writer": facts,
            "output": self.output,
            **totals,
            "failed": failed,
            "failures": dict(found.failed.most_common()),
            "retries": found.retries,
            "seconds": round(max(found.seconds.values()), 2),
            "ranks": self.ranks,
            "sources": [asdict(source) for source in self.cleaner.sources],
            "tally": self.surveyed.tally.as_dict(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_whole(self.place.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        return manifest


def _version() -> str:
    try:
        return version("spd_lightning")
    except PackageNotFoundError:
        return "not installed"


def _too_many_failures(failed: int, of: int, reasons: Counter[str], job: Job) -> str:
    reason, count = reasons.most_common(1)[0]
    return (
        f"{failed} of {of} conversations failed ({failed / of:.1%}, --max-failed-share allows "
        f"{job.max_failed_share:.1%}), {count} of them with: {reason}. What was written is kept: run the same command "
        "again to try the failed ones again, or raise --max-failed-share."
    )


class _Session:
    """What this process has written since it was started."""

    def __init__(self, job: Job, journal: Journal, total: int, done: int) -> None:
        self.job, self.journal, self.total, self.done = job, journal, total, done
        self.written, self.failed = 0, Counter[str]()
        self._last = time.monotonic()

    def record(self, progress: Any, written: Written) -> None:
        """A unit is complete: into the journal with it.

        Raises:
            InputError: nearly everything fails.
        """
        now = time.monotonic()
        unit, count = written.unit, len(written.unit.dialogues)
        line: Record = {"unit": unit.number, "seconds": round(now - self._last, 3), "retries": written.retries}
        if written.failed is None:
            line["done"] = [dialogue.record() for dialogue in unit.dialogues]
        else:
            line |= {"failed": written.failed, "conversations": count}
            self.failed[written.failed] += count
        self.journal.append(line)
        self._last = now
        self.written += count
        self.done += count
        progress(self.done, self.total)
        failed = sum(self.failed.values())
        if self.written >= ENOUGH and failed > self.job.max_failed_share * self.written:
            raise InputError(_too_many_failures(failed, self.written, self.failed, self.job))


@dataclass
class Finished:
    """What the journals of all ranks hold.

    Attributes:
        units: where each finished unit stands.
        failed: conversations of units that failed and were not written since, by reason.
        retries: requests that were repeated.
        seconds: of each rank, over all sessions.
        missing: units that nobody has tried yet.
    """

    units: dict[int, Place]
    failed: Counter[str]
    retries: int
    seconds: dict[Path, float]
    missing: int

    @classmethod
    def read(cls, place: Workplace, unit_count: int) -> Finished:
        done: dict[int, Place] = {}
        failures: dict[int, Counter[str]] = {}
        retries, seconds = 0, Counter[Path]()
        for (path, start), line in read_journals(place.journals):
            retries += line["retries"]
            seconds[path] += line["seconds"]
            if "failed" in line:
                failures[line["unit"]] = Counter({line["failed"]: line["conversations"]})
            else:
                done.setdefault(line["unit"], (path, start))
        failed = sum((why for unit, why in failures.items() if unit not in done), Counter[str]())
        return cls(done, failed, retries, dict(seconds), unit_count - len(done.keys() | failures.keys()))

    def write(self, place: Workplace, drop_unfinished: bool) -> Record:
        """The final file, in the input's order; its counts."""
        line = lru_cache(4 * WINDOW)(_line)  # conversations of a window are spread over its units
        where: list[tuple[int, Path, int, int]] = []  # number, journal, line, record in the line
        for path, start in self.units.values():
            records = _line(path, start)["done"]
            where += [(record["number"], path, start, at) for at, record in enumerate(records)]
        totals = _Totals()

        def write(stream: Any) -> None:
            for _, path, start, at in sorted(where):
                if (row := totals.add(line(path, start)["done"][at], drop_unfinished)) is not None:
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")

        write_whole(place.output, write)
        return totals.as_dict()


def _line(path: Path, start: int) -> Record:
    with open(path, "rb") as stream:
        stream.seek(start)
        found: Record = json.loads(stream.readline())
        return found


class _Totals:
    """Counts of the final file."""

    def __init__(self) -> None:
        self.conversations = self.prompt_tokens = self.response_tokens = 0
        self.finish_reasons, self.shortened, self.dropped = Counter[str](), Counter[str](), Counter[str]()

    def add(self, record: Record, drop_unfinished: bool) -> Record | None:
        """The row, where it goes into the file."""
        row: Record | None = record["row"]
        self.prompt_tokens += record["prompt_tokens"]
        if row is None:
            self.dropped[record["ended"]] += 1
            return None
        self.response_tokens += sum(row["response_tokens"])
        self.finish_reasons.update(row["finish_reasons"])
        if drop_unfinished and "length" in row["finish_reasons"]:
            self.dropped["unfinished response"] += 1
            return None
        if record["ended"] is not None:
            self.shortened[record["ended"]] += 1
        self.conversations += 1
        return row

    def as_dict(self) -> Record:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


def report(manifest: Record, place: Workplace, tokenizer: str) -> list[str]:
    """Lines for people: what was written, what went wrong, what to do next."""
    tokens, seconds = manifest["response_tokens"], manifest["seconds"]
    reasons = ", ".join(f"{n} {reason}" for reason, n in manifest["finish_reasons"].items())
    rate = f", {tokens / seconds:,.0f} tokens/s" if seconds else ""
    lines = [
        f"{manifest['conversations']} conversations in {place.output}",
        f"  {tokens:,} response tokens ({manifest['prompt_tokens']:,} of prompts) in {seconds:,.0f} s{rate}",
        f"  responses ended by: {reasons}",
    ]
    lines += [f"  ended early: {n} x {reason}" for reason, n in manifest["shortened"].items()]
    lines += [f"  left out: {n} x {reason}" for reason, n in manifest["dropped"].items()]
    lines += [f"  failed: {n} x {reason}" for reason, n in manifest["failures"].items()]
    if manifest["failed"]:
        lines.append("  run the same command again to try the failed ones again")
    if manifest["retries"]:
        lines.append(f"  {manifest['retries']} requests were repeated")
    name = os.fspath(place.output)
    return [
        *lines,
        "next",
        f"  spd-lightning data vocab {name} --tokenizer {tokenizer} --size 2048 --out {place.folder / 'vocab.json'}",
        f"  spd-lightning fit --config tiny --data.train {name}",
    ]
