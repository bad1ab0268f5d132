"""Runs on several ranks, many of them in one pair of processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from scale_worker import go_through

WORKER = Path(__file__).with_name("scale_worker.py")
#: Environment of ranks, some of which is read by what they import.
FORKED = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@dataclass
class Case:
    """One run: fields of the recipe `tiny` that differ (dots as double underscores), and what happens to it."""

    name: str
    fields: dict[str, Any]
    stop_at: int | str | None = None
    break_at: tuple[int, int] | None = None
    command: str = "fit"
    arguments: list[str] = field(default_factory=list)


@dataclass
class Done:
    """What became of some cases."""

    returned: dict[str, int]
    output: str


#: Strategies on two ranks; the default run tests one without DeepSpeed and one that shards everything.
STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def also(*values: Any) -> list[Any]:
    """Parameters that only `make test-all` draws."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values
    ]


def some_strategies(*before: str, default: Sequence[str] = ("ddp", "deepspeed_stage_3")) -> list[Any]:
    """All strategies as parameters, those beside `default` for `make test-all` alone."""
    return [*before, *default, *also(*(strategy for strategy in STRATEGIES if strategy not in default))]


def asked_for(request: pytest.FixtureRequest, *names: str) -> set[tuple[Any, ...]]:
    """Parameters `names` of the selected tests that use the fixture: runs that nobody looks at need not be made."""
    found = set()
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.path == request.path and request.fixturename in item.fixturenames and set(names) <= set(params):
            found.add(tuple(params[name] for name in names))
    return found


@pytest.fixture(scope="session")
def base_fields(model_folder: Path, data_files: dict[str, str]) -> dict[str, Any]:
    """A run of a few quick steps."""
    return {
        "model__target": model_folder,
        "model__num_stages": 4,
        "data__train": data_files["train"],
        "data__validation": data_files["validation"],
        "data__batch_size": 2,
        "data__validation_samples": 5,
        "decoding__prompts": 3,
        "decoding__max_new_tokens": 12,
        "final__prompts": 0,
        "model__optimizer": "adamw",  # what DeepSpeed knows
        "trainer__accelerator": "cpu",
        "trainer__log_every_n_steps": 1,
        "trainer__enable_progress_bar": False,
    }


@pytest.fixture(scope="session")
def forked() -> ForkServerContext:
    """Where ranks come from: a process that has imported what a run imports, which takes longer than these runs do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spd_lightning.training.run", "deepspeed"])
    with pytest.MonkeyPatch.context() as patch:  # what is read by imports
        for name, value in FORKED.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def go(base_fields: dict[str, Any], forked: ForkServerContext) -> Callable[..., Done]:
    """Goes through cases one after another, on one rank or several."""

    def run(folder: Path, cases: Sequence[Case], ranks: int = 1, limit: float = 280) -> Done:
        for case in cases:
            fields = base_fields | {"run_dir": folder / case.name} | case.fields
            words = [f"--{name.replace('__', '.')}={value}" for name, value in fields.items() if value is not None]
            case.arguments = [case.command, "--config", "tiny", *words]
        listed = [
            {"name": c.name, "arguments": c.arguments, "stop_at": c.stop_at, "break_at": c.break_at} for c in cases
        ]
        outputs = start_ranks(forked, listed, folder, ranks, limit)
        found = re.findall(r"^RETURNED (.*)$", outputs[0], re.MULTILINE)
        returned = dict(json.loads(line) for line in found)
        assert set(returned) == {case.name for case in cases}, "\n".join(outputs)
        return Done(returned, "\n".join(outputs))

    return run


def start_ranks(
    forked: ForkServerContext, cases: Sequence[dict[str, Any]], folder: Path, ranks: int, limit: float
) -> list[str]:
    """Go through cases on every rank, started as torchrun would; return what each printed and its status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"rank{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, file in enumerate(files):
        file.touch()  # there also where a rank ends before it prints
        environment = os.environ | FORKED | (torchrun_variables(rank, ranks, port) if ranks > 1 else {})
        processes.append(forked.Process(target=go_through, args=(cases, folder, file, environment)))
        processes[-1].start()
    try:
        for process in processes:
            process.join(limit)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # one that was not yet in a session of its own
            process.join()
    return [f"{f.read_text()}\nEXIT {p.exitcode}\n" for f, p in zip(files, processes, strict=True)]


def torchrun_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process, on one machine."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }
    return {name: str(value) for name, value in values.items()}


def logged(directory: Path, name: str) -> list[float]:
    """A metric of a run, line by line."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def logged_by_step(directory: Path, name: str) -> dict[int, float]:
    """A metric of a run by its optimizer step; of several lines of a step (micro-batches) the last one."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def everything_logged(directory: Path) -> list[dict[str, float]]:
    """All lines, without what clocks decide."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clocks = ("throughput/", "val/decoding_seconds", "val/decoding_share")
    return [{name: x for name, x in line.items() if not name.startswith(clocks)} for line in lines]
