"""Where a run can be followed: W&B with or without an account, TensorBoard, CSV; what W&B is told besides metrics.

W&B's run belongs to the run directory: run.json keeps its id, and a run that goes on in its directory goes on in the
same W&B run. Nothing of the environment is sent but what W&B itself records.
"""

from __future__ import annotations

import json
import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlparse

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from spd_lightning.errors import InputError
from spd_lightning.report.generations import as_html

Mode = Literal["online", "offline", "disabled"]
#: What a metric's summary keeps (docs/tracking.md says what each of them is). None: its last value, a plain number,
#: because a sweep optimises the summary of its metric and could not read one of several values.
SUMMARIES: dict[str, str | None] = {
    "train/loss": "min",
    "val/acceptance": "max",
    "val/theoretical_speedup": None,
    "val/predicted_tokens_per_second": None,
    "val/predicted_speedup": None,
    "val/wall_clock_speedup": "max",
    "val/lossless": "min",
    "val/drift": "max",
    "val/teacher_forced_kl": "min",
    "val/teacher_forced_top1": "max",
}


@dataclass(frozen=True)
class Tracking:
    """Where a run is followed, besides metrics.jsonl in its directory; loggers of trainer.logger stay as they are.

    Args:
        wandb: online, offline (run_dir/wandb, no account; `wandb sync` sends it later) or disabled. The environment
            variable WANDB_MODE, where it is set, wins.
        project: of W&B.
        entity: team or user that owns it; null: the account's default.
        name: of the run; null: the name of its directory.
        group: of runs that belong together.
        tags: words to filter by.
        tensorboard: write run_dir/tensorboard, for `tensorboard --logdir`.
        csv: write run_dir/csv/version_0/metrics.csv; a part that was resumed begins version_1, and so on.
        samples: generations of the final decoding that are kept token by token, for W&B and the report.
        upload_head: the best head as an artifact, with the target and data it comes from.
    """

    wandb: str = "disabled"
    project: str = "spd_lightning"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    tensorboard: bool = False
    csv: bool = False
    samples: int = 4
    upload_head: bool = True

    def __post_init__(self) -> None:
        if self.wandb not in get_args(Mode):
            raise InputError(f"tracking.wandb={self.wandb!r}: expected {', '.join(get_args(Mode))}.")
        if self.samples < 0:
            raise InputError(f"tracking.samples={self.samples}: expected at least 0.")
        if not self.project.strip():
            raise InputError("tracking.project='': expected a name.")

    @property
    def mode(self) -> str:
        """What W&B does here and now."""
        wanted = os.environ.get("WANDB_MODE") or self.wandb
        return {"dryrun": "offline", "run": "online"}.get(wanted, wanted)

    def check(self) -> None:
        """Refuse what W&B would ask a terminal for, before anything is loaded.

        Raises:
            InputError: online without an account, or an unknown WANDB_MODE.
        """
        if self.mode not in (*get_args(Mode), "shared"):
            raise InputError(f"WANDB_MODE={self.mode}: expected {', '.join(get_args(Mode))}. Set it, or unset it.")
        if self.mode == "online" and not has_account():
            raise InputError(
                "tracking.wandb=online: no W&B account is set up on this machine. Run `wandb login`, set "
                "WANDB_API_KEY, or set tracking.wandb to offline."
            )


