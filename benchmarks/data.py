"""What data costs: preparing and tokenising short chats (time, peak memory by size), and packing against padding.

    python benchmarks/data.py                    # writes benchmarks/records/data.json
    python benchmarks/performance.py             # renews the tables of docs/performance.md

Part one writes chats made from the embedded documentation (every one different) and takes them through `prepare` and
into a token store, each in a fresh process whose peak resident memory is read when it ends: memory must not follow the
size. Part two trains on the same corpus padded in random order, padded by length, and packed, taking turns.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import MIB, ROOT, console, interleaved, median_wall, write_record

SIZES = (12_500, 25_000, 50_000, 100_000)
CHATS = ROOT / "src" / "spd_lightning" / "embedded" / "documentation" / "train.jsonl.gz"


def write_chats(path: Path, count: int) -> None:
    """Conversations that are all different: the embedded ones, numbered."""
    with gzip.open(CHATS, "rt", encoding="utf-8") as stream:
        known = [json.loads(line)["messages"] for line in stream]
    with open(path, "w", encoding="utf-8") as out:
        for number in range(count):
            messages = [dict(message) for message in known[number % len(known)]]
            messages[0]["content"] = f"({number}) {messages[0]['content']}"
            out.write(json.dumps({"messages": messages}) + "\n")


# -- one job in a fresh process --------------------------------------------------------------------------------------


def job(step: str, chats: str, out: str, workers: int) -> None:
    """Do it and print seconds and MiB: the peak of this process, and the largest of its workers'."""
    from resource import RUSAGE_CHILDREN, getrusage

    from common import _resident

    began = time.perf_counter()
    if step == "prepare":
        from spd_lightning.data.cleaning import Cleaning
        from spd_lightning.data.prepare import Preparation, prepare
        from spd_lightning.data.sources import Source

        prepare(Preparation((Source(chats),), Cleaning()), Path(out), workers)
    else:
        from spd_lightning.data.cleaning import Cleaner
        from spd_lightning.data.sources import Source
        from spd_lightning.data.store import Encoding, open_store

        open_store(Encoding(Cleaner((Source(chats),)), "tiny", max_length=2048), Path(out), "SOURCE", workers)
    seconds = time.perf_counter() - began
    children = getrusage(RUSAGE_CHILDREN).ru_maxrss * 1024 if workers else 0
    print(json.dumps({"seconds": seconds, "peak_mib": _resident("VmHWM") / MIB, "worker_peak_mib": children / MIB}))


def run_job(step: str, chats: Path, workers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--job", step, str(chats), f"{out}/made", str(workers)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{step} failed:\n{done.stderr[-2000:]}")
    return {name: round(value, 2) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


def preparation(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in sizes:
            chats = Path(folder) / f"{count}.jsonl"
            write_chats(chats, count)
            for step in ("prepare", "tokenise"):
                for workers in (0, 2) if count == max(sizes) else (0,):
                    found = run_job(step, chats, workers)
                    rows.append({"step": step, "chats": count, "workers": workers, **found})
                    console.print(f"{step}, {count:,} chats, {workers} workers: {found}")
    return rows


# -- packing against padding -----------------------------------------------------------------------------------------


def packing(repeats: int, documents: int, timed: int, capacity: int, rows: int) -> dict[str, Any]:
    """Fill of all batches of so many documents, and the speed of the first `timed` batches, the three ways."""
    import numpy as np
    import torch

    from spd_lightning.data.batches import Rows, collate, plan
    from spd_lightning.data.cleaning import Cleaner
    from spd_lightning.data.sources import Source
    from spd_lightning.data.store import Encoding, open_store
    from spd_lightning.training.module import SpdModule

    module = SpdModule(num_stages=8)
    module.configure_model()
    with tempfile.TemporaryDirectory() as folder:
        encoding = Encoding(Cleaner((Source("documentation:train"),)), "tiny", max_length=capacity)
        samples = list(open_store(encoding, Path(folder), "SOURCE"))[:documents]
    lengths = np.array([len(sample) for sample in samples])
    random = np.random.default_rng(0)
    order = random.permutation(documents)
    per_batch = max(1, round(rows * capacity / lengths.mean()))  # as many tokens per padded batch as per packed one
    cases: dict[str, tuple[list[Rows], int | None]] = {
        "padded, random order": (
            [[[i] for i in order[at : at + per_batch].tolist()] for at in range(0, documents, per_batch)],
            None,
        ),
        "padded, similar lengths": (plan(lengths, order, per_batch, None, random)[0], None),
        "packed": (plan(lengths, order, rows, capacity, random)[0], capacity),
    }

    def train(batches: list[Rows], length: int | None) -> None:
        _, head = module.parts()
        for batch in batches:
            loss, _ = module.loss(collate([[samples[i] for i in row] for row in batch], length), statistics=False)
            loss.backward()
            head.zero_grad()

    runs = {name: (lambda b=batches[:timed], n=length: train(b, n)) for name, (batches, length) in cases.items()}
    timings = interleaved(runs, repeats, "packing")

    def tokens(batches: list[Rows]) -> int:
        return sum(int(lengths[row].sum()) for batch in batches for row in batch)

    def positions(batches: list[Rows], length: int | None) -> int:
        return sum(len(b) * (length or max(int(lengths[row].sum()) for row in b)) for b in batches)

    found = {
        name: {
            "batches": len(batches),
            "filled": tokens(batches) / positions(batches, length),
            "tokens_per_second": tokens(batches[:timed]) / median_wall(timings[name]),
        }
        for name, (batches, length) in cases.items()
    }
    slowest = found["padded, random order"]["tokens_per_second"]
    for case in found.values():
        case["speed_against_random_order"] = case["tokens_per_second"] / slowest
    return {
        "documents": documents,
        "timed_batches": timed,
        "capacity": capacity,
        "packed_rows_per_batch": rows,
        "padded_rows_per_batch": per_batch,
        "length_percentiles_5_50_95": np.percentile(lengths, [5, 50, 95]).tolist(),
        "threads": torch.get_num_threads(),
        "cases": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the packing comparison (3)")
    parser.add_argument("--largest", type=int, default=max(SIZES), help="chats of the largest corpus (100000)")
    options = parser.parse_args()
    if options.job:
        step, chats, out, workers = options.job
        job(step, chats, out, int(workers))
        return
    results = {
        "preparation": preparation(tuple(size for size in SIZES if size <= options.largest)),
        "packing": [packing(options.repeats, 4000, 4, capacity, 8) for capacity in (512,)],
    }
    write_record("data", results, threads=2)


if __name__ == "__main__":
    main()
