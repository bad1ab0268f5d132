"""The chunked loss against its definition: value, gradient, statistics, and what it never allocates."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spd_lightning.errors import InputError
from spd_lightning.training.losses import (
    COLUMNS,
    TERMS,
    Loss,
    chunked_draft_loss,
    draft_kl,
    draft_loss,
    hidden_distance,
)

N_STAGES, H, V = 4, 12, 40
DRAFT_IDS = torch.tensor([0, 3, 4, 9, 11, 17, 18, 25, 31, 32, 39])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Case:
    """A head that resembles its target at P positions; the target's norm and lm_head are frozen."""

    def __init__(self, P: int, draft_ids: Tensor | None, dtype: torch.dtype = torch.float64, size: int = V) -> None:
        generator = torch.Generator().manual_seed(P)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.draft_ids = draft_ids
        self.norm = nn.RMSNorm(H, dtype=dtype)
        self.target_hidden, self.target_head = self.norm(3 * normal(P, H)).detach(), normal(size, H)
        self.fills = torch.randint(1, N_STAGES + 1, (P,), generator=generator)
        rows = self.target_head if draft_ids is None else self.target_head[draft_ids]
        self.lm_head = (rows + 0.3 * normal(*rows.shape)).requires_grad_()
        self.hidden = (self.target_hidden + 0.5 * normal(P, H)).requires_grad_()

    def target_logits(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return hidden @ self.target_head.T

    def by_definition(self, options: Loss = Loss()) -> tuple[Tensor, list[Tensor]]:  # noqa: B008 (frozen)
        """Loss and the gradients of hidden and lm_head, by autograd."""
        logits = self.hidden @ self.lm_head.T
        loss = draft_loss(logits, self.target_logits(self.target_hidden), self.draft_ids, options).sum()
        loss = loss + options.hidden * hidden_distance(self.hidden, self.target_hidden).sum()
        return loss.detach(), list(torch.autograd.grad(loss, (self.hidden, self.lm_head)))

    def chunked(
        self,
        chunk: int,
        statistics: bool = True,
        scale: float = 1.0,
        options: Loss = Loss(),  # noqa: B008 (frozen)
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Loss, gradients of `scale` times it, and the statistics table."""
        loss, table = chunked_draft_loss(
            self.hidden,
            self.lm_head,
            self.target_hidden,
            self.target_logits,
            self.draft_ids,
            self.fills,
            N_STAGES,
            chunk,
            statistics,
            options=options,
        )
        gradients = torch.autograd.grad(scale * loss, (self.hidden, self.lm_head))
        return loss.detach(), list(gradients), table


vocabularies = pytest.mark.parametrize("draft_ids", [None, DRAFT_IDS], ids=["all ids", "draft vocabulary"])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    if not theirs.numel():
        return 0.0
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


@vocabularies
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 64, 1000])
def test_the_chunked_loss_equals_the_definition_in_value_and_gradient(
    draft_ids: Tensor | None, dtype: torch.dtype, chunk: int
) -> None:
    for P in (1, 7, 64):
        case = Case(P, draft_ids, dtype)
        expected, expected_gradients = case.by_definition()
        loss, gradients, table = case.chunked(chunk, scale=0.25)
        assert loss.dtype == dtype and [g.dtype for g in gradients] == [dtype] * 2
        errors = [relative_error(4 * ours, theirs) for ours, theirs in zip(gradients, expected_gradients, strict=True)]
        assert max(relative_error(loss, expected), *errors) < TOLERANCE[dtype], (P, errors)
        assert relative_error(table[:, COLUMNS.index("kl")].sum(), expected.double()) < TOLERANCE[dtype]


def drawn(seed: int) -> Loss:
    """A mix of some terms."""
    draw = random.Random(seed)
    weights = {name: draw.choice((0.0, draw.uniform(0.1, 2.0))) for name in TERMS}
    hidden = draw.choice((0.0, draw.uniform(0.1, 2.0)))
    return Loss(**weights | {"tv": 0.7}, hidden=hidden, lk_decay=draw.uniform(0, 5), misses=draw.random() < 0.5)


ALONE = [Loss(**dict.fromkeys(TERMS, 0.0) | {name: 1.0}) for name in TERMS]


@vocabularies
@pytest.mark.parametrize("options", [*ALONE, Loss(hidden=1.0), Loss(misses=False), *map(drawn, range(6))], ids=str)
def test_every_term_and_every_mix_equals_its_definition(draft_ids: Tensor | None, options: Loss) -> None:
    case = Case(40, draft_ids)
    expected, expected_gradients = case.by_definition(options)
    loss, gradients, table = case.chunked(7, scale=0.25, options=options)
    errors = [relative_error(4 * ours, theirs) for ours, theirs in zip(gradients, expected_gradients, strict=True)]
    assert max(relative_error(loss, expected), *errors) < 1e-10, errors
    assert table[:, COLUMNS.index("loss")].sum().item() == pytest.approx(expected.item())
    assert min(g.abs().max() for g in expected_gradients) > 0


@pytest.mark.parametrize("name", TERMS)
def test_each_term_alone_raises_what_it_is_for(name: str) -> None:
    """Descent on logits from afar: the target's best token and the acceptance at temperature 1 both grow."""
    case = Case(64, None)
    logits = torch.zeros(64, V, dtype=torch.float64, requires_grad=True)
    teacher = case.target_logits(case.target_hidden)
    optimizer = torch.optim.Adam([logits], lr=0.1)

    def measured() -> tuple[float, float]:
        q = logits.detach().softmax(-1)
        hits = (q.argmax(-1) == teacher.argmax(-1)).double().mean().item()
        return hits, torch.minimum(q, teacher.softmax(-1)).sum(-1).mean().item()

    before = measured()
    for _ in range(60):
        optimizer.zero_grad()
        draft_loss(logits, teacher, None, ALONE[TERMS.index(name)]).sum().backward()
        optimizer.step()
    after = measured()
    assert after[0] > 0.95 > before[0] and after[1] > before[1] + 0.2


def test_the_distance_of_hidden_states_is_relative_and_ends_where_they_meet() -> None:
    case = Case(64, None)
    wanted = case.target_hidden
    assert hidden_distance(torch.zeros_like(wanted), wanted).tolist() == pytest.approx([1.0] * 64)
    torch.testing.assert_close(hidden_distance(3 * case.hidden, 3 * wanted), hidden_distance(case.hidden, wanted))
    optimizer = torch.optim.Adam([case.hidden], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        hidden_distance(case.hidden, wanted).sum().backward()
        optimizer.step()
    torch.testing.assert_close(case.hidden.detach(), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tv": -1.0}, "model.loss.tv=-1.0: expected a number of at least 0"),
        ({"kl": float("nan")}, "model.loss.kl=nan"),
        ({"hidden": -0.5}, "model.loss.hidden=-0.5: expected a number of at least 0"),
        ({"kl": 0.0, "hidden": 1.0}, "expected a weight above 0 for one of kl, reverse_kl"),
    ],
)
def test_weights_that_are_none_are_refused(fields: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Loss(**fields)


@vocabularies
def test_a_batch_without_a_supervised_position_gives_zero_and_zero_gradients(draft_ids: Tensor | None) -> None:
    case = Case(0, draft_ids)
    loss, (grad_hidden, grad_lm_head), table = case.chunked(chunk=8)
    assert loss == 0 and not table.any()
    assert grad_hidden.shape == (0, H) and not grad_lm_head.any()


@vocabularies
def test_the_loss_of_a_head_that_equals_the_target_is_zero(draft_ids: Tensor | None) -> None:
    case = Case(9, draft_ids)
    with torch.no_grad():
        case.hidden.copy_(case.target_hidden)
        case.lm_head.copy_(case.target_head if draft_ids is None else case.target_head[draft_ids])
    loss, gradients, table = case.chunked(chunk=4, options=Loss(hidden=1.0))
    assert abs(loss.item()) < 1e-12 and max(g.abs().max().item() for g in gradients) < 1e-12
    if draft_ids is None:
        assert table[:, COLUMNS.index("alpha")].sum().item() == pytest.approx(9)


def statistics_by_hand(case: Case) -> Tensor:
    """Position by position: P over the full vocabulary, Q = 0 outside the draft vocabulary."""
    table = torch.zeros(N_STAGES + 1, len(COLUMNS), dtype=torch.float64)
    ids = range(V) if case.draft_ids is None else case.draft_ids.tolist()
    draft_logits = (case.hidden @ case.lm_head.T).detach()
    target_logits = case.target_logits(case.target_hidden)
    divergences = draft_kl(draft_logits, target_logits, case.draft_ids)
    for t in range(len(case.fills)):
        p = target_logits[t].double().softmax(0)
        q = dict(zip(ids, draft_logits[t].double().softmax(0).tolist(), strict=True))
        wanted = int(p.argmax())
        ranked = sorted(q, key=lambda token: -q[token])
        row = {
            "count": 1.0,
            "top1": float(wanted == ranked[0]),
            "hit2": float(wanted in ranked[:2]),
            "hit4": float(wanted in ranked[:4]),
            "alpha": sum(min(p[token].item(), q.get(token, 0.0)) for token in range(V)),
            "miss": float(wanted not in q),
            "kl": divergences[t].item(),
            "loss": divergences[t].item(),
        }
        table[case.fills[t]] += torch.tensor([row[name] for name in COLUMNS], dtype=torch.float64)
    return table


@vocabularies
@pytest.mark.parametrize("P", [1, 50])
def test_the_statistics_count_over_the_full_vocabulary(draft_ids: Tensor | None, P: int) -> None:
    case = Case(P, draft_ids)
    expected = statistics_by_hand(case)
    for chunk in (3, 64):
        torch.testing.assert_close(case.chunked(chunk)[2], expected, atol=1e-9, rtol=0)
    plain = case.chunked(64, statistics=False)[2]
    for name in ("count", "kl", "loss"):
        torch.testing.assert_close(plain[:, COLUMNS.index(name)], expected[:, COLUMNS.index(name)])
    if P == 50:
        sums = dict(zip(COLUMNS, expected.sum(0).tolist(), strict=True))
        print(f"{'all ids' if draft_ids is None else 'draft vocabulary'}: {sums}")
        assert 0 < sums["top1"] < sums["hit4"] < P, "the case tells right from wrong"
        assert (sums["miss"] > 0) == (draft_ids is not None)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def largest_tensor(run: Callable[[], object]) -> int:
    with LargestTensor() as largest:
        run()
    return largest.numel


@vocabularies
def test_logits_exist_for_one_chunk_at_a_time(draft_ids: Tensor | None) -> None:
    P, vocabulary, chunk = 512, 300, 16
    case = Case(P, draft_ids, torch.float32, vocabulary)
    rows = max(P * H, len(case.lm_head) * H)
    ours, plain = largest_tensor(lambda: case.chunked(chunk)), largest_tensor(case.by_definition)
    print(f"largest tensor: chunked {ours}, by definition {plain}, hidden states {rows}")
    assert ours <= max(rows, chunk * vocabulary) < P * vocabulary / 10
    assert plain >= P * vocabulary, "the watch sees what it is meant to see"


def test_a_frozen_lm_head_and_a_pass_without_gradients_are_served() -> None:
    case = Case(6, DRAFT_IDS)
    expected, (grad_hidden, _) = case.by_definition()
    arguments = (case.target_hidden, case.target_logits, DRAFT_IDS, case.fills, N_STAGES, 4)
    loss, _ = chunked_draft_loss(case.hidden, case.lm_head.detach(), *arguments)
    torch.testing.assert_close(torch.autograd.grad(loss, case.hidden)[0], grad_hidden)
    with torch.no_grad():
        silent, table = chunked_draft_loss(case.hidden, case.lm_head, *arguments)
    assert not silent.requires_grad and silent.item() == pytest.approx(expected.item()) and table.any()


@pytest.mark.parametrize("options", [Loss(), Loss(hidden=3.0)], ids=str)
def test_under_bfloat16_autocast_the_gradients_stay_float32_and_close(options: Loss) -> None:
    case = Case(64, None, torch.float32)
    expected, expected_gradients = case.by_definition(options)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients, _ = case.chunked(16, options=options)
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    assert relative_error(loss, expected) < 0.02
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert relative_error(ours, theirs) < 0.05
