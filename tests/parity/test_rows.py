"""Training rows == decoding rows: the invariant that guards everything.

The oracle decodes cycle by cycle from nothing but entry cycles: in every cycle it asks which positions reach a
new block (by counting layers), computes these rows through the head's decoding view, and writes down ALL outputs.
The training pass must produce the same rows, for any gaps. Anchor states that do not exist yet at a position's
depth are NaN in the oracle, so a row that reads too deep cannot go unnoticed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder
from spd_lightning.decoding.drafters import Draft, HeadDrafter
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.schedule import Cycle
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.head.loading import draft_logits, new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.target import Target

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
KINDS = ("saturated", "restarts", "early re-drafts")
VOCABULARY = 60


def spread_head(target: Target, seed: int, **settings: Any) -> SpeculationHead:
    """An untrained head with every weight moved: no norm is 1, no W_k the identity, every layer matters."""
    head = new_head(target, seed=seed, **{"anchor_norm": seed % 2 == 1} | settings)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise if "norm" in name else noise * 0.5 / parameter.shape[-1] ** 0.5)
    return head.to(target.dtype).eval()


def random_gaps(kind: str, n: int, length: int, generator: random.Random) -> list[int]:
    if kind == "saturated":
        return [1] * length
    if kind == "restarts":
        return [n if generator.random() < 0.3 else 1 for _ in range(length)]
    return [generator.randint(1, n) if generator.random() < 0.5 else 1 for _ in range(length)]


def random_split(n: int, num_layers: int, generator: random.Random) -> tuple[int, ...]:
    cuts = [0, *sorted(generator.sample(range(1, num_layers), n - 1)), num_layers]
    return tuple(stop - start for start, stop in zip(cuts, cuts[1:], strict=False))


def random_anchors(shape: str, stage_layers: Sequence[int], generator: random.Random) -> tuple[int, ...] | None:
    """`deep` ends at the last layer, `shallow` stops before it, `unreachable` has two anchors in one stage."""
    L, last = sum(stage_layers), stage_layers[-1]
    if shape == "default":
        return None
    if shape == "shallow":
        return (0, *sorted(generator.sample(range(1, L), min(2, L // 2))))
    if shape == "unreachable":
        widest = max(range(len(stage_layers)), key=lambda s: stage_layers[s])
        start = sum(stage_layers[:widest])
        inside = range(start + 1, start + stage_layers[widest] + 1)
        return (0, *sorted({*inside[-2:], L}))
    return (0, *sorted({*generator.sample(range(1, L), min(3, L - 1)), L - last + 1, L}))


def block_after(stages_done: int, stage_layers: Sequence[int], anchors: Sequence[int]) -> int:
    layers = sum(stage_layers[:stages_done])
    return max(k for k, anchor in enumerate(anchors) if anchor <= layers)


def decode_rows(
    head: SpeculationHead, states: Sequence[Tensor], entered: Sequence[int]
) -> dict[tuple[int, int], Tensor]:
    """(block, position) -> output row [H], one cycle after another; states: one [S, H] per anchor."""
    stage_layers, anchors = head.config.stage_layers, head.config.anchors
    n, S = len(stage_layers), len(entered)
    cache, rotary = head.new_cache(S), head.rotary_table(S)
    cache.keys.fill_(torch.nan)  # what was never written must never be read
    cache.values.fill_(torch.nan)
    current: dict[int, int] = {}
    outputs: dict[tuple[int, int], Tensor] = {}
    for cycle in range(entered[-1] + n + 1):
        due, kept = [], {}
        for position in range(S):
            if entered[position] > cycle:
                break
            depth = min(n, cycle - entered[position])
            block = block_after(depth, stage_layers, anchors)
            if current.get(position) == block:
                continue
            current[position] = block
            due.append((block, position))
            rows = torch.stack([state[position] for state in states])
            rows[[anchor > sum(stage_layers[:depth]) for anchor in anchors]] = torch.nan
            kept[position] = rows
        if due:
            assert len(due) <= len(anchors), "at most one row per block and cycle"
            found = head.step(due, kept, cache, rotary, all_rows=True)
            outputs.update(zip(due, found, strict=True))
            assert torch.equal(found[-1], found[len(due) - 1])
    return outputs


def largest_difference(
    head: SpeculationHead, states: list[Tensor], gaps: list[list[int]], dense: bool
) -> tuple[float, int]:
    """Over ALL rows of all sequences, hidden and (for block 0) logits; states: [B, S, H] per anchor."""
    entries = [[sum(row[1 : T + 1]) for T in range(len(row))] for row in gaps]
    layout = StaircaseLayout(head.staircase, torch.tensor(entries))
    training = head(states, layout, all_rows=True, dense=dense)
    drafting = head(states, layout, dense=dense)
    largest, rows = 0.0, 0
    for index, entered in enumerate(entries):
        decoded = decode_rows(head, [state[index] for state in states], entered)
        blocks = sorted({block for block, _ in decoded})
        assert training.shape[1] == len(blocks) and len(decoded) == len(blocks) * len(entered)
        for (block, position), row in decoded.items():
            pairs = [(training[index, blocks.index(block), position], row)]
            if block == 0:
                pairs += [(drafting[index, position], row)]
                pairs += [(head.logits(drafting[index, position]), head.logits(row))]
            for ours, theirs in pairs:
                difference = (ours - theirs).abs().max().item()
                assert difference == difference, f"NaN in row {(block, position)}"
                largest = max(largest, difference)
            rows += 1
    return largest, rows


# -- all rows against the cycle-by-cycle decoder -------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "fast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
@torch.no_grad()
def test_all_training_rows_equal_the_rows_of_a_cycle_by_cycle_decoder(
    make_target: Callable[..., Target], n: int, dtype: torch.dtype, dense: bool
) -> None:
    """Every kind of gap x of anchors, uneven stages, 1-4 head layers, with and without draft vocabulary."""
    generator = random.Random(100 * n)
    worst, rows, cases = 0.0, 0, 0
    for shape in ("default", "deep", "shallow", "unreachable"):
        num_layers = n + generator.randint(2, 4)
        stage_layers = random_split(n, num_layers, generator)
        family = generator.choice(("llama", "qwen3"))
        seed = 10 * n + cases
        target = make_target(
            family,
            num_layers,
            vocab=VOCABULARY,
            seed=seed,
            stage_layers=stage_layers,
            dtype=dtype,
            spread=0.15,
        )
        ids = torch.tensor([[generator.randrange(VOCABULARY) for _ in range(2 * n + 6)] for _ in range(2)])
        for kind in KINDS:
            head = spread_head(
                target,
                seed,
                num_layers=1 + cases % 4,
                anchors=random_anchors(shape, stage_layers, generator),
                draft_token_ids=generator.sample(range(VOCABULARY), 20) if cases % 2 else None,
            )
            assert head.lm_head.out_features == (20 if cases % 2 else VOCABULARY)
            states, _ = target(ids, head.config.anchors)
            gaps = [random_gaps(kind, n, ids.shape[1], generator) for _ in range(2)]
            difference, compared = largest_difference(head, states, gaps, dense)
            assert difference < TOLERANCE[dtype], (shape, kind, stage_layers, head.config.anchors, gaps)
            worst, rows, cases = max(worst, difference), rows + compared, cases + 1
    print(f"n={n} {dtype} dense={dense}: {rows} rows in {cases} cases, largest difference {worst:.1e}")
    assert cases == 12


@torch.no_grad()
def test_rows_differ_visibly_if_one_entry_cycle_differs(make_target: Callable[..., Target]) -> None:
    """The comparison above has power: one cycle wrong in one place shows far above the tolerance."""
    target = make_target(num_layers=6, stage_layers=(1, 2, 1, 2), dtype=torch.float64)
    head = spread_head(target, 0, num_layers=2)
    ids = torch.arange(14)[None] % VOCABULARY
    states, _ = target(ids, head.config.anchors)
    right = [[1, 1, 1, 2, 1, 1, 4, 1, 1, 1, 3, 1, 1, 1]]
    assert largest_difference(head, states, right, dense=True)[0] < 1e-10
    entries = torch.tensor(right).cumsum(1)
    correct = head(states, StaircaseLayout(head.staircase, entries), all_rows=True)
    for where in (3, 6, 10):
        moved = entries.clone()
        moved[:, where:] += 1 if where != 6 else -1
        other = head(states, StaircaseLayout(head.staircase, moved), all_rows=True)
        assert (correct - other).abs().max() > 1e-2, where


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "fast"])
def test_selected_positions_have_the_same_drafts_and_gradients_as_when_every_row_is_computed(
    make_target: Callable[..., Target], dense: bool
) -> None:
    """Rows that nothing selected depends on are left out: that must change neither a value nor a gradient."""
    generator, torch_generator = random.Random(3), torch.Generator().manual_seed(3)
    worst = 0.0
    for case, n in enumerate((2, 3, 4, 8)):
        num_layers = n + 2
        stage_layers = random_split(n, num_layers, generator)
        target = make_target(num_layers=num_layers, stage_layers=stage_layers, dtype=torch.float64, spread=0.15)
        shape = ("default", "deep", "shallow", "unreachable")[case]
        anchors = random_anchors(shape, stage_layers, generator)
        head = spread_head(target, case, num_layers=1 + case % 3, anchors=anchors)
        ids = torch.randint(0, VOCABULARY, (2, 37), generator=torch_generator)
        states, _ = target(ids, head.config.anchors)
        gaps = torch.tensor([random_gaps(KINDS[case % 3], n, 37, generator) for _ in range(2)])
        documents = torch.tensor([[0] * 20 + [1] * 17, [0] * 3 + [1] * 34]) if case % 2 else None
        layout = StaircaseLayout(head.staircase, gaps.cumsum(1), documents)
        for share in (0.0, 0.1, 0.6, 1.0):
            select = torch.rand(2, 37, generator=torch_generator) < share
            weight = torch.randn(int(select.sum()), head.lm_head.out_features, generator=torch_generator).double()
            found = []
            for whole in (True, False):
                if whole:
                    hidden = head(states, layout, all_rows=True, dense=True)[:, 0][select]
                else:
                    hidden = head(states, layout, select=select, dense=dense)
                head.zero_grad()
                (head.logits(hidden) * weight).sum().backward()
                grads = [parameter.grad for parameter in head.parameters()]
                found.append([hidden.detach(), *(g.clone() for g in grads if g is not None)])
            assert found[0][0].shape == found[1][0].shape == (int(select.sum()), target.hidden_size)
            assert len(found[0]) == len(found[1])
            for whole_part, part in zip(*found, strict=True):
                if part.numel():
                    scale = max(1.0, whole_part.abs().max().item())
                    worst = max(worst, (whole_part - part).abs().max().item() / scale)
    print(f"dense={dense}: largest relative difference of values and gradients {worst:.1e}")
    assert worst < 1e-10


@torch.no_grad()
def test_no_row_depends_on_a_later_token_or_a_later_restart(make_target: Callable[..., Target]) -> None:
    target = make_target(num_layers=5, stage_layers=(2, 1, 2), dtype=torch.float64)
    head = spread_head(target, 4, num_layers=3)
    ids = torch.randint(0, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCABULARY
    results = []
    for tokens, restarts in ((ids, (0, 3)), (changed, (0, 3, 7, 9))):
        states, _ = target(tokens, head.config.anchors)
        results.append(head(states, StaircaseLayout.from_restarts(head.staircase, [restarts], 12), all_rows=True))
    assert (results[0][:, :, :7] - results[1][:, :, :7]).abs().max() < 1e-12
    assert (results[0][:, :, 7:] - results[1][:, :, 7:]).abs().max() > 1e-2


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "fast"])
@torch.no_grad()
def test_documents_packed_into_one_row_draft_as_they_do_alone(make_target: Callable[..., Target], dense: bool) -> None:
    """Target, positions, staircase and head together: nothing leaks from one document into the next."""
    target = make_target("qwen3", 5, stage_layers=(2, 1, 2), dtype=torch.float64)
    head = spread_head(target, 5, num_layers=2)
    generator = random.Random(0)
    lengths, packed_ids, positions, documents, entries, alone = (5, 1, 9, 4), [], [], [], [], []
    for number, length in enumerate(lengths):
        ids = [generator.randrange(VOCABULARY) for _ in range(length)]
        restarts = sorted({0, generator.randrange(length)})
        alone.append(draft_logits(target, head, torch.tensor([ids]), restarts=restarts)[0])
        packed_ids += ids
        positions += range(length)
        documents += [number] * length
        entries += [T + 2 * sum(1 for restart in restarts if 0 < restart <= T) for T in range(length)]
    states, _ = target(
        torch.tensor([packed_ids]),
        head.config.anchors,
        position_ids=torch.tensor([positions]),
        documents=torch.tensor([documents]),
    )
    layout = StaircaseLayout(head.staircase, torch.tensor([entries]), torch.tensor([documents]))
    packed = head.logits(head(states, layout, position_ids=torch.tensor([positions]), dense=dense))[0]
    assert (packed - torch.cat(alone)).abs().max() < 1e-10


# -- the real decoder against draft_logits -------------------------------------------------------------------


class CoinDrafter(HeadDrafter):
    """Runs the head in every cycle and records its logits, but proposes the right token or a wrong one by coin.

    A random head would be rejected every time; coins give real runs of every length while the head's arithmetic
    is that of the real decoder.
    """

    def __init__(self, head: SpeculationHead, continuation: Sequence[int], acceptance: float, seed: int) -> None:
        super().__init__(head)
        self.tokens, self.acceptance, self.coins = list(continuation), acceptance, random.Random(seed)
        self.logits: dict[int, Tensor] = {}  # position of the newest token -> logits of its last draft

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        self.logits[cycle.newest] = self.head.logits(self.head.step(cycle.rows, kept, self.cache, self.rotary))
        assert len(tokens) == cycle.newest + 1
        right = self.tokens[cycle.newest + 1] if cycle.newest + 1 < len(self.tokens) else 0
        wrong = (right + 1 + self.coins.randrange(VOCABULARY - 1)) % VOCABULARY
        return Draft(right if self.coins.random() < self.acceptance else wrong, None)


@torch.no_grad()
def plain_greedy(target: Target, prompt: list[int], new_tokens: int) -> list[int]:
    """Whole-sequence passes of the Hugging Face model, no cache: prompt and continuation."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(target.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_draft_logits_equal_what_the_real_decoder_computed_in_every_cycle(
    make_target: Callable[..., Target], n: int, dtype: torch.dtype
) -> None:
    generator = random.Random(n)
    worst, compared = 0.0, 0
    for case, acceptance in enumerate((0.0, 0.5, 0.8, 0.9, 1.0)):
        num_layers = n + generator.randint(1, 3)
        stage_layers = random_split(n, num_layers, generator)
        family = ("llama", "qwen3")[case % 2]
        target = make_target(
            family,
            num_layers,
            vocab=VOCABULARY,
            seed=case,
            stage_layers=stage_layers,
            dtype=dtype,
            spread=0.15,
        )
        shape = ("default", "deep", "shallow", "unreachable")[case % 4]
        head = spread_head(
            target,
            case,
            num_layers=1 + case % 4,
            anchors=random_anchors(shape, stage_layers, generator),
            draft_token_ids=generator.sample(range(VOCABULARY), 20) if case % 2 else None,
        )
        prompt = [generator.randrange(VOCABULARY) for _ in range((1, 2, 9, 5, 3)[case])]
        tokens = plain_greedy(target, prompt, 24)
        drafter = CoinDrafter(head, tokens, acceptance, case)
        generation = SpdDecoder(target, drafter).generate(prompt, 24)
        assert prompt + generation.token_ids == tokens
        if 0 < acceptance < 1:
            assert 1 < len(generation.restart_positions) < 24, "runs of different lengths"
        expected = draft_logits(target, head, torch.tensor([tokens]), restarts=generation.restart_positions)[0]
        for position in range(len(prompt), len(tokens) - 1):
            difference = (drafter.logits[position] - expected[position]).abs().max().item()
            assert difference < TOLERANCE[dtype], (
                stage_layers,
                head.config.anchors,
                generation.restart_positions,
            )
            worst, compared = max(worst, difference), compared + 1
    print(f"n={n} {dtype}: {compared} drafts, largest difference {worst:.1e}")
    assert compared == 5 * 23