def has_account() -> bool:
    """Whether W&B finds credentials without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def in_sweep() -> bool:
    """Whether an agent of a W&B sweep runs this process."""
    return "WANDB_SWEEP_ID" in os.environ


class Tracker:
    """The loggers of a run, and what its W&B run is told when.

    Args:
        tracking: fields of the recipe.
        directory: of the run.
        run_id: of the W&B run that goes on; None: a new one, or the one a sweep's agent has chosen.
        main: whether this process logs; others hold loggers that do nothing.
    """

    def __init__(self, tracking: Tracking, directory: Path, run_id: str | None, main: bool) -> None:
        self.tracking, self.directory, self.main = tracking, directory, main
        self.loggers: list[Logger] = []
        self._wandb: WandbLogger | None = None
        if tracking.mode != "disabled":
            self._wandb = WandbLogger(experiment=self._open(run_id)) if main else WandbLogger()
            self.loggers.append(self._wandb)
        if tracking.tensorboard:
            self.loggers.append(TensorBoardLogger(directory, name="tensorboard", version=""))
        if tracking.csv:
            self.loggers.append(CSVLogger(directory, name="csv"))

    def _open(self, run_id: str | None) -> Any:
        """W&B's run of this directory, or the one a sweep's agent has chosen."""
        import wandb

        tracking = self.tracking
        entity = {} if tracking.entity is None else {"entity": tracking.entity}
        run = wandb.init(
            name=tracking.name or self.directory.name,
            dir=self.directory,
            project=os.environ.get("WANDB_PROJECT") or tracking.project,
            id=os.environ.get("WANDB_RUN_ID") or run_id,
            resume="allow",
            mode=tracking.mode,  # type: ignore[arg-type]
            group=tracking.group,
            tags=list(tracking.tags) or None,
            settings=wandb.Settings(silent=True),  # fit says where the run is
            **entity,  # type: ignore[arg-type]
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    @property
    def where(self) -> str | None:
        """A line for people: where W&B's run is."""
        if self.run is None:
            return None
        if self.tracking.mode == "offline":
            folder = Path(self.run.dir).parent
            return (
                f"W&B: offline, {os.path.relpath(folder)}; `wandb sync` sends it, --tracking.wandb online shows it live"
            )
        return f"W&B: {self.run.url}"

    @property
    def run(self) -> Any:
        """W&B's run; None where there is none."""
        return self._wandb.experiment if self._wandb is not None and self.main else None

    def begin(self, config: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
        """Open the W&B run: configuration, definitions of metrics, provenance; returns what run.json keeps of it.

        Args:
            config: of the run.
            about: commit, versions, fingerprint of the data.
        """
        run = self.run
        if run is None:
            return {}
        # names of a sweep's parameters are dotted keys; the same configuration, nested, stands beside them
        run.config.update({**config, "provenance": dict(about)}, allow_val_change=True)
        for name, summary in SUMMARIES.items():
            run.define_metric(name, step_metric="trainer/global_step", summary=summary and f"{summary},last")
        run.define_metric("tokens", summary="max")
        return {"wandb": {"id": run.id, "project": run.project, "mode": self.tracking.mode}}

    def end(self, record: Mapping[str, Any]) -> None:
        """Summaries, sample generations, plots and the head, once the final decoding is done."""
        run = self.run
        if run is None:
            return
        import wandb

        results = record["results"]
        run.summary.update(headline(results))
        samples = self.directory / "generations.json"
        if samples.is_file():
            content = json.loads(samples.read_text(encoding="utf-8"))
            run.log({"generations": _table(wandb, content["samples"])})
        plots = sorted((self.directory / "plots").glob("*.png"))
        if plots:
            run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in plots})
        head = self.directory / "head"
        if self.tracking.upload_head and head.is_dir():
            artifact = wandb.Artifact(f"head-{run.id}", "speculation-head", metadata=lineage(record))
            artifact.add_dir(str(head))
            run.log_artifact(artifact, aliases=["best"])

    def close(self, how: str) -> None:
        """End the W&B run. how: finished, stopped (by a signal; it will be resumed) or failed."""
        run = self.run
        if run is None:
            return
        if how == "stopped" and not in_sweep():  # a sweep would begin anew what its hyperband has ended
            run.mark_preempting()
        run.finish(exit_code=0 if how == "finished" else 1)


def headline(results: Mapping[str, Any]) -> dict[str, float]:
    """final/...: figures of the trained head in the final decoding, for tables of runs and sweeps."""
    found: dict[str, float] = {}
    for row in results.get("final", ()):
        if row["drafter"] != "trained head" or row["acceptance"] is None:
            continue
        place = "final" if row["temperature"] == 0 else f"final/temperature_{row['temperature']:g}"
        for name in ("acceptance", "theoretical_speedup", "predicted_tokens_per_second"):
            if row.get(name) is not None:
                found[f"{place}/{name}"] = row[name]
    if lossless := results.get("lossless"):
        found["final/lossless"] = float(lossless["mismatches"] == 0)
    if results.get("best_val_acceptance") is not None:
        found["best_val_acceptance"] = results["best_val_acceptance"]
    return found


def lineage(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a head comes from: target, data, code; and what it reached."""
    model = record["config"]["model"]
    data = {name: part["fingerprint"] for name, part in record.get("data", {}).items()}
    return {
        "target": model["target"], "revision": (model.get("loading") or {}).get("revision"), "data": data,
        "commit": record.get("commit"), "versions": record.get("versions"), **headline(record["results"]),
    }  # fmt: skip


def _table(wandb: Any, samples: Sequence[Mapping[str, Any]]) -> Any:
    table = wandb.Table(columns=["prompt", "generation", "accepted", "corrected", "p", "S"])
    for sample in samples:
        flags = [token["accepted"] for token in sample["tokens"] if token["accepted"] is not None]
        rendered = wandb.Html(as_html(sample["tokens"], inline=True), inject=False)
        accepted = sum(flags)
        table.add_data(
            sample["prompt"], rendered, accepted, len(flags) - accepted, sample["acceptance"],
            sample["theoretical_speedup"],
        )  # fmt: skip
    return table
