"""GraphDecoder: the pipeline on ONE GPU, every cycle one replay of a CUDA graph with stages and head side by side.

A single token through a small model leaves most of a GPU idle: its kernels are short and wait for each other. The n
stages of a pipeline work on n different tokens, so the graph has n + 1 branches (`StaticCycle.branches`) which the
device may run at the same time, and the host only writes a few integers, replays, and reads the verdict.

Without CUDA the same cycle runs eagerly, branch after branch: exact, and no faster than anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spd_lightning.decoding.decoder import (
    CycleEvent,
    Observer,
    SpdDecoder,
    Stop,
    _ended,
    _sampling,
    checked_prompt,
)
from spd_lightning.decoding.drafters import Draft
from spd_lightning.decoding.generation import Generation
from spd_lightning.decoding.sampling import draw
from spd_lightning.decoding.schedule import Cycle, PipelineSchedule
from spd_lightning.decoding.static import Branch, StaticCycle
from spd_lightning.decoding.verdict import Verdicts
from spd_lightning.errors import InputError
from spd_lightning.head.module import SpeculationHead
from spd_lightning.randomness import Purpose, uniform
from spd_lightning.target.gathering import in_pieces
from spd_lightning.target.target import Target

#: Attention kernels that take the mask which hides what lies behind a position.
MASKED_KERNELS = ("sdpa", "eager")
#: What sdpa may choose from on a GPU. Not cuDNN, which torch prefers on new ones: it makes a plan for every length, and
#: what hides a place in a mask can overflow in it.
_WITH_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_WITHOUT_MASK = [SDPBackend.FLASH_ATTENTION, *_WITH_MASK]
SMALLEST_BUCKET = 256


def bucket(places: int) -> int:
    """The capacity that holds so many places: a power of two, so that few graphs serve all prompts."""
    return max(SMALLEST_BUCKET, 1 << (places - 1).bit_length())


def capture_refusal(target: Target, head: SpeculationHead | None = None) -> str | None:
    """Why a cycle of this target cannot be a graph of one device; None if it can."""
    model = target.model
    devices = {p.device for module in (model, head) if module is not None for p in module.parameters()}
    kernel = target.config._attn_implementation
    if getattr(model, "is_quantized", False):
        return "its weights are quantised, and their kernels may wait for the device"
    if any(hasattr(module, "_hf_hook") for module in model.modules()) or len(devices) > 1:
        return "its weights (or the head's) are offloaded or lie on several devices"
    if in_pieces(model) or (head is not None and in_pieces(head)):
        return "ZeRO stage 3 keeps its weights (or the head's) in pieces"
    if any(hasattr(module, "experts") for module in model.modules()):
        return "it is a mixture of experts, whose shapes depend on the token"
    if kernel not in MASKED_KERNELS:
        return f"its attention kernel {kernel!r} takes no mask (set loading.attention to sdpa)"
    return None


class CycleRunner:
    """A static cycle that is replayed: on CUDA as a graph, elsewhere eagerly.

    The cycle must be loaded with a prompt before, because its first prompt allocates the caches.

    Raises:
        InputError: CUDA could not capture the cycle, with its reason.
    """

    def __init__(self, cycle: StaticCycle) -> None:
        self.cycle = cycle
        on_gpu = cycle.device.type == "cuda"
        # pinned: the device copies from and to them by itself
        self._asked = torch.zeros(len(cycle.inputs), dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._found = torch.zeros(len(cycle.results), dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self.graph = _capture(cycle) if on_gpu else None

    def __call__(self, positions: Sequence[int], token: int) -> tuple[int, int]:
        """One cycle with the positions at depth 0..n and the entering token; returns `StaticCycle.results`."""
        self._asked.numpy()[:] = [*positions, token]
        if self.graph is None:
            self._cycle(self.cycle.run)
        else:
            with torch.cuda.device(self.cycle.device):
                self._cycle(self.graph.replay)
                torch.cuda.current_stream().synchronize()
        draft, own = self._found.tolist()
        return draft, own

    def _cycle(self, run: Callable[[], None]) -> None:
        self.cycle.inputs.copy_(self._asked, non_blocking=True)
        run()
        self._found.copy_(self.cycle.results, non_blocking=True)


def _capture(cycle: StaticCycle) -> torch.cuda.CUDAGraph:
    """The cycle as a graph with one parallel branch per stage and one for the head.

    Captured (and warmed up) at the spare position, so that a loaded prompt is as it was.
    """
    here = torch.cuda.device(cycle.device)
    # the current stream comes back whatever happens; autocast would leave copies of weights behind that the graph reads
    with here, torch.cuda.stream(torch.cuda.current_stream(cycle.device)), torch.autocast("cuda", enabled=False):
        streams = [torch.cuda.Stream() for _ in cycle.branches()]

        def fork(branches: Sequence[Branch]) -> None:
            trunk = torch.cuda.current_stream()
            for stream, branch in zip(streams, branches, strict=True):
                stream.wait_stream(trunk)
                with torch.cuda.stream(stream):
                    branch()
            for stream in streams:
                trunk.wait_stream(stream)

        cycle.inputs[:-1] = cycle.spare
        cycle.inputs[-1] = 0
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with kernels(cycle.device, masked=True):
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries set themselves up in the first calls, on every stream
                    cycle.run(fork)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            # workspaces that the warm-up made belong to nobody: made again while capturing, they are the graph's own
            torch._C._cuda_clearCublasWorkspaces()
            graph = _captured(lambda: cycle.run(fork), side)
            torch._C._cuda_clearCublasWorkspaces()
    return graph


def _captured(run: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """What `run` puts on the stream, as a graph.

    Raises:
        InputError: CUDA could not capture it.
    """
    graph, failure = torch.cuda.CUDAGraph(), None
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                run()
            except Exception as error:  # kept: the end of a broken capture raises too, and says less
                failure = error
    except RuntimeError as error:
        failure = failure or error
    if failure is None:
        return graph
    if isinstance(failure, RuntimeError) and not isinstance(failure, torch.OutOfMemoryError):
        reason = str(failure).partition("\n")[0]
        raise InputError(f"The cycle could not be captured as a CUDA graph: {reason} Decode with SpdDecoder.") from (
            failure
        )
    raise failure


def kernels(device: torch.device, masked: bool) -> AbstractContextManager[None]:
    """Within it attention on a GPU takes none but kernels that are right, and quick, for one token or one prompt."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(_WITH_MASK if masked else _WITHOUT_MASK)


