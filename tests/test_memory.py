"""What memory is planned is what real passes hold: storages of tensors are counted as they are born and freed."""

from __future__ import annotations

import json
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import spd_lightning.head.attention as attention
import spd_lightning.head.module as head_module
import spd_lightning.training.losses as losses
from spd_lightning.head.config import HeadConfig, LayerStyle
from spd_lightning.head.layout import Rows as LayoutRows
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.head.loading import new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.memory import ranks
from spd_lightning.memory.activations import Layer, Loss, aggregation_bytes
from spd_lightning.memory.ranks import PARTS, STRATEGIES, Job, Step, largest_batch, rank_memory
from spd_lightning.memory.shapes import Arithmetic, Rows, expected_rows, shape_of_head, shape_of_target
from spd_lightning.staircase import default_anchors
from spd_lightning.target.target import Target
from spd_lightning.training.losses import chunked_draft_loss

LOW = torch.bfloat16
MODES = ("32-true", "bf16-mixed", "bf16-true")
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False,
}  # fmt: skip
STYLES = {
    "qwen3": LayerStyle(),
    "llama": LayerStyle(qk_norm="none"),
    "biases": LayerStyle(qk_norm="none", qkv_bias=True, output_bias=True, mlp_bias=True),
    "olmo": LayerStyle(norms="after", qk_norm="row"),
    "gemma": LayerStyle(norms="both", query_scale=0.1),
    "qwen3.5": LayerStyle(gate=True),
}


# -- CUDA's branches on CPU tensors ------------------------------------------------------------------------------------


class FusedNorm(torch.autograd.Function):
    """What CUDA's RMSNorm keeps: its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_ones(*x.shape[:-1], 1, dtype=torch.float32), weight)
        return x * weight.detach().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, _, weight = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight) if weight.requires_grad else None


def flash(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool) -> tuple[Any, ...]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal)
    return out, lse, None, None, 0, 0, *torch.zeros(3).unbind()


def flash_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*arguments[:6], 0.0, True)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU take the branches for CUDA: attention's near part in float32, fused norms, whole chunks."""
    source = Path(attention.__file__).read_text()
    for found, instead in (('type == "cpu"', 'type == "none"'), ('type == "cuda"', 'type == "cpu"')):
        assert found in source
        source = source.replace(found, instead)
    branched = types.ModuleType("attention_as_on_cuda")
    monkeypatch.setitem(sys.modules, branched.__name__, branched)
    exec(compile(source, branched.__name__, "exec"), branched.__dict__)
    branched.aten = types.SimpleNamespace(  # type: ignore[attr-defined]
        _scaled_dot_product_flash_attention=flash, _scaled_dot_product_flash_attention_backward=flash_backward
    )
    monkeypatch.setattr(head_module, "staircase_attention", branched.staircase_attention)
    monkeypatch.setattr(losses, "CPU_CHUNK_LOGITS", 10**15)

    def norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
        assert self.weight is not None
        return FusedNorm.apply(x.float() if torch.is_autocast_enabled("cpu") else x, self.weight)

    monkeypatch.setattr(nn.RMSNorm, "forward", norm)


# -- what autograd saves -----------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A small random head and a batch of it."""

    config: HeadConfig
    mode: str
    head: SpeculationHead
    layout: StaircaseLayout
    select: Tensor

    @property
    def autocast(self) -> Any:
        return torch.autocast("cpu", LOW, enabled=self.mode == "bf16-mixed")

    def arithmetic(self, cuda: bool) -> Arithmetic:
        weight, compute = (4 if self.mode != "bf16-true" else 2), (4 if self.mode == "32-true" else 2)
        return Arithmetic(weight, compute, compute, cuda)

    @property
    def rows(self) -> Rows:
        seen = self.layout.seen_by(LayoutRows(self.select[:, :, None], [0]))
        B, S = self.select.shape
        return Rows(B, S, tuple(map(len, seen.places)), int(self.select.sum()), self.layout.documents is not None)


