"""What ZeRO holds and hands on: pieces of the target, heads from its checkpoints; offload, bfloat16, lockstep."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scale_runs import Case, Done, also, asked_for, logged
from torch import nn

from spd_lightning import cli
from spd_lightning.errors import InputError
from spd_lightning.head.loading import draft_logits, load_head
from spd_lightning.target.loading import Loading, load_target
from spd_lightning.training.carousel import Carousel
from spd_lightning.training.saving import progress_checkpoints

Go = Callable[..., Done]


# -- layers that pass by ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_ranks_with_other_work_meet_at_the_same_layers_in_the_same_order_and_all_come_home(seed: int) -> None:
    """Three ranks as threads; a gather that is not everybody's, or of another layer, is a broken meeting."""
    draw = np.random.default_rng(seed)
    ranks, layers = 3, int(draw.integers(1, 5))
    meeting = threading.Barrier(ranks, timeout=20)
    said: list[Any] = [None] * ranks
    gathered: list[list[int]] = [[] for _ in range(ranks)]

    def meet(rank: int, what: Any) -> list[Any]:
        said[rank] = what
        meeting.wait()
        everyone = list(said)
        meeting.wait()
        return everyone

    def work(rank: int, wanted: list[list[int]]) -> list[int]:
        modules = [nn.Identity() for _ in range(layers)]
        held: list[int] = []

        @contextmanager
        def gather(module: nn.Module) -> Any:
            index = modules.index(module)  # type: ignore[arg-type]
            assert set(meet(rank, ("gather", index))) == {("gather", index)}
            gathered[rank].append(index)
            held.append(index)
            yield
            held.remove(index)

        carousel = Carousel(modules, lambda busy: any(flag for _, flag in meet(rank, ("busy", busy))), gather)
        used = []
        for prompt in wanted:
            with carousel.turn():
                for index in prompt:
                    modules[index](torch.zeros(1))
                    assert held == [index]
                    used.append(index)
        return used

    wanted = [[draw.integers(0, layers, int(draw.integers(0, 12))).tolist() for _ in range(4)] for _ in range(ranks)]
    results: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, wanted[rank])
        except BaseException as error:
            meeting.abort()
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[i for prompt in prompts for i in prompt] for prompts in wanted]
    assert gathered[0] == gathered[1] == gathered[2]
    rounds = len(gathered[0]) // layers
    assert gathered[0] == list(range(layers)) * rounds


def test_a_cycle_of_the_pipeline_takes_one_round_at_most(make_target: Callable[..., Any]) -> None:
    from spd_lightning.decoding.decoder import SpdDecoder
    from spd_lightning.head.loading import new_head

    target = make_target(num_layers=4, num_stages=4, spread=0.06, embedding_scale=3.0)
    head = new_head(target, 1).eval()
    layers = [target.layer(index) for index in range(4)]
    carousel = Carousel(layers, lambda busy: busy)
    with carousel.turn():
        found = SpdDecoder(target, head).generate([1, 2, 3], 24)
    assert found.drafts_accepted > 0
    # the prefill and every cycle; while the pipeline fills, cycles share rounds
    assert found.cycles / 2 < carousel.rounds <= found.cycles + 1


