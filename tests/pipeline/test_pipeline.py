"""The pipeline over ranks against the decoder in process: same tokens, same cycles, same events."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from family.common import build

from spd_lightning import cli
from spd_lightning.decoding.schedule import PipelineSchedule
from spd_lightning.decoding.topology import Roles
from spd_lightning.errors import InputError
from spd_lightning.staircase import Staircase, default_anchors
from spd_lightning.target.target import Target

HERE = Path(__file__).parent
#: Between a prompt in one piece and in several, float32; the chunked kernels of recurrent layers round most.
TOLERANCE = 2e-4


def run_ranks(world: int, *command: object, patience: float = 60.0) -> subprocess.CompletedProcess[str]:
    """A command on local ranks that are started and watched as `--workers` does it."""
    code = (
        "import sys; from spd_lightning.decoding.workers import run_ranks; "
        f"sys.exit(run_ranks({[sys.executable, *map(str, command)]!r}, {world}, patience={patience}, threads=1))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=580)


def decode_cases(world: int, first: int, count: int) -> list[dict[str, Any]]:
    done = run_ranks(world, HERE / "pipeline_worker.py", first, count)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(told) == count, done.stderr[-3000:]
    return told


def check(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        assert not case["differs"], case
        if case["kind"] == "phases":
            assert case["phases"] == list(range(1, case["n"] + 1)), case


@pytest.mark.parametrize(("world", "count"), [(3, 3), pytest.param(5, 2, marks=pytest.mark.slow)])
def test_ranks_decode_token_for_token_what_one_process_does(world: int, count: int) -> None:
    check(decode_cases(world, 0, count))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_ranks_decode_token_for_token_in_many_random_cases(world: int) -> None:
    cases = decode_cases(world, 1000, 40)
    check(cases)
    seen = {(case["family"], case["kind"].split()[0]) for case in cases}
    assert len({family for family, _ in seen}) == 3 and len({kind for _, kind in seen}) == 6
    print(world, "ranks:", len(cases), "cases,", sum(case["restarts"] for case in cases), "restarts")


def test_the_plan_ahead_is_the_next_plan_if_the_verdict_is_acceptance() -> None:
    draw = random.Random(0)
    for _ in range(50):
        layers = [draw.randint(0, 3) for _ in range(draw.randint(2, 6))]
        layers[0] += 1
        schedule = PipelineSchedule(Staircase(tuple(layers), default_anchors(layers)), 5)
        for _ in range(60):
            plan, ahead = schedule.plan(), schedule.plan(ahead=True)
            verdict = None if plan.leaving is None else draw.random() < 0.7
            schedule.advance(verdict)
            assert (schedule.plan() == ahead) == (verdict is not False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_pieces_leaves_the_states_of_the_whole_prompt(
    make_target: Callable[..., Target], family: str
) -> None:
    """Stage by stage and piece by piece: anchor states, h_L, and the tokens that come after it."""
    draw = random.Random(family)
    target = build(make_target, family, (2, 2, 1))
    ids = torch.tensor([[draw.randrange(50) for _ in range(23)]])
    whole_cache = target.new_cache(40, (2, 2, 1))
    states, last = target(ids, (2, 4), cache=whole_cache)
    cache = target.new_cache(40, (2, 2, 1), tentative=1)
    borders = [0, *sorted(draw.sample(range(1, 23), 4)), 23]
    pieces: list[list[torch.Tensor]] = [[], [], []]
    for start, stop in zip(borders, borders[1:], strict=False):
        hidden = target.embed_tokens(ids[0, start:stop].tolist())
        kept: dict[int, torch.Tensor] = {}
        for layers in (range(0, 2), range(2, 4), range(4, 5)):
            found, hidden = target.prefill_layers(hidden, layers, start, cache, (2, 4))
            kept |= found
        for part, of in zip((kept[2], kept[4], hidden), pieces, strict=True):
            of.append(part)
    for found_parts, expected in zip(pieces, (*states, last), strict=True):
        torch.testing.assert_close(torch.cat(found_parts, 1), expected, rtol=TOLERANCE, atol=TOLERANCE)
    rotary, nothing = target.rotary_table(40), last.new_empty(0, target.hidden_size)
    for position in range(23, 27):
        after = [
            target.run_layers(target.embed(position % 50), range(5), position, rotary, one, {}, nothing)
            for one in (whole_cache, cache)
        ]
        torch.testing.assert_close(*after, rtol=TOLERANCE, atol=TOLERANCE)


def test_roles_name_every_rank_and_refuse_other_numbers() -> None:
    together, alone = Roles(3, (4, 5, 6)), Roles(3, (0, 1, 2, 3))
    assert (together.head, together.first, together.last) == (4, 4, 6)
    assert (alone.head, alone.first, alone.last) == (3, 0, 2)
    assert together.names == {4: "rank 4: stage 0 + head", 5: "rank 5: stage 1", 6: "rank 6: stage 2"}
    assert alone.name(3) == "rank 3: head" and alone.stage_of(3) is None
    with pytest.raises(InputError, match="5 ranks cannot run a pipeline of 3 stages: expected 3 .* or 4"):
        Roles(3, tuple(range(5)))


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained head of two stages for the embedded target."""
    from spd_lightning.head.folder import save_head
    from spd_lightning.head.loading import new_head
    from spd_lightning.target.loading import load_target

    folder = tmp_path_factory.mktemp("head") / "two"
    folder.mkdir()
    save_head(new_head(load_target("tiny", num_stages=2), num_layers=1), folder)
    return folder


