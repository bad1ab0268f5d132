"""Draft trees: up to k continuations enter the pipeline per cycle, and the target's own token says which one was right.

A node is a token that has entered, with a parent one position before it. In every cycle the head drafts after each of
the newest nodes; of all continuations that are not in flight yet, the k of most value enter next (`Tree`). The nodes
that entered together go through a stage as rows of one batch, each seeing its own ancestors alone (a mask over one
cache). When a node leaves the last stage the target's token is known: the child that holds it lives on with its
descendants, everything else dies. If no child does, it is a restart.

Lossless: the target chooses its token by itself, by argmax or by a draw of its own, and the tree only says whether that
token is in flight already. So the output is token for token that of plain decoding with the same draws, whatever is
drafted. Under sampling the draws are coupled: a position has Gumbel noise of its own, the target's token is the best of
log P + noise, and the likeliest candidates for it are the best of log Q + noise (`Sampling.scores`).

A path through the tree is a sequence with entry cycles that grow along it, so the staircase rule holds for it as it
stands: a node's rows see its ancestors' rows, whatever gap lies between a parent's entry and a child's.

Shapes: R rows of a pass, A anchors, H hidden, C rows of the caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder
from spd_lightning.decoding.drafters import Drafter
from spd_lightning.decoding.sampling import CoupledSampling, Sampling
from spd_lightning.decoding.schedule import Cycle
from spd_lightning.decoding.verdict import Verdicts
from spd_lightning.errors import InputError
from spd_lightning.head.loading import draft_logits
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.target import Target
from spd_lightning.target.tree_cache import TreeCache


@dataclass(frozen=True)
class Tree:
    """How a draft tree grows.

    A continuation's value is log(chance that its path is the target's) + log(cycles it then saves). The chance is the
    product along the path of softmax(sharpness x scores of the draft): the law of the target's CHOICE given the draft's
    scores, not the draft itself. Under greedy decoding the likeliest token is the target's far more often than its
    probability says, so with a sharpness of 1 confident branches of wrong tokens would crowd out the right one. A child
    that enters g cycles after its parent saves n - g of the n cycles of a restart.

    Args:
        width: k, continuations that enter per cycle at most; 1: a chain, as without a tree.
        sharpness: see `fitted_sharpness`.
        late: whether an older node's second thoughts may enter too, beside the newest nodes' continuations.
        gate: what a continuation must be worth to enter, the chance of its path x the share of a restart that it saves;
            rows are not free, and where the head is sure of one path others are worth nothing. The best always enters.
    """

    width: int = 3
    sharpness: float = 2.5
    late: bool = True
    gate: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 16:
            raise InputError(f"Tree.width={self.width} (--tree): expected 1 to 16 continuations per cycle.")
        if not (math.isfinite(self.sharpness) and self.sharpness > 0):
            raise InputError(f"Tree.sharpness={self.sharpness} (--tree-sharpness): expected a positive number.")
        if not 0 <= self.gate < 1:
            raise InputError(f"Tree.gate={self.gate} (--tree-gate): expected a number from 0 to below 1.")


@dataclass(eq=False)
class Node:
    """A token that has entered.

    Attributes:
        place: its row in the caches of target and head.
        entered: its entry cycle.
        chance: log of the chance that it is the target's token, given its parent.
        drafts: (token, log chance) of its continuations, the likeliest first, once the head has drafted after it.
    """

    position: int
    token: int
    place: int
    entered: int
    chance: float
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    drafts: list[tuple[int, float]] = field(default_factory=list)

    def below(self) -> Iterable[Node]:
        """It and its descendants."""
        yield self
        for child in self.children:
            yield from child.below()


class TreeDecoder(SpdDecoder):
    """`SpdDecoder` with a draft tree instead of a chain; the same output, fewer cycles, more rows per cycle.

    Args:
        target, head: as there; the head must be a `SpeculationHead`.
        tree: how it grows.

    Raises:
        InputError: for a target with recurrent or sliding-window layers, whose states are of one branch.
    """

    def __init__(self, target: Target, head: SpeculationHead, tree: Tree = Tree()) -> None:  # noqa: B008 (frozen)
        if other := set(target.layer_kinds) - {"full_attention"}:
            raise InputError(
                f"a draft tree of width {tree.width}: branches of this target would need a state each, because it has "
                f"layers of kind {sorted(other)[0]}. Decode without a tree."
            )
        super().__init__(target, head)
        self.head, self.tree = head, tree

    def _run(
        self, prompt: list[int], max_new_tokens: int, verdicts: Verdicts, ends: frozenset[int], observed: bool
    ) -> _TreeRun:
        if verdicts.forced_acceptance is not None:
            raise InputError("forced_acceptance is a verdict on one draft: decode without a tree.")
        coupled = Verdicts(verdicts.draft_ids, CoupledSampling(**asdict(verdicts.sampling)))
        return _TreeRun(self.target, self.drafter, self.head, self.tree, prompt, max_new_tokens, coupled)


@dataclass
class _Clock:
    """What `generate` reads of a schedule."""

    cycle: int
    restart_positions: list[int]


@dataclass
class _Slot:
    """Nodes that entered in the same cycle, and where they are: hidden [1, R, H], anchors [A, R, H].

    places and positions are [R]; seen [R, C] bool and mask [1, 1, R, C] say which of the first C cached rows a node
    sees: its ancestors and itself, which are there when it enters and stay the same for its whole way.
    """

    nodes: list[Node]
    hidden: Tensor
    anchors: Tensor
    places: Tensor
    positions: Tensor
    seen: Tensor
    mask: Tensor

    def keep(self, alive: set[int]) -> None:
        rows = [row for row, node in enumerate(self.nodes) if id(node) in alive]
        if len(rows) < len(self.nodes):
            self.nodes = [self.nodes[row] for row in rows]
            self.hidden, self.anchors = self.hidden[:, rows], self.anchors[:, rows]
            self.places, self.positions = self.places[rows], self.positions[rows]
            self.seen, self.mask = self.seen[rows], self.mask[:, :, rows]


class _TreeRun:
    """The state of one generation."""

    schedule: _Clock

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        head: SpeculationHead,
        tree: Tree,
        prompt: list[int],
        max_new_tokens: int,
        verdicts: Verdicts,
    ) -> None:
        self.target, self.head, self.tree, self.verdicts, self.prompt = target, head, tree, verdicts, prompt
        self.staircase = drafter.staircase
        n = self.staircase.num_stages
        capacity = len(prompt) + max_new_tokens + (n + 2) * tree.width + 1
        self.cache = TreeCache(target.num_layers, capacity)
        longest = len(prompt) + max_new_tokens + n + 1  # a path may run n positions past the last token
        self.rotary, self.head_rotary = target.rotary_table(longest), head.rotary_table(longest)
        self.head_cache = head.new_cache(capacity)
        self.free = list(reversed(range(len(prompt), capacity)))
        self.used = len(prompt)  # rows of the caches that were ever written, the first ones
        # [query's place, place] of what is generated, counted from the prompt's end
        nodes = capacity - len(prompt)
        self.sees = torch.zeros(nodes, nodes, dtype=torch.bool, device=target.device)
        self.hides = torch.tensor(torch.finfo(target.dtype).min, dtype=target.dtype, device=target.device)
        self.keep = {anchor: row for row, anchor in enumerate(self.staircase.anchors)}
        bounds = self.staircase.boundaries
        self.stage_layers = [range(start, stop) for start, stop in pairwise(bounds)]
        self.cycles_by_rows = [0] * tree.width  # by the rows of the cycle's widest stage pass
        self.slots: dict[int, _Slot] = {}  # entry cycle -> nodes of the last n + 1 cycles
        self.root: Node  # the last verified token

    def prefill(self) -> int:
        """Prompt through target and head; returns the first token, which is the target's own."""
        ids = torch.tensor([self.prompt], device=self.target.device)
        states, last = self.target(ids, self.staircase.anchors, cache=self.cache)
        self.head.prefill([state.to(self.head.dtype) for state in states], self.head_cache, self.head_rotary)
        first = self.verdicts.own(self.target.logits(last[0, -1]), len(self.prompt))
        self.schedule = _Clock(0, [len(self.prompt)])
        self.root = self._node(None, len(self.prompt), first, 0.0)
        self._enter([self.root])
        return first

    def cycle(self) -> CycleEvent:
        """Execute one cycle. The head reads what existed at its start, so it goes before the stages."""
        n, now = self.staircase.num_stages, self.schedule.cycle
        self._draft(now)
        stages = []
        for stage in reversed(range(n)):
            slot = self.slots.get(now - stage)
            if slot is not None and slot.nodes:
                self._stage(stage, slot)
                stages.append((stage, slot.nodes[0].position))
        self.cycles_by_rows[max(len(self.slots[now - stage].nodes) for stage, _ in stages) - 1] += 1
        newest = max(node.position for slot in self.slots.values() for node in slot.nodes)
        leaving = self.slots.get(now - n + 1)
        emitted = accepted = None
        at = None
        if leaving is not None and leaving.nodes:
            (node,) = leaving.nodes  # its siblings died when its parent left
            at = node.position
            emitted, accepted = self._verdict(node, leaving)
        plan = Cycle(now, tuple(stages), (), newest, at)
        self.schedule.cycle += 1
        self.slots.pop(now - n, None)  # finished, and its deepest row is computed
        entering = [self.root] if accepted is False else self._chosen()
        self._enter(entering)
        return CycleEvent(plan, entering[0].token if entering else None, emitted, accepted)

    @property
    def widths(self) -> tuple[int, ...]:
        """Cycles so far whose widest stage pass had 1, 2, ... rows."""
        return tuple(self.cycles_by_rows)

    def end(self, stopped: bool) -> None:
        """Nothing outlives a generation here."""

    # -- one cycle -----------------------------------------------------------------------------------------------------

    def _draft(self, now: int) -> None:
        """Rows that are due, of all nodes at once; and continuations after the newest nodes."""
        due = zip(self.staircase.reachable_blocks, self.staircase.first_depths, strict=True)
        slots = [(block, self.slots.get(now - depth)) for block, depth in reversed(list(due))]
        groups = [(block, slot) for block, slot in slots if slot is not None and slot.nodes]
        if not groups:
            return
        newest = self.slots[now].nodes if now in self.slots else []
        length = max(slot.seen.shape[1] for _, slot in groups)
        hidden = self.head.step_rows(
            [(block, slot.anchors.transpose(0, 1)) for block, slot in groups],
            torch.cat([slot.positions for _, slot in groups]),
            torch.cat([slot.places for _, slot in groups]),
            torch.cat([F.pad(slot.seen, (0, length - slot.seen.shape[1])) for _, slot in groups]),
            self.head_cache,
            self.head_rotary,
            last=len(newest),
        )
        if not newest:
            return
        sampling, ids = self.verdicts.sampling, self.verdicts.draft_ids
        logits = zip(newest, self.head.logits(hidden), strict=True)
        scores = torch.stack([sampling.scores(one, node.position + 1, ids) for node, one in logits])
        best = (self.tree.sharpness * scores).log_softmax(-1).topk(min(self.tree.width, scores.shape[1]))
        for node, tokens, chances in zip(newest, best.indices.tolist(), best.values.tolist(), strict=True):
            node.drafts = [
                (self.head.full_vocabulary_id(token), chance)
                for token, chance in zip(tokens, chances, strict=True)
                if chance > -math.inf
            ]

    def _stage(self, stage: int, slot: _Slot) -> None:
        """The rows of a slot through one stage."""
        self.cache.write_to(slot.places, slot.mask.shape[-1])
        slot.hidden = self.target.run_layers(
            slot.hidden,
            self.stage_layers[stage],
            slot.positions,
            self.rotary,
            self.cache,
            self.keep,
            slot.anchors,
            mask=slot.mask,
        )

    def _verdict(self, node: Node, slot: _Slot) -> tuple[int, bool]:
        """The target's token after a node that has left; whatever disagrees with it dies."""
        token = self.verdicts.own(self.target.logits(slot.hidden)[0, 0], node.position + 1)
        right = [child for child in node.children if child.token == token]
        if right:
            self.root = right[0]
        else:
            self.root = self._node(None, node.position + 1, token, 0.0, before=node)
            self.schedule.restart_positions.append(node.position + 1)
        node.children, self.root.parent = right, None
        alive = {id(one) for one in self.root.below()} | {id(node)}
        for entered, other in list(self.slots.items()):
            for one in other.nodes:
                if id(one) not in alive and entered > node.entered:
                    self.free.append(one.place)
            if entered > node.entered:
                other.keep(alive)
        return token, bool(right)

    def _chosen(self) -> list[Node]:
        """The continuations that enter next, the most valuable first."""
        n, after = self.staircase.num_stages, self.schedule.cycle
        found: list[tuple[float, Node, int, float]] = []
        newest = max(node.entered for node in self.root.below())
        for node in self.root.below():
            gap = after - node.entered
            if not node.drafts or gap >= n or (node.entered < newest and not self.tree.late):
                continue
            path = self._path_chance(node)
            there = {child.token for child in node.children}
            for token, chance in node.drafts:
                if token not in there:
                    found.append((path + chance + math.log((n - gap) / n), node, token, chance))
        found.sort(key=lambda one: -one[0])
        least = math.log(self.tree.gate) if self.tree.gate else -math.inf
        entering = found[:1] + [one for one in found[1 : self.tree.width] if one[0] >= least]
        return [self._node(node, node.position + 1, token, chance) for _, node, token, chance in entering]

    def _path_chance(self, node: Node) -> float:
        """log of the chance that a node is right, given what is verified."""
        chance = 0.0
        while node is not self.root:
            chance += node.chance
            assert node.parent is not None
            node = node.parent
        return chance

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _node(self, parent: Node | None, position: int, token: int, chance: float, before: Node | None = None) -> Node:
        """A new node after `parent`, or (a restart) after the finished node `before`, in a row of its own."""
        place, above = self.free.pop(), parent or before
        self.used = max(self.used, place + 1)
        row, P = place - len(self.prompt), len(self.prompt)
        self.sees[row] = self.sees[above.place - P] if above is not None else False
        self.sees[row, row] = True
        # the cycle is over when it enters
        made = Node(position, token, place, self.schedule.cycle, chance, parent)
        if parent is not None:
            parent.children.append(made)
        return made

    def _enter(self, nodes: Sequence[Node]) -> None:
        if not nodes:
            return
        for node in nodes:
            node.entered = self.schedule.cycle
        hidden = torch.cat([self.target.embed(node.token) for node in nodes], dim=1)
        anchors = hidden.new_empty(len(self.keep), len(nodes), self.target.hidden_size)
        anchors[0] = hidden[0]
        places = torch.tensor([node.place for node in nodes], device=self.target.device)
        positions = torch.tensor([node.position for node in nodes], device=self.target.device)
        # everybody sees the prompt
        seen = F.pad(
            self.sees[places - len(self.prompt), : self.used - len(self.prompt)], (len(self.prompt), 0), value=True
        )
        mask = torch.where(seen, self.hides.new_zeros(()), self.hides)[None, None]
        self.slots[self.schedule.cycle] = _Slot(list(nodes), hidden, anchors, places, positions, seen, mask)


