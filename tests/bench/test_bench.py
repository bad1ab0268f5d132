"""The command bench: prompts of every format, figures that a seed decides, records that survive a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spd_lightning import cli
from spd_lightning.bench import measure as measure_module
from spd_lightning.bench.measure import Row
from spd_lightning.bench.prompts import Prompt, read_prompts, spread
from spd_lightning.bench.record import bootstrap, figures
from spd_lightning.decoding.checks import Divergence
from spd_lightning.errors import InputError
from spd_lightning.export.background import metrics_of_bench
from spd_lightning.head.folder import save_head
from spd_lightning.head.loading import load_head, new_head
from spd_lightning.target.loading import load_target

QUESTIONS = [{"question_id": i, "category": "ab"[i % 2], "turns": [f"the list {i}", "of the path"]} for i in range(6)]
#: What a seed decides, of a metric and of a row.
FIGURES = ("acceptance", "acceptance_interval", "accepted_per_restart", "theoretical_speedup", "cycles", "new_tokens",
           "theoretical_speedup_interval", "equivalent_accept_length", "identical", "ties", "mismatches")  # fmt: skip
Bench = Callable[..., int]


@pytest.fixture(scope="module")
def head_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "head"
    save_head(new_head(load_target(model_folder, num_stages=4), num_layers=1), folder)
    return folder


@pytest.fixture
def bench(model_folder: Path, head_folder: Path, tmp_path: Path) -> Bench:
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))

    def run(output: str, *options: str, prompts: Path = path) -> int:
        start = ["bench", "--target", str(model_folder), "--head", str(head_folder), "--prompts", str(prompts)]
        return cli.main([*start, "--max-new-tokens", "12", "--output", str(tmp_path / output), *options])

    return run


def record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def decided(content: dict[str, Any]) -> Any:
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in content["rows"]]
    return [{name: metric[name] for name in FIGURES} for metric in content["metrics"]], rows


def test_a_seed_decides_every_figure_but_time(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("one.json", "--temperature", "0", "1", "--repeats", "2") == 0
    assert bench("two.json", "--temperature", "0", "1") == 0
    assert bench("other.json", "--temperature", "0", "1", "--seed", "5") == 0
    one, two, other = (record(tmp_path / f"{name}.json") for name in ("one", "two", "other"))
    assert decided(one) == decided(two)
    sampled = [[row["cycles"] for row in r["rows"] if row["temperature"] == 1] for r in (one, other)]
    assert sampled[0] != sampled[1]
    assert {(m["category"], m["temperature"], m["count"]) for m in one["metrics"]} == {
        (None, 0, 6), ("a", 0, 3), ("b", 0, 3), (None, 1, 6), ("a", 1, 3), ("b", 1, 3),
    }  # fmt: skip
    whole = one["metrics"][0]
    assert whole["identical"] == 6 and whole["mismatches"] == 0 and whole["wall_clock_speedup"] is None
    assert whole["equivalent_accept_length"] == pytest.approx(4 * whole["new_tokens"] / whole["cycles"])
    assert whole["acceptance"] == pytest.approx(whole["drafts_accepted"] / whole["drafts_verified"])
    first = one["rows"][0]
    assert first["acceptance"] == first["drafts_accepted"] / first["drafts_verified"]
    assert first["theoretical_speedup"] == 4 * (first["new_tokens"] - 1) / first["cycles"]
    assert one["machine"]["cores"] and one["target"]["tokenizer_digest"] and one["prompt_sets"][0]["sha256"]
    assert str(tmp_path) not in json.dumps(one)
    out = capsys.readouterr().out
    assert "equivalent accept length" in out and "…" not in out
    assert (tmp_path / "one.md").read_text().count("\n") == 8
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_other_prompts_change_nothing_about_a_prompt(bench: Bench, tmp_path: Path) -> None:
    assert bench("all.json", "--temperature", "1") == 0
    assert bench("some.json", "--temperature", "1", "--limit", "2") == 0
    rows = {row["key"]: row for row in record(tmp_path / "all.json")["rows"]}
    some = record(tmp_path / "some.json")["rows"]
    assert len(some) == 2 and {row["category"] for row in some} == {"a", "b"}
    for row in some:
        assert row["cycles"] == rows[row["key"]]["cycles"]


def test_an_interrupted_bench_goes_on_where_it_was(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("whole.json", "--temperature", "0", "1", "--warmup", "0") == 0
    before, calls = measure_module.measure, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return before(*arguments)

    monkeypatch.setattr(measure_module, "measure", interrupted)
    assert bench("cut.json", "--temperature", "0", "1", "--warmup", "0") == 130
    assert "4 rows are kept: the same command goes on" in capsys.readouterr().err
    journal = tmp_path / ".cut.json.journal"
    with open(journal, "ab") as stream:  # a kill in the middle of a line
        stream.write(b'{"rows": [{"prom')
    calls.clear()
    monkeypatch.setattr(measure_module, "measure", lambda *arguments: calls.append(arguments) or before(*arguments))
    assert bench("cut.json", "--temperature", "0", "1", "--warmup", "0", "--seed", "3") == 2
    assert "settings.seed was 0, now 3" in capsys.readouterr().err
    assert bench("cut.json", "--temperature", "0", "1", "--warmup", "0") == 0
    assert len(calls) == 12 - 4
    assert decided(record(tmp_path / "cut.json")) == decided(record(tmp_path / "whole.json"))
    assert not journal.exists()


def test_a_mismatch_is_told_and_is_exit_status_1(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_module, "lossless_divergence", lambda *_: Divergence(3, 1, 2, 0.5, False))
    assert bench("wrong.json", "--limit", "2") == 1
    assert "NOT LOSSLESS: 2 greedy outputs differ" in capsys.readouterr().out


def test_later_turns_see_the_heads_own_answers(bench: Bench, tmp_path: Path) -> None:
    assert bench("turns.json", "--turns", "all", "--limit", "2") == 0
    rows = record(tmp_path / "turns.json")["rows"]
    assert [row["turn"] for row in rows] == [1, 2, 1, 2]
    assert rows[1]["prompt_tokens"] > rows[0]["prompt_tokens"] + rows[0]["new_tokens"] / 2
    assert record(tmp_path / "turns.json")["metrics"][0]["count"] == 2


def test_the_record_puts_its_figures_on_the_card_of_its_own_head_alone(
    bench: Bench, tmp_path: Path, head_folder: Path
) -> None:
    assert bench("bench.json", "--limit", "2") == 0
    head = load_head(head_folder)
    found = metrics_of_bench(tmp_path / "bench.json", [head])
    assert found[0].acceptance == record(tmp_path / "bench.json")["metrics"][0]["acceptance"]
    assert found[0].identical == 2 and found[0].commit == record(tmp_path / "bench.json")["commit"]
    head.lm_head.weight.data[0] += 1
    with pytest.raises(InputError, match="measured another head"):
        metrics_of_bench(tmp_path / "bench.json", [head])


def test_prompts_that_exceed_the_context_are_left_out_and_counted(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("the list\n" + "name " * 3000 + "\n")
    assert bench("long.json", prompts=path) == 0
    assert "1 prompts exceed the context" in capsys.readouterr().err
    described = record(tmp_path / "long.json")["prompt_sets"][0]
    assert (described["available"], described["used"], described["too_long"]) == (2, 1, 1)
    path.write_text("name " * 3000 + "\n")
    assert bench("none.json", prompts=path) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-new-tokens", "1"], "--max-new-tokens 1: expected at least 2"),
        (["--limit", "0"], "--limit 0"),
        (["--temperature", "0", "0"], "distinct"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--raw", "--turns", "all"], "--raw has no turns"),
        (["--output", "record.txt"], "ends in .json"),
        (["--output", "nowhere/record.json"], "does not exist"),
        (["--prompts", "nothere.jsonl"], "nothere.jsonl cannot be read"),
    ],
)
def test_wrong_arguments_are_one_line(bench: Bench, capsys: Any, options: list[str], says: str) -> None:
    assert bench("x.json", *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line


# -- prompts -----------------------------------------------------------------------------------------------------------

LINES = {
    "Spec-Bench": {"question_id": 81, "category": "writing", "turns": ["one", "two"]},
    "GSM8K": {"question": "one", "answer": "2"},
    "HumanEval": {"task_id": "HumanEval/0", "prompt": "one"},
    "chat": {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "one"},
                          {"role": "assistant", "content": "two"}]},
}  # fmt: skip


@pytest.mark.parametrize("form", LINES)
def test_a_format_is_seen_by_its_fields(tmp_path: Path, form: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\ufeff" + json.dumps(LINES[form]) + "\r\n\n", encoding="utf-8")
    found = read_prompts(path)
    assert found.format == form and found.available == 1
    assert found.prompts[0].turns[0] == "one"
    assert found.prompts[0].before == ((("system", "be"),) if form == "chat" else ())


def test_conversations_of_the_other_form_are_read_and_odd_characters_stay_in_their_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    row = {"messages": None, "conversations": [{"from": "human", "value": "a\u2028b"}]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(path).prompts[0].turns == ("a\u2028b",)
    text = tmp_path / "lines.txt"
    text.write_text("a\x0cb\nc\n")
    assert [prompt.turns for prompt in read_prompts(text).prompts] == [("a\x0cb",), ("c",)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is no JSON"), ("[1]", "expected a JSON object"), ('{"turns": []}', "expected a field turns"),
        ('{"turns": [1]}', "expected a field turns"), ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the user says nothing"), ('{"a": 1}', "found ['a']"),
    ],
)  # fmt: skip
def test_a_line_of_no_format_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(LINES["GSM8K"]) + "\n" + line + "\n")
    with pytest.raises(InputError, match="line 2") as caught:
        read_prompts(path)
    assert says in str(caught.value)


def test_a_limit_covers_all_categories_evenly() -> None:
    prompts = [Prompt(str(i), "abc"[i // 40], ("x",)) for i in range(100)]
    chosen = spread(prompts, 12)
    assert [p.category for p in chosen] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert [int(p.key) for p in chosen[:4]] == [5, 15, 25, 35]
    assert spread(prompts, 200 - 100) == prompts


# -- figures -----------------------------------------------------------------------------------------------------------


def row(key: str, new: int, cycles: int, verified: int, accepted: int) -> Row:
    return Row("set", key, None, 1, 0.0, 3, new, cycles, verified, accepted, 0.1, 1.0, new, 0.1, 0.5, "identical")


def test_ratios_are_pooled_and_not_averaged() -> None:
    rows = [row("a", 11, 20, 10, 9), row("b", 101, 400, 100, 20)]
    (found,) = figures(rows, 8, 0)
    assert found["acceptance"] == 29 / 110 and found["accepted_per_restart"] == 29 / 81
    assert found["theoretical_speedup"] == 8 * 110 / 420 and found["equivalent_accept_length"] == 8 * 112 / 420
    assert found["tokens_per_second"] == 110 / 2 and found["plain_tokens_per_second"] == 110 / 1


def test_the_bootstrap_covers_what_it_should() -> None:
    random, inside = np.random.default_rng(0), 0
    for trial in range(200):
        counts = np.zeros((40, 5))
        counts[:, 2] = 50
        counts[:, 3] = random.binomial(50, random.beta(6, 4, 40))
        low, high = bootstrap(counts, lambda s: (s[:, 3], s[:, 2]), trial) or (1.0, 0.0)
        inside += low <= 0.6 <= high
    assert 180 <= inside <= 199  # of 200 at 95 %
    assert bootstrap(np.ones((1, 5)), lambda s: (s[:, 3], s[:, 2]), 0) is None


def test_two_processes_do_not_share_a_journal(bench: Bench, tmp_path: Path, capsys: Any) -> None:
    from filelock import FileLock

    with FileLock(str(tmp_path / ".x.json.journal.lock")):
        assert bench("x.json") == 2
    assert "another process writes" in capsys.readouterr().err


def test_bench_imports_nothing_of_training(model_folder: Path, head_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("the list\n")
    arguments = ["bench", "--target", str(model_folder), "--head", str(head_folder), "--prompts", "p.txt"]
    code = (
        f"import sys\nfrom spd_lightning import cli\nassert cli.main({[*arguments, '--max-new-tokens', '4']!r}) == 0\n"
        "print([n for n in ('lightning', 'deepspeed', 'wandb', 'datasets') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.strip().endswith("[]"), done.stderr
