"""Draft trees: the output is plain decoding's, and every branch is what it would be alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.decoding.generation import Generation
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.tree import Node, Tree, TreeDecoder, _Slot, _TreeRun
from spd_lightning.errors import InputError
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.head.loading import new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.target import Target

Models = tuple[Target, SpeculationHead]
SPLITS: list[tuple[int, Any]] = [(2, 2), (4, 4), (5, [1, 3, 1]), (8, 8), (6, [2, 0, 3, 1]), (7, 3)]


@pytest.fixture
def models(make_target: Callable[..., Target]) -> Callable[[int], Models]:
    """A target in float64 and an untrained head that is right now and then, of a seed."""

    def made(seed: int) -> Models:
        layers, stages = SPLITS[seed % len(SPLITS)]
        split = {"num_stages": stages} if isinstance(stages, int) else {"stage_layers": stages}
        target = make_target(
            ("llama", "qwen3")[seed % 2], layers, seed=seed, spread=0.05, embedding_scale=4.0,
            dtype=torch.float64, **split,
        )  # fmt: skip
        ids = None if seed % 3 else sorted(random.Random(seed).sample(range(60), 40))
        return target, new_head(target, num_layers=1 + seed % 2, draft_token_ids=ids, seed=seed).double().eval()

    return made


def drawn(seed: int) -> tuple[Tree, dict[str, Any], list[int]]:
    """A tree, settings of sampling, and a prompt."""
    draw = random.Random(seed)
    tree = Tree(draw.randint(1, 5), draw.choice((0.5, 2.0, 6.0)), draw.random() < 0.7)
    settings: dict[str, Any] = draw.choice(
        [{}, {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 8}, {"temperature": 1.3, "top_p": 0.8}]
    )
    return tree, settings | {"seed": seed}, [draw.randrange(60) for _ in range(draw.choice((1, 2, 9)))]


@pytest.mark.parametrize("seed", range(24))
def test_the_output_is_that_of_plain_decoding_with_the_same_draws(models: Callable[[int], Models], seed: int) -> None:
    target, head = models(seed)
    tree, settings, prompt = drawn(seed)
    plain = autoregressive_generate(target, prompt, 30, coupled=True, **settings)
    found = TreeDecoder(target, head, tree).generate(prompt, 30, **settings)
    assert found.token_ids == plain.token_ids
    assert found.drafts_verified == 29 and found.drafts_accepted == sum(found.accepted_flags)
    n = len(target.stage_layers or ())
    assert 29 + n - 1 <= found.cycles <= 29 * n, "between a pipeline that is always full and none"


@pytest.mark.parametrize("seed", range(12))
def test_a_tree_of_width_one_is_the_chain(models: Callable[[int], Models], seed: int) -> None:
    target, head = models(seed)
    _, _, prompt = drawn(seed)
    chain = SpdDecoder(target, head).generate(prompt, 30)
    found = TreeDecoder(target, head, Tree(width=1, late=False)).generate(prompt, 30)
    assert (found.token_ids, found.cycles, found.restart_positions) == (
        chain.token_ids, chain.cycles, chain.restart_positions,
    )  # fmt: skip


def test_an_end_of_sequence_ends_it_and_the_bound_is_exact(models: Callable[[int], Models]) -> None:
    target, head = models(3)
    decoder = TreeDecoder(target, head, Tree(3))
    free = decoder.generate([5, 6], 20).token_ids
    ended = decoder.generate([5, 6], 20, eos_token_id=free[7]).token_ids
    assert ended == free[: free.index(free[7]) + 1]
    assert all(len(decoder.generate([5, 6], count).token_ids) == count for count in (1, 2, 3))


def test_a_gate_keeps_rows_out_and_costs_no_token(models: Callable[[int], Models]) -> None:
    target, head = models(3)
    prompts = [[seed, 2 * seed % 60, 7] for seed in range(4)]
    rows, cycles = [], []
    for gate in (0.0, 0.01, 0.999):
        decoder = TreeDecoder(target, head, Tree(4, gate=gate))
        found = [decoder.generate(prompt, 20) for prompt in prompts]
        assert [one.token_ids for one in found] == [autoregressive_generate(target, p, 20).token_ids for p in prompts]
        rows.append(sum(one.rows * one.cycles for one in found) / sum(one.cycles for one in found))
        cycles.append(sum(one.cycles for one in found))
    assert rows[0] > rows[1] > rows[2] >= 1 and cycles[0] <= cycles[1] <= cycles[2]
    chain = [TreeDecoder(target, head, Tree(1)).generate(prompt, 20) for prompt in prompts]
    assert sum(one.cycles for one in chain) >= cycles[2], "nothing is worth the whole of a restart: the best alone"
    assert all(one.rows == 1 for one in chain)


def test_a_generation_charges_its_rows(models: Callable[[int], Models]) -> None:
    found = TreeDecoder(*models(3), Tree(3)).generate([5, 6], 20)
    free = found.theoretical_speedup
    assert free is not None and found.rows > 1
    assert sum(found.widths) == found.cycles and len(found.widths) == 3
    assert found.row_charged_speedup([1.0, 1.0, 1.0]) == free
    assert found.row_charged_speedup([1.0, 1.5, 2.0]) == pytest.approx(free / (1 + 0.5 * (found.rows - 1)))
    dear = [1.0, 1.0, 9.0]  # not what the mean number of rows costs
    assert found.row_charged_speedup(dear) == pytest.approx(free * found.cycles / (found.cycles + 8 * found.widths[2]))
    assert found.widths[2] > 0 < found.widths[0] + found.widths[1]


# -- every branch is what it would be alone ----------------------------------------------------------------------------


class Watched(_TreeRun):
    """Compares every row of every cycle with a chain of its own: the path's tokens and entry cycles, no branches."""

    compared = 0

    def _draft(self, now: int) -> None:
        super()._draft(now)
        slot = self.slots.get(now)
        for node in slot.nodes if slot is not None else ():
            tokens, entries = self.alone(node)
            states, _ = self.target(torch.tensor([tokens]), self.staircase.anchors)
            layout = StaircaseLayout(self.staircase, torch.tensor([entries]))
            logits = self.head.logits(self.head(list(states), layout))[0, -1]
            scores = self.verdicts.sampling.scores(logits, node.position + 1, self.verdicts.draft_ids)
            laws = (self.tree.sharpness * scores).log_softmax(-1)
            for token, chance in node.drafts:
                index = token if self.verdicts.draft_ids is None else self.verdicts.draft_ids.tolist().index(token)
                assert chance == pytest.approx(float(laws[index]), abs=1e-9), "the head's row"
                self.compared += 1

    def _stage(self, stage: int, slot: Any) -> None:
        super()._stage(stage, slot)
        depth = self.staircase.boundaries[stage + 1]
        for row, node in enumerate(slot.nodes):
            tokens, _ = self.alone(node)
            states, _ = self.target(torch.tensor([tokens]), (0, depth))
            torch.testing.assert_close(slot.hidden[0, row], states[-1][0, -1], atol=1e-9, rtol=0)
            self.compared += 1

    def alone(self, node: Node) -> tuple[list[int], list[int]]:
        """Tokens and entry cycles of a path, the prompt finished long before."""
        path = [node]
        while (above := self.above[id(path[-1])]) is not None:
            path.append(above)
        path.reverse()
        n, P = self.staircase.num_stages, len(self.prompt)
        entries = [n * (position - P) for position in range(P)] + [one.entered for one in path]
        return [*self.prompt, *(one.token for one in path)], entries

    def _node(self, parent: Node | None, position: int, token: int, chance: float, before: Node | None = None) -> Node:
        made = super()._node(parent, position, token, chance, before)
        if not hasattr(self, "above"):
            self.above: dict[int, Node | None] = {}
            self.every: list[Node] = []  # keeps ids from being used again
        self.above[id(made)] = parent or before
        self.every.append(made)
        return made