# -- what each rank holds --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_target(make_model: Callable[..., Path]) -> Path:
    """8 layers, wide enough for weights to outweigh norms."""
    return make_model(num_layers=8, hidden=64)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, go: Go, wide_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("zero")
    fields = {
        "model__target": wide_target,
        "model__num_stages": 4,
        "trainer__max_steps": 3,
        "decoding__every_steps": 3,
        "data__global_batch_size": 8,
        "model__learning_rate": 3e-3,
    }

    def two(strategy: str, **changes: Any) -> dict[str, Any]:
        return fields | {"trainer__devices": 2, "trainer__strategy": strategy} | changes

    cases = [
        Case("1", two("deepspeed_stage_1")),
        Case("2", two("deepspeed_stage_2")),
        Case("3", two("deepspeed_stage_3")),
        Case("2-offload", two("deepspeed_stage_2_offload")),
        Case("3-offload", two("deepspeed_stage_3_offload")),
        Case("2-checkpointing", two("deepspeed_stage_2", model__activation_checkpointing=True)),
        Case("3-checkpointing", two("deepspeed_stage_3", model__activation_checkpointing=True)),
        Case("ddp-bf16", two("ddp", trainer__precision="bf16-mixed")),
        Case("1-bf16", two("deepspeed_stage_1", trainer__precision="bf16-mixed")),
        Case("2-bf16", two("deepspeed_stage_2", trainer__precision="bf16-mixed")),
        Case("3-bf16", two("deepspeed_stage_3", trainer__precision="bf16-mixed")),
        Case(
            "3-validate",
            two("deepspeed_stage_3", ckpt_path=folder / "3" / "checkpoints" / "last.ckpt"),
            command="validate",
        ),
    ]
    asked = {name for (name,) in asked_for(request, "name")} | {"1", "3", "3-validate"}
    done = go(folder, [case for case in cases if case.name in asked], ranks=2)
    assert set(done.returned.values()) == {0}, done.output
    return folder, done.output


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["3", *also("2", "2-offload", "3-offload", "2-checkpointing", "3-checkpointing")])
def test_no_option_changes_the_curve(runs: tuple[Path, str], name: str) -> None:
    folder, _ = runs
    assert logged(folder / name, "train/loss") == pytest.approx(logged(folder / "1", "train/loss"), rel=1e-4)
    for metric in ("val/cycles", "val/acceptance", "val/lossless"):
        assert logged(folder / name, metric) == logged(folder / "1", metric), metric


@pytest.mark.parametrize("name", also("ddp-bf16", "1-bf16", "2-bf16", "3-bf16"))
def test_bfloat16_keeps_float32_master_weights(runs: tuple[Path, str], name: str) -> None:
    folder, _ = runs
    found, exact = logged(folder / name, "train/loss"), logged(folder / "1", "train/loss")
    assert found == pytest.approx(exact, rel=0.1) and found != pytest.approx(exact, rel=1e-6)
    head = load_head(progress_checkpoints(folder / name / "checkpoints")[-1])
    rounded = [w.float().bfloat16().float().equal(w) for n, w in head.named_parameters() if n != "norm.weight"]
    assert head.dtype == torch.float32 and not any(rounded), "what was saved is finer than bfloat16"
    assert logged(folder / name, "val/lossless") == [1.0]


def test_under_stage_3_each_rank_holds_half_of_the_target(runs: tuple[Path, str], wide_target: Path) -> None:
    folder, output = runs
    whole = sum(p.numel() for p in load_target(wide_target).parameters())
    held = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("HELD ")]
    of_stage_3 = [line for line in held if line["stage"] == 3 and line["of"] == "target"]
    assert {line["rank"] for line in of_stage_3} == {0, 1}
    for line in of_stage_3:
        assert line["numbers"] == pytest.approx(whole / 2, rel=0.02)
    assert {line["rank"] for line in of_stage_3 if line["read"]} == {0}, "one process reads the target's files"
    for line in held:
        if line["stage"] < 3 and line["of"] == "target":
            assert line["numbers"] == whole


@pytest.mark.parametrize("name", ["1", "3", *also("2")])
def test_the_optimizer_holds_the_head_and_nothing_of_the_target(runs: tuple[Path, str], name: str) -> None:
    folder, _ = runs
    head = load_head(folder / name)
    trained = sum(p.numel() for p in head.parameters()) - head.norm.weight.numel()
    newest = progress_checkpoints(folder / name / "checkpoints")[-1]
    parts = sorted((newest / "checkpoint").glob("*optim_states.pt"))
    assert len(parts) == 2
    # three float32 numbers per trained weight, shared out
    assert sum(part.stat().st_size for part in parts) == pytest.approx(12 * trained, rel=0.1)


