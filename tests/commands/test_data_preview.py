"""The command data preview: what it prints with and without colours, the page, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd_lightning import cli

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]
HOSTILE = "<script>alert(1)</script> \x1b[31m \u202e \U0001f469\u200d\U0001f4bb\n\u65e5\u672c"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four rows: two chats, broken JSON, a chat without an answer."""
    made: list[Any] = [
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": HOSTILE}]},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "the file"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made) + '{"messages": [\n{"messages": []}\n')
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], rows: Path) -> Run:
    """Runs the command on these rows; returns status, stdout, stderr."""

    def call(*arguments: str, source: str = str(rows)) -> tuple[int, str, str]:
        status = cli.main(["data", "preview", source, *arguments])
        return (status, *capsys.readouterr())

    return call


def test_a_pipe_gets_the_mask_as_signs_and_no_escape_code(run: Run, rows: Path):
    status, out, err = run()
    assert status == 0 and not err and "\x1b" not in out
    assert "<|user|>two<|end|><|assistant|>\u2039the\u00a6 file<|end|>\u203a" in out
    assert "\u241b[31m" in out and "<U+202E>" in out and "\u23ce\n\u65e5\u672c<|end|>\u203a" in out
    assert f"-- {rows}:1: " in out and "in 1 turn" in out
    assert "4 rows read, 2 conversations kept" in out and "1 x invalid JSON" in out and "1 x unknown fields" in out
    assert "50.0% of the rows are bad" in out and "--max-bad-share 5.0%" in out
    assert "50.0% of the rows" not in run("--max-bad-share", "0.5")[1]


def test_colours_say_the_same_as_signs(run: Run, monkeypatch: pytest.MonkeyPatch):
    plain = run("--samples", "2")[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = run("--samples", "2")[1]
    assert "\x1b[30;42m file" in coloured and "\x1b[30;43mthe" in coloured
    bare = re.sub("\x1b\\[[0-9;]*m", "", coloured)
    first = bare.split("\n\n")[0]
    assert first == re.sub("[\u2039\u00a6\u203a]", "", plain).split("\n\n")[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert run("--samples", "2")[1] == plain
    monkeypatch.delenv("NO_COLOR")
    assert run("--samples", "2", "--no-color")[1] == plain


def test_skip_and_samples_choose_what_is_shown_and_scan_what_is_counted(run: Run, rows: Path):
    _, out, _ = run("--skip", "1", "--samples", "1", "--scan", "1")
    assert f"-- {rows}:2: " in out and ":1: " not in out and "1 rows read, 1 conversations kept" in out
    _, out, _ = run("--samples", "0")
    assert "--" not in out.splitlines()[0] and "4 rows read" in out


def test_rows_of_several_sources_keep_their_columns(run: Run, rows: Path, tmp_path: Path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"frage": "two", "antwort": "one"}) + "\n")
    status, out, _ = run(f"{other},prompt=frage,response=antwort", "--max-bad-share", "1")
    assert status == 0 and "<|user|>two<|end|><|assistant|>\u2039one\u00a6<|end|>\u203a" in out


def test_the_page_is_one_file_that_holds_the_hostile_row_harmlessly(run: Run, tmp_path: Path):
    page = tmp_path / "page.html"
    status, _, err = run("--html", str(page))
    assert status == 0 and err == f"wrote {page}\n"
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;" in text and "invalid JSON" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--samples", "-1"), ("--samples -1", "at least 0")),
        (("--skip", "-1"), ("--skip -1",)),
        (("--scan", "0"), ("--scan 0", "at least 1")),
        (("--max-length", "1"), ("--max-length 1", "at least 2")),
        (("--skip", "9"), ("--skip 9", "has only 4 rows")),
        (("--html", "nowhere/page.html"), ("--html nowhere/page.html", "does not exist")),
        (("--html", "."), ("--html .", "is a folder")),
        (("--chat-arguments", "no"), ("--chat-arguments", "JSON object")),
        (("--tokenizer", "./nowhere"), ("./nowhere", "does not exist")),
        (("--sample", "1"), ("--sample",)),
    ],
)
def test_wrong_arguments_end_with_one_line(run: Run, arguments: tuple[str, ...], says: tuple[str, ...]):
    status, out, err = run(*arguments)
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in says), err


def test_missing_and_useless_sources_are_refused(run: Run, tmp_path: Path):
    assert "SOURCE='nowhere.jsonl' does not exist" in run(source="nowhere.jsonl")[2]
    useless = tmp_path / "useless.jsonl"
    useless.write_text('{"a": 1}\n')
    status, out, err = run("--html", str(tmp_path / "page.html"), source=str(useless))
    assert status == 2 and "unknown fields" in out and "none of 1 rows" in err
    assert not (tmp_path / "page.html").exists()
    useless.write_text("\n\n")
    assert "has no rows" in run(source=str(useless))[2]


def test_an_output_that_knows_no_unicode_does_not_end_the_script(rows: Path):
    command = [sys.executable, str(ROOT / "data_prep" / "02_preview.py"), str(rows)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert b"\\u65e5\\u672c" in done.stdout
