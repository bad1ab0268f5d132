"""DecodingValidation: every validation runs the ACTUAL decoder on held-out prompts.

The loss says how close two distributions are; what counts is how many drafts a real pipeline accepts. So acceptance
and theoretical speedup are measured by decoding, losslessness is checked token by token against plain decoding, and
the decoder's own output is re-scored by the training view (drift check).

Where the run has a rank per stage, its ranks ARE the pipeline: each takes one stage of the weights it holds anyway, and
the wall-clock speedup over plain decoding on one of them is measured. With fewer ranks, or with weights in pieces
(ZeRO-3), every rank decodes prompts of its own in process; seconds are simulated time then, never called a speedup.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from spd_lightning.decoding.checks import Divergence, drift, lossless_divergence
from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.decoding.generation import Generation
from spd_lightning.decoding.pipeline import PipelineDecoder
from spd_lightning.decoding.topology import Groups, Roles
from spd_lightning.decoding.trace import breakdown
from spd_lightning.errors import BrokenInvariantError, InputError
from spd_lightning.head.module import SpeculationHead
from spd_lightning.speed.hardware import read_profile
from spd_lightning.speed.model import design_of, seconds_of
from spd_lightning.target.gathering import in_pieces
from spd_lightning.target.target import Target, is_placed
from spd_lightning.training.carousel import whole_weights
from spd_lightning.training.data import SpdDataModule

#: Counts that ranks add up before any ratio is taken, in this order.
COUNTS = (
    "prompts", "new_tokens", "cycles", "verified", "accepted", "mismatches", "ties", "drift", "drift_ties",
    "predicted_seconds",
)  # fmt: skip
#: Sums that a pipeline of ranks adds to them; the first two over the same prompts, the others over all cycles.
CLOCK = ("decode_seconds", "plain_seconds", "cycle_ms", "slowest_ms", "head_slack_ms", "bubbles")
#: Prompts of each pipeline and validation whose plain decoding is timed again, next to the pipeline's.
CLOCKED = 2


class DecodingValidation(L.Callback):
    """Decodes held-out prompts at every validation and logs val/acceptance, val/theoretical_speedup, val/lossless.

    Args:
        prompts: held-out prompts per validation, shared out among ranks.
        max_new_tokens: new tokens per prompt.
        directory: where a checkpoint is saved before the run is failed; default: the trainer's root directory.
        every_steps: validate every so many optimizer steps; null: as trainer.val_check_interval says, in batches.
        hardware: profile of the machine that will decode (a file, or a name such as cpu_tiny): the clock of this head
            there is predicted from the verdicts as they fell, and logged as val/predicted_tokens_per_second.
        head_alone: predict for a head on a rank of its own, n + 1 ranks in all; otherwise it is beside stage 0.
    """

    def __init__(
        self,
        prompts: int = 16,
        max_new_tokens: int = 64,
        directory: str | None = None,
        every_steps: int | None = None,
        hardware: str | None = None,
        head_alone: bool = False,
    ) -> None:
        for name, value, least in (
            ("prompts", prompts, 1),
            ("max_new_tokens", max_new_tokens, 2),
            ("every_steps", every_steps, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"decoding.{name}={value}: expected at least {least}.")
        self.prompts, self.max_new_tokens, self.directory = prompts, max_new_tokens, directory
        self.every_steps = every_steps
        self.profile = None if hardware is None else read_profile(hardware, "decoding.hardware")
        self.hardware, self.head_alone = hardware, head_alone
        #: Called by all ranks after each round of prompts; a run that is told to stop leaves there.
        self.between_prompts: Callable[[L.Trainer], None] = lambda trainer: None
        self.reference: dict[tuple[int, ...], Generation] = {}
        self.spent, self.began = 0.0, time.perf_counter()
        self._groups: Groups | None = None
        self._decoder: PipelineDecoder | None = None
        self._told, self._last_seconds = False, 0.0

    def schedule(self, trainer: L.Trainer) -> None:
        """Validate at the end of an optimizer step: in the middle of one, no state can be saved."""
        accumulate, interval = trainer.accumulate_grad_batches, trainer.val_check_interval
        if self.every_steps is not None:
            trainer.val_check_interval = self.every_steps * accumulate
            trainer.check_val_every_n_epoch = None
        elif isinstance(interval, int) and interval % accumulate:
            raise InputError(
                f"trainer.val_check_interval={interval} batches end in the middle of an optimizer step of {accumulate} "
                "batches. Set decoding.every_steps instead, which counts steps."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accumulate, interval = trainer.accumulate_grad_batches, trainer.val_check_batch
        if interval is not None and interval != float("inf"):  # a share of an epoch, up to the end of the step
            trainer.val_check_batch = ceil(interval / accumulate) * accumulate

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.spent, self.began = 0.0, time.perf_counter()
        self._decoder, self._groups = None, None

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SpdDataModule)
        target, head = pl_module.parts()
        began = time.perf_counter()
        prompts = data.prompts(self.prompts)
        device = trainer.strategy.root_device
        counts = torch.zeros(len(COUNTS) + len(CLOCK), dtype=torch.float64, device=device)
        bad: list[str] = []
        pipelines = self._pipelines(trainer, target, head)
        _give_back(device)
        if pipelines:
            rounds: Iterator[tuple[torch.Tensor, list[str]]] = self._in_parallel(
                pipelines, target, head, prompts, device
            )
        else:
            rounds = self._in_process(trainer, target, head, prompts)
        size = len(pipelines) or trainer.world_size
        shown = tqdm(rounds, "real decoding", ceil(len(prompts) / size), leave=False, disable=trainer.global_rank != 0)
        for found, wrong in shown:
            counts[: len(found)] += found.to(device)
            bad += wrong
            self.between_prompts(trainer)
        _give_back(device)
        totals = dict(zip(COUNTS + CLOCK, trainer.strategy.reduce(counts, reduce_op="sum").tolist(), strict=True))
        self.spent += time.perf_counter() - began
        self._log(pl_module, totals, head.staircase.num_stages, time.perf_counter() - began, bool(pipelines))
        if totals["mismatches"] - totals["ties"] or totals["drift"] - totals["drift_ties"]:
            self._fail(trainer, bad)

    def _pipelines(self, trainer: L.Trainer, target: Target, head: SpeculationHead) -> list[Roles]:
        """The pipelines that the run's ranks can form; none where there are too few of them."""
        n, world = head.staircase.num_stages, trainer.world_size
        if world < n or in_pieces(target) or is_placed(target.model):
            if world > 1 and not self._told:
                self._told = True
                why = f"{world} ranks for {n} stages" if world < n else "the target's weights are in pieces"
                rank_zero_only(print)(f"Validation decodes in process ({why}): wall clock is not measured.", flush=True)
            return []
        count = world // n
        size = n + 1 if count * (n + 1) <= world else n
        pipelines = [Roles(n, tuple(range(i * size, (i + 1) * size))) for i in range(count)]
        if self._groups is None:  # all ranks make the groups of all pipelines, once
            self._groups = Groups.of(pipelines, head.staircase, trainer.strategy.root_device)
            mine = next((roles for roles in pipelines if trainer.global_rank in roles.ranks), None)
            if mine is not None:
                self._decoder = PipelineDecoder(target, head, mine.ranks, traced=True, groups=self._groups)
        return pipelines

    def _in_process(
        self, trainer: L.Trainer, target: Target, head: SpeculationHead, prompts: Sequence[list[int]]
    ) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """Every rank decodes prompts of its own, one per round."""
        rank, world = trainer.global_rank, trainer.world_size
        with whole_weights(target, head, trainer) as turn:
            for start in range(0, len(prompts), world):
                with turn():
                    found = self.measure(target, head, prompts[start + rank : start + rank + 1], start + rank)
                yield found

    def _in_parallel(
        self,
        pipelines: Sequence[Roles],
        target: Target,
        head: SpeculationHead,
        prompts: Sequence[list[int]],
        device: torch.device,
    ) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """Every pipeline decodes prompts of its own, one per round; its leader counts."""
        decoder = self._decoder
        nothing = torch.zeros(len(COUNTS) + len(CLOCK), dtype=torch.float64, device=device)
        was_training = head.training
        head.eval()
        try:
            for start in range(0, len(prompts), len(pipelines)):
                found: tuple[torch.Tensor, list[str]] = nothing, []
                number = start + (pipelines.index(decoder.roles) if decoder is not None else len(pipelines))
                if decoder is not None and number < min(len(prompts), start + len(pipelines)):
                    if decoder.leads:
                        counts, bad = self.measure(target, head, [prompts[number]], number, decoder)
                        clocked = prompts[number] if start < CLOCKED * len(pipelines) else None
                        found = torch.cat([counts, self._clock(decoder, clocked).to(counts.device)]), bad
                    else:
                        decoder.follow(generations=1)
                        decoder.spans_of_all()
                yield found
        finally:
            head.train(was_training)

    def _clock(self, decoder: PipelineDecoder, prompt: list[int] | None) -> torch.Tensor:
        """Sums in the order of CLOCK, of the generation that was decoded last.

        Args:
            prompt: to be decoded plainly once more, here and now, while the other ranks wait: what was measured when
                the run began was measured on a machine in another state.
        """
        spans, cycles = decoder.spans_of_all(), decoder.cycles
        if not cycles:
            return torch.zeros(len(CLOCK), dtype=torch.float64)
        seconds = 0.0, 0.0
        if prompt is not None:
            plain = autoregressive_generate(decoder.target, prompt, self.max_new_tokens)
            seconds = self._last_seconds, plain.decode_seconds
        parts = breakdown(spans, cycles)
        values = (
            *seconds,
            parts.cycle_ms * cycles,
            parts.slowest[1] * cycles,
            (parts.head_slack_ms or 0.0) * cycles,
            parts.bubble_share * cycles,
        )
        return torch.tensor(values, dtype=torch.float64)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        decoder, self._decoder, self._groups = self._decoder, None, None
        if decoder is not None:
            if decoder.leads:
                decoder.close()
            else:
                decoder.follow()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """There is no teardown after an error, and other ranks may be gone: end alone."""
        decoder, self._decoder, self._groups = self._decoder, None, None
        if decoder is not None:
            decoder.release()

    def measure(
        self,
        target: Target,
        head: SpeculationHead,
        prompts: Sequence[list[int]],
        first: int = 0,
        decoder: SpdDecoder | None = None,
    ) -> tuple[torch.Tensor, list[str]]:
        """Counts (in the order of COUNTS) over prompts number `first`, ..., and a line per broken invariant."""
        was_training = head.training
        head.eval()
        decoder = decoder or SpdDecoder(target, head)
        counts = torch.zeros(len(COUNTS), dtype=torch.float64, device=target.device)
        bad: list[str] = []
        for number, prompt in enumerate(prompts, first):
            found = decoder.generate(prompt, self.max_new_tokens)
            self._last_seconds = found.decode_seconds
            divergence = lossless_divergence(target, prompt, found, self._plain(target, prompt))
            drifted = drift(target, head, prompt, found)
            ties = [d for d in drifted if d.tie]
            counts += torch.tensor(
                [
                    1,
                    len(found.token_ids),
                    found.cycles,
                    found.drafts_verified,
                    found.drafts_accepted,
                    divergence is not None,
                    divergence is not None and divergence.tie,
                    len(drifted),
                    len(ties),
                    self._predicted_seconds(head, found),
                ],
                dtype=torch.float64,
                device=counts.device,
            )
            bad += _complaints(number, divergence, drifted)
        head.train(was_training)
        return counts, bad

    def _predicted_seconds(self, head: SpeculationHead, found: Generation) -> float:
        """What this generation would take on the profile's machine."""
        if self.profile is None:
            return 0.0
        return seconds_of(self.profile, design_of(head.config, self.head_alone), found.accepted_flags)

    def _plain(self, target: Target, prompt: list[int]) -> Generation:
        """Plain decoding of a prompt; the target is frozen, so once per run is enough."""
        key = tuple(prompt)
        if key not in self.reference:
            self.reference[key] = autoregressive_generate(target, prompt, self.max_new_tokens)
        return self.reference[key]

    def _log(
        self, module: L.LightningModule, totals: dict[str, float], num_stages: int, seconds: float, parallel: bool
    ) -> None:
        verified, cycles = totals["verified"], totals["cycles"]
        values = {
            "acceptance": totals["accepted"] / verified if verified else 0.0,
            "theoretical_speedup": num_stages * verified / cycles if cycles else 0.0,
            "lossless": float(totals["mismatches"] == totals["ties"]),
            "ties": totals["ties"] + totals["drift_ties"],
            "drift": totals["drift"] - totals["drift_ties"],
            "cycles": cycles,
            "decoded_tokens": totals["new_tokens"],
            "decoding_seconds" if parallel else "decoding_seconds_simulated": seconds,
            "decoding_share_of_time": self.spent / max(time.perf_counter() - self.began, 1e-9),
        }
        if self.profile is not None and totals["predicted_seconds"]:
            rate = (totals["new_tokens"] - totals["prompts"]) / totals["predicted_seconds"]
            values["predicted_tokens_per_second"] = rate
            values["predicted_speedup"] = rate * self.profile.plain / 1e3
        if parallel and cycles:
            if totals["decode_seconds"]:  # over plain decoding on one rank's hardware
                values["wall_clock_speedup"] = totals["plain_seconds"] / totals["decode_seconds"]
            names = CLOCK[2:5] if self._decoder is not None and self._decoder.ranks > num_stages else CLOCK[2:4]
            values |= {name: totals[name] / cycles for name in names}
            values["bubble_share"] = totals["bubbles"] / cycles
        # counts are reduced already, so every rank logs the same numbers
        for name, value in values.items():
            module.log(f"val/{name}", value, prog_bar=name in ("acceptance", "theoretical_speedup"), sync_dist=False)

    def _fail(self, trainer: L.Trainer, bad: list[str]) -> None:
        where = Path(self.directory or trainer.default_root_dir) / "broken_invariant.ckpt"
        trainer.save_checkpoint(where)
        detail = bad[0] if bad else "on another rank"
        raise BrokenInvariantError(f"{detail}. {max(len(bad), 1)} in all; the state was saved to {where}.")


def _give_back(device: torch.device) -> None:
    """What training keeps for its next step is free for caches of decoding, and the other way round."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _complaints(number: int, divergence: Divergence | None, drifted: Sequence[Divergence]) -> list[str]:
    lines = []
    if divergence is not None and not divergence.tie:
        lines.append(
            f"Not lossless: prompt {number}, new token {divergence.position} is {divergence.found}, plain decoding "
            f"gives {divergence.expected} (relative logit gap {divergence.gap:.1e}, no tie)"
        )
    lines += [
        f"Drift: prompt {number}, new token {d.position}: decoder and training view disagree whether its draft was "
        f"right (relative logit gap {d.gap:.1e}, no tie)"
        for d in drifted
        if not d.tie
    ]
    return lines