def test_the_training_view_reproduces_every_verdict_of_a_greedy_generation(
    make_target: Callable[..., Target],
) -> None:
    """The drift check: accept or reject, draft by draft, from one pass over what the real decoder produced."""
    accepted = verified = 0
    for seed in range(8):
        n = (2, 3, 4, 5)[seed % 4]
        target = make_target(num_layers=5, num_stages=n, seed=seed, spread=0.05, embedding_scale=4)
        ids = sorted(random.Random(seed).sample(range(VOCABULARY), 45)) if seed >= 4 else list(range(VOCABULARY))
        head = new_head(
            target,
            num_layers=1 + seed % 2,
            draft_token_ids=ids if seed >= 4 else None,
            seed=seed,
            anchor_norm=seed % 3 == 0,
        )
        events: list[CycleEvent] = []
        prompt = [seed, 3]
        generation = SpdDecoder(target, head).generate(prompt, 40, observer=events.append)
        tokens = prompt + generation.token_ids
        logits = draft_logits(target, head, torch.tensor([tokens]), restarts=generation.restart_positions)[0]
        drafted = {event.cycle.newest: event.drafted for event in events if event.cycle is not None}
        expected = {t: ids[int(logits[t].argmax())] for t in range(len(prompt), len(tokens) - 1)}
        assert expected == {t: drafted[t] for t in expected}
        flags = [draft == tokens[t + 1] for t, draft in expected.items()]
        assert flags == [event.accepted for event in events if event.accepted is not None]
        assert flags == generation.accepted_flags
        accepted, verified = accepted + sum(flags), verified + len(flags)
    print(f"{accepted} of {verified} drafts accepted")
    assert 0.05 < accepted / verified < 0.95, "a check of both verdicts needs both"