def fitted_sharpness(
    target: Target, head: SpeculationHead, prompts: Iterable[Sequence[int]], max_new_tokens: int = 64, **sampling: Any
) -> float:
    """The sharpness under which the target's choices are likeliest, given the drafts' scores for them.

    A chain decodes the prompts; every verified position whose token is in the draft vocabulary counts. Prompts of its
    own, please, not those that a tree is measured on.

    Args:
        sampling: temperature, top_k, top_p, seed of `SpdDecoder.generate`; the fit holds for them.
    """
    decoder = TreeDecoder(target, head, Tree(width=1, late=False))
    law = Sampling(**sampling)
    ids = head.draft_token_ids
    scores: list[Tensor] = []
    chosen: list[int] = []
    for prompt in prompts:
        found = decoder.generate(prompt, max_new_tokens, **sampling)
        whole = [*prompt, *found.token_ids]
        logits = draft_logits(target, head, torch.tensor([whole], device=target.device), found.restart_positions)[0]
        for position in range(len(prompt) + 1, len(whole)):
            index = whole[position] if ids is None else int((ids == whole[position]).nonzero().sum())
            if ids is None or int(ids[index]) == whole[position]:
                scores.append(law.scores(logits[position - 1], position, ids))
                chosen.append(index)
    if not scores:
        raise InputError("a tree's sharpness cannot be fitted: no prompt gave a token of the draft vocabulary.")
    table, places = torch.stack(scores), torch.tensor(chosen)[:, None]
    table = table - table.amax(-1, keepdim=True)

    def surprise(sharpness: Tensor) -> float:
        laws = (sharpness * table).log_softmax(-1)
        return -float(laws.gather(-1, places).clamp(min=-50).mean())  # outside of top-p: surprising, not infinite

    return float(min(torch.logspace(-1, 1.5, 60, dtype=torch.float64), key=surprise))  # 0.1 to 32 in steps of a tenth
