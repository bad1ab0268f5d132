"""A training run from the first check to the printed result, and the files it leaves behind.

run_dir/
  run.json            argv, commit, versions, configuration, data fingerprint, results (rewritten as they come in)
  config.yaml         the complete configuration; `fit --config run_dir/config.yaml` repeats the run
  metrics.jsonl       one line per logged step
  checkpoints/        the best head by REAL acceptance, and the newest states to resume from
  skipped/            batches of steps whose gradient was not finite, if any
  head/               the best head: config.json + model.safetensors
  plots/              PNG
  generations.json    some generations of the final decoding, token by token
  report.html         all of it to look at: one file, no network
  wandb/, tensorboard/, csv/     as the section `tracking` says
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder
from spd_lightning.decoding.evaluation import (
    Arm,
    Result,
    Subject,
    bootstrap_difference,
    drift_count,
    evaluate,
    losslessness,
)
from spd_lightning.decoding.generation import Generation
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.errors import BrokenInvariantError, InputError, first_line
from spd_lightning.files import write_whole
from spd_lightning.head.checkpoint import read_checkpoint
from spd_lightning.head.config import HeadConfig
from spd_lightning.head.folder import save_head
from spd_lightning.head.loading import fields_from_target, find_head, load_head, read_source, resolve_head_kind
from spd_lightning.memory.resident import resident
from spd_lightning.provenance import commit, versions
from spd_lightning.speed.model import design_of, seconds_of
from spd_lightning.staircase import Staircase
from spd_lightning.target.gathering import in_pieces
from spd_lightning.target.loading import check_target, load_target, shapes_of_target
from spd_lightning.target.target import Target
from spd_lightning.training.data import SpdDataModule
from spd_lightning.training.loggers import JsonLinesLogger
from spd_lightning.training.module import SpdModule
from spd_lightning.training.record import (
    RunRecord,
    fingerprint,
    new_run_directory,
    plain,
    run_directory_in_place,
)
from spd_lightning.training.resuming import Header, read_header
from spd_lightning.training.saving import SaveProgress, WholeCheckpointIO, progress_checkpoints
from spd_lightning.training.strategies import ZeroStrategy
from spd_lightning.training.strategies import check as check_strategy
from spd_lightning.training.survival import (
    RandomState,
    RankWatch,
    SkippedSteps,
    StopOnSignal,
    StoppedError,
    Survival,
)
from spd_lightning.training.throughput import Throughput
from spd_lightning.training.tracking import Tracker, Tracking
from spd_lightning.training.validation import DecodingValidation
from spd_lightning.training.warm_start import check_style


@dataclass(frozen=True)
class FinalEvaluation:
    """What is decoded after training, on held-out prompts that no validation has used.

    Args:
        prompts: number of prompts; 0 skips the evaluation.
        max_new_tokens: new tokens per prompt.
        temperatures: 0 is greedy, and is what baselines are compared at.
        baselines: also decode with the untrained head and with prompt lookup.
    """

    prompts: int = 50
    max_new_tokens: int = 64
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    baselines: bool = True

    def __post_init__(self) -> None:
        for name, value, least in (("prompts", self.prompts, 0), ("max_new_tokens", self.max_new_tokens, 2)):
            if value < least:
                raise InputError(f"final.{name}={value}: expected at least {least}.")
        for temperature in self.temperatures:
            Sampling(temperature)  # refuses what is no temperature
        if len(set(self.temperatures)) != len(self.temperatures):
            raise InputError(f"final.temperatures={list(self.temperatures)}: expected distinct numbers.")


def fit(cli: Any) -> Path:
    """The main job: check, train with real decoding in every validation, evaluate, report."""
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    final, survival = FinalEvaluation(**plain(cli.config["final"])), Survival(**plain(cli.config["survival"]))
    tracking = Tracking(**plain(cli.config["tracking"]))
    tracking.check()
    ckpt_path = _resumed_from(cli)
    staircase = _prepare(cli, None if ckpt_path is None else read_header(ckpt_path))
    in_place = cli.config.get("ckpt_path") == "last"
    wanted = Path(cli.config["run_dir"])
    directory = run_directory_in_place(wanted) if in_place else new_run_directory(wanted)
    record = RunRecord.going_on(directory, plain(cli.config)) if in_place else RunRecord(directory, plain(cli.config))
    record.save()
    if trainer.is_global_zero:
        write_whole(directory / "config.yaml", cli.parser.dump(cli.config), "run_dir:")
    tracker: Tracker | None = None
    try:
        with record.phase("load data"):
            data.setup("fit")
            record.data = fingerprint(data)
            seen = max(_validation_decoding(trainer).prompts, data.validation_samples)  # by validations
            _check_data(module, data, _validation_decoding(trainer), final, seen)
        tracker = Tracker(tracking, directory, record.tracking.get("wandb", {}).get("id"), trainer.is_global_zero)
        about = {"commit": commit(), "versions": versions(), "data": record.data}
        record.tracking |= tracker.begin(record.config, about)  # a part without W&B forgets no W&B run
        record.save()
        if tracker.where:
            print(tracker.where, flush=True)
        stop = _attach(trainer, directory, survival, tracker.loggers)
        with record.phase("train and validate"), stop.listening():
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        best = _export_best(trainer, module, directory)
        record.results["best_val_acceptance"] = best
        record.results["tokens"] = round(module.tokens_seen)
        record.results["teacher_forced_by_fill"] = module.teacher_forced_by_fill
        if final.prompts and trainer.is_global_zero:
            target = _whole_target(module, trainer)
            with record.phase("final decoding"):
                _final(record, module, target, data, final, _validation_decoding(trainer), skip=seen)
            with record.phase("plots"):
                count = min(tracking.samples, final.prompts)
                watched = _samples(record, target, data, count, seen, final.max_new_tokens)
                _plots(record, data, watched, module)
        record.results["peak_memory_bytes"] = peak_memory(trainer.strategy.root_device)
        record.status = "finished"
        record.save()
    except BaseException as error:
        how = "stopped" if isinstance(error, StoppedError) else "failed"
        record.fail(error, how)
        if tracker is not None:
            tracker.close(how)
        raise
    assert tracker is not None
    if trainer.is_global_zero:
        from spd_lightning.report.html import write_report
        from spd_lightning.report.summary import print_summary

        content = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        write_report([directory], directory / "report.html")
        print_summary(content, directory, staircase.num_stages)
        try:
            tracker.end(content)
        except Exception as error:  # the run is finished and its files are complete, whatever W&B's service does
            print(f"W&B was not told the results: {first_line(error)}", file=sys.stderr)
    tracker.close("finished")
    return directory


def validate(cli: Any) -> list[Any]:
    """Teacher-forced metrics and real decoding of a checkpoint (or of the untrained head), without training."""
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    ckpt_path = _resumed_from(cli)
    _prepare(cli, None if ckpt_path is None else read_header(ckpt_path), resumes=False)
    _keep_whole(trainer)
    return trainer.validate(module, datamodule=data, ckpt_path=ckpt_path)


def _resumed_from(cli: Any) -> Path | None:
    """The checkpoint that ckpt_path means: `last` is the newest one of run_dir that can be read, if there is one."""
    wanted = cli.config.get("ckpt_path")
    if wanted != "last":
        return None if wanted is None else Path(wanted)
    folder = Path(cli.config["run_dir"]) / "checkpoints"
    states = progress_checkpoints(folder)
    for path in reversed(states):
        try:
            header = read_header(path)
        except InputError as error:
            rank_zero_warn(f"{error} The run goes on from an older checkpoint.")
            continue
        # after the last step Lightning would not come to a validation that was interrupted
        if header.validates and header.step == cli.trainer.max_steps and path != states[0]:
            continue
        rank_zero_only(print)(f"Going on from {path}.", flush=True)
        return path
    rank_zero_only(print)(f"No checkpoint in {folder}: the run starts from the beginning.", flush=True)
    return None


def _prepare(cli: Any, header: Header | None, resumes: bool = True) -> Staircase:
    """Let the parts of a run know of one another, and refuse what can be refused without reading a weight.

    Args:
        header: of the checkpoint that the run begins with.
        resumes: whether it goes on training, with the same global batches.
    """
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    check_strategy(trainer.strategy, trainer.precision, module.loading)
    if module.settings.optimizer == "muon" and isinstance(trainer.strategy, ZeroStrategy):
        raise InputError(
            "model.optimizer=muon: its step needs whole matrices, which DeepSpeed cuts in pieces. Set "
            "trainer.strategy to ddp or auto, or model.optimizer to adamw."
        )
    if module.head_options.warm_start and isinstance(trainer.strategy, ZeroStrategy) and trainer.strategy.stage == 3:
        raise InputError(
            "model.head.warm_start: a head is fitted to the whole target before training, which ZeRO-3 cuts in pieces. "
            "Set trainer.strategy to another one, or model.head.warm_start to false."
        )
    if data.tokenizer_source == module.settings.target:
        data.loading = module.loading
    if header is not None and module.settings.stage_layers == "auto":
        # what was measured then holds: another clock today must not ask for another head
        module.stage_layers = HeadConfig(**header.fields["head_config"]).stage_layers
    module.resumes = header is not None
    staircase = module.check()
    if module.head_options.warm_start:
        shapes = shapes_of_target(module.settings.target, module.loading)
        kind = resolve_head_kind(module.head_options.kind, shapes.config)
        check_style(shapes, fields_from_target(shapes, kind)["style"])
    data.choose_packing(module.packing_refusal())
    data.share_out(trainer, header.data if header is not None and resumes else None)
    decoding = _validation_decoding(trainer)
    decoding.schedule(trainer)
    if decoding.profile is not None:
        config = check_target(module.settings.target, module.loading).get_text_config()
        decoding.profile.check_fits(
            config.num_hidden_layers, config.vocab_size, f"decoding.hardware={decoding.hardware!r}"
        )
    return staircase


# -- pieces of fit -----------------------------------------------------------------------------------------------------


def _attach(trainer: L.Trainer, directory: Path, survival: Survival, loggers: Sequence[Logger]) -> StopOnSignal:
    """Logger, checkpoints and watchmen of the run directory, beside whatever the user configured."""
    _keep_whole(trainer)
    log = JsonLinesLogger(directory / "metrics.jsonl")
    trainer.loggers = [*trainer.loggers, *loggers, log]
    folder = directory / "checkpoints"
    progress = SaveProgress(
        folder, survival.keep, survival.save_every_steps, survival.save_every_minutes, resumed=log.go_on_at
    )
    stop = StopOnSignal(progress)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, DecodingValidation):
            callback.directory = callback.directory or str(folder)
            callback.between_prompts = stop.check
    # Lightning adds a checkpoint callback without monitor and folder of its own; ours replaces it
    callbacks = [c for c in trainer.callbacks if not (isinstance(c, ModelCheckpoint) and c.monitor is None)]  # type: ignore[attr-defined]
    trainer.callbacks = [  # type: ignore[attr-defined]
        *callbacks,
        Throughput(),
        RankWatch(survival.dead_rank_seconds),
        RandomState(),
        SkippedSteps(directory / "skipped", survival.skipped_steps),
        stop,
        LearningRateMonitor("step"),
        ModelCheckpoint(
            folder,
            filename="step{step}-acceptance{val/acceptance:.4f}",
            auto_insert_metric_name=False,
            monitor="val/acceptance",  # what counts is what the decoder accepts, not the loss
            mode="max",
            enable_version_counter=False,  # a validation that is repeated finds the same
        ),
        progress,  # last: its states know which head is the best
    ]
    return stop


def _keep_whole(trainer: L.Trainer) -> None:
    """Checkpoints of one file are complete or not there, and may be read from ZeRO's."""
    if not isinstance(trainer.strategy, ZeroStrategy):
        trainer.strategy.checkpoint_io = WholeCheckpointIO()


