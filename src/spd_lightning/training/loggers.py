"""JsonLinesLogger: metrics.jsonl, one line per logged step, appended and flushed, readable by anything."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from spd_lightning.files import write_whole
from spd_lightning.training.saving import cannot_save


class JsonLinesLogger(Logger):
    """Appends {"step": ..., "<metric>": ...} lines to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        line = json.dumps({"step": step, **{name: float(value) for name, value in metrics.items()}}) + "\n"
        try:
            with self.path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise cannot_save(self.path, error) from error

    @rank_zero_only
    def go_on_at(self, step: int, validates: bool) -> None:
        """Drop what a run logged after the state that it goes on from.

        Args:
            step: optimizer steps that are done.
            validates: the validation after them is not.
        """
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:  # cut off when the process was killed
                continue
            last = entry["step"] == step - 1  # Lightning counts from 0
            if entry["step"] < step and not (last and validates and any(name.startswith("val/") for name in entry)):
                kept.append(line)
        write_whole(self.path, "".join(kept), "run_dir:")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration is in run.json."""