def random_case(style: LayerStyle, mode: str, seed: int) -> Case:
    random = Random(seed)
    torch.manual_seed(seed)
    stages = (1,) * random.choice([2, 4, 8, 12])
    groups = random.choice([1, 2, 4])
    config = HeadConfig(
        stage_layers=stages,
        anchors=default_anchors(stages),
        num_layers=random.choice([1, 2, 3]),
        hidden_size=random.choice([64, 96, 128]),
        intermediate_size=random.choice([100, 256, 300]),
        num_attention_heads=4,
        num_key_value_heads=4 // groups,
        head_dim=random.choice([16, 24, 32]),
        vocab_size=random.choice([200, 1000]),
        style=style,
    )
    head = SpeculationHead(config).to(LOW if mode == "bf16-true" else torch.float32)
    B, S = random.choice([1, 2, 3]), random.choice([40, 64, 100])
    entries = torch.where(torch.rand(B, S) < 0.15, len(stages), 1).cumsum(1)
    documents = (torch.arange(S) // 30).expand(B, S) if seed % 2 else None
    return Case(config, mode, head, StaircaseLayout(config.staircase, entries, documents), torch.rand(B, S) < 0.7)


def saved_bytes(case: Case) -> int:
    """Storages that the head's forward pass saves, its weights left out."""
    seen: dict[int, tuple[int, Tensor]] = {}
    weights = {p.untyped_storage()._cdata for p in case.head.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage.nbytes(), x  # kept alive, so that no address comes twice
        return x

    B, S = case.select.shape
    dtype = torch.float32 if case.mode == "32-true" else LOW
    states = [torch.randn(B, S, case.config.hidden_size).to(dtype) for _ in case.config.anchors]
    with case.autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.head.norm(case.head([x.to(case.head.dtype) for x in states], case.layout, None, case.select))
    return sum(size for size, _ in seen.values())


def planned_saved(case: Case, cuda: bool) -> int:
    shape, arithmetic, rows = shape_of_head(case.config), case.arithmetic(cuda), case.rows
    layers = [Layer(shape, arithmetic, rows, last=i == shape.num_layers - 1) for i in range(shape.num_layers)]
    whole = sum(sum(layer.saved.values()) + layer.weights for layer in layers)
    return whole + aggregation_bytes(shape, arithmetic, rows) + Loss(shape, arithmetic, rows, 64).norm


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", STYLES)
def test_a_forward_pass_saves_what_is_listed(style: str, mode: str) -> None:
    for seed in range(3):
        case = random_case(STYLES[style], mode, seed)
        assert planned_saved(case, cuda=False) == pytest.approx(saved_bytes(case), rel=0.03)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("style", STYLES)
def test_it_saves_what_is_listed_in_the_branches_for_cuda_too(style: str, mode: str, as_on_cuda: None) -> None:
    for seed in range(3):
        case = random_case(STYLES[style], mode, seed)
        assert planned_saved(case, cuda=True) == pytest.approx(saved_bytes(case), rel=0.03)


def test_a_random_batch_has_the_expected_rows() -> None:
    for n, rate, length in ((4, 0.3, 4000), (8, 0.15, 4000), (16, 0.05, 4000)):
        stages = (1,) * n
        shape = shape_of_head(replace(random_case(LayerStyle(), "32-true", 0).config, stage_layers=stages,
                                      anchors=default_anchors(stages)))  # fmt: skip
        torch.manual_seed(n)
        entries = torch.where(torch.rand(2, length) < rate, n, 1).cumsum(1)
        select = torch.ones(2, length, dtype=torch.bool)
        seen = StaircaseLayout(shape.staircase, entries).seen_by(LayoutRows(select[:, :, None], [0]))
        expected = expected_rows(shape, 2, length, rate)
        assert expected.all == pytest.approx(len(seen), rel=0.03)
        assert expected.blocks[-1] == len(seen.places[-1]) == 2 * length


# -- whole steps -------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of all storages that operations have made and nobody has freed; the most per phase."""

    def __init__(self, *before: Tensor | None) -> None:
        super().__init__()
        self.now, self.phase, self.peaks = 0, "", dict[str, int]()
        self._sizes: dict[int, int] = {}
        for tensor in before:
            if tensor is not None:
                self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, address: int) -> None:
        self.now -= self._sizes.pop(address)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)
        return out


