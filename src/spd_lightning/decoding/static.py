"""One cycle of the pipeline as a function of device tensors alone: what a CUDA graph captures.

Every stage computes one token and the head one row per reachable block, whether or not the schedule has one for them;
what does not exist is computed at the spare position, where nobody looks. All that differs from cycle to cycle is
`StaticCycle.inputs`: the position at every depth 0..n, and the token that enters. No operation depends on a value, none
waits for the device, and everything that outlives a cycle keeps its address.

Within a cycle the stages and the head are independent `branches`: each reads what existed at the start and writes what
no other one touches, so they may run at the same time. What passes from stage to stage does so in `finish`, after all.

Shapes: n stages, A anchors, H hidden, R reachable blocks, V vocabulary, V_d draft vocabulary, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from spd_lightning.decoding.schedule import Cycle
from spd_lightning.head.module import HeadLayer, SpeculationHead
from spd_lightning.target.cache import RollbackCache
from spd_lightning.target.static_cache import StaticCache, StaticPosition, hidden_score, spare_position
from spd_lightning.target.target import Rotary, Target

Branch = Callable[[], None]


def one_after_another(branches: Sequence[Branch]) -> None:
    for branch in branches:
        branch()


class StaticStage:
    """Some consecutive layers for the token at a position tensor.

    Args:
        layers: their indices; none is a stage that passes its token on.
        position: of the token, and what the layers derive from it.
        rotary: rotary embeddings of all positions up to the capacity.
        keep: hidden-state index -> row of `kept`, for the anchors that these layers produce.
    """

    def __init__(
        self, target: Target, layers: range, position: StaticPosition, rotary: Rotary, keep: dict[int, int]
    ) -> None:
        self.target, self.layers, self.position, self.rotary = target, layers, position, rotary
        self.keep = {index: row for index, row in keep.items() if index - 1 in layers}

    def run(self, hidden: Tensor, cache: StaticCache, kept: Tensor) -> Tensor:
        """h_i [1, 1, H] with i = layers.start to i = layers.stop; anchor states into the rows of `kept` [A, H]."""
        position = self.position
        position.refresh()
        here = {
            kind: (cos.index_select(1, position.value), sin.index_select(1, position.value))
            for kind, (cos, sin) in self.rotary.items()
        }
        ids = position.value.view(1, 1)
        for index in self.layers:
            mask = position.masks.get(self.target.layer_kinds[index])
            hidden = self.target.run_layer(index, hidden, ids, here, cache, mask)
            if index + 1 in self.keep:
                kept[self.keep[index + 1]] = hidden[0, 0]
        return hidden


class StaticHead:
    """The head's rows of one cycle, one per reachable block, the newest position's first.

    Args:
        positions: int64 [n + 1], the position at every depth.
    """

    def __init__(self, head: SpeculationHead, capacity: int, positions: Tensor) -> None:
        self.head, self.positions = head, positions
        staircase, config = head.staircase, head.config
        self.rows = list(zip(staircase.reachable_blocks, staircase.first_depths, strict=True))
        assert self.rows[0][1] == 0, "the row that drafts comes first"
        self.depths = torch.tensor(staircase.first_depths, device=positions.device)
        self.cache, self.rotary = head.new_cache(capacity), head.rotary_table(capacity)
        self.places = torch.arange(capacity, device=positions.device)
        self.seen = torch.zeros((), dtype=head.dtype, device=positions.device)
        self.hidden = torch.full_like(self.seen, hidden_score(head.dtype))
        self.groups = config.num_attention_heads // config.num_key_value_heads

    def run(self, kept: Tensor) -> Tensor:
        """Draft logits [V_d], from the anchor states `kept` [n + 1, A, H] at every depth."""
        head = self.head
        x = torch.stack([head.aggregation[k](kept[depth, : k + 1].flatten().to(head.dtype)) for k, depth in self.rows])
        at = self.positions.index_select(0, self.depths)
        mask = torch.where(self.places <= at[:, None], self.seen, self.hidden)
        here = (self.rotary[0].index_select(0, at), self.rotary[1].index_select(0, at))
        for index, layer in enumerate(head.layers):
            assert isinstance(layer, HeadLayer)
            normed = layer.input_layernorm(x)
            k, v = layer.self_attn.key_value(normed, here)
            keys, values = self.cache.keys[index], self.cache.values[index]
            keys.index_copy_(1, at, k.transpose(0, 1))
            values.index_copy_(1, at, v.transpose(0, 1))
            if index == len(head.layers) - 1:  # only the newest row drafts
                x, normed, mask, here = x[:1], normed[:1], mask[:1], (here[0][:1], here[1][:1])
            q, gate = layer.self_attn.query(normed, here)
            x = layer.finish(x, self._attend(q, keys, values, mask), gate)
        return head.logits(x[0])

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[R, N, D] over keys and values [K, C, D], mask [R, C] -> [R, N, D].

        The query heads of a key head become its rows: kernels that take a mask take no groups of heads.
        """
        R, N, D = query.shape
        grouped = query.view(R, -1, self.groups, D).permute(1, 2, 0, 3).flatten(1, 2)  # [K, groups R, D]
        out = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], mask.repeat(self.groups, 1))
        return out[0].view(-1, self.groups, R, D).permute(2, 0, 1, 3).reshape(R, N, D)


