"""The pictures of a run: what the occupancy diagram shows is checked cell by cell, the rest by drawing it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from spd_lightning.decoding.decoder import CycleEvent
from spd_lightning.decoding.schedule import PipelineSchedule
from spd_lightning.report.plots import FATES, occupancy, plot_acceptance_by_fill, plot_occupancy, plot_training
from spd_lightning.staircase import Staircase, default_anchors


def simulate(num_stages: int, verdicts: list[bool]) -> tuple[list[CycleEvent], list[int]]:
    """Events of a decoder whose drafts meet these verdicts, and the tokens it emits; tokens are numbered as made."""
    stages = (1,) * num_stages
    schedule = PipelineSchedule(Staircase(stages, default_anchors(stages)), first_position=5)
    events, emitted, left, made = [CycleEvent(None, None, 0, None)], [0], list(verdicts), 1
    drafts: dict[int, int] = {}
    while left:
        plan = schedule.plan()
        token = accepted = None
        draft, made = made, made + 1
        if plan.leaving is not None:
            accepted = left.pop(0)
            token = drafts[plan.leaving + 1] if accepted else made
            made += not accepted
            emitted.append(token)
        if accepted is not False:
            drafts[plan.newest + 1] = draft
        schedule.advance(accepted)
        events.append(CycleEvent(plan, draft, token, accepted))
    return events, emitted


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert len(image.convert("RGB").getcolors(10**6) or []) > 5, "an empty picture"
        return image.size


def test_occupancy_of_two_stages_cell_by_cycle():
    events, emitted = simulate(2, [False, True])
    # cycle 0: the first token enters; 1: its draft 1 is found wrong; 2: the correction 3 enters; 3: draft 4 holds
    assert emitted == [0, 3, 4]
    assert occupancy(events, 2) == [
        [("restart", 0), ("empty", None)],
        [("rejected", 1), ("restart", 0)],
        [("restart", 3), ("empty", None)],
        [("accepted", 4), ("restart", 3)],
    ]


@pytest.mark.parametrize("num_stages", [2, 3, 8])
@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_only_tokens_that_stay_reach_the_last_stage_and_they_are_the_output(num_stages, rate):
    rng = random.Random(num_stages)
    events, emitted = simulate(num_stages, [rng.random() < rate for _ in range(40)])
    grid = occupancy(events, num_stages)
    assert len(grid) == len(events) - 1
    last = [row[-1] for row in grid if row[-1][0] != "empty"]
    assert {fate for fate, _ in last} <= {"accepted", "restart"}
    assert [token for _, token in last] == emitted[:-1]  # the final one was emitted, it never had to run
    for earlier, later in zip(grid, grid[1:], strict=False):
        for stage in range(num_stages - 1):  # a token moves on by one stage, unless it was flushed
            if earlier[stage][0] in ("accepted", "restart", "open"):
                assert later[stage + 1] == earlier[stage]
    assert all(cell[0] != "empty" for row in grid[-1:] for cell in row if rate == 1.0)


def test_every_fate_has_a_colour_of_its_own():
    assert len({color for color, _ in FATES.values()}) == len(FATES)


def test_the_occupancy_diagram_is_drawn_with_and_without_text(tmp_path):
    rng = random.Random(0)
    events, _ = simulate(8, [rng.random() < 0.8 for _ in range(60)])
    words = ["the", "\n\n", "東京", "$x_1$", "a very long token", "", "\x1b"]
    plain = size(plot_occupancy(events, 8, tmp_path / "plain.png"))
    labelled = size(plot_occupancy(events, 8, tmp_path / "text.png", text=lambda token: words[token % 7]))
    short = size(plot_occupancy(events, 8, tmp_path / "short.png", max_cycles=20))
    assert labelled[0] > plain[0] and short[1] < plain[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.png", "short.png", "text.png"]


def test_the_learning_curve_is_drawn_from_the_first_line_on(tmp_path):
    lines = [{"step": i, "tokens": 1000 * i, "train/loss": 2 / (1 + i)} for i in range(100)]
    lines += [
        {
            "step": i,
            "tokens": 1000 * i,
            "val/acceptance": p,
            "val/theoretical_speedup": 2.0,
            "val/teacher_forced_top1": 0.5,
        }
        for i, p in ((50, 0.4), (99, 0.7))
    ]
    lines += [{"step": 3, "lr-AdamW": 0.1}]
    for count in (0, 1, len(lines)):
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
        assert size(plot_training(metrics, tmp_path / f"{count}.png")) == (1200, 960)


def test_acceptance_by_fill_is_drawn_from_either_source_or_none(tmp_path):
    rows = [{"fill": fill, "count": 10**fill, "top1": 0.9 - 0.02 * fill} for fill in range(1, 9)]
    for name, forced, decoded in (
        ("both", rows, rows[:3]),
        ("forced", rows, None),
        ("real", [], rows),
        ("none", [], None),
    ):
        assert size(plot_acceptance_by_fill(forced, tmp_path / f"{name}.png", decoded=decoded)) == (1200, 660)


def test_pyplot_is_left_alone():
    import subprocess
    import sys

    code = "import sys; from spd_lightning.report import plots; from matplotlib.figure import Figure;"
    code += "plots._figure(2, 2); sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
