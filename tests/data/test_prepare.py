"""Preparation: what lies in the folder afterwards, what is refused, and that nothing half-written is ever there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spd_lightning import cli
from spd_lightning.data.cleaning import Cleaning
from spd_lightning.data.prepare import Preparation, prepare
from spd_lightning.data.reading import read
from spd_lightning.data.sources import Source
from spd_lightning.errors import InputError

Conversations = Callable[..., list[list[dict[str, str]]]]
WriteLines = Callable[[Path, Iterable[Any]], Path]


@pytest.fixture
def corpus(tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines) -> Path:
    """600 conversations, 50 of them twice, and 20 broken lines."""
    rows = [{"messages": messages} for messages in make_conversations(600, 21)]
    path = write_lines(tmp_path / "chats.jsonl", [*rows, *rows[:50]])
    path.write_text(path.read_text() + "{oops\n" * 20)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")


def test_every_usable_conversation_is_written_once_on_its_side(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest, made = prepare(Preparation((Source(str(corpus)),), heldout_share=0.2), out)
    train, heldout = lines(out / "train.jsonl"), lines(out / "heldout.jsonl")
    assert made and manifest["conversations"] == {"train": len(train), "heldout": len(heldout)}
    assert len(train) + len(heldout) == 600 and 80 < len(heldout) < 160
    assert len({row["id"] for row in train + heldout}) == 600
    messages = {json.dumps(row["messages"]) for row in train + heldout}
    assert messages == {json.dumps(row["messages"]) for row in lines_of(corpus)}
    questions = [
        {next(m["content"] for m in row["messages"] if m["role"] == "user") for row in side}
        for side in (train, heldout)
    ]
    assert not questions[0] & questions[1], "what opens alike stands on one side"
    tally = manifest["tally"]
    assert (tally["read"], tally["kept"]) == (670, 600)
    assert tally["left_out"] == {"duplicate": 50} and tally["bad"] == {"invalid JSON": 20}
    assert names(out) == ["heldout.jsonl", "manifest.json", "train.jsonl"]


def lines_of(corpus: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in corpus.read_text().splitlines() if line != "{oops"]


def test_the_number_of_processes_changes_no_byte(corpus: Path, tmp_path: Path) -> None:
    preparation = Preparation((Source(str(corpus)),))
    for workers in (0, 2):
        prepare(preparation, tmp_path / str(workers), workers)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_what_was_prepared_reads_back_as_a_source(corpus: Path, tmp_path: Path) -> None:
    prepare(Preparation((Source(str(corpus)),), heldout_share=0.0), tmp_path / "out")
    found = [row.content for row in read([Source(str(tmp_path / "out"))])]
    assert len(found) == 600 and all(isinstance(row, dict) and "messages" in row for row in found)
    assert names(tmp_path / "out") == ["manifest.json", "train.jsonl"]


def test_the_same_again_does_nothing_and_something_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    out, preparation = tmp_path / "out", Preparation((Source(str(corpus)),))
    prepare(preparation, out)
    before = (out / "train.jsonl").stat()
    assert not prepare(preparation, out)[1] and (out / "train.jsonl").stat() == before
    for other in (replace(preparation, heldout_share=0.5), replace(preparation, limit=10)):
        with pytest.raises(InputError, match=r"--out .* holds another corpus"):
            prepare(other, out)
    (out / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"--out .* holds train\.jsonl already"):
        prepare(preparation, out)


def test_an_edited_benchmark_and_a_manifest_of_other_origin_are_another_corpus(corpus: Path, tmp_path: Path) -> None:
    out, benchmark = tmp_path / "out", tmp_path / "bench.jsonl"
    benchmark.write_text('{"question": "a question of no importance"}\n')
    preparation = Preparation((Source(str(corpus)),), Cleaning(decontaminate=[str(benchmark)]))
    prepare(preparation, out)
    assert not prepare(preparation, out)[1]
    benchmark.write_text('{"question": "another question of no importance"}\n')
    manifest = (out / "manifest.json").read_text()
    for content in (manifest, manifest[:-9], "[1]"):
        (out / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=r"--out .* holds another corpus"):
            prepare(preparation, out)


def test_two_processes_with_one_folder_write_it_once(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spd_lightning", "data", "prepare", str(corpus), "--out", str(tmp_path / "out")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("made before" in text for text in said) == [False, True]


def test_a_folder_that_cannot_be_written_ends_with_one_line(corpus: Path) -> None:
    with pytest.raises(InputError, match=r"--out '/proc/none' cannot be written"):
        prepare(Preparation((Source(str(corpus)),)), Path("/proc/none"))


def test_a_limit_reads_that_many_rows(corpus: Path, tmp_path: Path) -> None:
    manifest, _ = prepare(Preparation((Source(str(corpus)),), limit=100), tmp_path / "out")
    assert manifest["tally"]["read"] == sum(manifest["conversations"].values()) == 100


def test_too_many_bad_rows_leave_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    strict = Preparation((Source(str(corpus)),), Cleaning(max_bad_share=0.01))
    with pytest.raises(InputError, match=r"20 of 670 rows are bad.*max_bad_share.*chats\.jsonl:651"):
        prepare(strict, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_a_preparation_that_is_killed_leaves_no_file_under_its_name_and_can_be_repeated(
    corpus: Path, tmp_path: Path
) -> None:
    large, out = tmp_path / "large.jsonl", tmp_path / "out"
    text = corpus.read_text().replace("{oops\n", "")
    large.write_text("".join(text.replace('"content": "', f'"content": "{number} ') for number in range(40)))
    command = [sys.executable, "-m", "spd_lightning", "data", "prepare", str(large), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not any(path.stat().st_size for path in out.glob(".prepare/train.jsonl")) and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert names(out) == [".prepare"]
    assert cli.main(command[3:]) == 0
    assert names(out) == ["heldout.jsonl", "manifest.json", "train.jsonl"]
    assert len(lines(out / "train.jsonl")) + len(lines(out / "heldout.jsonl")) == 24_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.jsonl", "--out", "o"], "SOURCE='none.jsonl' does not exist"),
        (["CORPUS", "--out", "CORPUS"], "is a file: expected a folder"),
        (["CORPUS", "--out", "o", "--heldout-share", "1"], "--heldout-share 1.0: expected"),
        (["CORPUS", "--out", "o", "--limit", "0"], "--limit 0: expected"),
        (["CORPUS", "--out", "o", "--workers", "-1"], "--workers -1: expected"),
        (["CORPUS", "--out", "o", "--ngram", "1"], "--ngram=1: expected"),
        (["CORPUS", "--out", "o", "--decontaminate", "none.jsonl"], "--decontaminate='none.jsonl' does not exist"),
        (["CORPUS", "--out", "o", "--tool", "keep"], "--tool. Did you mean --tools?"),
        (["CORPUS"], "--out"),
        ([], "SOURCE"),
    ],
    ids=str,
)
def test_wrong_arguments_end_with_one_line(
    arguments: list[str], says: str, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.parent)
    replaced = [str(corpus) if word == "CORPUS" else word for word in arguments]
    assert cli.main(["data", "prepare", *replaced]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_the_command_says_what_became_of_the_rows(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "prepare", str(corpus), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for part in ("670 rows read, 600 conversations kept", "50 x duplicate", "20 x invalid JSON", ":651", "Try next"):
        assert part in shown
    assert cli.main(["data", "prepare", str(corpus), "--out", str(tmp_path / "out")]) == 0
    assert "nothing to do" in capsys.readouterr().out