def watched(target: Target, head: SpeculationHead, tree: Tree, prompt: Sequence[int], **settings: Any) -> int:
    """Rows that were compared in one generation."""
    runs: list[Watched] = []

    class Decoder(TreeDecoder):
        def _run(self, prompt: Any, max_new_tokens: int, verdicts: Any, ends: Any, observed: bool) -> Watched:
            made = super()._run(prompt, max_new_tokens, verdicts, ends, observed)
            made.__class__ = Watched
            runs.append(made)  # type: ignore[arg-type]
            return runs[-1]

    Decoder(target, head, tree).generate(prompt, 16, **settings)
    return runs[0].compared


@pytest.mark.parametrize("seed", range(12))
def test_every_row_of_a_tree_is_that_of_its_path_alone(models: Callable[[int], Models], seed: int) -> None:
    target, head = models(seed)
    tree, settings, prompt = drawn(seed)
    assert watched(target, head, tree, prompt, **settings) > 30


def broken(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    right, whole = _TreeRun._node, _Slot.keep

    def node(self: _TreeRun, parent: Node | None, *arguments: Any, **more: Any) -> Node:
        made, P = right(self, parent, *arguments, **more), len(self.prompt)
        if how == "siblings are seen" and parent is not None:
            for child in parent.children:
                self.sees[made.place - P, child.place - P] = True
        if how == "parents are not seen" and parent is not None:
            self.sees[made.place - P, parent.place - P] = False
        return made

    def keep(self: Any, alive: set[int]) -> None:
        hidden, anchors = self.hidden, self.anchors
        whole(self, alive)
        self.hidden, self.anchors = hidden[:, : len(self.nodes)], anchors[:, : len(self.nodes)]

    monkeypatch.setattr(_TreeRun, "_node", node)
    if how == "rows of dead branches stay":
        monkeypatch.setattr("spd_lightning.decoding.tree._Slot.keep", keep)


@pytest.mark.parametrize("how", ["siblings are seen", "parents are not seen", "rows of dead branches stay"])
def test_branches_that_leak_are_found(
    models: Callable[[int], Models], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    broken(monkeypatch, how)
    target, head = models(3)
    with pytest.raises(AssertionError):
        for seed in range(4):
            watched(target, head, Tree(4), [seed, 3, 5])


def test_a_tree_accepts_more_than_a_chain_and_takes_fewer_cycles(models: Callable[[int], Models]) -> None:
    target, head = models(3)
    prompts = [[seed, 2 * seed % 60, 7] for seed in range(6)]

    def cycles(decoder: SpdDecoder, **settings: Any) -> int:
        found: list[Generation] = [decoder.generate(prompt, 24, **settings) for prompt in prompts]
        return sum(one.cycles for one in found)

    for settings in ({}, {"temperature": 0.5}):
        narrow, wide = (cycles(TreeDecoder(target, head, Tree(width)), **settings) for width in (1, 4))
        assert wide < 0.95 * narrow


# -- the law -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7}], ids=str)
def test_the_best_score_is_an_exact_draw(settings: dict[str, Any]) -> None:
    from scipy.stats import chisquare

    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts, law, rounds = torch.zeros(12), Sampling(0.9, **settings).law(logits), 6000
    for position in range(rounds):
        counts[int(Sampling(0.9, seed=4, **settings).scores(logits, position).argmax())] += 1
    possible = law > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible].numpy(), rounds * law[possible].numpy()).pvalue > 1e-4