class StaticCycle:
    """All state of a pipeline in tensors of one shape and one address each, and one cycle on them.

    Args:
        target: on one device.
        head: its staircase gives the stages. None: plain decoding, one stage and no draft.
        capacity: C, places of every cache; the last one is spare, so true positions are below C - 1.

    Attributes:
        inputs: int64 [n + 2]: the position at depth 0..n (`spare` where there is none), then the entering token.
        results: int64 [2]: the most likely token of the head (an id of the target's vocabulary) and of the target.
        draft_logits: [V_d] after the newest token; target_logits: [V] after the leaving one.
    """

    def __init__(self, target: Target, head: SpeculationHead | None, capacity: int) -> None:
        H, device, dtype = target.hidden_size, target.device, target.dtype
        boundaries = (0, target.num_layers) if head is None else head.staircase.boundaries
        self.anchors = (0,) if head is None else head.staircase.anchors
        n = len(boundaries) - 1
        self.target, self.capacity, self.device = target, capacity, device
        self.spare = spare_position(capacity)
        self.inputs = torch.full((n + 2,), self.spare, device=device)
        self.inputs[-1] = 0
        positions, self.token = self.inputs[: n + 1], self.inputs[n + 1 :]
        window = getattr(target.config, "sliding_window", None)
        rotary = target.rotary_table(capacity)
        keep = {anchor: row for row, anchor in enumerate(self.anchors)}
        places, self.stages = list[StaticPosition](), list[StaticStage]()
        for stage, (start, stop) in enumerate(pairwise(boundaries)):
            kinds = target.layer_kinds[start:stop]
            place = StaticPosition(positions[stage : stage + 1], capacity, n - 1 - stage, window, kinds, dtype)
            places += [place] * len(kinds)
            self.stages.append(StaticStage(target, range(start, stop), place, rotary, keep))
        self.cache = StaticCache(target.layer_kinds, places)
        self.head = None if head is None else StaticHead(head, capacity, positions)
        self.entering = torch.zeros(n, 1, 1, H, dtype=dtype, device=device)  # by stage: the state that enters it
        self.leaving = torch.zeros_like(self.entering)  # by stage: the state that leaves it
        self.kept = torch.zeros(n + 1, len(self.anchors), H, dtype=dtype, device=device)  # by depth
        self.results = torch.zeros(2, dtype=torch.int64, device=device)
        self.target_logits = torch.zeros(target.vocab_size, dtype=dtype, device=device)
        drafts, of_head = (0, dtype) if head is None else (head.config.draft_vocab_size, head.dtype)
        self.draft_logits = torch.zeros(drafts, dtype=of_head, device=device)
        self._depths = dict(self.head.rows) if self.head else {}

    def load(self, states: Sequence[Tensor], cache: RollbackCache) -> None:
        """Take over a finished prompt: anchor states [1, P, H] each, and the target's cache after it."""
        self.cache.load(cache)
        if self.head is not None:
            head = self.head.head
            head.prefill([state.to(head.dtype) for state in states], self.head.cache, self.head.rotary)

    def positions_of(self, plan: Cycle) -> list[int]:
        """The first n + 1 inputs of a planned cycle: who is at which depth."""
        positions = [self.spare] * (len(self.stages) + 1)
        for stage, position in plan.stages:
            positions[stage] = position
        for block, position in plan.rows:
            positions[self._depths[block]] = position
        return positions

    @property
    def buffers(self) -> list[Tensor]:
        """Everything that outlives a cycle."""
        own = [self.inputs, self.entering, self.leaving, self.kept, self.results, self.target_logits, self.draft_logits]
        heads = [] if self.head is None else [self.head.cache.keys, self.head.cache.values]
        return own + heads + self.cache.buffers

    # -- one cycle -------------------------------------------------------------------------------------------------

    def run(self, fork: Callable[[Sequence[Branch]], None] = one_after_another) -> None:
        """One cycle; `fork` runs the branches, in any order or at the same time, and returns when all have run."""
        self.begin()
        fork(self.branches())
        self.finish()

    def begin(self) -> None:
        """The token enters: stage 0 and the head's newest row start from its embedding."""
        self.entering[0] = self.target.embed(self.token)
        self.kept[0, 0] = self.entering[0, 0, 0]

    def branches(self) -> list[Branch]:
        stages: list[Branch] = [partial(self._stage, stage) for stage in range(len(self.stages))]
        return stages if self.head is None else [self._draft, *stages]

    def finish(self) -> None:
        """Every token is one stage deeper."""
        self.entering[1:] = self.leaving[:-1]
        if self.head is not None:
            self.kept[1:] = self.kept[:-1].clone()

    def _draft(self) -> None:
        assert self.head is not None
        head = self.head.head
        self.draft_logits.copy_(self.head.run(self.kept))
        best = self.draft_logits.argmax(-1, keepdim=True)
        self.results[:1] = best if head.draft_token_ids is None else head.draft_token_ids.index_select(0, best)

    def _stage(self, stage: int) -> None:
        hidden = self.stages[stage].run(self.entering[stage], self.cache, self.kept[stage])
        self.leaving[stage] = hidden
        if stage == len(self.stages) - 1:  # the only one whose token the target's lm_head sees
            self.target_logits.copy_(self.target.logits(hidden)[0, 0])
            self.results[1:] = self.target_logits.argmax(-1, keepdim=True)
