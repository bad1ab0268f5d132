"""The speed model: acceptance by fill, what it makes of S, and which designs it prefers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from spd_lightning import cli
from spd_lightning.decoding.simulator import simulate
from spd_lightning.errors import InputError
from spd_lightning.speed.acceptance import Acceptance, given, of_runs
from spd_lightning.speed.hardware import HardwareProfile, HeadCosts, LinkCosts, profile_files, read_profile
from spd_lightning.speed.model import Design, best_split, costs_of, designs, expected_acceptance, predict, rescaled
from spd_lightning.staircase import long_run_speedup

PROFILE = HardwareProfile(
    target="made up", device="made up", dtype="float32", plain=17.0, embedding=0.2, layers=(2.0,) * 8,
    verification=0.8, head=HeadCosts(0.1, 0.5, 0.01, 0.05), link=LinkCosts(0.05, 0.02, 0.01), vocabulary=4096,
    measured=True,
)  # fmt: skip


def played(by_fill: Sequence[float], seed: int) -> Iterator[bool]:
    """Verdicts of a generation without end, drawn."""
    draw, since = random.Random(seed), 0
    while True:
        since += 1
        accepted = draw.random() < by_fill[min(since, len(by_fill)) - 1]
        yield accepted
        since = since if accepted else 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [None, 1, 60])
def test_a_prediction_is_the_mean_of_generations_played_with_drawn_verdicts(seed: int, length: int | None) -> None:
    draw = random.Random(seed)
    n = draw.randint(2, 8)
    by_fill = [draw.uniform(0.4, 0.95) for _ in range(n)]
    profile = replace(PROFILE, layers=tuple(draw.uniform(0.5, 3.0) for _ in range(n)))
    design = Design((1,) * n, 1, 2, 100, head_alone=draw.random() < 0.5)
    predicted = predict(profile, design, by_fill, length)
    tokens, times = 4000, 1 if length is None else 4000 // length
    flags = [list(islice(played(by_fill, 100 * seed + i), length or tokens)) for i in range(times)]
    runs = [simulate(costs_of(profile, design), one, len(one)) for one in flags]
    new, cycles, seconds = sum(map(len, flags)), sum(one.cycles for one in runs), sum(one.seconds for one in runs)
    assert predicted.acceptance == pytest.approx(sum(map(sum, flags)) / new, abs=0.025)
    assert pytest.approx(n * new / cycles, rel=0.06) == predicted.S
    assert predicted.cycle_ms == pytest.approx(1e3 * seconds / cycles, rel=0.02)
    assert predicted.tokens_per_second == pytest.approx(1e3 * predicted.S / n / predicted.cycle_ms)
    if length is None:
        assert predicted.acceptance == pytest.approx(expected_acceptance(by_fill))
        assert pytest.approx(long_run_speedup(n, predicted.acceptance)) == predicted.S


def test_one_share_for_every_fill_is_itself() -> None:
    assert expected_acceptance([0.8]) == pytest.approx(0.8) == expected_acceptance([0.8] * 5)
    assert expected_acceptance([0.9, 1.0]) == 1.0 and expected_acceptance([0.0, 1.0]) == 0.0
    assert rescaled([0.7], 5) == (0.7,) * 5


def test_other_numbers_of_stages_take_the_value_of_the_same_share_of_the_pipeline() -> None:
    by_fill = (0.9, 0.8, 0.7, 0.6)
    assert rescaled(by_fill, 4) == pytest.approx(by_fill)
    assert rescaled(by_fill, 2) == pytest.approx((0.8, 0.6))
    assert rescaled(by_fill, 8) == pytest.approx((0.9, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6))


def test_between_known_numbers_of_stages_the_logarithm_counts_and_outside_the_nearest() -> None:
    known = Acceptance({4: (0.8,), 16: (0.6,)}, "given")
    assert known.of(8) == pytest.approx((0.7,) * 8) and known.of(2) == (0.8,) * 2 and known.of(32) == (0.6,) * 32
    assert known.assumed(8) and not known.assumed(4)


def test_a_cycle_is_as_long_as_its_slowest_rank_and_a_head_beside_it_counts() -> None:
    beside = predict(PROFILE, Design((4, 4), 4, 3, 1000), [1.0])
    alone = predict(PROFILE, Design((4, 4), 4, 3, 1000, head_alone=True), [1.0])
    head = 0.1 + 4 * 0.5 + 6 * 0.01 + 0.05
    assert beside.head_ms == pytest.approx(head)
    assert beside.cycle_ms == pytest.approx(8.2 + head + 0.05, rel=0.01)
    assert alone.cycle_ms == pytest.approx(8.8 + 0.02 + 0.05, rel=0.01)
    assert alone.head_hidden and not beside.head_hidden
    slow = replace(PROFILE, head=replace(PROFILE.head, layer=5.0))
    assert not predict(slow, Design((4, 4), 4, 3, 1000, head_alone=True), [1.0]).head_hidden


def test_the_best_split_gives_the_first_stage_fewer_layers_where_the_head_sits_there() -> None:
    assert best_split(PROFILE, 2, head_ms=4.0, head_alone=False) == (3, 5)
    assert best_split(PROFILE, 2, head_ms=4.0, head_alone=True) == (4, 4)
    made = list(designs(PROFILE, [2, 4], [1, 2], 1000))
    assert {d.num_stages for d in made} == {2, 4} and {d.head_alone for d in made} == {True, False}
    assert len(made) == len(set(made))


def test_given_acceptances_are_by_fill_and_the_last_holds_for_fuller_pipelines() -> None:
    assert given(["8:0.9,0.85,0.8"]).of(8) == (0.9, 0.85, *[0.8] * 6)
    assert given(["0.9,0.85"]).of(8) == (0.9, 0.85) and given(["2:0.9"]).of(2) == (0.9, 0.9)
    with pytest.raises(InputError, match="2:0.9,0.8,0.7: 3 shares, but no more than 2 tokens"):
        given(["2:0.9,0.8,0.7"])


@pytest.mark.parametrize("word", ["1.5", "x", "8:", "1:0.5", "0.8,", "-0.1"])
def test_wrong_acceptances_are_named(word: str) -> None:
    with pytest.raises(InputError, match="--acceptance .*: expected shares"):
        given([word])


def test_acceptance_of_a_run_is_that_of_its_greedy_decoding(tmp_path: Path) -> None:
    row = {"drafter": "trained head", "temperature": 0.0, "num_stages": 3, "acceptance": 0.5}
    row["by_fill"] = [{"fill": 1, "top1": 0.6, "count": 5}, {"fill": 3, "top1": 0.4, "count": 5}]
    (tmp_path / "run.json").write_text(json.dumps({"results": {"final": [row]}}))
    assert of_runs([tmp_path]).of(3) == (0.6, 0.5, 0.4)
    with pytest.raises(InputError, match="another run has 3 stages too"):
        of_runs([tmp_path, tmp_path])
    with pytest.raises(InputError, match="no run whose final decoding"):
        of_runs([tmp_path / "none"])


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_profile_is_read_as_it_was_written_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    PROFILE.write(path)
    assert read_profile(str(path), "--hardware") == PROFILE
    content = json.loads(path.read_text())
    for changes, says in (
        ({"format": "x"}, "format"),
        ({"plain": -1}, "plain=-1, expected milliseconds"),
        ({"layers": []}, "layers must not be empty"),
        ({"vocabulary": "many"}, "vocabulary='many'"),
        ({"head": {"fixed": 1}}, "'layer' is missing"),
    ):
        path.write_text(json.dumps(content | changes))
        with pytest.raises(InputError) as caught:
            read_profile(str(path), "decoding.hardware")
        assert says in str(caught.value) and "decoding.hardware" in str(caught.value)
    with pytest.raises(InputError, match="no such file, and no profile of that name"):
        read_profile("nothing", "--hardware")


def test_shipped_profiles_say_where_they_come_from() -> None:
    names = profile_files()
    assert {"cpu_tiny", "tiny_gpu", "llama31_h100"} <= set(names)
    for name in names:
        profile = read_profile(name, "--hardware")
        assert profile.made["argv"] and profile.made["date"]
        assert profile.measured == (name == "cpu_tiny")


def test_a_profile_of_a_bandwidth_counts_bytes(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    words = ["profile", "--target", "tiny", "--bandwidth", "1GB/s", "--achieved", "1", "--launch-ms", "0"]
    assert cli.main([*words, "--dtype", "float32", "--output", str(out)]) == 0
    profile = read_profile(str(out), "--hardware")
    from spd_lightning.target.loading import load_target

    target = load_target("tiny")
    layer = sum(p.numel() for p in target.layer(0).parameters())
    assert profile.layers == pytest.approx([4e-6 * layer] * 8) and not profile.measured
    assert profile.head.thousand_ids == pytest.approx(4e-6 * 1000 * target.hidden_size)


# -- commands --------------------------------------------------------------------------------------------------------


def test_plan_tells_what_to_train_and_where_the_head_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PROFILE.write(tmp_path / "p.json")
    words = ["plan", "--config", "tiny", "--device", "cpu", "--gpus", "1", "--hardware", str(tmp_path / "p.json")]
    assert cli.main([*words, "--acceptance", "0.8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Predicted tokens/s" in text and "tokens/s, " in text and "head alone: train model.num_stages=" in text
    assert cli.main([*words, "--acceptance", "4:0.8", "8:0.7", "--stages", "2-4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["decoding"]
    assert {len(d["design"]["stage_layers"]) for d in found["designs"]} == {2, 3, 4}
    fastest = max(found["designs"], key=lambda d: d["tokens_per_second"])
    assert found["best"] == fastest and len(found["advice"]) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--acceptance", "0.8"], "--acceptance says how many drafts are accepted; give --hardware too"),
        (["--hardware", "p.json"], "--hardware needs --acceptance P or --run DIR"),
        (["--hardware", "p.json", "--acceptance", "0.8", "--stages", "9-16"], "the target has 8 layers"),
        (["--hardware", "p.json", "--acceptance", "0.8", "--stages", "x"], "--stages x: expected a range"),
        (["--hardware", "short.json", "--acceptance", "0.8"], "a profile of made up with 2 layers, but the target has"),
    ],
)
def test_wrong_flags_of_plan_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    PROFILE.write(Path("p.json"))
    replace(PROFILE, layers=(1.0, 1.0)).write(Path("short.json"))
    assert cli.main(["plan", "--config", "tiny", "--device", "cpu", "--gpus", "1", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--output", "x.txt"], "--output x.txt: expected a name that ends in .json"),
        (["--output", "no/x.json"], "the folder no does not exist"),
        (["--output", "x.json", "--workers", "0"], "--workers 0: expected at least 1"),
        (["--output", "x.json", "--bandwidth", "fast"], "--bandwidth fast: expected a size"),
        (["--output", "x.json", "--bandwidth", "1GB/s", "--achieved", "2"], "--achieved 2: expected a share"),
        (["--output", "x.json", "--achieved", "0.5"], "--achieved 0.5: it belongs to --bandwidth"),
        (
            ["--output", "x.json", "--bandwidth", "1GB/s", "--workers", "2"],
            "--workers 2: nothing runs with --bandwidth",
        ),
        (["--output", "x.json", "--workers", "9"], "--workers 9: expected at most 8, one for each layer"),
        (["--output", "x.json", "--bandwidth", "1GB/s", "--quantization", "4bit"], "--quantization 4bit: what"),
    ],
)
def test_wrong_flags_of_profile_are_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "--target", "tiny", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_profile_measures_this_machine_on_two_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "here.json"
    assert cli.main(["profile", "--target", "tiny", "--workers", "2", "--output", str(out)]) == 0
    profile = read_profile(str(out), "--hardware")
    assert profile.measured and len(profile.layers) == 8 and profile.made["ranks"] == 2
    assert profile.link.send > 0 and profile.link.latency > 0 and profile.link.tell > 0
    # a token of plain decoding goes through all of it
    assert 0.2 < (sum(profile.layers) + profile.embedding + profile.verification) / profile.plain < 5
    assert "final norm, lm_head, verdict" in capfd.readouterr().out
