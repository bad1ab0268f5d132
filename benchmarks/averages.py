"""What averaging a head's weights over steps is worth: exponential moving averages, kept beside one training.

The best recipe of quality.py is trained twice, with its learning rate falling to zero and with a constant one. A
callback keeps the head's averages at several decays meanwhile; none of them touches the training. At the end each
average, and the head itself, gives the held-out loss of the training view; the head and the best average also what the
real decoder accepts (200 held-out prompts x 64 tokens, greedy, the prompts of quality.py's finalists).

    .venv/bin/python benchmarks/averages.py      trains into runs/averages, writes records/averages.json, renews
                                                 docs/quality.md
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import ROOT, console, renew_readme, write_record  # noqa: E402
from quality import BEST, prompts_of  # noqa: E402
from quality_tables import NEW, counts_of_generations, pooled  # noqa: E402
from torch import Tensor  # noqa: E402

from spd_lightning.decoding.decoder import SpdDecoder  # noqa: E402
from spd_lightning.head.loading import load_head  # noqa: E402
from spd_lightning.target.loading import load_target  # noqa: E402

RUNS = ROOT / "runs" / "averages"
DECAYS = (0.9, 0.97, 0.99, 0.997)
RATES: dict[str, dict[str, Any]] = {"falling to zero": {}, "constant": {"model.final_learning_rate": 1.0}}
FILE = "averages.pt"
#: Environment variable that tells the callback where to write.
FOLDER = "AVERAGES_FOLDER"


class Averages(L.Callback):
    """Keeps averages of the trained weights; measures and writes them when training ends."""

    def __init__(self) -> None:
        self.kept: dict[float, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        weights = trained(module)
        for decay in DECAYS:
            kept = self.kept.setdefault(decay, {name: torch.zeros_like(weight) for name, weight in weights.items()})
            # while few steps are seen, their plain mean
            share = max(1 - decay, 1 / trainer.global_step)
            for name, average in kept.items():
                average.lerp_(weights[name], share)

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        _, head = module.parts()
        found = {}
        for name, weights in {"last": trained(module), **self.kept}.items():
            head.load_state_dict(weights, strict=False)
            found[str(name)] = (weights, self.held_out(trainer, module))
        head.load_state_dict(found["last"][0], strict=False)
        path = Path(os.environ[FOLDER]) / FILE
        torch.save(found, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def held_out(self, trainer: L.Trainer, module: Any) -> dict[str, float]:
        """The training view's figures on the validation set."""
        module.eval()
        module.val_statistics.reset()
        for batch in trainer.val_dataloaders:
            module.val_statistics.update(module.loss(batch, statistics=True)[1])
        values = {name: float(value) for name, value in module.val_statistics.compute().items()}
        module.val_statistics.reset()
        module.train()
        return values


def trained(module: Any) -> dict[str, Tensor]:
    _, head = module.parts()
    return {name: p.detach().clone() for name, p in head.named_parameters() if p.requires_grad}


def train(name: str, fields: dict[str, Any]) -> Path:
    folder = RUNS / name.replace(" ", "-")
    if not (folder / FILE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        words = replace(BEST, fields=BEST.fields | fields).words()
        words += [f"--run_dir={folder}", "--trainer.callbacks+=averages.Averages", "--final.prompts=4"]
        paths = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), FOLDER: str(folder)}
        if subprocess.run([sys.executable, "-m", "spd_lightning", *words], cwd=ROOT, env=environment).returncode:
            sys.exit(f"averages.py: the training into {folder} failed, see above.")
    return folder


@torch.inference_mode()
def measured(folder: Path) -> list[dict[str, Any]]:
    target = load_target("tiny")
    rows: list[dict[str, Any]] = []
    kept = torch.load(folder / FILE)
    best = min(kept.keys() - {"last"}, key=lambda name: kept[name][1]["kl"])
    for name, (weights, forced) in kept.items():
        rows.append({"average": name, "kl": forced["kl"], "alpha": forced["alpha"]})
        if name not in ("last", best):
            continue
        head = load_head(folder, target)
        head.load_state_dict(weights, strict=False)
        decoder = SpdDecoder(target, head)
        made = [decoder.generate(ids, NEW) for ids in prompts_of(BEST, None)["held-out"]]
        rows[-1] |= pooled(np.array(counts_of_generations(made)), BEST.stages)
        console.print(json.dumps(rows[-1]))
    return rows


def markdown(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| learning rate | weights | held-out KL | alpha | p, greedy |", "|---|---|---|---|---|"]
    for rate, rows in found.items():
        for row in rows:
            name = "the last ones" if row["average"] == "last" else f"average, decay {row['average']}"
            accepted = f"{row['p']:.3f}" if "p" in row else ""
            lines.append(f"| {rate} | {name} | {row['kl']:.4f} | {row['alpha']:.3f} | {accepted} |")
    return "\n".join(lines)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    found = {name: measured(train(name, fields)) for name, fields in RATES.items()}
    write_record("averages", {"found": found, "prompts": len(prompts_of(BEST, None)["held-out"])}, threads=1)
    renew_readme("averages", markdown(found), "docs/quality.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