class GraphEngine:
    """Runners by capacity, made by the first prompt of each bucket and used again by all others.

    Args:
        head: None for plain decoding.
        capacity: of the only bucket; None: whatever each prompt asks for.

    Raises:
        InputError: a target that cannot be captured, with the reason; a capacity below 1.
    """

    def __init__(self, target: Target, head: SpeculationHead | None, capacity: int | None) -> None:
        if reason := capture_refusal(target, head):
            raise InputError(f"This target cannot be captured as a CUDA graph: {reason}. Decode with SpdDecoder.")
        if capacity is not None and capacity < 1:
            raise InputError(f"capacity={capacity}: expected a number of tokens, or None.")
        self.target, self.head = target, head
        self.capacity = None if capacity is None else bucket(capacity)
        self.runners: dict[int, CycleRunner] = {}
        self._weights = self._addresses()

    def _addresses(self) -> list[int]:
        """Of all weights: a graph reads from where they were when it was captured."""
        modules = (self.target.model, self.head)
        return [p.data_ptr() for module in modules if module is not None for p in module.parameters()]

    def start(self, prompt: Sequence[int], places: int) -> tuple[CycleRunner, Tensor]:
        """A prompt through target and head, eagerly; returns a runner that holds it, and its last logits [V].

        Args:
            places: positions that the generation may touch.

        Raises:
            InputError: more places than the engine's capacity holds.
        """
        capacity = self.capacity or bucket(places + 1)  # and the spare one
        if places + 1 > capacity:
            raise InputError(
                f"A prompt of {len(prompt)} tokens with its new tokens takes {places + 1} places, and capacity is "
                f"{capacity}: raise capacity, or leave it out."
            )
        if (addresses := self._addresses()) != self._weights:
            self._weights = addresses
            self.runners.clear()
        runner = self.runners.get(capacity)
        cycle = StaticCycle(self.target, self.head, capacity) if runner is None else runner.cycle
        cache = self.target.new_cache(len(prompt))
        ids = torch.tensor([list(prompt)], device=cycle.device)
        with kernels(cycle.device, masked=False):
            states, last = self.target(ids, cycle.anchors, cache=cache)
            cycle.load(states, cache)
        if runner is None:
            runner = self.runners[capacity] = CycleRunner(cycle)
        return runner, self.target.logits(last[:, -1])[0]


class GraphDecoder(SpdDecoder):
    """Speculative pipeline decoding of one sequence on one GPU, one graph replay per cycle.

    Decodes what `SpdDecoder` decodes, and draws the same random numbers.

    Args:
        target: frozen target on one device; takes the head's stages if it has none yet.
        head: a `SpeculationHead` on the same device.
        capacity: places of every cache, rounded up to a power of two: prompt, new tokens and n + 2 more. None: whatever
            each prompt asks for, in powers of two from 256 on, a graph for each.

    Raises:
        InputError: a head that does not fit; a target that cannot be captured, with the reason.
    """

    def __init__(self, target: Target, head: SpeculationHead, capacity: int | None = None) -> None:
        if not isinstance(head, SpeculationHead):
            raise InputError(f"GraphDecoder takes a SpeculationHead, not {type(head).__name__}: use SpdDecoder.")
        self.engine = GraphEngine(target, head, capacity)
        super().__init__(target, head)
        self.head = head

    def _run(
        self, prompt: list[int], max_new_tokens: int, verdicts: Verdicts, ends: frozenset[int], observed: bool
    ) -> GraphRun:
        return GraphRun(self.engine, self.head, prompt, max_new_tokens, verdicts)