def test_coupled_draws_agree_more_often_than_two_draws_would() -> None:
    generator = torch.Generator().manual_seed(2)
    p_logits: Tensor = torch.randn(20, generator=generator)
    q_logits = p_logits + 0.5 * torch.randn(20, generator=generator)
    p, q = Sampling(1.0).law(p_logits), Sampling(1.0).law(q_logits)
    same = [
        Sampling(1.0, seed=s).scores(p_logits, 0).argmax() == Sampling(1.0, seed=s).scores(q_logits, 0).argmax()
        for s in range(3000)
    ]
    overlap = float(torch.minimum(p, q).sum())
    agreed = sum(map(bool, same)) / len(same)
    assert overlap / (2 - overlap) - 0.03 < agreed < overlap + 0.03, "the bound of 2408.07978, and the best there is"
    assert agreed > float((p * q).sum()) + 0.2


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_5_text", "gemma3_text"])
def test_targets_whose_states_are_of_one_branch_are_refused(make_target: Callable[..., Target], family: str) -> None:
    target = make_target(family, 4, num_stages=2)
    with pytest.raises(InputError, match="branches of this target would need a state each"):
        TreeDecoder(target, new_head(target), Tree(2))


def test_impossible_trees_are_refused(models: Callable[[int], Models]) -> None:
    for tree, says in (({"width": 0}, "Tree.width=0 .*expected 1 to 16"), ({"sharpness": 0.0}, "Tree.sharpness=0.0")):
        with pytest.raises(InputError, match=says):
            Tree(**tree)
    target, head = models(1)
    with pytest.raises(InputError, match="forced_acceptance is a verdict on one draft"):
        TreeDecoder(target, head).generate([1], 4, forced_acceptance=0.5)
