"""Staircase attention: fast path and dense reference against the definition, in value and gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spd_lightning.head import attention
from spd_lightning.head.attention import staircase_attention
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.staircase import Staircase

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 6e-2}

STAIRCASES = {
    "one block per depth": Staircase((1, 1, 1, 1), (0, 1, 2, 3, 4)),
    "default of 8 stages": Staircase((4,) * 8, (0, 4, 12, 24, 32)),
    "uneven and shallow": Staircase((5, 11, 9, 7), (0, 5, 20)),
    "an unreachable block": Staircase((2, 2, 2, 2), (0, 2, 6, 7, 8)),
    "two depths in block 0": Staircase((2, 2, 2, 2), (0, 3, 7)),
    "embedding only": Staircase((3, 3), (0,)),
}


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    staircase: Staircase,
    entries: Sequence[Sequence[int]],
    documents: Sequence[Sequence[int]] | None,
    blocks: Sequence[int],
) -> Tensor:
    """Row by row, head by head: softmax over the one row that each earlier position shows."""
    B, _, S, N, D = query.shape
    group = N // key.shape[3]
    bounds = [sum(staircase.stage_layers[:depth]) for depth in range(staircase.num_stages + 1)]
    depth_block = [max(k for k, anchor in enumerate(staircase.anchors) if anchor <= bound) for bound in bounds]
    reachable = sorted(set(depth_block))
    result = []
    for b in range(B):
        for block in blocks:
            first = depth_block.index(reachable[block])
            for T in range(S):
                earlier = [t for t in range(T + 1) if documents is None or documents[b][t] == documents[b][T]]
                rows = []
                for t in earlier:
                    depth = min(staircase.num_stages, first + entries[b][T] - entries[b][t])
                    rows.append(reachable.index(depth_block[depth]))
                for head in range(N):
                    keys = key[b, rows, earlier, head // group]
                    values = value[b, rows, earlier, head // group]
                    weights = (keys @ query[b, blocks.index(block), T, head] / math.sqrt(D)).softmax(0)
                    result.append(weights @ values)
    return torch.stack(result).view(B, len(blocks), S, N, D)


def random_entries(kind: str, n: int, length: int, generator: random.Random) -> list[int]:
    entered, cycle = [], generator.randint(0, 5)
    for _ in range(length):
        entered.append(cycle)
        restart = generator.random() < 0.3
        cycle += {
            "saturated": 1,
            "restarts": n if restart else 1,
            "early re-drafts": generator.randint(1, n),
        }[kind]
    return entered


def random_documents(length: int, generator: random.Random) -> list[int]:
    """Contiguous documents of 1.. tokens; numbers neither start at 0 nor grow, since only equality counts."""
    lengths = []
    while sum(lengths) < length:
        lengths.append(min(generator.choice((1, 2, 3, 5, 9)), length - sum(lengths)))
    numbers = generator.sample(range(100), len(lengths))
    return [number for number, size in zip(numbers, lengths, strict=True) for _ in range(size)]


def random_tensors(
    seed: int, B: int, r: int, m: int, S: int, heads: tuple[int, int], D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value (all requiring gradients) and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    N, K = heads
    shapes = ((B, r, S, N, D), (B, m, S, K, D), (B, m, S, K, D), (B, r, S, N, D))
    q, k, v, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return (1.5 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_(), g


def results(
    tensors: tuple[Tensor, ...],
    layout: StaircaseLayout,
    blocks: Sequence[int],
    dense: bool,
    weight: Tensor | None = None,
) -> list[Tensor]:
    """Output and the three gradients."""
    q, k, v, g = tensors
    out = staircase_attention(q, k, v, layout, blocks, dense)
    grads = torch.autograd.grad(out, (q, k, v), g if weight is None else g * weight)
    return [out.detach(), *grads]


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    assert all(torch.isfinite(x).all() for x in (*ours, *theirs))
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", STAIRCASES)
def test_both_paths_equal_the_definition_row_by_row(name: str) -> None:
    staircase, generator = STAIRCASES[name], random.Random(name)
    m, n, worst = len(staircase.reachable_blocks), staircase.num_stages, 0.0
    for case, kind in enumerate(("saturated", "restarts", "early re-drafts")):
        for packed in (False, True):
            S = 21  # three tiles of the near part, and a far part
            entries = [random_entries(kind, n, S, generator) for _ in range(2)]
            documents = [random_documents(S, generator) for _ in range(2)] if packed else None
            layout = StaircaseLayout(
                staircase, torch.tensor(entries), None if documents is None else torch.tensor(documents)
            )
            tensors = random_tensors(case, 2, m, m, S, (4, 2), 6, torch.float64)
            q, k, v, g = tensors
            expected = by_definition(q, k, v, staircase, entries, documents, range(m))
            reference = [expected.detach(), *torch.autograd.grad(expected, (q, k, v), g)]
            for dense in (True, False):
                worst = max(worst, difference(results(tensors, layout, range(m), dense), reference))
    print(f"{name}: largest difference {worst:.1e}")
    assert worst < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STAIRCASES)
def test_the_fast_path_equals_the_dense_mask_in_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    staircase, generator = STAIRCASES[name], random.Random(f"{name}{dtype}")
    m, n, worst, cases = len(staircase.reachable_blocks), staircase.num_stages, 0.0, 0
    for kind in ("saturated", "restarts", "early re-drafts"):
        for S in (1, 2, n, n + 1, 16, 17, 150):
            for heads in ((4, 4), (4, 2), (6, 1)):
                blocks = sorted(generator.sample(range(m), generator.randint(1, m)))
                entries = torch.tensor([random_entries(kind, n, S, generator) for _ in range(2)])
                documents = torch.tensor([random_documents(S, generator) for _ in range(2)]) if cases % 2 else None
                layout = StaircaseLayout(staircase, entries, documents)
                tensors = random_tensors(cases, 2, len(blocks), m, S, heads, 8, dtype)
                fast = results(tensors, layout, blocks, dense=False)
                # bfloat16 against float64 of the same numbers: both paths round, only one may be blamed
                exact = tuple(x.detach().double().requires_grad_() for x in tensors[:3])
                dense = results((*exact, tensors[3].double()), layout, blocks, dense=True)
                assert [x.dtype for x in fast] == [dtype] * 4
                scale = max(1.0, max(x.abs().max().item() for x in dense))
                worst, cases = max(worst, difference(fast, dense) / scale), cases + 1
    print(f"{name} {dtype}: {cases} cases, largest difference {worst:.1e}")
    assert cases == 63 and worst < TOLERANCE[dtype]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_rows_that_ask_get_the_same_value_and_gradient_as_when_all_ask(packed: bool) -> None:
    staircase, generator = STAIRCASES["default of 8 stages"], random.Random(7)
    m, S = len(staircase.reachable_blocks), 150
    entries = torch.tensor([random_entries("restarts", 8, S, generator) for _ in range(2)])
    documents = torch.tensor([random_documents(S, generator) for _ in range(2)]) if packed else None
    layout = StaircaseLayout(staircase, entries, documents)
    q, k, v, g = random_tensors(0, 2, 2, m, S, (4, 2), 8, torch.float64)
    for share in (0.0, 0.02, 0.5):
        asking = torch.rand(2, S, 2, generator=torch.Generator().manual_seed(1)) < share
        wanted = asking.transpose(1, 2)[..., None, None]
        found = []
        for dense, asked in ((True, None), (False, asking)):
            out = staircase_attention(q, k, v, layout, [0, 3], dense, asked).where(wanted, torch.zeros(()).double())
            found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), g)])
        assert difference(*found) < 1e-12


def test_the_cuda_call_folds_the_rows_of_a_position_into_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and order around the CUDA kernel, with the CPU kernel of the same contract in its place."""
    aten, b, T, r, N, D = torch.ops.aten, 2, 9, 3, 4, 8

    def forward(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool) -> tuple[Any, ...]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal)
        return (out, lse, None, None, T, T, 0, 0, None)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset = args
        assert (cum_q, cum_k, max_q, max_k, seed, offset) == (None, None, T, T, 0, 0)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, dropout, causal)

    kernels = SimpleNamespace(
        _scaled_dot_product_flash_attention=forward, _scaled_dot_product_flash_attention_backward=backward
    )
    monkeypatch.setattr(attention, "aten", kernels)
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, T * r, N, D), (b, T, N, D), (b, T, N, D), (b, T * r, N, D))
    query, key, value, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    out, lse, state = attention._cuda_causal(query, key, value)
    grads = attention._cuda_causal_backward(grad, query, key, value, out, lse, state)

    q, k, v = (x.clone().requires_grad_() for x in (query, key, value))
    scores = torch.einsum("bqnd,bknd->bqnk", q, k) / D**0.5
    later = torch.arange(T)[None, :] > torch.arange(T * r)[:, None] // r
    scores = scores.masked_fill(later[None, :, None], -math.inf)
    expected = torch.einsum("bqnk,bknd->bqnd", scores.softmax(-1), v)
    assert difference([out, lse], [expected, scores.logsumexp(-1)]) < 1e-12
    assert difference(grads, torch.autograd.grad(expected, (q, k, v), grad)) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STAIRCASES)
