"""What one rank (GPU, or process on CPUs) holds at every moment of a training step, for every strategy.

A step is gone through moment by moment: the target's forward pass, the head's layers, the loss, the way back through
the layers, the optimizer. What is there all the time (weights, optimizer state) and what a moment adds make its total;
the largest total is what the rank needs. `activations` has what a layer saves and needs; here is who else holds what:

  ddp       every rank holds all of it: float32 weights, gradients and two AdamW moments of the head (16 bytes per
            trained weight), with several ranks the reducer's buckets besides (4), under autocast copies of the weights.
  ZeRO      weights that compute in the low dtype; float32 master weights and moments (12 bytes) cut over the ranks.
            Stage 2 keeps of the gradients each rank's part, stage 1 as well unless micro-batches accumulate. Stage 3
            also cuts all weights, the frozen target's included, and brings a layer together while it computes.
            Gradients travel in buckets of so many numbers, two of them for stages 1 and 2. Offload puts master
            weights, moments and their gradients into host memory.

Read off DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py) and Lightning 2.6, not off their documentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from spd_lightning.memory.activations import FLOAT, Layer, Loss, States, aggregation_bytes
from spd_lightning.memory.shapes import Arithmetic, HeadShape, Rows, TargetShape, expected_rows

#: What a rank's memory is told in.
PARTS = ("target", "weights", "gradients", "optimizer", "activations", "temporary", "logits", "other")

#: Numbers in a bucket of gradients (Lightning's default), gathered ahead and kept gathered by stage 3 (DeepSpeed's).
REDUCE_BUCKET, PREFETCHED, KEPT_GATHERED = 200_000_000, 50_000_000, 1_000_000_000

#: Bytes of everything else. CUDA: context, kernels, workspaces and (several ranks) NCCL: an assumption, not measured.
CUDA_PROCESS, NCCL = 1_000_000_000, 500_000_000
#: CPU: a process that has imported all that `fit` imports, and what DeepSpeed adds; see benchmarks/memory.py.
CPU_PROCESS, CPU_DEEPSPEED = 560_000_000, 30_000_000


@dataclass(frozen=True)
class Strategy:
    """How weights, gradients and optimizer state are laid over the ranks.

    Attributes:
        name: of trainer.strategy.
        stage: of ZeRO; 0: every rank holds everything.
        offload: the optimizer works in host memory.
    """

    name: str
    stage: int = 0
    offload: bool = False


STRATEGIES = (
    Strategy("ddp"),
    Strategy("deepspeed_stage_1", 1),
    Strategy("deepspeed_stage_2", 2),
    Strategy("deepspeed_stage_2_offload", 2, offload=True),
    Strategy("deepspeed_stage_3", 3),
    Strategy("deepspeed_stage_3_offload", 3, offload=True),
)


@dataclass(frozen=True)
class Job:
    """A training run, as far as its memory depends on it.

    Attributes:
        head, target: their sizes.
        length: S, tokens per sequence.
        ranks: processes that train together, one per GPU.
        ranks_per_node: how many of them share a machine's host memory.
        cuda: on GPUs; else on CPUs.
        precision: of the trainer: 32-true, bf16-mixed, 16-mixed, bf16-true or 16-true.
        target_bytes: per element of the target, None: as wide as the head computes (loading.dtype: auto).
        quantised_bytes: twice the bytes per weight of a quantised target's layers; None: not quantised.
        loss_chunk, checkpointing, restart_rate, restart_draws: as in the model's fields.
        accumulate: micro-batches per optimizer step.
        supervised: share of the positions that feed the loss.
        packed: several documents per sequence.
    """

    head: HeadShape
    target: TargetShape
    length: int
    ranks: int = 1
    ranks_per_node: int = 1
    cuda: bool = True
    precision: str = "bf16-mixed"
    target_bytes: int | None = None
    quantised_bytes: int | None = None
    loss_chunk: int = 1024
    checkpointing: bool = False
    restart_rate: float = 0.15
    restart_draws: int = 1
    accumulate: int = 1
    supervised: float = 1.0
    packed: bool = False


@dataclass(frozen=True)
class RankMemory:
    """What one rank needs.

    Attributes:
        strategy, batch_size: for which.
        moment: when it needs most.
        parts: bytes at that moment, by `PARTS`.
        moments: total bytes at every moment of a step.
        host: bytes of host memory that the ranks of one node need besides.
    """

    strategy: Strategy
    batch_size: int
    moment: str
    parts: Mapping[str, int]
    moments: Mapping[str, int]
    host: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def rank_memory(job: Job, strategy: Strategy, batch_size: int) -> RankMemory:
    """What a rank needs for micro-batches of so many sequences."""
    step = Step(job, strategy, batch_size)
    moments = dict(step.moments())
    name = max(moments, key=lambda name: sum(moments[name].values()))
    totals = {moment: sum(parts.values()) for moment, parts in moments.items()}
    return RankMemory(strategy, batch_size, name, moments[name], totals, step.host)


def largest_batch(job: Job, strategy: Strategy, memory: int, most: int = 4096) -> int:
    """The largest batch size that fits into `memory` bytes per rank, 0 where none does."""
    low, high = 0, 1
    while high <= most and rank_memory(job, strategy, high).total <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rank_memory(job, strategy, middle).total <= memory else (low, middle)
    return low


def arithmetic_of(job: Job, strategy: Strategy) -> Arithmetic:
    """The dtypes of a step: Lightning's mixed precision is autocast, DeepSpeed's a model in the low dtype."""
    low = job.precision != "32-true"
    mixed = job.precision.endswith("mixed")
    weight = FLOAT if not low or (mixed and not strategy.stage) else 2
    compute = 2 if low else FLOAT
    target = job.target_bytes
    if target is None:
        target = weight if strategy.stage else 2 if job.cuda else FLOAT
    elif strategy.stage:  # DeepSpeed converts the whole module
        target = weight
    return Arithmetic(weight, compute, target, job.cuda)


@dataclass(frozen=True)
class Step:
    """One training step on one rank.

    Attributes:
        job, strategy, batch_size: of which.
    """

    job: Job
    strategy: Strategy
    batch_size: int

    # -- what is there all the time ----------------------------------------------------------------------------------

    @cached_property
    def arithmetic(self) -> Arithmetic:
        return arithmetic_of(self.job, self.strategy)

    @property
    def _cut(self) -> int:
        """Into how many pieces ZeRO cuts."""
        return self.job.ranks if self.strategy.stage else 1

    def _piece(self, count: int) -> int:
        return -(-count // self._cut)

    @cached_property
    def target(self) -> int:
        """Bytes of the frozen target."""
        job, target = self.job, self.job.target
        stored = target.stored * self.arithmetic.target
        if job.quantised_bytes is not None:
            stored -= target.quantisable * (2 * self.arithmetic.target - job.quantised_bytes) // 2
        return self._piece(stored) if self.strategy.stage == 3 else stored

    @property
    def weights(self) -> int:
        """Bytes of the head's weights that compute."""
        count = self.job.head.trained
        return (self._piece(count) if self.strategy.stage == 3 else count) * self.arithmetic.weight

    @property
    def optimizer(self) -> int:
        """Bytes of master weights (ZeRO) and moments."""
        count = self.job.head.trained
        if not self.strategy.stage:
            return 2 * count * self.arithmetic.weight
        return 0 if self.strategy.offload else 3 * FLOAT * self._piece(count)

    @property
    def other(self) -> int:
        if not self.job.cuda:
            return CPU_PROCESS + (CPU_DEEPSPEED if self.strategy.stage else 0)
        return CUDA_PROCESS + (NCCL if self.job.ranks > 1 else 0)

    @property
    def host(self) -> int:
        """Bytes in host memory per node: offloaded master weights, gradients and moments, and what carries them."""
        if not self.strategy.offload:
            return 0
        head, w = self.job.head, self.arithmetic.weight
        per_rank = (4 * FLOAT + w) * self._piece(head.trained) + w * max(head.parameters)
        if self.job.accumulate > 1:
            per_rank += w * self._own_gradients
        return per_rank * min(self.job.ranks, self.job.ranks_per_node)

    # -- gradients ---------------------------------------------------------------------------------------------------

    @cached_property
    def _own_gradients(self) -> int:
        """Numbers in the gradients that a rank keeps: of every tensor that reaches into its piece, the whole."""
        sizes, piece = self.job.head.parameters, self._piece(self.job.head.trained)
        ends = list(pairwise((0, *accumulate(sizes))))
        starts = range(0, self.job.head.trained, piece)
        return max(sum(stop - start for start, stop in ends if start < at + piece and stop > at) for at in starts)

    @property
    def _buckets(self) -> int:
        """Bytes of the buffers in which gradients travel; on a CPU as far as they are written to."""
        head, w, stage = self.job.head, self.arithmetic.weight, self.strategy.stage
        if not stage:
            return w * head.trained if self.job.ranks > 1 else 0
        used = min(REDUCE_BUCKET, head.trained)  # ZeroStrategy makes them no larger than the head
        return w * used * (2 if stage < 3 and self.job.cuda else 1)

    @property
    def gradients_before(self) -> int:
        """Bytes of gradients during the forward pass: those of the last step, or of earlier micro-batches."""
        w, trained, stage = self.arithmetic.weight, self.job.head.trained, self.strategy.stage
        if not stage:
            return w * trained + self._buckets
        if stage == 3:
            return (0 if self.strategy.offload else w * self._piece(trained)) + self._buckets
        if self.strategy.offload or self.job.accumulate == 1:
            return 0
        return w * (trained if stage == 1 else self._own_gradients)

    def gradients_after(self, count: int) -> int:
        """Bytes in the backward pass, when the gradients of `count` weights have been computed."""
        w, stage = self.arithmetic.weight, self.strategy.stage
        if not stage:
            everything = self.job.head.trained if self.job.accumulate > 1 else count
            return w * everything + self._buckets
        lm_head = self.job.head.lm_head
        # what is too large for a bucket waits whole until the next gradient comes; stage 3 cuts a copy
        waiting = w * lm_head if count == lm_head > REDUCE_BUCKET else 0
        if stage == 3:
            travelling = w * min(REDUCE_BUCKET, count) if count > REDUCE_BUCKET else 0
            return self.gradients_before + max(2 * waiting, travelling)
        own = w * max(self.job.head.parameters) if self.strategy.offload else w * min(self._own_gradients, count)
        return self.gradients_before + self._buckets + own + waiting

    # -- moments -----------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> Rows:
        job = self.job
        return expected_rows(job.head, self.batch_size, job.length, job.restart_rate, job.supervised, job.packed)

    @cached_property
    def layers(self) -> list[Layer]:
        """The head's layers, first to last; all but the last are alike."""
        count = self.job.head.num_layers
        return [Layer(self.job.head, self.arithmetic, self.rows, last=i == count - 1) for i in range(count)]

    @cached_property
    def states(self) -> States:
        return States(self.job.head, self.arithmetic, self.rows)

    @cached_property
    def loss(self) -> Loss:
        return Loss(self.job.head, self.arithmetic, self.rows, self.job.loss_chunk)

    def moments(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Name and parts of every moment, in the order of a step."""
        yield "target forward", self._at(self.gradients_before, 0, self._target_forward())
        saved = aggregation_bytes(self.job.head, self.arithmetic, self.rows)
        # the last draw of restarts is computed while the others wait for the backward pass, which takes it first
        layers = sum(layer.input if self.job.checkpointing else sum(layer.saved.values()) for layer in self.layers)
        saved += (self.job.restart_draws - 1) * (saved + layers + self.loss.norm + self.loss.saved)
        states = self.states.kept + self.states.tables
        for number, layer in enumerate(self.layers):
            moment = self.states.cast + self._autocast_copies + self._gathered + self._layer_forward(layer)
            yield f"forward, head layer {number}", self._at(self.gradients_before, states + saved, moment)
            saved += layer.input if self.job.checkpointing else sum(layer.saved.values())
        saved += self.loss.norm
        yield "loss", self._in_loss(states + saved)
        yield from self._backward(saved)
        yield "optimizer step", self._optimizer_step()

    def _at(self, gradients: int, activations: int, temporary: int, logits: int = 0) -> dict[str, int]:
        found = (self.target, self.weights, gradients, self.optimizer, activations, temporary, logits, self.other)
        return dict(zip(PARTS, found, strict=True))

    def _target_forward(self) -> int:
        """States that are kept, what the widest part of one layer needs, masks, and with stage 3 a whole layer."""
        target, a, positions = self.job.target, self.arithmetic, self.rows.positions
        attention = 2 * target.H + 3 * target.N * target.D + 4 * target.K * target.D
        masks = 0
        if self.rows.documents:
            attention += 2 * target.N * target.D  # keys and values once per query head: no kernel groups under a mask
            masks = self.batch_size * self.job.length**2 * (target.kinds + a.target)
        widest = positions * a.target * max(attention, 2 * target.H + 3 * target.I)
        gathered = 0
        if self.strategy.stage == 3:
            gathered = a.target * (target.largest_layer + min(PREFETCHED, target.stored))
        return self.states.kept + widest + masks + gathered

    @property
    def _autocast_copies(self) -> int:
        """Weights of layers and W_k in the dtype of matrix products, until autocast ends."""
        a, head = self.arithmetic, self.job.head
        return a.compute * (head.trained - head.lm_head) if a.autocast else 0

    @property
    def _gathered(self) -> int:
        """Stage 3: weights of the head that are whole at a time; what comes again soon is not given away."""
        head = self.job.head
        if self.strategy.stage < 3:
            return 0
        return self.arithmetic.weight * min(head.trained, KEPT_GATHERED + max(head.parameters))

    def _layer_forward(self, layer: Layer) -> int:
        """What a layer has computed until attention, and attention itself."""
        if self.job.checkpointing:
            return layer.input + layer.checkpointed_forward
        until = ("norm before attention", "keys and values", "queries", "attention")
        return sum(layer.saved[name] for name in until) + layer.attending

    def _in_loss(self, saved: int) -> dict[str, int]:
        a, head, rows = self.arithmetic, self.job.head, self.rows
        selected = rows.asked * head.H * a.target
        gathered = self._gathered
        if self.strategy.stage == 3:
            gathered += self.job.target.output * a.target
        moment = selected + self.loss.hidden + self.loss.weights + self._autocast_copies + gathered
        return self._at(self.gradients_before, saved + self.loss.saved, moment, self.loss.logits)

    def _backward(self, saved: int) -> Iterator[tuple[str, dict[str, int]]]:
        """Backwards through loss and layers; what a layer saved is given up once it is passed."""
        head = self.job.head
        copies = sum(layer.weights for layer in self.layers) if not self.job.checkpointing else 0
        product = self.loss.gradient + self.loss.hidden
        before = self.gradients_before if self.strategy.stage else self.gradients_after(0)
        yield "backward, loss", self._at(before, saved + self.loss.saved, product + copies + self._gathered)
        saved -= self.loss.norm
        done = head.lm_head
        for number, layer in reversed(list(enumerate(self.layers))):
            own = sum(layer.saved.values())
            saved -= layer.input if self.job.checkpointing else own
            below = saved + (layer.input if self.job.checkpointing else 0)
            here = copies + self._gathered + (self.states.tables + layer.weights if self.job.checkpointing else 0)
            gradients = self.gradients_after(done)
            for part, kept, moment in self._through(layer):
                yield f"backward, {part} of head layer {number}", self._at(gradients, below + kept, here + moment)
            copies -= layer.weights if not self.job.checkpointing else 0
            done += head.layer

    def _through(self, layer: Layer) -> Iterator[tuple[str, int, int]]:
        """Moments of a layer's backward pass: name, what it still holds, what is computed."""
        own = sum(layer.saved.values())
        after = sum(layer.saved[name] for name in ("output projection", "norms around the MLP", "MLP"))
        if self.job.checkpointing:
            yield "attention, once more", own - after, layer.attending
        yield "MLP", own, layer.mlp_backward
        yield "attention", own - after, layer.attending_backward

    def _optimizer_step(self) -> dict[str, int]:
        """Gradients in the optimizer's dtype, and the root that AdamW takes: on CUDA of all weights at once."""
        head, w, stage = self.job.head, self.arithmetic.weight, self.strategy.stage
        if not stage:
            root = w * head.trained if self.job.cuda else 2 * w * max(head.parameters)
            return self._at(w * head.trained + self._buckets, 0, root)
        if self.strategy.offload:
            return self._at(self.gradients_before, 0, 0)
        piece = self._piece(head.trained)
        own = piece if stage == 3 else head.trained if self.gradients_before and stage == 1 else self._own_gradients
        flat = w * piece + (FLOAT * piece if w < FLOAT else 0)
        root = FLOAT * piece * (1 if self.job.cuda else 2)
        return self._at(w * own + (self._buckets if stage == 3 else 0), 0, flat + root)
