"""What a training step keeps for its backward pass, and what it needs for a moment: bytes, item by item.

Saved is what autograd holds between the forward and the backward pass of a module, storage by storage; a storage that
several nodes save counts once, where it is saved first. Momentary is what exists besides, at the worst moment of a
part. tests/test_memory.py compares both with real passes, and fails when the head, its attention or the loss change
and this file does not.

Two things differ between CPUs and CUDA. RMSNorm is one kernel on CUDA (keeps its input and one number per row) and
several on a CPU (keeps input and normalised input, both in float32). Attention's near part is one kernel on a CPU and
written out on CUDA, in float32.

Letters as in head/module.py and head/attention.py: R rows of a layer, Q of them asked for an output, T positions of
all sequences, r query blocks, m blocks, c positions per tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from spd_lightning.memory.shapes import Arithmetic, HeadShape, Rows

FLOAT, INDEX = 4, 8
#: On a CPU a chunk of logits is cut down to so many elements (`CPU_CHUNK_LOGITS` of training/losses.py).
CPU_CHUNK_LOGITS = 2**18


@dataclass(frozen=True)
class Layer:
    """One decoder layer of the head in the training view.

    Attributes:
        head, arithmetic, rows: what it computes.
        last: whether it is the last layer, which is asked for block-0 rows of supervised positions only.
    """

    head: HeadShape
    arithmetic: Arithmetic
    rows: Rows
    last: bool

    @property
    def queries(self) -> int:
        """Q."""
        return self.rows.asked if self.last else self.rows.all

    @property
    def query_blocks(self) -> int:
        """r."""
        return 1 if self.last else self.head.m

    # -- saved -------------------------------------------------------------------------------------------------------

    @cached_property
    def saved(self) -> dict[str, int]:
        """Bytes per part of the layer, in the order of the forward pass."""
        return {
            "norm before attention": 0 if self.head.style.norms == "after" else self._norm(self.rows.all, self.head.H),
            "keys and values": self._keys(),
            "queries": self._queries(),
            "attention": self._attention(),
            "output projection": self._output(),
            "norms around the MLP": self._mlp_norms(),
            "MLP": self._mlp(),
        }

    @property
    def input(self) -> int:
        """Its input [R, H], all that is kept under activation checkpointing."""
        return self.rows.all * self.head.H * self.arithmetic.compute

    @property
    def weights(self) -> int:
        """Copies of its weights in the dtype of matrix products, which the graph of autocast keeps."""
        return self.head.layer * self.arithmetic.compute if self.arithmetic.autocast else 0

    def _norm(self, rows: int, width: int) -> int:
        """Of a norm with trained gain."""
        return norm_bytes(self.arithmetic, rows, width, trained=True)

    @property
    def _linear_copies(self) -> int:
        """Copies of a norm's output that linear maps keep: CUDA's are float32 under autocast, and each map casts."""
        return 2 if self.arithmetic.cuda and self.arithmetic.autocast else 1

    def _keys(self) -> int:
        head, e, R = self.head, self.arithmetic.compute, self.rows.all
        heads = head.K if head.style.qk_norm != "none" else 0
        width = head.D if head.style.qk_norm == "head" else head.K * head.D
        rows = R * heads if head.style.qk_norm == "head" else R * (heads > 0)
        copies = 1 if head.style.norms == "after" else self._linear_copies
        return (
            copies * e * R * head.H
            + self._norm(rows, width)
            + 2 * self.arithmetic.weight * R * head.rotary  # cos and sin of each row
            + 2 * e * R * head.K * head.D  # keys and values as lists, before they are spread over the grid
            + INDEX * R
        )

    def _queries(self) -> int:
        head, e, Q = self.head, self.arithmetic.compute, self.queries
        heads = head.N if head.style.qk_norm != "none" else 0
        width = head.D if head.style.qk_norm == "head" else head.N * head.D
        rows = Q * heads if head.style.qk_norm == "head" else Q * (heads > 0)
        return (
            e * Q * head.H
            + self._norm(rows, width)
            + 2 * self.arithmetic.weight * Q * head.rotary
            + e * Q * head.N * head.D
            + 2 * INDEX * Q
        )

    def _attention(self) -> int:
        """The grids of keys, values and queries, the mask of the near part, the output and its log-sum-exp."""
        head, e, r, T = self.head, self.arithmetic.compute, self.query_blocks, self.rows.positions
        width = head.N * head.D
        grids = e * T * (2 * head.m * head.K * head.D + r * width)
        mask = e * self._tiled * r * 2 * head.span * head.m
        return grids + mask + self._tiled * r * (e * width + FLOAT * head.N)

    def _output(self) -> int:
        """Attention's output as a list; with a gate, the gate's sigmoid and their product too."""
        return (3 if self.head.style.gate else 1) * self.arithmetic.compute * self.queries * self.head.N * self.head.D

    def _mlp_norms(self) -> int:
        norms = {"before": 1, "after": 2, "both": 3}[self.head.style.norms]
        return norms * self._norm(self.queries, self.head.H)

    def _mlp(self) -> int:
        """Its input; gate, up, the activation and their product."""
        copies = 1 if self.head.style.norms == "after" else self._linear_copies
        return self.arithmetic.compute * self.queries * (copies * self.head.H + 4 * self.head.I)

    # -- momentary ---------------------------------------------------------------------------------------------------

    @property
    def _tiled(self) -> int:
        """Positions, each sequence filled up to whole tiles."""
        c = self.head.span
        return self.rows.B * -(-self.rows.S // c) * c

    @property
    def _windows(self) -> int:
        """Elements of all tiles' windows of keys: each key twice, once per query head."""
        return 2 * self._tiled * self.head.m * self.head.N * self.head.D

    @property
    def _tiles(self) -> int:
        """Elements of all tiles' queries."""
        return self._tiled * self.query_blocks * self.head.N * self.head.D

    @property
    def _scores(self) -> int:
        """Elements of the near part's scores."""
        return self._tiled * self.query_blocks * self.head.N * 2 * self.head.span * self.head.m

    def _near_scores(self) -> int:
        """On CUDA: keys and queries in float32 and once more as matrix products want them, and the scores."""
        if not self.arithmetic.cuda:
            return 0
        twice = 2 if self.arithmetic.compute < FLOAT else 1  # float32 is not converted
        return FLOAT * (twice * (self._windows + self._tiles) + self._scores)

    @property
    def attending(self) -> int:
        """Besides what is saved, while attention's near part is computed."""
        return self.arithmetic.compute * (2 * self._windows + self._tiles) + self._near_scores()

    @property
    def attending_backward(self) -> int:
        """The same in the backward pass: windows and tiles again, and their gradients."""
        e = self.arithmetic.compute
        incoming = e * (
            self.rows.positions * self.query_blocks * self.head.N * self.head.D + self.queries * self.head.H
        )
        if not self.arithmetic.cuda:
            return incoming + e * (4 * self._windows + 3 * self._tiles)
        scores = e * (2 * self._windows + 2 * self._tiles) + self._near_scores()
        gradients = e * (4 * self._windows + 3 * self._tiles) + (2 * FLOAT + 2 * e) * self._scores
        return incoming + max(scores, gradients)

    @property
    def checkpointed_forward(self) -> int:
        """All that exists in attention when nothing is kept for the backward pass."""
        head, e = self.head, self.arithmetic.compute
        lists = self.rows.all * (head.H + 2 * head.K * head.D) + self.queries * head.N * head.D
        return e * lists + self.saved["attention"] + self.attending

    @property
    def mlp_backward(self) -> int:
        """While the gradient passes the MLP: two of its widths, the residual's gradient, a weight's in two dtypes."""
        arithmetic, head = self.arithmetic, self.head
        weight = arithmetic.compute * head.I * head.H if arithmetic.autocast else 0
        return arithmetic.compute * self.queries * (2 * head.I + 2 * head.H) + weight


