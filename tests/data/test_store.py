"""Stores of tokens: right, shared, rebuilt when stale, complete or not there at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spd_lightning.data import store as module
from spd_lightning.data.chat import ChatOptions
from spd_lightning.data.cleaning import Cleaner, Cleaning
from spd_lightning.data.sources import Source
from spd_lightning.data.store import Encoding, TokenStore, open_store
from spd_lightning.errors import InputError

Conversations = Callable[..., list[list[dict[str, str]]]]
WriteLines = Callable[[Path, Iterable[Any]], Path]


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, make_conversations: Conversations, write_lines: WriteLines
) -> Path:
    """600 conversations: several chunks."""
    path = tmp_path_factory.mktemp("corpus") / "chats.jsonl"
    return write_lines(path, ({"messages": messages} for messages in make_conversations(600, 5)))


@pytest.fixture
def encoding(corpus: Path, model_folder: Path) -> Encoding:
    return Encoding(Cleaner((Source(str(corpus)),)), str(model_folder), max_length=64)


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def test_a_store_holds_what_the_encoder_says_sample_by_sample(encoding: Encoding, corpus: Path, tmp_path: Path) -> None:
    stored = open_store(encoding, tmp_path, "data.train")
    expected = []
    for line in corpus.read_text().splitlines():
        expected += encoding.encoder(json.loads(line)["messages"])
    assert len(stored) == len(expected) == 600
    for index, (found, sample) in enumerate(zip(stored, expected, strict=True)):
        assert found == replace(sample, index=index)
    assert stored.lengths.tolist() == [len(sample) for sample in expected]
    figures = stored.manifest
    assert figures["tokens"] == sum(map(len, expected)) and figures["labels"] == sum(s.labels for s in expected)
    assert figures["largest_token"] == max(int(sample.ids.max()) for sample in expected)
    with pytest.raises(IndexError):
        stored[600]


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(encoding: Encoding, tmp_path: Path) -> None:
    files = [
        (open_store(encoding, tmp_path / str(workers), "x", workers).path / "samples.arrow").read_bytes()
        for workers in (0, 2)
    ]
    assert files[0] == files[1]


def test_a_second_opening_builds_nothing(encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_store(encoding, tmp_path, "x")
    monkeypatch.setattr(module, "_build", None)
    assert open_store(encoding, tmp_path, "x").path == first.path


def test_whatever_changes_the_tokens_changes_the_name(
    encoding: Encoding, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Path]
) -> None:
    source = encoding.cleaner.sources[0]
    other = tmp_path / "other.jinja"
    other.write_text((encoding.encoder.template or "") + "{# another #}")
    bench = tmp_path / "bench.jsonl"
    bench.write_text('{"question": "a question of no importance"}\n')

    def cleaned(**options: Any) -> Encoding:
        return replace(encoding, cleaner=replace(encoding.cleaner, **options), _encoder=None)

    variants = {
        "as it is": encoding,
        "length": replace(encoding, max_length=65, _encoder=None),
        "template": replace(encoding, chat=ChatOptions(template=str(other)), _encoder=None),
        "template arguments": replace(encoding, chat=ChatOptions(arguments={"x": 1}), _encoder=None),
        "turns": replace(encoding, chat=ChatOptions(turns="last"), _encoder=None),
        "split": cleaned(part="train", heldout_share=0.1),
        "share": cleaned(part="train", heldout_share=0.2),
        "side": cleaned(part="heldout", heldout_share=0.1),
        "tools": cleaned(cleaning=Cleaning(tools="keep")),
        "benchmarks": cleaned(cleaning=Cleaning(decontaminate=[str(bench)])),
        "columns": cleaned(sources=(replace(source, columns={"messages": "messages"}),)),
        "two sources": cleaned(sources=(source, source)),
    }
    names = {name: variant.fingerprint() for name, variant in variants.items()}
    tokenizer = encoding.encoder.tokenizer
    grown = replace(encoding, _encoder=None)
    grown.encoder.tokenizer.add_tokens(["<|new|>"])
    names["tokenizer"] = grown.fingerprint()
    renamed = replace(encoding, _encoder=None)
    renamed.encoder.tokenizer.eos_token = renamed.encoder.tokenizer.pad_token  # what templates read as eos_token
    names["special tokens"] = renamed.fingerprint()
    assert tokenizer is not grown.encoder.tokenizer is not renamed.encoder.tokenizer
    monkeypatch.setattr(module, "_code", lambda: "another version")
    names["code"] = encoding.fingerprint()
    monkeypatch.undo()
    os.utime(corpus, ns=(1, 1))
    names["file"] = encoding.fingerprint()
    assert len(set(names.values())) == len(names), names
    assert encoding.fingerprint() == names["file"], "the same again is the same"
    tolerant = cleaned(cleaning=Cleaning(max_bad_share=0.9), sources=(replace(source, weight=3.0),))
    assert tolerant.fingerprint() == names["file"], "weights and what is tolerated change no token"


def test_a_store_with_too_many_bad_rows_is_refused_again_when_it_is_opened_again(
    encoding: Encoding, tmp_path: Path, corpus: Path
) -> None:
    damaged = tmp_path / "damaged.jsonl"
    lines = corpus.read_text().splitlines(keepends=True)[:20]
    damaged.write_text("".join(lines) + "{oops\n{oops\n")

    def opened(share: float) -> TokenStore:
        cleaner = Cleaner((Source(str(damaged)),), Cleaning(max_bad_share=share))
        return open_store(replace(encoding, cleaner=cleaner, _encoder=None), tmp_path / "cache", "data.train")

    with pytest.raises(InputError, match=r"data\.train: 2 of 22 rows.*invalid JSON.*damaged\.jsonl:21"):
        opened(0.05)
    assert folders(tmp_path / "cache") == [], "nothing half-written stays"
    assert len(opened(0.5)) == 20
    with pytest.raises(InputError, match=r"2 of 22 rows"):
        opened(0.05)


def test_a_store_without_any_sample_is_refused_with_what_became_of_the_rows(
    encoding: Encoding, tmp_path: Path, write_lines: WriteLines
) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}] * 3)
    cleaner = Cleaner((Source(str(path)),), Cleaning(max_bad_share=1.0))
    with pytest.raises(InputError, match=r"data\.train: none of 3 rows.*3 x no assistant turn"):
        open_store(replace(encoding, cleaner=cleaner, _encoder=None), tmp_path / "c", "data.train")


def test_another_process_maps_the_file_itself(encoding: Encoding, tmp_path: Path) -> None:
    stored = open_store(encoding, tmp_path, "x")
    assert len(stored.lengths) == 600
    sent = pickle.dumps(stored)
    assert len(sent) < 10_000, "no token travels"
    assert pickle.loads(sent)[7] == stored[7]


def _open(encoding: Encoding, folder: Path, queue: Any) -> None:
    stored = open_store(encoding, folder, "x")
    queue.put((os.getpid(), stored.path.name, int(stored.lengths.sum()), stored.manifest["seconds"]))


def test_processes_that_start_together_build_one_store(encoding: Encoding, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_open, args=(encoding, tmp_path, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert len({figures[1:] for figures in found}) == 1, "one of them built it, all of them have it"
    assert len(folders(tmp_path)) == 1


def test_a_build_that_is_killed_leaves_nothing_that_looks_complete(
    encoding: Encoding, tmp_path: Path, corpus: Path
) -> None:
    large = tmp_path / "large.jsonl"
    large.write_text(corpus.read_text() * 40)
    encoding = replace(encoding, cleaner=Cleaner((Source(str(large)),)), _encoder=None)
    cache, job = tmp_path / "cache", tmp_path / "job"
    job.write_bytes(pickle.dumps(encoding))
    script = (
        "import pickle, sys; from pathlib import Path; from spd_lightning.data.store import open_store;"
        "open_store(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), 'x')"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(job), str(cache)])
    until = time.monotonic() + 60
    while not any(path.stat().st_size for path in cache.glob(".*/samples.arrow")) and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert all(name.startswith(".") for name in folders(cache)), "only under a temporary name"
    stored = open_store(encoding, cache, "x")
    assert len(stored) == 24_000 and folders(cache) == [stored.path.name], "what was left is cleared away"


def test_a_folder_that_cannot_be_written_is_refused_by_its_field(encoding: Encoding, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"data\.cache=.*cannot be written.*Set data\.cache"):
        open_store(encoding, tmp_path / "file" / "cache", "x")


def test_plain_texts_go_on_in_further_samples(encoding: Encoding, tmp_path: Path, write_lines: WriteLines) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": "the file opens the path " * 40}, {"text": "a line"}])
    stored = open_store(replace(encoding, cleaner=Cleaner((Source(str(path)),)), _encoder=None), tmp_path / "c", "x")
    tokens = encoding.encoder.tokenizer("the file opens the path " * 40, add_special_tokens=False)["input_ids"]
    pieces = list(stored)[:-1]
    assert np.concatenate([piece.ids for piece in pieces]).tolist() == tokens
    assert all(len(piece) <= 64 and piece.turns == ((0, len(piece)),) for piece in pieces) and len(pieces) > 1


def test_control_tokens_in_texts_are_counted(encoding: Encoding, tmp_path: Path, write_lines: WriteLines) -> None:
    rows = [{"prompt": "What is <|end|>?", "response": "A token."}, {"prompt": "Hello?", "response": "Hello."}]
    path = write_lines(tmp_path / "x.jsonl", rows)
    stored = open_store(replace(encoding, cleaner=Cleaner((Source(str(path)),)), _encoder=None), tmp_path / "c", "x")
    assert stored.tally.notes == {"text that holds control tokens of the tokenizer": 1}