class GraphRun:
    """What a generation keeps on the host: integers, and the drafts in flight."""

    widths = ()

    schedule: PipelineSchedule

    def __init__(
        self,
        engine: GraphEngine,
        head: SpeculationHead,
        prompt: list[int],
        max_new_tokens: int,
        verdicts: Verdicts,
    ) -> None:
        self.engine, self.head, self.prompt, self.verdicts = engine, head, prompt, verdicts
        self.sampling = verdicts.sampling
        self.places = len(prompt) + max_new_tokens + head.staircase.num_stages + 1
        self.drafts: dict[int, Draft] = {}  # position -> the draft that entered there, until it is verified

    def prefill(self) -> int:
        """Prompt through target and head; returns the first token, which is the target's own."""
        self.runner, logits = self.engine.start(self.prompt, self.places)
        self.entering = self.verdicts.own(logits, len(self.prompt))
        self.schedule = PipelineSchedule(self.head.staircase, len(self.prompt))
        return self.entering

    def cycle(self) -> CycleEvent:
        """One replay, and what follows from it."""
        plan = self.schedule.plan()
        position = plan.newest + 1
        drafted, own = self.runner(self.runner.cycle.positions_of(plan), self.entering)
        draft = self._draft(plan, drafted)
        emitted, accepted = None, None
        if plan.leaving is not None:
            emitted = self._verdict(plan.leaving + 1, own)
            accepted = emitted == self.drafts.pop(plan.leaving + 1).token
        self.schedule.advance(accepted)
        if accepted is False:
            assert emitted is not None
            self.drafts.clear()
            self.entering = emitted
        else:
            self.drafts[position] = draft
            self.entering = draft.token
        return CycleEvent(plan, draft.token, emitted, accepted)

    def _draft(self, plan: Cycle, likeliest: int) -> Draft:
        """The draft after the newest token."""
        if self.sampling.greedy:
            return Draft(likeliest, None)
        law = self.sampling.law(self.runner.cycle.draft_logits)
        position = plan.newest + 1
        u = uniform(self.sampling.seed, Purpose.DRAFT, position, plan.attempt)
        return Draft(self.head.full_vocabulary_id(draw(law, u)), law)

    def _verdict(self, position: int, own: int) -> int:
        """The token at `position`: the draft in flight there, or the target's correction."""
        attempt = self.schedule.attempt_of(position)
        return self.verdicts.of(self.runner.cycle.target_logits, self.drafts[position], position, attempt, best=own)

    def end(self, stopped: bool) -> None:
        """The graph and its caches wait for the next prompt."""


class GraphAutoregressive:
    """The baseline of `GraphDecoder`: one token per full target pass, each one replay of a graph of the same layers."""

    def __init__(self, target: Target, capacity: int | None = None) -> None:
        self.engine = GraphEngine(target, None, capacity)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        observer: Observer | None = None,
        stop: Stop | None = None,
    ) -> Generation:
        """As `autoregressive_generate`."""
        target = self.engine.target
        prompt = checked_prompt(target, input_ids, max_new_tokens)
        verdicts = Verdicts(None, _sampling(temperature, top_k, top_p, seed))
        ends = target.end_of_sequence_ids(eos_token_id)
        began = time.perf_counter()
        runner, logits = self.engine.start(prompt, len(prompt) + max_new_tokens)
        tokens = [verdicts.own(logits, len(prompt))]
        prefilled = time.perf_counter()
        if observer:
            observer(CycleEvent(None, None, tokens[0], None))
        while len(tokens) < max_new_tokens and not _ended(tokens, ends, stop):
            position = len(prompt) + len(tokens) - 1
            _, own = runner([position, runner.cycle.spare], tokens[-1])
            if not verdicts.sampling.greedy:
                own = verdicts.own(runner.cycle.target_logits, position + 1)
            tokens.append(own)
            if observer:
                observer(CycleEvent(None, None, own, None))
        return Generation(
            token_ids=tokens,
            prompt_length=len(prompt),
            num_stages=1,
            cycles=len(tokens) - 1,
            drafts_verified=0,
            drafts_accepted=0,
            restart_positions=list(range(len(prompt), len(prompt) + len(tokens))),
            prefill_seconds=prefilled - began,
            decode_seconds=time.perf_counter() - prefilled,
        )