@dataclass(frozen=True)
class Loss:
    """The chunked loss: final norm, lm_head and KL.

    Attributes:
        head, arithmetic, rows: what it computes.
        chunk: model.loss_chunk.
    """

    head: HeadShape
    arithmetic: Arithmetic
    rows: Rows
    chunk: int

    @property
    def norm(self) -> int:
        """Saved by the frozen final norm."""
        return norm_bytes(self.arithmetic, self.rows.asked, self.head.H, trained=False)

    @property
    def hidden(self) -> int:
        """Bytes of the final norm's output [P, H]: CUDA's norm returns float32 under autocast."""
        wide = self.arithmetic.autocast and self.arithmetic.cuda
        return self.rows.asked * self.head.H * (FLOAT if wide else self.arithmetic.compute)

    @property
    def gradient(self) -> int:
        """Saved gradient of lm_head."""
        return self.head.lm_head * self.arithmetic.weight

    @property
    def saved(self) -> int:
        """Gradients of hidden states and lm_head, computed in the forward pass already."""
        return self.hidden + self.gradient

    @property
    def positions(self) -> int:
        """Positions whose logits exist at a time."""
        chunk = self.chunk
        if not self.arithmetic.cuda:
            chunk = min(chunk, max(32, CPU_CHUNK_LOGITS // self.head.V_d))
        return min(chunk, self.rows.asked)

    @property
    def logits(self) -> int:
        """The most that logits and what is made of them hold: a step that logs statistics is counted."""
        head, a = self.head, self.arithmetic
        restricted = head.V_d < head.V
        several = self.positions < self.rows.asked  # the last chunk's tensors live until the next one's replace them
        low = a.compute if a.compute < FLOAT else 0  # a copy in that dtype, where it is not float32 already
        teacher, draft = FLOAT * head.V, FLOAT * head.V_d
        kept = teacher + (5 if head.capped else 4) * draft
        old = low * head.V_d if several else 0
        fresh = teacher + (a.target * head.V if a.target < FLOAT else 0) if several else 0
        statistics = teacher + (2 * draft if not restricted else max(3 * draft, draft))
        return self.positions * (kept + old + max(fresh, statistics, low * head.V_d + draft if several else 0))

    @property
    def weights(self) -> int:
        """lm_head in the dtype of matrix products, and the product that a chunk adds to its gradient."""
        head, a = self.head, self.arithmetic
        copies = a.compute + (a.compute + a.weight) if a.autocast else a.compute
        return head.lm_head * copies


def norm_bytes(arithmetic: Arithmetic, rows: int, width: int, trained: bool) -> int:
    """What an RMSNorm over `rows` vectors keeps: on a CPU input, scale and, for its gain, normalised input."""
    if not rows:
        return 0
    if arithmetic.cuda:
        return rows * (width * arithmetic.weight + FLOAT)
    return rows * (width * FLOAT * (2 if trained else 1) + FLOAT)


@dataclass(frozen=True)
class States:
    """What the target hands to the head: its states at the anchors, and its last layer's output.

    Attributes:
        head, arithmetic, rows: of the step.
    """

    head: HeadShape
    arithmetic: Arithmetic
    rows: Rows

    @property
    def kept(self) -> int:
        """The target's own tensors [B, S, H]; the last layer's is one of the anchors where that is asked for."""
        anchors = self.head.staircase.anchors
        count = len({*anchors, self.head.staircase.num_layers})
        return count * self.rows.positions * self.head.H * self.arithmetic.target

    @property
    def cast(self) -> int:
        """Their copies in the dtype of the head's weights, where that is another."""
        if self.arithmetic.target == self.arithmetic.weight:
            return 0
        return len(self.head.staircase.anchors) * self.rows.positions * self.head.H * self.arithmetic.weight

    @property
    def tables(self) -> int:
        """cos and sin of every position, and who sees whom among near rows."""
        head, positions = self.head, self.rows.positions
        return positions * (2 * head.rotary * self.arithmetic.weight + 2 * head.span * head.m**2)


def aggregation_bytes(head: HeadShape, arithmetic: Arithmetic, rows: Rows) -> int:
    """Concatenated anchors of every row, the inputs of all W_k."""
    blocks = head.staircase.reachable_blocks
    anchors = sum(count * (k + 1) for k, count in zip(blocks, rows.blocks, strict=True))
    return anchors * head.H * arithmetic.compute