def command(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spd_lightning", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_generate_on_workers_prints_what_one_process_prints_and_leaves_a_trace(
    head_of_two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["generate", "--target", "tiny", "--head", head_of_two, "--prompt", "What is a path?"]
    assert cli.main([*map(str, plain), "--max-new-tokens", "24"]) == 0
    here = capsys.readouterr().out
    ranks = command(*plain, "--max-new-tokens", 24, "--workers", 3, "--trace", "t.json", cwd=tmp_path)
    assert ranks.returncode == 0, ranks.stderr
    assert ranks.stdout == here and ranks.stdout.strip()
    assert "3 ranks, stages at the same time" in ranks.stderr and "the head could take" in ranks.stderr
    trace = json.loads((tmp_path / "t.json").read_text())
    names = {event["args"].get("name") for event in trace["traceEvents"] if event["ph"] == "M"}
    assert {"rank 0: stage 0", "rank 1: stage 1", "rank 2: head"} <= names
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_bench_on_workers_measures_a_wall_clock_speedup_and_marks_forced_acceptance(
    head_of_two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("What is a path?\nHow do I open a file?\n")
    options = ["--prompts", "p.txt", "--max-new-tokens", 24, "--workers", 2, "--output", "b.json"]
    done = command(
        "bench", "--target", "tiny", "--head", head_of_two, *options, "--forced-acceptance", 0.8, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["quality"] is False and record["settings"]["forced_acceptance"] == 0.8
    engine = record["engine"]
    assert (engine["ranks"], engine["head_alone"], engine["traced"]) == (2, False, False) and engine["threads"] >= 1
    assert "FORCED acceptance 0.8" in (tmp_path / "b.md").read_text()
    assert record["metrics"][-1]["wall_clock_speedup"] > 0 and record["metrics"][-1]["identical"] is None
    assert record["metrics"][-1]["new_tokens"] == 48 and "FORCED acceptance 0.8" in done.stdout
    words = ["export", "--checkpoint", head_of_two, "--target", "tiny", "--output", tmp_path / "e", "--bench"]
    assert cli.main([*map(str, words), str(tmp_path / "b.json")]) == 2
    assert "--forced-acceptance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", 4], "4 ranks cannot run a pipeline of 2 stages: expected 2 .* or 3"),
        (["--workers", 1], "--workers 1: expected at least 2"),
        (["--trace", "t.json"], "--trace t.json shows ranks at work: give --workers N"),
        (["--workers", 2, "--patience", 1], "--patience 1: expected from 2 to 1,000,000 seconds"),
        (["--workers", 2, "--port", 70000], "--port 70000: expected a number from 1 to 65535"),
        (["--workers", 2, "--trace", "t.png"], "--trace t.png: expected a name that ends in .json"),
        (["--workers", 2, "--trace", "no/t.json"], "--trace no/t.json: the folder no does not exist"),
        (["--workers", 2, "--trace", "t.json", "--json", "t.json"], "--trace t.json is --json too"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_ranks_are_one_line_before_any_process_is_started(
    head_of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[object], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *unused, **settings: pytest.fail("a process was started"))
    words = ["generate", "--target", "tiny", "--head", head_of_two, "--prompt", "x", *arguments]
    status, err = cli.main(list(map(str, words))), capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and re.search(message, errors[0]), err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-stages", 3], "--num-stages 3: the head has 2 stages"),
        (["--device-map", "auto"], "in a pipeline every rank holds its own stage"),
    ],
    ids=["stages", "map"],
)
def test_what_all_ranks_refuse_is_one_line(
    head_of_two: Path, tmp_path: Path, arguments: list[object], message: str
) -> None:
    words = ["generate", "--target", "tiny", "--head", head_of_two, "--prompt", "x", "--workers", 2, *arguments]
    done = command(*words, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and re.search(message, errors[0]), done.stderr


def test_a_taken_port_is_one_line(head_of_two: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command(
            "generate", "--target", "tiny", "--head", head_of_two, "--prompt", "x", "--workers", 2, "--port", port,
            "--patience", 3, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 2 and f"error: --port {port} is taken" in done.stderr, done.stderr


@pytest.mark.slow
def test_torchrun_starts_the_same_command(head_of_two: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "spd_lightning",
         "generate", "--target", "tiny", "--head", str(head_of_two), "--prompt", "What is a path?", "--max-new-tokens",
         "12"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    here = command(
        "generate", "--target", "tiny", "--head", head_of_two, "--prompt", "What is a path?", "--max-new-tokens", 12,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == here.stdout


@pytest.mark.slow
def test_two_nodes_are_one_pipeline(head_of_two: Path, tmp_path: Path) -> None:
    """Two torchruns on this machine, as on two; the text comes from the node of the last stage."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plain = ["generate", "--target", "tiny", "--head", str(head_of_two), "--prompt", "What is a path?"]
    plain += ["--max-new-tokens", "12"]
    nodes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--node-rank",
                str(node),
                "--master-addr",
                "127.0.0.1",
                "--master-port",
                str(port),
                "-m",
                "spd_lightning",
                *plain,
            ],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for node in range(2)
    ]
    told = [node.communicate(timeout=200) for node in nodes]
    here = command(*plain, cwd=tmp_path)
    assert [node.returncode for node in nodes] == [0, 0], told
    assert told[0][0] == "" and told[1][0] == here.stdout and here.stdout.strip()


@pytest.mark.parametrize("accelerate", [True, False])
def test_a_rank_keeps_the_weights_of_its_stage_alone(accelerate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from spd_lightning.target import stage_loading
    from spd_lightning.target.loading import load_target
    from spd_lightning.target.stage_loading import load_stage

    if not accelerate:
        monkeypatch.setattr(stage_loading, "find_spec", lambda name: None)
    whole = dict(load_target("tiny").model.named_parameters())
    for stage, embeds, layers in ((0, True, range(0, 3)), (1, False, range(3, 8)), (None, True, range(0))):
        target = load_stage("tiny", (3, 5), stage, embeds)
        here = {name: value for name, value in target.model.named_parameters() if not value.is_meta}
        numbers = {int(name.split(".")[2]) for name in here if ".layers." in name}
        assert numbers == set(layers) and all(torch.equal(value, whole[name]) for name, value in here.items())
        assert ("model.norm.weight" in here) == (stage == 1)
        assert target.device.type == "cpu" and target.stage_layers == (3, 5)


def test_weights_that_differ_in_one_tensor_are_told_apart(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from spd_lightning.target.loading import embedded_target_path
    from spd_lightning.target.samples import sampled_digest

    whole = embedded_target_path()
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(whole / "model.safetensors")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    same = sampled_digest(other)
    assert same == sampled_digest(other) and len(same) == 64
    name = next(name for name in tensors if "layers.3" in name)
    save_file(tensors | {name: tensors[name] * 1.01}, other / "model.safetensors", metadata={"format": "pt"})
    assert sampled_digest(other) != same
    (other / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(InputError, match="is no safetensors file"):
        sampled_digest(other)


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_ranks_in_silence(head_of_two: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "spd_lightning", "generate", "--target", "tiny", "--head", str(head_of_two)]
    words += ["--prompt", "Write about the module os.", "--max-new-tokens", "700", "--workers", "2"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 141 and "Traceback" not in err and "error" not in err, err
    process.stderr.close()