def test_the_fast_path_on_a_gpu_equals_the_dense_mask_in_float64(name: str, dtype: torch.dtype) -> None:
    staircase, generator = STAIRCASES[name], random.Random(name)
    m, n, worst = len(staircase.reachable_blocks), staircase.num_stages, 0.0
    for case, (S, heads) in enumerate(product((1, n, 17, 300), ((4, 4), (4, 2), (6, 1)))):
        blocks = sorted(generator.sample(range(m), generator.randint(1, m)))
        entries = torch.tensor([random_entries("early re-drafts", n, S, generator) for _ in range(2)])
        documents = torch.tensor([random_documents(S, generator) for _ in range(2)]) if case % 2 else None
        q, k, v, g = random_tensors(case, 2, len(blocks), m, S, heads, 64, dtype)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        layout = StaircaseLayout(staircase, entries, documents)
        expected = results((*exact, g.double()), layout, blocks, dense=True)
        there = [x.detach().cuda().requires_grad_() for x in (q, k, v)]
        layout = StaircaseLayout(staircase, entries.cuda(), None if documents is None else documents.cuda())
        found = [x.cpu() for x in results((*there, g.cuda()), layout, blocks, dense=False)]
        scale = max(1.0, max(x.abs().max().item() for x in expected))
        worst = max(worst, difference(found, expected) / scale)
    print(f"{name} {dtype}: largest difference {worst:.1e}")
    assert worst < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "fast"])
