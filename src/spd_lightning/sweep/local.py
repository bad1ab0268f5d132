"""A sweep without a server: Optuna chooses, the sweep's own command runs, metrics.jsonl says how it goes.

The study is an SQLite file, every trial a run directory. What is killed, the sweep or a trial, goes on where it was:
a trial resumes from its newest state, and its values so far are read again from its own metrics. A trial that is killed
twice has failed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from spd_lightning.errors import InputError
from spd_lightning.files import write_whole
from spd_lightning.processes import OWNER
from spd_lightning.sweep.file import Parameter, SweepFile

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

STUDY, TRIALS = "study.db", "trials"
#: A sweep whose first trials all fail is wrong itself.
HOPELESS = 3


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: complete, pruned or failed.

    Attributes:
        value: the last of the metric, which is also what W&B optimises; None if it never came.
        why: the last line of a trial that failed.
    """

    state: str
    value: float | None
    why: str = ""


class LocalSweep:
    """A sweep in a folder.

    Args:
        sweep: the file.
        folder: for the study, the trials' run directories and the results; made if it is not there.
        seed: of the choice of parameters.

    Raises:
        InputError: Optuna is missing, or the folder holds another sweep.
    """

    def __init__(self, sweep: SweepFile, folder: Path, seed: int = 0) -> None:
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise InputError("sweep --local needs optuna: pip install 'spd_lightning[train]'.") from error
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.folder, self._optuna = sweep, folder, optuna
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)
        self._same_as_before()
        storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / STUDY).resolve()}")
        self.study = optuna.create_study(
            storage=storage,
            study_name=sweep.name,
            load_if_exists=True,
            direction="maximize" if sweep.maximise else "minimize",
        )
        begun = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = self._sampler(seed + begun)
        if sweep.min_iter is not None:
            self.study.pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=sweep.min_iter, reduction_factor=sweep.eta
            )

    def _same_as_before(self) -> None:
        """A study is of one space, one metric and one command: refuse to mix in another."""
        path, content = self.folder / "sweep.json", _described(self.sweep)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if names := [name for name in content if content[name] != before.get(name)]:
                raise InputError(
                    f"--output {self.folder} holds a sweep with another {names[0]}: {str(before.get(names[0]))[:200]}. "
                    "Give another folder, or remove this one."
                )
        else:
            write_whole(path, json.dumps(content, indent=1) + "\n", "--output")

    def _sampler(self, seed: int) -> Any:
        samplers = self._optuna.samplers
        if self.sweep.method == "grid":
            choices = {name: range(len(p.values)) for name, p in self.sweep.parameters.items()}
            if missing := [name for name, places in choices.items() if not places]:
                raise InputError(f"{self.sweep.path}: method grid needs values for {missing[0]}, not min and max.")
            for places in product(*choices.values()):
                self.study.enqueue_trial(dict(zip(choices, places, strict=True)), skip_if_exists=True)
        if self.sweep.method in ("grid", "random"):
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5)

    # -- running -------------------------------------------------------------------------------------------------------

    @property
    def trials(self) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False))

    def run(self, count: int | None, say: Callable[[str], None], tick: Callable[[int, str], None]) -> None:
        """Run trials until `count` of them are finished in all, those of earlier calls included.

        Args:
            say: told of every trial that ends.
            tick: told the number of a trial that runs, and what it has reached.

        Raises:
            InputError: three trials in a row failed, or another sweep runs in this folder.
        """
        with _locked(self.folder / ".lock"):
            self._run(count, say, tick)

    def _run(self, count: int | None, say: Callable[[str], None], tick: Callable[[int, str], None]) -> None:
        states = self._optuna.trial.TrialState
        failures: list[str] = []  # in a row, of this call: what was wrong before may have been mended
        left = [trial for trial in self.trials if trial.state == states.RUNNING]  # by a sweep that was killed
        while True:
            ended = [trial for trial in self.trials if trial.state.is_finished()]
            if len(failures) >= HOPELESS:
                raise InputError(f"{HOPELESS} trials in a row failed; the last: {failures[-1]}")
            if count is not None and len(ended) >= count:
                return
            if self._exhausted() and not left:
                return
            trial = self._optuna.trial.Trial(self.study, left.pop(0)._trial_id) if left else self.study.ask()
            values = {name: self._value(trial, name, p) for name, p in self.sweep.parameters.items()}
            outcome = self._run_trial(trial, values, tick)
            failures = [*failures, outcome.why] if outcome.state == "failed" else []
            state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[outcome.state]
            trial.set_user_attr("values", values)
            trial.set_user_attr("why", outcome.why)
            trial.set_user_attr("value", outcome.value)
            self.study.tell(trial.number, outcome.value if outcome.state == "complete" else None, state)
            reached = "-" if outcome.value is None else f"{outcome.value:.4g}"
            say(f"trial {trial.number}: {outcome.state}, {self.sweep.metric} {reached} {outcome.why}".rstrip())

    def _exhausted(self) -> bool:
        """Whether a grid has been gone through."""
        waiting = self._optuna.trial.TrialState.WAITING
        return self.sweep.method == "grid" and not any(trial.state == waiting for trial in self.trials)

    def _value(self, trial: Any, name: str, parameter: Parameter) -> Any:
        """What the sampler gives a field; lists are chosen by their place, because Optuna knows only plain values."""
        if parameter.values:
            places = list(range(len(parameter.values)))
            return parameter.values[trial.suggest_categorical(name, places)]
        if parameter.integer:
            return trial.suggest_int(name, int(parameter.low), int(parameter.high))
        step = None if parameter.log else parameter.step
        return trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log, step=step)

    def _run_trial(self, trial: Any, values: Mapping[str, Any], tick: Callable[[int, str], None]) -> Outcome:
        """A trial to its end; one that was killed goes on once."""
        began = time.monotonic()
        before = trial.user_attrs.get("seconds", 0.0)

        def timed(number: int, reached: str) -> None:
            trial.set_user_attr("seconds", before + time.monotonic() - began)  # a killed sweep's part counts
            tick(number, reached)

        outcome = self._run_once(trial, values, timed)
        if outcome.state == "killed":
            outcome = self._run_once(trial, values, timed)
        trial.set_user_attr("seconds", before + time.monotonic() - began)
        return Outcome("failed", None, outcome.why) if outcome.state == "killed" else outcome

    def _run_once(self, trial: Any, values: Mapping[str, Any], tick: Callable[[int, str], None]) -> Outcome:
        folder = self.folder / TRIALS / f"{trial.number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        words = self.sweep.render(values)
        # the interpreter and the environment are this process's own; a name on the path may be another one's
        words = [sys.executable if word == "python" else word for word in words if word != "/usr/bin/env"]
        # whatever a run needs to go on after a kill; the last word of a flag wins
        words += [f"--run_dir={folder / 'run'}", "--ckpt_path=last"]
        environment = {"WANDB_MODE": "disabled", **os.environ, "PYTHONUNBUFFERED": "1", OWNER: str(os.getpid())}
        reported = len(self.trials[trial.number].intermediate_values)  # by a sweep that was killed
        with (folder / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )
            try:
                while True:
                    code = process.poll()
                    found = logged(folder / "run" / "metrics.jsonl", self.sweep.metric)
                    for step, value in enumerate(found[reported:], start=reported + 1):
                        trial.report(value, step)
                    if len(found) > reported:
                        reported = len(found)
                        tick(trial.number, f"{self.sweep.metric} {found[-1]:.4g}")
                        if code is None and self.sweep.min_iter is not None and trial.should_prune():
                            _end(process)
                            return Outcome("pruned", found[-1])
                    if code is not None:
                        break
                    time.sleep(0.2)
            except BaseException:
                _end(process)  # it saves its state, and goes on when the sweep does
                raise
        found = logged(folder / "run" / "metrics.jsonl", self.sweep.metric)
        if code:
            state = "killed" if code < 0 or code > 128 else "failed"  # by a signal, told by itself or by a shell
            return Outcome(state, None, _last_line(folder / "output.txt") or f"exit status {code}")
        if not found:
            return Outcome("failed", None, f"it never logged {self.sweep.metric}")
        if not math.isfinite(found[-1]):
            return Outcome("failed", None, f"{self.sweep.metric} ended as {found[-1]}")
        return Outcome("complete", found[-1])

    # -- results -------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Trials that ended, the best first; those without a value last."""
        rows = []
        for trial in self.trials:
            if trial.state.is_finished():
                value = trial.user_attrs.get("value")
                rows.append(
                    {
                        "trial": trial.number,
                        "state": trial.state.name.lower().replace("fail", "failed"),
                        "value": value,
                        "parameters": trial.user_attrs.get("values", {}),
                        "seconds": round(trial.user_attrs.get("seconds", 0.0), 1),
                        "run": f"{TRIALS}/{trial.number:03d}/run",
                    }
                )
        sign = -1 if self.sweep.maximise else 1
        return sorted(rows, key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0), row["trial"]))

    def importances(self) -> dict[str, float]:
        """Share of each field in how the metric varies (PED-ANOVA); empty with fewer than four finished trials."""
        complete = self._optuna.trial.TrialState.COMPLETE
        varied = [name for name, p in self.sweep.parameters.items() if len(p.values) != 1]
        if sum(trial.state == complete for trial in self.trials) < 4 or len(varied) < 2:
            return {}
        evaluator = self._optuna.importance.PedAnovaImportanceEvaluator()
        found = self._optuna.importance.get_param_importances(self.study, evaluator=evaluator, params=varied)
        return {name: float(share) for name, share in found.items()}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file that no other process holds; the system lets go of it however this one ends."""
    with path.open("w") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"--output {path.parent}: another sweep runs in this folder. Let it end, or give another folder."
                ) from error
        yield


def _described(sweep: SweepFile) -> dict[str, Any]:
    """What must stay the same for trials to be comparable."""
    fields = {
        "metric": [sweep.metric, sweep.maximise],
        "command": [sweep.program, *sweep.command],
        "parameters": {name: vars(p) for name, p in sweep.parameters.items()},
        "method": sweep.method,
        "name": sweep.name,
    }
    return dict(json.loads(json.dumps(fields)))


def logged(path: Path, metric: str) -> list[float]:
    """Values of a metric in metrics.jsonl, in their order."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # being written
            continue
        if metric in entry:
            values.append(float(entry[metric]))
    return values


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a run to save and end, and do not wait for ever."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1][:300]
