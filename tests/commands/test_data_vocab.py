"""The command data vocab: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd_lightning import cli
from spd_lightning.head.vocabulary import read_draft_vocabulary

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_CACHE", str(tmp_path_factory.getbasetemp() / "tokens"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], data_files: dict[str, str], model_folder: Path, tmp_path: Path) -> Run:
    """Runs the command on the tiny data; returns status, stdout, stderr."""

    def call(*arguments: str, source: str = data_files["train"], out: str = "v.json") -> tuple[int, str, str]:
        given = [source, "--tokenizer", str(model_folder), "--out", str(tmp_path / out), *arguments]
        status = cli.main(["data", "vocab", *given])
        return (status, *capsys.readouterr())

    return call


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_size_gives_that_many_ids_and_special_tokens_are_among_them(
    run: Run, tmp_path: Path, data_files: dict[str, str]
):
    status, out, err = run("--size", "40", "--heldout", data_files["validation"])
    assert status == 0 and not err
    found = content(tmp_path / "v.json")
    assert len(read_draft_vocabulary(tmp_path / "v.json", found["vocab_size"])) == found["size"] == 40
    assert set(range(5)) <= set(found["token_ids"])
    assert "40 of" in out and "5 of them special" in out and "missed" in out and "upper bound" in out
    assert "--target measures its time" in out
    provenance = found["provenance"]
    assert provenance["sources"]["train"][0]["path"] == data_files["train"]
    assert provenance["sources"]["heldout"][0]["path"] == data_files["validation"]
    assert provenance["argv"][:3] == ["spd-lightning", "data", "vocab"]
    assert provenance["labels"]["train"] > provenance["labels"]["heldout"] > 0
    assert provenance["chat"]["turns"] == "all" and len(provenance["stores"]["train"]) == 20
    assert provenance["versions"]["transformers"] and provenance["date"].startswith("20")


def test_a_coverage_is_reached_and_the_split_keeps_a_share_apart(run: Run, tmp_path: Path):
    status, out, _ = run("--coverage", "0.9", "--heldout-share", "0.3")
    assert status == 0
    found = content(tmp_path / "v.json")
    assert found["coverage"]["train"] >= 0.9 and 0 < found["coverage"]["heldout"] <= 1
    first = found["provenance"]["stores"]
    assert first["train"] != first["heldout"] and found["provenance"]["heldout_share"] == 0.3
    assert run("--coverage", "1")[0] == 0
    found = content(tmp_path / "v.json")
    assert found["coverage"]["train"] == 1.0 and found["provenance"]["heldout_share"] == 0.05
    unseen = [token for token, count in zip(found["token_ids"], found["counts"], strict=True) if not count]
    assert set(unseen) <= set(range(5)), "an id that never occurs is in only if it is special"
    assert run("--coverage", "0.001")[0] == 0
    assert content(tmp_path / "v.json")["token_ids"] == [0, 1, 2, 3, 4], "special tokens stay, whatever the coverage"


def test_the_two_sides_of_the_split_hold_all_labels_once(run: Run, tmp_path: Path, data_files: dict[str, str]):
    run("--size", "40", "--heldout-share", "0.3")
    split = content(tmp_path / "v.json")["provenance"]["labels"]
    run("--size", "40", "--heldout", data_files["validation"])
    assert sum(split.values()) == content(tmp_path / "v.json")["provenance"]["labels"]["train"]


def test_a_target_gives_vocabulary_ends_and_the_time_of_its_lm_head(
    run: Run, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / "target"
    shutil.copytree(model_folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 200, 501, 700]}))
    status, out, _ = run("--coverage", "0.5", "--target", str(target))
    assert status == 0 and "lm_head: median time of [1, 32] x [32, ids]" in out and " ms" in out
    found = content(tmp_path / "v.json")
    assert found["vocab_size"] == 512 and {200, 501} <= set(found["token_ids"]) and 700 not in found["token_ids"]


def test_the_tokenizer_is_the_targets_where_none_is_named(
    tmp_path: Path, data_files: dict[str, str], model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "v.json"
    assert cli.main(["data", "vocab", data_files["train"], "--target", str(model_folder), "--size", "50", "--out",
                     str(out)]) == 0  # fmt: skip
    assert content(out)["provenance"]["tokenizer"] == str(model_folder)


def test_the_embedded_target_runs_as_the_readme_of_the_step_says(tmp_path: Path):
    script = ROOT / "data_prep" / "04_vocabulary.py"
    command = [sys.executable, str(script), "documentation:heldout", "--target", "tiny", "--size", "1024"]
    done = subprocess.run([*command, "--out", str(tmp_path / "v.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:10])) <= 80, "the table must fit a narrow terminal"
    assert len(read_draft_vocabulary(tmp_path / "v.json", 4096)) == 1024


def test_weights_of_sources_are_named_as_not_used(run: Run, data_files: dict[str, str]):
    assert "weights of sources are not used" in run("--size", "40", source=f"{data_files['train']},weight=2")[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ("--size N or --coverage X", "exactly one")),
        (("--size", "40", "--coverage", "0.9"), ("exactly one",)),
        (("--coverage", "0"), ("--coverage 0.0", "above 0 and at most 1")),
        (("--coverage", "1.01"), ("--coverage 1.01",)),
        (("--coverage", "nan"), ("--coverage nan",)),
        (("--size", "0"), ("--size 0", "at least 1")),
        (("--size", "100000"), ("--size 100000", "at most")),
        (("--size", "4"), ("--size 4", "at least 5, the special tokens")),
        (("--size", "40", "--heldout-share", "1"), ("--heldout-share 1.0", "between 0 and 1")),
        (("--size", "40", "--heldout-share", "0.1", "--heldout", "x.jsonl"), ("at most one",)),
        (("--size", "40", "--heldout", "x.jsonl"), ("--heldout='x.jsonl'", "does not exist")),
        (("--size", "40", "--heldout-share", "1e-9"), ("--heldout-share 1e-09", "none of 40 rows")),
        (("--size", "40", "--max-length", "1"), ("--max-length 1",)),
        (("--size", "40", "--workers", "-1"), ("--workers -1",)),
        (("--size", "40", "--num-stages", "0"), ("--num-stages 0",)),
        (("--size", "40", "--target", "./nowhere"), ("./nowhere", "does not exist")),
        (("--size", "40", "--heldou", "0.1"), ("--heldou",)),
    ],
)
def test_wrong_arguments_end_with_one_line_and_write_nothing(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], says: tuple[str, ...]
):
    status, out, err = run(*arguments)
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in says), err
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_and_a_folder_in_the_way_are_refused(run: Run, tmp_path: Path):
    assert "does not exist" in run("--size", "40", out="nowhere/v.json")[2]
    (tmp_path / "taken").mkdir()
    assert "is a folder" in run("--size", "40", out="taken")[2]


def test_heldout_rows_without_a_drafted_token_are_refused(
    run: Run, tmp_path: Path, write_lines: Callable[..., Path], make_tokenizer: Callable[..., Any]
):
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "the list of the path"}]
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": messages}])
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "the list of the path"}])
    length = len(make_tokenizer()("<|user|>the<|end|><|assistant|>")["input_ids"]) + 1
    given = ("--size", "40", "--heldout", str(chats), "--max-length", str(length))
    status, _, err = run(*given, source=str(texts))
    assert status == 2 and "--heldout: 1 of 1 rows are bad" in err and "no labelled token (but the first" in err


def test_a_tokenizer_that_is_not_the_targets_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                         model_folder: Path):  # fmt: skip
    given = ["documentation:heldout", "--tokenizer", "tiny", "--target", str(model_folder), "--coverage", "0.9"]
    assert cli.main(["data", "vocab", *given, "--out", str(tmp_path / "v.json")]) == 2
    assert "--tokenizer tiny makes id" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["vocab", "preview"])
def test_help_is_light(step: str):
    code = (
        "import sys; from spd_lightning.cli import main; assert main(['data', sys.argv[1], '--help']) == 0; "
        "heavy = {'numpy', 'torch', 'transformers', 'datasets', 'rich', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, step], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 120