def test_padding_on_the_right_changes_nothing_for_the_tokens_before_it(dense: bool) -> None:
    staircase = STAIRCASES["default of 8 stages"]
    m, generator = len(staircase.reachable_blocks), random.Random(5)
    lengths, S = (13, 30, 1), 30
    entries = [random_entries("restarts", 8, S, generator) for _ in lengths]
    tensors = random_tensors(0, 3, m, m, S, (4, 2), 8, torch.float64)
    real = torch.zeros(3, 1, S, 1, 1, dtype=torch.float64)
    for row, length in enumerate(lengths):
        real[row, :, :length] = 1
    padded = results(tensors, StaircaseLayout(staircase, torch.tensor(entries)), range(m), dense, weight=real)
    assert max((x * (1 - real)).abs().max().item() for x in padded[1:]) == 0, "padding receives no gradient"
    for row, length in enumerate(lengths):
        here = (slice(row, row + 1), slice(None), slice(0, length))
        alone = tuple(x.detach()[here].clone().requires_grad_() for x in tensors[:3])
        layout = StaircaseLayout(staircase, torch.tensor([entries[row][:length]]))
        own = results((*alone, tensors[3][here]), layout, range(m), dense)
        assert difference([x[here] for x in padded], own) < 1e-12


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "fast"])
def test_a_packed_document_gives_what_it_gives_alone(dense: bool) -> None:
    staircase = STAIRCASES["one block per depth"]
    m, generator = len(staircase.reachable_blocks), random.Random(6)
    pieces = ((0, 7), (7, 8), (8, 20), (20, 23))
    entries = [cycle for start, stop in pieces for cycle in random_entries("restarts", 4, stop - start, generator)]
    documents = [number for number, (start, stop) in enumerate(pieces) for _ in range(stop - start)]
    tensors = random_tensors(1, 1, m, m, 23, (4, 2), 8, torch.float64)
    layout = StaircaseLayout(staircase, torch.tensor([entries]), torch.tensor([documents]))
    packed = results(tensors, layout, range(m), dense)
    for start, stop in pieces:
        here = (slice(None), slice(None), slice(start, stop))
        alone = tuple(x.detach()[here].clone().requires_grad_() for x in tensors[:3])
        own = results(
            (*alone, tensors[3][here]),
            StaircaseLayout(staircase, torch.tensor([entries[start:stop]])),
            range(m),
            dense,
        )
        assert difference([x[here] for x in packed], own) < 1e-12