def _validation_decoding(trainer: L.Trainer) -> DecodingValidation:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, DecodingValidation))


def _check_data(
    module: SpdModule, data: SpdDataModule, decoding: DecodingValidation, final: FinalEvaluation, seen: int
) -> None:
    """Refuse before anything is loaded: foreign tokens, and held-out prompts that are too few or too long to decode."""
    config = check_target(module.settings.target, loading=module.loading).get_text_config()
    stores = [store for store in (data.train_samples, data.validation_set) if store is not None]
    largest = max(store.manifest["largest_token"] for store in stores)
    if largest >= config.vocab_size:
        raise InputError(
            f"data.tokenizer={data.tokenizer_source!r} makes token {largest}, but the target's vocabulary has "
            f"{config.vocab_size} entries: set it to the tokenizer of model.target."
        )
    context = config.max_position_embeddings
    jobs = [("decoding", decoding.max_new_tokens, data.prompts(decoding.prompts))]
    if final.prompts:
        jobs.append(("final", final.max_new_tokens, data.prompts(final.prompts, skip=seen)))
    for field_name, new_tokens, prompts in jobs:
        longest = max(map(len, prompts))
        if longest + new_tokens > context:
            raise InputError(
                f"{field_name}.max_new_tokens={new_tokens}: with a held-out prompt of {longest} tokens that exceeds "
                f"the target's context of {context} tokens. Lower it, or data.max_length."
            )