@dataclass
class Training:
    """Target, head and optimizer, and a batch with every position supervised."""

    target: Target
    head: SpeculationHead
    layout: StaircaseLayout
    autocast: Callable[[], Any]
    accumulating: bool = False

    def __post_init__(self) -> None:
        trained = [p for p in self.head.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
        self.phase: Callable[[str], None] = lambda name: None

    def loss(self) -> Tensor:
        """As `SpdModule.loss`: the same calls keep the same things alive."""
        layout = self.layout
        with self.autocast():
            self.phase("target forward")
            ids = torch.arange(layout.entries.numel()).view_as(layout.entries) % self.target.vocab_size
            states, last = self.target(ids, self.head.config.anchors)
            self.phase("forward")
            select = torch.ones_like(ids, dtype=torch.bool)
            hidden = self.head([state.to(self.head.dtype) for state in states], layout, None, select)
            hidden = self.head.norm(hidden)
            self.phase("loss")
            total, _ = chunked_draft_loss(
                hidden=hidden,
                lm_head=self.head.lm_head.weight,
                target_hidden=self.target.normed(last[select]),
                target_logits=self.target.logits_of_normed,
                draft_ids=self.head.draft_token_ids,
                fills=layout.fills()[select],
                num_stages=self.head.staircase.num_stages,
                chunk=256,
            )
        return total / select.sum()

    def step(self) -> None:
        """In Lightning's order: gradients of the last step live until the loss is there."""
        loss = self.loss()
        if not self.accumulating:
            self.optimizer.zero_grad()
        self.phase("backward")
        loss.backward()
        del loss
        self.phase("optimizer step")
        self.optimizer.step()


class ExactStep(Step):
    """A step whose rows are those of a batch instead of the expected ones."""

    rows: Rows  # type: ignore[assignment]


def by_phase(step: Step) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, parts in step.moments():
        phase = name.partition(",")[0]
        found[phase] = max(found.get(phase, 0), sum(parts.values()))
    return found


@contextmanager
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(ranks, "CPU_PROCESS", 0)
        patched.setattr(ranks, "CUDA_PROCESS", 0)
        yield


@pytest.mark.parametrize(
    "mode, checkpointing, accumulate",
    [*((mode, on, 1) for mode in MODES for on in (False, True)), ("32-true", True, 2)],
)
def test_a_step_never_holds_much_more_or_less_than_planned(
    mode: str, checkpointing: bool, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_step(mode, checkpointing, accumulate, monkeypatch, cuda=False)


def test_so_does_a_step_under_autocast_with_a_float32_target(monkeypatch: pytest.MonkeyPatch) -> None:
    check_step("bf16-mixed", False, 1, monkeypatch, cuda=False, wide_target=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", MODES[1:])
def test_a_step_in_the_branches_for_cuda_holds_what_is_planned(
    mode: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch, as_on_cuda: None
) -> None:
    check_step(mode, checkpointing, 1, monkeypatch, cuda=True)


def check_step(
    mode: str,
    checkpointing: bool,
    accumulate: int,
    monkeypatch: pytest.MonkeyPatch,
    cuda: bool,
    wide_target: bool = False,
) -> None:
    torch.manual_seed(0)
    n, B, S = 8, 2, 256
    low = mode != "32-true" and not wide_target
    target = Target(LlamaForCausalLM(LlamaConfig(**SIZES))).partition(num_stages=n).to(LOW if low else torch.float32)
    head = new_head(target, 2).to(LOW if mode == "bf16-true" else torch.float32)
    head.checkpoint_layers = checkpointing
    layout = StaircaseLayout(head.staircase, torch.where(torch.rand(B, S) < 0.15, n, 1).cumsum(1))
    training = Training(
        target, head, layout, lambda: torch.autocast("cpu", LOW, enabled=mode == "bf16-mixed"), accumulate > 1
    )
    training.step()
    everything = [*target.parameters(), *head.parameters(), *(p.grad for p in head.parameters())]
    everything += [x for state in training.optimizer.state.values() for x in state.values()]
    live = Live(*everything)
    del everything  # it would keep the old gradients alive
    training.phase = lambda name: setattr(live, "phase", name)
    with live:
        training.step()

    job = Job(
        shape_of_head(head.config), shape_of_target(target), S, cuda=cuda, precision=mode, loss_chunk=256,
        checkpointing=checkpointing, accumulate=accumulate, target_bytes=2 if low else 4,
    )  # fmt: skip
    step = ExactStep(job, STRATEGIES[0], B)
    select = torch.ones(B, S, dtype=torch.bool)
    places = layout.seen_by(LayoutRows(select[:, :, None], [0])).places
    object.__setattr__(step, "rows", Rows(B, S, tuple(map(len, places)), B * S))
    with nothing_else(monkeypatch):
        planned = by_phase(step)
    assert max(planned.values()) == pytest.approx(max(live.peaks.values()), rel=0.04)
    for name, peak in live.peaks.items():
        if name and not (cuda and name == "optimizer step"):  # whose foreach form this is not
            assert planned[name] == pytest.approx(peak, rel=0.06), name


# -- ranks and strategies ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job() -> Job:
    """A head of 8 layers' worth of sizes on 8 GPUs."""
    torch.manual_seed(0)
    target = Target(LlamaForCausalLM(LlamaConfig(**SIZES))).partition(num_stages=8)
    return Job(shape_of_head(new_head(target, 2).config), shape_of_target(target), 256, ranks=8, ranks_per_node=4)


def test_parts_make_the_total_of_the_worst_moment(job: Job) -> None:
    for strategy in STRATEGIES:
        found = rank_memory(job, strategy, 4)
        assert tuple(found.parts) == PARTS and all(type(count) is int and count >= 0 for count in found.parts.values())
        assert found.total == found.moments[found.moment] == max(found.moments.values())


def test_each_strategy_holds_what_it_is_known_for(job: Job) -> None:
    ddp, one, two, two_offloaded, three, three_offloaded = (Step(job, strategy, 1) for strategy in STRATEGIES)
    trained, stored = job.head.trained, job.target.stored
    assert (ddp.weights, ddp.optimizer, ddp.target) == (4 * trained, 8 * trained, 2 * stored)
    assert ddp.gradients_before == 8 * trained  # the reducer's buckets besides
    assert Step(replace(job, ranks=1), STRATEGIES[0], 1).gradients_before == 4 * trained
    assert one.weights == two.weights == 2 * trained and one.optimizer == two.optimizer == 12 * -(-trained // 8)
    assert three.weights == 2 * -(-trained // 8) and three.target == -(-2 * stored // 8)
    for offloaded in (two_offloaded, three_offloaded):
        assert offloaded.optimizer == 0 and offloaded.host > 4 * 18 * trained // 8  # four ranks share a node
    assert ddp.host == two.host == three.host == 0


def test_only_accumulation_keeps_gradients_of_stages_1_and_2_for_the_next_forward_pass(job: Job) -> None:
    one, two = STRATEGIES[1:3]
    assert Step(job, one, 1).gradients_before == Step(job, two, 1).gradients_before == 0
    accumulating = replace(job, accumulate=2)
    assert Step(accumulating, one, 1).gradients_before == 2 * job.head.trained
    assert 2 * job.head.trained // 8 <= Step(accumulating, two, 1).gradients_before < 2 * job.head.trained


def test_a_quantised_target_is_smaller_by_the_matrices_of_its_layers(job: Job) -> None:
    plain, eight, four = (Step(replace(job, quantised_bytes=twice), STRATEGIES[0], 1).target for twice in (None, 2, 1))
    assert plain - eight == job.target.quantisable and plain - four == 3 * job.target.quantisable // 2


def test_the_largest_batch_fits_and_one_more_does_not(job: Job) -> None:
    for strategy in STRATEGIES:
        memory = rank_memory(job, strategy, 13).total
        assert largest_batch(job, strategy, memory) == 13
        assert largest_batch(job, strategy, memory - 1) == 12
        assert largest_batch(job, strategy, rank_memory(job, strategy, 1).total - 1) == 0


@pytest.mark.parametrize("change", [{"supervised": 0.5}, {"restart_rate": 0.5}, {"length": 99}], ids=str)
def test_less_work_never_needs_more(job: Job, change: dict[str, Any]) -> None:
    for strategy in STRATEGIES:
        assert rank_memory(replace(job, **change), strategy, 16).total < rank_memory(job, strategy, 16).total


def test_every_further_draw_of_restarts_needs_as_much_again_of_the_head_alone(job: Job) -> None:
    for strategy in STRATEGIES:
        one, two, three = (rank_memory(replace(job, restart_draws=draws), strategy, 16) for draws in (1, 2, 3))
        first, second = two.moments["loss"] - one.moments["loss"], three.moments["loss"] - two.moments["loss"]
        assert first == second > 0.5 * one.parts["activations"]
        assert one.moments["target forward"] == three.moments["target forward"]


def test_checkpointing_helps_a_head_of_several_layers_and_not_one_of_one(job: Job) -> None:
    """The first layer is computed with all rows in either case, and one layer at a time needs all its activations."""
    for layers, share in ((4, 0.8), (1, 1.1)):
        deeper = replace(job, head=replace(job.head, num_layers=layers), length=2048)
        kept, again = (rank_memory(replace(deeper, checkpointing=on), STRATEGIES[2], 8).total for on in (False, True))
        assert (again < share * kept) and (layers > 1 or again >= kept)


def test_measured_peaks_are_within_15_percent_of_their_plans() -> None:
    record = json.loads((Path(__file__).parents[1] / "benchmarks" / "records" / "memory.json").read_text())
    assert len(record["settings"]) >= 3
    for row in record["settings"]:
        assert row["planned_mib"] == pytest.approx(row["measured_mib"], rel=0.15), row["setting"]