def test_the_default_path_is_the_fast_one_on_a_cpu() -> None:
    staircase = STAIRCASES["one block per depth"]
    layout = StaircaseLayout.from_restarts(staircase, [(0, 3)], 12)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        q, k, v, _ = random_tensors(2, 1, 5, 5, 12, (4, 2), 8, dtype)
        chosen = staircase_attention(q, k, v, layout, range(5))
        assert torch.equal(chosen, staircase_attention(q, k, v, layout, range(5), dense=False))
    q, k, v, _ = random_tensors(2, 1, 5, 5, 12, (4, 2), 8, torch.float16)  # no flash kernel: the reference serves
    assert torch.isfinite(staircase_attention(q, k, v, layout, range(5))).all()


def test_strided_inputs_give_the_same_as_contiguous_ones() -> None:
    staircase = STAIRCASES["an unreachable block"]
    m = len(staircase.reachable_blocks)
    layout = StaircaseLayout.from_restarts(staircase, [(0, 3), (0, 1, 9)], 14)
    tensors = random_tensors(3, 2, m, m, 14, (4, 2), 8, torch.float64)
    strided = tuple(x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in tensors[:3])
    assert not strided[0].is_contiguous()
    ours = results((*strided, tensors[3]), layout, range(m), dense=False)
    assert difference(ours, results(tensors, layout, range(m), dense=False)) == 0


@pytest.mark.parametrize("name", ["one block per depth", "an unreachable block", "two depths in block 0"])
def test_the_gradient_of_the_fast_path_passes_gradcheck(name: str) -> None:
    staircase = STAIRCASES[name]
    m = len(staircase.reachable_blocks)
    for S, restarts, blocks in ((6, (0, 2), range(m)), (2, (0,), [m - 1]), (7, (0,), [0, m - 1])):
        layout = StaircaseLayout.from_restarts(staircase, [restarts], S)
        q, k, v, _ = random_tensors(4, 1, len(blocks), m, S, (2, 1), 2, torch.float64)
        assert torch.autograd.gradcheck(
            lambda q, k, v, layout=layout, blocks=blocks: staircase_attention(q, k, v, layout, blocks, dense=False),
            (q, k, v),
        )


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operation returned (a kernel's own scratch does not show)."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def largest_tensor(S: int, dense: bool) -> int:
    staircase = STAIRCASES["default of 8 stages"]
    tensors = random_tensors(0, 1, 5, 5, S, (2, 1), 8, torch.float32)
    layout = StaircaseLayout.from_restarts(staircase, [range(0, S, 11)], S)
    with LargestTensor() as largest:
        results(tensors, layout, range(5), dense)
    return largest.numel


def test_the_fast_path_allocates_nothing_quadratic_in_the_sequence_length() -> None:
    """At S = 256 rows hold m S N D = 20,480 elements, the windows of the near part five times that, a mask 1.6 M."""
    S, rows = 256, 5 * 256 * 2 * 8
    fast, twice, dense = largest_tensor(S, False), largest_tensor(2 * S, False), largest_tensor(S, True)
    print(f"largest tensor at S=256: fast {fast}, dense {dense}; fast at S=512: {twice}")
    assert fast <= 8 * rows
    assert twice <= 2 * fast
    assert dense >= (5 * S) ** 2, "the watch sees what it is meant to see"


@pytest.mark.parametrize("length", [12, 3])
def test_a_second_derivative_is_refused_rather_than_wrong(length: int) -> None:
    """The weights of the near part are constants to autograd, so it would silently drop terms."""
    staircase = STAIRCASES["default of 8 stages"]
    layout = StaircaseLayout.from_restarts(staircase, [(0,)], length)
    q, k, v, _ = random_tensors(4, 1, 1, 5, length, (2, 1), 2, torch.float64)
    out = staircase_attention(q, k, v, layout, [0], dense=False)
    first = torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), k)