def _export_best(trainer: L.Trainer, module: SpdModule, directory: Path) -> float | None:
    """Write the head of the best checkpoint; returns its validation acceptance."""
    checkpoint = next(c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
    if trainer.is_global_zero:
        best = Path(checkpoint.best_model_path) if checkpoint.best_model_path else None
        if best is None or not best.exists():
            best = progress_checkpoints(directory / "checkpoints")[-1]
            rank_zero_warn(f"No validation has chosen a head: {directory / 'head'} is that of {best}.")
        save_head(read_checkpoint(best), directory / "head")
    score = checkpoint.best_model_score
    return None if score is None else float(score)


def _whole_target(module: SpdModule, trainer: L.Trainer) -> Target:
    """The target to decode with after training; where its weights lie in pieces on all ranks, it is loaded anew."""
    target, _ = module.parts()
    if in_pieces(target):
        stages = target.stage_layers
        target = load_target(module.settings.target, device=trainer.strategy.root_device, loading=module.loading)
        return target.partition(stage_layers=stages)
    return target.to(trainer.strategy.root_device)  # Lightning moves it to the CPU when training ends


def _final(
    record: RunRecord,
    module: SpdModule,
    target: Target,
    data: SpdDataModule,
    final: FinalEvaluation,
    decoding: DecodingValidation,
    skip: int,
) -> None:
    """Decode the final prompts with every arm and store figures, intervals and verdicts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    prompts = data.prompts(final.prompts, skip=skip)
    greedy = Arm("trained head", 0.0)
    arms = [Arm("plain", 0.0), *(Arm("trained head", t) for t in final.temperatures)]
    if final.baselines:
        arms += [Arm("untrained head", 0.0), Arm("prompt lookup", 0.0)]
    hp = module.settings
    subject = Subject(
        target=str(hp.target),
        head=str(record.directory / "head"),
        loading=module.loading,
        device=target.device.type,
        init_seed=hp.seed,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("decoding held-out prompts", total=len(prompts) * len(arms))
        found = evaluate(
            subject,
            arms,
            prompts,
            final.max_new_tokens,
            seed=hp.seed,
            on_progress=lambda arm, done: progress.update(task, advance=done, description=f"decoding: {arm.drafter}"),
            target=target,
        )
    record.results["final"] = [_figures(result) for result in found.values()]
    if decoding.profile is not None:
        design = design_of(read_source(find_head(record.directory / "head")).config, decoding.head_alone)
        for row, result in zip(record.results["final"], found.values(), strict=True):
            if row["drafter"] == "trained head":
                seconds = sum(seconds_of(decoding.profile, design, g.accepted_flags) for g in result.generations)
                new = sum(len(g.token_ids) - 1 for g in result.generations)
                row["predicted_tokens_per_second"] = new / seconds if seconds else None
    record.results["prompts"], record.results["max_new_tokens"] = final.prompts, final.max_new_tokens
    if greedy in found:
        same, ties, wrong = losslessness(target, prompts, found[greedy], found[Arm("plain", 0.0)])
        head = load_head(record.directory / "head", target)
        differing, tied = drift_count(target, head, prompts, found[greedy])
        record.results["lossless"] = {"identical": same, "ties": ties, "mismatches": wrong}
        record.results["drift"] = {"differing_flags": differing, "ties": tied}
        record.results["versus"] = {
            arm.drafter: {
                "difference": _acceptance(found[greedy]) - _acceptance(found[arm]),
                "interval": bootstrap_difference(found[greedy].generations, found[arm].generations),
            }
            for arm in arms
            if arm.drafter in ("untrained head", "prompt lookup")
        }
        if wrong or differing - tied:
            raise BrokenInvariantError(
                f"final decoding: {wrong} of {len(prompts)} prompts differ from plain decoding, {differing - tied} "
                f"flags from the training view; see {record.directory / 'run.json'}"
            )


def _figures(result: Result) -> dict[str, Any]:
    pooled = result.pooled
    return {
        "drafter": result.arm.drafter,
        "temperature": result.arm.temperature,
        **asdict(pooled),
        "acceptance": pooled.acceptance,
        "acceptance_interval": bootstrap_difference(result.generations) if pooled.drafts_verified else None,
        "theoretical_speedup": pooled.theoretical_speedup if pooled.drafts_verified else None,
        "accepted_per_restart": pooled.accepted_per_restart,
        "seconds": round(result.seconds, 2),
        "by_fill": acceptance_by_fill(result.generations) if pooled.drafts_verified else [],
        "by_position": acceptance_by_position(result.generations) if pooled.drafts_verified else [],
    }


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident()


def acceptance_by_position(generations: Sequence[Generation], width: int = 8) -> list[dict[str, float]]:
    """Real acceptance by how many new tokens came before, in steps of `width`."""
    counts: dict[int, list[int]] = {}
    for g in generations:
        for position, accepted in enumerate(g.accepted_flags, start=1):
            row = counts.setdefault(position // width * width, [0, 0])
            row[0] += 1
            row[1] += accepted
    return [{"position": at, "count": n, "top1": a / n} for at, (n, a) in sorted(counts.items())]


def acceptance_by_fill(generations: Sequence[Generation]) -> list[dict[str, float]]:
    """Real acceptance by the number of tokens in flight when the draft was made."""
    counts: dict[int, list[int]] = {}
    for g in generations:
        since = 0
        for accepted in g.accepted_flags:
            since += 1
            row = counts.setdefault(min(since, g.num_stages), [0, 0])
            row[0] += 1
            row[1] += accepted
            since = since if accepted else 0
    return [{"fill": f, "count": n, "top1": a / n} for f, (n, a) in sorted(counts.items())]


def _samples(
    record: RunRecord, target: Target, data: SpdDataModule, count: int, skip: int, max_new_tokens: int
) -> list[tuple[Generation, list[CycleEvent]]]:
    """The first final prompts once more, watched cycle by cycle; kept in generations.json, and for the plots."""
    from spd_lightning.report import generations

    decode = data.encoder.tokenizer.decode
    head = load_head(record.directory / "head", target)
    decoder, watched, kept = SpdDecoder(target, head), [], []
    for prompt in data.prompts(max(1, count), skip=skip):
        events: list[CycleEvent] = []
        found = decoder.generate(prompt, max_new_tokens, observer=events.append)
        watched.append((found, events))
        kept.append(generations.sample(decode(prompt), found, events, lambda token: str(decode([token]))))
    content = {"format": generations.FORMAT, "num_stages": head.staircase.num_stages, "samples": kept[:count]}
    write_whole(record.directory / "generations.json", json.dumps(content) + "\n", "run_dir:")
    return watched


def _plots(
    record: RunRecord, data: SpdDataModule, watched: Sequence[tuple[Generation, list[CycleEvent]]], module: SpdModule
) -> None:
    from spd_lightning.report.plots import plot_acceptance_by_fill, plot_occupancy, plot_training

    folder = record.directory / "plots"
    folder.mkdir(exist_ok=True)
    plot_training(record.directory / "metrics.jsonl", folder / "training.png")
    greedy = next(
        (r for r in record.results["final"] if r["drafter"] == "trained head" and r["temperature"] == 0), None
    )
    plot_acceptance_by_fill(
        module.teacher_forced_by_fill, folder / "acceptance_by_fill.png", decoded=greedy["by_fill"] if greedy else None
    )
    decode = data.encoder.tokenizer.decode
    found, events = watched[0]
    plot_occupancy(events, found.num_stages, folder / "occupancy.png", text=lambda token: decode([token]))


def _acceptance(result: Result) -> float:
    return result.pooled.acceptance or 0.0