@pytest.mark.parametrize("name", ["3", *also("1", "2")])
def test_an_exported_head_gives_the_logits_of_its_checkpoint(
    runs: tuple[Path, str], wide_target: Path, name: str, tmp_path: Path
) -> None:
    folder, _ = runs
    newest = progress_checkpoints(folder / name / "checkpoints")[-1]
    assert (
        cli.main(["export", "--checkpoint", str(newest), "--target", str(wide_target), "--output", str(tmp_path / "x")])
        == 0
    )
    ids = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = []
    for source in (newest, tmp_path / "x", folder / name):
        target = load_target(wide_target, num_stages=4)
        logits.append(draft_logits(target, load_head(source, target), ids))
    assert logits[0].equal(logits[1])
    assert logits[0].equal(logits[2]), "the only validation chose this head, which decoded live"


def test_validate_reads_a_checkpoint_of_stage_3(runs: tuple[Path, str]) -> None:
    _, output = runs
    before, _, _ = output.partition('RETURNED ["3-validate", 0]')
    assert "val/acceptance" in before.rpartition("RETURNED")[2]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_stock_deepspeed_and_true_bfloat16_are_refused(
    base_fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spd_lightning.training import strategies

    with pytest.raises(InputError, match=r"trainer\.strategy: expected .*ZeroStrategy"):
        strategies.check(strategies.DeepSpeedStrategy(), "32-true", Loading())
    with pytest.raises(InputError, match=r"model\.loading\.quantization='8bit' with deepspeed_stage_3"):
        strategies.check(strategies.ZeroStrategy(3), "bf16-mixed", Loading(quantization="8bit"))
    with pytest.raises(InputError, match=r"model\.loading\.dtype='bfloat16' with DeepSpeed.*bf16-mixed"):
        strategies.check(strategies.ZeroStrategy(1), "32-true", Loading(dtype="bfloat16"))
    fields = base_fields | {"trainer__strategy": "deepspeed_stage_2", "trainer__precision": "bf16-true"}
    words = [f"--{name.replace('__', '.')}={value}" for name, value in fields.items()]
    assert cli.main(["fit", "--config", "tiny", "--run_dir", str(tmp_path / "run"), *words]) == 2
    assert "error: trainer.precision='bf16-true' with DeepSpeed: set it to bf16-mixed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ddp_spawn", "trainer.strategy: ddp_spawn, ddp_fork and ddp_notebook start ranks by spawn"),
        ("ddp_notebook", "ddp_notebook start ranks by fork"),
        ("ddp_fork_find_unused_parameters_false", "start ranks by fork"),
        ("deepspeed_stage_9", "trainer.strategy='deepspeed_stage_9'"),
        ("dpp", "trainer.strategy='dpp'"),
    ],
)
def test_strategies_that_cannot_train_are_refused_with_the_list_of_those_that_can(
    base_fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    fields = base_fields | {"trainer__strategy": name, "trainer__devices": 2}
    words = [f"--{name.replace('__', '.')}={value}" for name, value in fields.items()]
    assert cli.main(["fit", "--config", "tiny", "--run_dir", str(tmp_path / "run"), *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and says in line and ": expected auto, ddp, deepspeed, deepspeed_stage_1" in line
    assert not (tmp_path / "run").exists()


def test_a_global_batch_that_ranks_cannot_share_is_refused(
    base_fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for fields, says in (
        (
            {"data__global_batch_size": 5},
            "data.global_batch_size=5: expected a multiple of data.batch_size=2 x 1 ranks",
        ),
        (
            {"data__global_batch_size": 8, "trainer__accumulate_grad_batches": 2},
            "trainer.accumulate_grad_batches=2: data.global_batch_size=8 asks for 4 on 1 ranks",
        ),
        (
            {"trainer__accumulate_grad_batches": 4, "trainer__val_check_interval": 6},
            "trainer.val_check_interval=6 batches end in the middle of an optimizer step of 4",
        ),
    ):
        words = [f"--{name.replace('__', '.')}={value}" for name, value in (base_fields | fields).items()]
        assert cli.main(["fit", "--config", "tiny", "--run_dir", str(tmp_path / "run"), *words]) == 2
        assert says in capsys.readouterr().err
