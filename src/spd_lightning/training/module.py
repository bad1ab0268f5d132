"""SpdModule wires target, staircase, head and loss into Lightning; it does no mathematics of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from spd_lightning.data.batches import Batch, is_packed, position_ids, supervised_positions
from spd_lightning.errors import InputError
from spd_lightning.head.checkpoint import CHECKPOINT_PREFIX
from spd_lightning.head.config import HeadConfig
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.head.loading import head_config, new_head, resolve_head_kind, shapes_of_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.head.vocabulary import read_draft_vocabulary
from spd_lightning.randomness import Purpose, generator
from spd_lightning.staircase import Staircase, default_anchors, empty_stages, resolve_stage_layers
from spd_lightning.target.balance import measured_split
from spd_lightning.target.families import packing_refusal
from spd_lightning.target.gathering import gathered
from spd_lightning.target.loading import Loading, check_target, load_target, shapes_of_target
from spd_lightning.target.target import Target
from spd_lightning.training.losses import Loss, Verdicts, chunked_draft_loss
from spd_lightning.training.metrics import DraftStatistics, by_fill
from spd_lightning.training.optimizers import BETAS, MuonAdamW, scheduled
from spd_lightning.training.resuming import check_weights, rescale_progress, trained_groups
from spd_lightning.training.strategies import ZeroStrategy
from spd_lightning.training.survival import gradients_finite
from spd_lightning.training.warm_start import warm_start


@dataclass(frozen=True)
class HeadOptions:
    """What head is trained.

    Args:
        kind: its layers: qwen3 is what most published heads have; target builds them like the target's own attention
            layers (dense, full attention); auto is the kind published for the target's family.
        num_layers: decoder layers of the head.
        anchors: hidden-state indices it reads; default: stage boundaries at depths 0, n/8, 3n/8, 6n/8, n.
        draft_vocabulary: JSON file with "token_ids", the ids it can propose; default: all of them.
        intermediate_size: width of its MLPs; default: the target's (of a mixture without dense layers, the width of
            the experts a token passes).
        anchor_norm: RMSNorm of each anchor's hidden state before it is aggregated.
        warm_start: training starts with the end of the target instead of random layers: its last ones, which needs
            layers like the target's, and aggregation weights that are fitted to what these read.
    """

    kind: Literal["auto", "qwen3", "target"] = "auto"
    num_layers: int = 2
    anchors: list[int] | None = None
    draft_vocabulary: str | None = None
    intermediate_size: int | None = None
    anchor_norm: bool = False
    warm_start: bool = False

    def __post_init__(self) -> None:
        for name, value in (("num_layers", self.num_layers), ("intermediate_size", self.intermediate_size)):
            if value is not None and value < 1:
                raise InputError(f"model.head.{name}={value}: expected at least 1.")


class SpdModule(L.LightningModule):
    """Trains a speculation head on a frozen target.

    Args:
        target: folder or hub id of the frozen target; `tiny` is the embedded one.
        loading: how the target is loaded.
        num_stages: n, pipeline stages; balanced, where L allows no equal ones.
        stage_layers: layers per stage by hand, instead of num_stages; or auto: num_stages stages of equal measured
            time, embedding, lm_head and verification included.
        head: what head is trained.
        loss: what is minimised.
        restarts: where training sequences restart. drawn: token by token at restart_rate, so that fills come as often
            as in decoding. rejected: so in the first of several restart_draws; in each further one with the chance
            that the token came after a rejected draft of the draw before, at temperature 1. published: as the
            method's authors train, half of the sequences saturated, in the other half all fills from 1 to n equally
            often. Validation draws them in any case.
        restart_rate: probability that a training token starts after a flush, 1 - p of the decoder it is meant for.
        restart_draws: how often a step draws restarts: the target passes over a batch once, the head trains on the
            same features with every draw of fills. Compute and memory of the head grow with it.
        optimizer: adamw; or muon, for all matrices but the lm_head (adamw for the rest).
        learning_rate: peak.
        adamw_learning_rate: beside Muon, the peak of what AdamW takes, the lm_head and the norms; null: learning_rate.
        weight_decay: on matrices only.
        warmup: share of the steps in which the learning rate rises linearly.
        schedule: how it falls after that.
        final_learning_rate: where it ends, as a share of the peak.
        loss_chunk: supervised positions whose logits exist at a time.
        activation_checkpointing: keep only the input of each layer of the head and compute the rest once more in the
            backward pass: less memory, about a third more work of the head.
        seed: of the head's initial weights and of the restarts.
    """

    def __init__(
        self,
        target: str = "tiny",
        loading: Loading = Loading(),  # noqa: B008 (frozen)
        num_stages: int | None = None,
        stage_layers: list[int] | Literal["auto"] | None = None,
        head: HeadOptions = HeadOptions(),  # noqa: B008 (frozen)
        loss: Loss = Loss(),  # noqa: B008 (frozen)
        restarts: Literal["drawn", "rejected", "published"] = "drawn",
        restart_rate: float = 0.15,
        restart_draws: int = 1,
        optimizer: Literal["adamw", "muon"] = "adamw",
        learning_rate: float = 1e-3,
        adamw_learning_rate: float | None = None,
        weight_decay: float = 0.0,
        warmup: float = 0.05,
        schedule: Literal["cosine", "linear"] = "cosine",
        final_learning_rate: float = 0.1,
        loss_chunk: int = 1024,
        activation_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["loading", "head", "loss"])  # checkpoints hold plain values, no classes
        self.save_hyperparameters({"loading": asdict(loading), "head": asdict(head), "loss": asdict(loss)})
        self.settings: Any = self.hparams
        self.loading, self.head_options, self.loss_options = loading, head, loss
        #: Layers per stage, where they are known before anything is measured: a resumed run keeps its own.
        self.stage_layers: tuple[int, ...] | None = None
        for name, value, low, high in (
            ("restart_rate", restart_rate, 0, 1),
            ("warmup", warmup, 0, 1),
            ("final_learning_rate", final_learning_rate, 0, 1),
        ):
            if not low <= value <= high:
                raise InputError(f"model.{name}={value}: expected a number from {low} to {high}.")
        for name, choice, known in (
            ("restarts", restarts, ("drawn", "rejected", "published")),
            ("optimizer", optimizer, ("adamw", "muon")),
            ("schedule", schedule, ("cosine", "linear")),
        ):
            if choice not in known:
                raise InputError(f"model.{name}={choice!r}: expected {', '.join(known[:-1])} or {known[-1]}.")
        for name, rate in (("learning_rate", learning_rate), ("adamw_learning_rate", adamw_learning_rate)):
            if rate is not None and not rate > 0:
                raise InputError(f"model.{name}={rate}: expected a positive number.")
        for name, count in (("loss_chunk", loss_chunk), ("restart_draws", restart_draws)):
            if count < 1:
                raise InputError(f"model.{name}={count}: expected at least 1.")
        if restarts == "rejected" and restart_draws < 2:
            raise InputError(
                f"model.restarts=rejected with model.restart_draws={restart_draws}: expected at least 2 draws, the "
                "first one says what is rejected."
            )
        self.strict_loading = False  # the frozen target is in no checkpoint; missing HEAD keys are refused below
        self.tokens_seen = 0.0
        self._step_applied = True
        self._frozen: dict[str, Tensor] = {}  # of the head, where this rank has read it
        self.statistics_due = 0  # the optimizer step after which training statistics are logged
        self.resumes = False  # weights of a checkpoint will take the place of what the head starts with
        self.teacher_forced_by_fill: list[dict[str, float]] = []
        self.target: Target | None = None
        self.head: SpeculationHead | None = None

    # -- building ------------------------------------------------------------------------------------------------

    def packing_refusal(self) -> str | None:
        """Why the target cannot take packed rows; None where it can."""
        config = check_target(self.settings.target, loading=self.loading, named="model.loading.{}".format)
        kernel = self.loading.attention
        return packing_refusal(config.get_text_config(), None if kernel == "auto" else kernel)

    def check(self) -> Staircase:
        """Everything that can be refused without reading a weight; returns the staircase the run will have.

        With `stage_layers: auto` and nothing measured yet, that of a balanced split stands in for it.
        """
        hp = self.settings
        config = check_target(hp.target, loading=self.loading, named="model.loading.{}".format).get_text_config()
        resolve_head_kind(self.head_options.kind, config)
        stages = self.stage_layers
        if stages is None:
            measured = hp.stage_layers == "auto"
            if measured and hp.num_stages is None:
                raise InputError("model.stage_layers=auto: set model.num_stages, the number of stages to balance.")
            by_hand = None if measured else hp.stage_layers
            stages = resolve_stage_layers(config.num_hidden_layers, hp.num_stages, by_hand)
        anchors = self.head_options.anchors
        staircase = Staircase(stages, default_anchors(stages) if anchors is None else tuple(anchors))
        if message := empty_stages(stages):
            L.pytorch.utilities.rank_zero_warn(message)
        if staircase.unreachable_blocks:
            names = [staircase.anchors[k] for k in staircase.unreachable_blocks]
            L.pytorch.utilities.rank_zero_warn(
                f"No depth of stage_layers={list(stages)} ends at anchors {names}: their blocks have no rows of their "
                "own and only feed deeper ones. Choose anchors at stage boundaries."
            )
        if self.head_options.draft_vocabulary is not None:
            read_draft_vocabulary(self.head_options.draft_vocabulary, config.vocab_size, "model.head.draft_vocabulary")
        return staircase

    def configure_model(self) -> None:
        if self.head is not None:
            return
        hp, options = self.settings, self.head_options
        staircase = self.check()
        strategy = None if self._trainer is None else self._trainer.strategy
        ranks = 1 if self._trainer is None else self._trainer.world_size
        if self.loading.device_map is not None and ranks > 1:
            raise InputError(
                f"model.loading.device_map={self.loading.device_map!r} lets one process use every device, and "
                f"{ranks} processes train: set trainer.devices to 1, or leave the map out."
            )
        zero = strategy if isinstance(strategy, ZeroStrategy) else None
        cut = zero is not None and zero.stage == 3
        reads = not cut or self.trainer.is_global_zero
        device = torch.device("cpu") if strategy is None or cut else strategy.root_device
        dtype = zero.weight_dtype if zero is not None and self.loading.dtype == "auto" else None
        if reads:
            self.target = load_target(hp.target, device=device, dtype=dtype, loading=self.loading)
        else:
            self.target = shapes_of_target(hp.target, self.loading)
        if hp.stage_layers == "auto" and self.stage_layers is None:
            self.stage_layers = self._measured_stages(self.target)
            staircase = self.check()
        self.target.partition(stage_layers=staircase.stage_layers)
        ids = None
        if options.draft_vocabulary is not None:
            ids = read_draft_vocabulary(options.draft_vocabulary, self.target.vocab_size)
        choices: dict[str, Any] = {
            "num_layers": options.num_layers,
            "anchors": staircase.anchors,
            "draft_token_ids": ids,
            "kind": options.kind,
            "intermediate_size": options.intermediate_size,
            "anchor_norm": options.anchor_norm,
        }
        if reads:
            self.head = new_head(self.target, seed=hp.seed, **choices)
            if options.warm_start and not self.resumes and self._trainer is not None and self._trainer.training:
                with torch.device("cpu"):  # Lightning's default device is no place for the workers of a data loader
                    warm_start(self.target, self.head, self._training_batches())
        else:
            self.head = shapes_of_head(self.target, head_config(self.target, **choices))
        self.head.checkpoint_layers = hp.activation_checkpointing
        for k in set(range(len(staircase.anchors))) - set(staircase.reachable_blocks):
            self.head.aggregation[k].requires_grad_(False)  # no row passes it
        if reads:
            frozen = ((name, p) for name, p in self.head.named_parameters() if not p.requires_grad)
            self._frozen = {name: p.detach().cpu().clone() for name, p in frozen}
        if cut:
            assert zero is not None
            zero.cut(self.target, self.head)
        self.train_statistics = DraftStatistics(staircase.num_stages)
        self.val_statistics = DraftStatistics(staircase.num_stages)

    def _training_batches(self) -> Iterable[Batch]:
        """This rank's; where ranks read their own, the first one's head becomes everyone's."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise InputError(
                "model.head.warm_start: a head is fitted to training texts. Give the trainer a data module."
            )
        return cast("Iterable[Batch]", data.train_dataloader())

    def _measured_stages(self, target: Target) -> tuple[int, ...]:
        """Stages of equal time, measured by the first process for all of them."""
        split = None
        if self._trainer is None or self._trainer.is_global_zero:
            split = measured_split(target, self.settings.num_stages)
            print(split.table(), flush=True)
        stages = () if split is None else split.stage_layers
        return stages if self._trainer is None else tuple(self._trainer.strategy.broadcast(stages))

    def parts(self) -> tuple[Target, SpeculationHead]:
        """Target and head, once `configure_model` has run."""
        assert self.target is not None and self.head is not None, "configure_model has not run"
        return self.target, self.head

    def configure_optimizers(self) -> OptimizerLRScheduler:
        weights = dict(self.named_parameters())
        matrices, others = ([weights[name] for name in names] for names in trained_groups(weights.items()))
        groups = [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        strategy = self.trainer.strategy
        # in host memory the fused kernel is several times as fast
        fused = True if isinstance(strategy, ZeroStrategy) and strategy.offloads else None
        rate = self.settings.learning_rate
        optimizer: torch.optim.Optimizer
        if self.settings.optimizer == "muon":
            _, head = self.parts()
            beside = self.settings.adamw_learning_rate or rate
            optimizer = MuonAdamW(groups, rate, beside, apart=[head.lm_head.weight])
        else:
            optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = scheduled(optimizer, self.settings, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- steps ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        due = (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        loss, table = self.loss(batch, statistics=due)
        self.tokens_seen += float(batch["tokens"]) * self.trainer.world_size
        self.log("loss", loss.detach(), prog_bar=True, logger=False)  # this micro-batch's, for a quick look
        if due:
            self.statistics_due = self.global_step + 1
            self.train_statistics.update(table, batch)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # the optimizer step that was due is over: all its micro-batches (and ranks) are in the sums
        if self.train_statistics.update_called and self.global_step == self.statistics_due:
            values = self.train_statistics.compute()
            # of the global batch
            self.log_dict({f"train/{name}": x for name, x in values.items()})
            self.log("tokens", self.tokens_seen)
            self.train_statistics.reset()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # DeepSpeed looks by itself, and so does the scaler of float16
        if not isinstance(self.trainer.strategy, ZeroStrategy) and self.trainer.precision != "16-mixed":
            self._step_applied = gradients_finite(self.parameters())
            if not self._step_applied:
                optimizer.zero_grad(set_to_none=True)  # a weight without gradient stays as it is

    @property
    def step_applied(self) -> bool:
        """Whether the last optimizer step changed the weights: not where a gradient was not finite."""
        strategy = self.trainer.strategy
        return strategy.step_applied if isinstance(strategy, ZeroStrategy) else self._step_applied

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _, table = self.loss(batch, statistics=True)
        self.val_statistics.update(table)

    def on_validation_epoch_end(self) -> None:
        # sums over all batches and ranks first, ratios last
        values = self.val_statistics.compute()
        if not torch.isfinite(values["kl"]):  # the step before this validation broke the weights
            raise InputError(
                f"the validation loss became {values['kl'].item()} after step {self.global_step}. Lower "
                f"model.learning_rate (now {self.settings.learning_rate}) or trainer.gradient_clip_val."
            )
        for name, value in values.items():
            self.log(f"val/teacher_forced_{name}", value)
        table = self.trainer.strategy.reduce(self.val_statistics.table, reduce_op="sum")
        self.teacher_forced_by_fill = by_fill(table)
        for row in self.teacher_forced_by_fill:
            self.log(f"val/teacher_forced_top1_fill{row['fill']:.0f}", row["top1"])
        self.log("tokens", float(self.tokens_seen))
        self.val_statistics.reset()

    def loss(self, batch: Batch, statistics: bool) -> tuple[Tensor, Tensor]:
        """A micro-batch's part of the loss and its statistics table.

        The part is such that its mean over the micro-batches of an optimizer step, on all ranks, is the mean over the
        supervised positions of the global batch, see `Share`.
        """
        target, head = self.parts()
        documents = positions = None
        if is_packed(batch):  # causality alone hides padding, not another document
            documents, positions = batch["documents"], position_ids(batch)
        states, last = target(batch["input_ids"], head.config.anchors, positions, documents)
        states = [state.to(head.dtype) for state in states]
        select = supervised_positions(batch)
        draws = self.settings.restart_draws if self.training else 1
        parts, rates = [], None
        for draw in range(draws):
            layout = StaircaseLayout(head.staircase, self.entry_cycles(batch, draw, rates), documents)
            asked = self.settings.restarts == "rejected" and draw + 1 < draws
            verdicts = self._verdicts(batch, select) if asked else None
            parts.append(self._loss_of_rows(states, last[select], layout, positions, select, statistics, verdicts))
            rates = None if verdicts is None else self._rejection_rates(select, verdicts)
        total, table = (torch.stack(values).mean(0) for values in zip(*parts, strict=True))
        return total / batch["supervised"].clamp(min=1).to(total.dtype), table

    def _loss_of_rows(
        self,
        states: list[Tensor],
        last: Tensor,
        layout: StaircaseLayout,
        positions: Tensor | None,
        select: Tensor,
        statistics: bool,
        verdicts: Verdicts | None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the selected positions, and its statistics table, at the fills of a layout."""
        target, head = self.parts()
        # a head with one block has no deeper rows
        deeper = self.loss_options.deeper_rows if len(head.staircase.reachable_blocks) > 1 else 0.0
        hidden = head(states, layout, positions, select, all_rows=deeper > 0)
        drafting = hidden[:, 0][select] if deeper else hidden
        loss = partial(
            chunked_draft_loss,
            target_logits=target.logits_of_normed,
            draft_ids=head.draft_token_ids,
            num_stages=head.staircase.num_stages,
            chunk=self.settings.loss_chunk,
            softcap=head.config.logit_softcap,
            options=self.loss_options,
        )
        fills = layout.fills()[select]
        with gathered(target.norm, target.lm_head):  # chunks differ in number from rank to rank
            last = target.normed(last)
            here = partial(loss, target_hidden=last, fills=fills, statistics=statistics, verdicts=verdicts)
            total, table = head.lm_head(head.norm(drafting), here)
            if deeper:
                rows = hidden[:, 1:].transpose(1, 2)[select]  # [P, m - 1, H]
                again = partial(
                    loss,
                    target_hidden=last.repeat_interleave(rows.shape[1], 0),
                    fills=fills.repeat_interleave(rows.shape[1]),
                    statistics=False,
                )
                more, _ = head.lm_head(head.norm(rows.flatten(0, 1)), again)
                total = total + deeper * more / rows.shape[1]
        return total, table

    def _verdicts(self, batch: Batch, select: Tensor) -> Verdicts:
        """What to ask of the drafts that are made at the selected positions: each is of the token after it."""
        target, head = self.parts()
        tokens = batch["input_ids"].roll(-1, 1)[select]
        if head.draft_token_ids is None:
            return Verdicts(tokens, tokens)
        columns = torch.full((target.vocab_size,), -1, device=tokens.device)
        columns[head.draft_token_ids] = torch.arange(len(head.draft_token_ids), device=tokens.device)
        return Verdicts(columns[tokens], tokens)

    def _rejection_rates(self, select: Tensor, verdicts: Verdicts) -> Tensor:
        """[B, S]: the chance that a token comes after a flush; restart_rate where none was drafted."""
        rates = verdicts.kept.new_full(select.shape, self.settings.restart_rate)
        rates[select.roll(1, 1)] = 1 - verdicts.kept  # the draft is made a position before; at the last one is none
        return rates

    def entry_cycles(self, batch: Batch, draw: int = 0, rates: Tensor | None = None) -> Tensor:
        """[B, S]: gap n at each assistant turn's first token and at drawn restarts, else 1.

        `rates` [B, S] are chances of a restart by position, instead of restart_rate everywhere. What is drawn is a
        function of them and of (seed, epoch, sample, draw), so a resumed run repeats it, and without `rates` another
        number of ranks, too. In validation restarts are always drawn at restart_rate: what is judged is the decoder's
        work, and the metrics of two ways to train mean the same.
        """
        _, head = self.parts()
        epoch = int(batch["epoch"])
        starts = batch["turn_starts"]
        n = head.staircase.num_stages
        published = self.training and self.settings.restarts == "published"
        draws = torch.ones(starts.numel(), dtype=torch.float64)  # padding restarts nowhere
        places = zip(batch["sample_ids"].tolist(), batch["starts"].tolist(), batch["lengths"].tolist(), strict=True)
        for sample, at, length in places:
            random = generator(self.settings.seed, Purpose.RESTART, epoch, sample).random((draw + 1, length))[draw]
            if published:  # saturated, or a restart every n tokens: fills 1 to n alike
                phase = int(random[0] * 2 * n)
                random = ((np.arange(length) + phase) % n != 0) * 1.0 if phase < n else np.ones(length)
            draws[at : at + length] = torch.from_numpy(random)
        draws = draws.view_as(starts).to(starts.device)
        if rates is None:
            rates = draws.new_full((), 0.5 if published else self.settings.restart_rate)
        restart = starts | (draws < rates)
        return torch.where(restart, n, 1).cumsum(1)

    # -- checkpoints: the head alone -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        _, head = self.parts()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k.startswith(CHECKPOINT_PREFIX)}
        checkpoint["head_config"] = asdict(head.config)
        checkpoint["target"] = asdict(head.origin)
        checkpoint["head_frozen"] = self._frozen  # ZeRO leaves frozen parameters out, or cuts them in pieces
        checkpoint["tokens_seen"] = self.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.configure_model()
        self.tokens_seen = checkpoint.get("tokens_seen", 0.0)
        _, head = self.parts()
        ours, theirs = asdict(head.config), checkpoint.get("head_config", {})
        if theirs:  # fields that it is too old to have mean their defaults
            theirs = asdict(HeadConfig(**theirs))
        if differing := [name for name in ours if ours[name] != theirs.get(name)]:
            name = differing[0]
            raise InputError(
                f"The checkpoint holds another head: {name} is {theirs.get(name)} in the checkpoint and {ours[name]} "
                f"in this configuration{f' (also: {differing[1:]})' if differing[1:] else ''}. Resume with the "
                "configuration of the run that wrote it."
            )
        ours, theirs = self.settings.optimizer, checkpoint.get("hyper_parameters", {}).get("optimizer", "adamw")
        if self._trainer is not None and ours != theirs:
            raise InputError(f"model.optimizer={ours}: the checkpoint holds the state of {theirs}. Resume with that.")
        if "state_dict" in checkpoint:  # ZeRO has checked and loaded its own
            shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
            check_weights(shapes, self, "The checkpoint")
        before = checkpoint.get("SpdDataModule", {}).get("accumulate")
        if before is not None and self._trainer is not None:
            rescale_progress(checkpoint["loops"], self._trainer.accumulate_grad_batches, before)
