"""Renew the tables of docs/performance.md from benchmarks/records/{training_cost,rollback,data}.json.

    python benchmarks/training_cost.py && python benchmarks/rollback.py && python benchmarks/data.py
    python benchmarks/performance.py

Each table stands between `<!-- table: NAME -->` and `<!-- /table -->`; the text around them is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from common import RECORDS, ROOT

DOCUMENT = ROOT / "docs" / "performance.md"
#: The published implementation in the same setting on another machine (docs/method.md, section 12).
PUBLISHED = {512: (843, 202), 1024: (578, 755), 2048: (296, 2962)}
HALF = "ours, half of S supervised"


def markdown(header: str, rows: Iterable[Iterable[str]]) -> str:
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def source(record: dict[str, Any]) -> str:
    """Where the numbers come from."""
    machine, versions = record["machine"], record["versions"]
    dirty = " (with changes)" if record["dirty"] else ""
    load = record.get("load_average")
    busy = f" Load average of the machine at the end: {load[1]}." if load else ""
    threads = "one thread" if machine["threads_used"] == 1 else f"{machine['threads_used']} threads"
    return (
        f"`python {' '.join(record['argv'])}`, {record['date'][:10]}, commit {record['commit'][:7]}{dirty}, torch "
        f"{versions['torch']}, {threads} of {machine['processor']} ({machine['cores']} cores).{busy}"
    )


def by_length(rows: list[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    table: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        table[row["S"]][row["case"]] = row
    return table


def ratio(row: dict[str, Any]) -> str:
    over = row.get("dense_over")
    return f"**{over['cpu']:.1f}** ({over['wall']:.1f})" if over else "-"


def step(record: dict[str, Any]) -> str:
    def tokens(S: int, row: dict[str, Any] | None) -> str:
        return f"{1e3 * S / row['cpu_ms']:,.0f}" if row else "-"

    return markdown(
        "S | published, elsewhere | dense | ours | ours / dense | ours, half supervised | / dense",
        (
            [
                str(S),
                f"{PUBLISHED[S][0]}" if S in PUBLISHED else "-",
                tokens(S, cases.get("dense")),
                tokens(S, cases["ours"]),
                ratio(cases["ours"]),
                tokens(S, cases[HALF]),
                ratio(cases[HALF]),
            ]
            for S, cases in by_length(record["step"]).items()
        ),
    )


def attention(record: dict[str, Any]) -> str:
    rows = []
    for head_dim in dict.fromkeys(row["head_dim"] for row in record["attention"]):
        own = [row for row in record["attention"] if row["head_dim"] == head_dim]
        for S, cases in by_length(own).items():
            dense, fast = cases["dense"], cases["fast"]
            milliseconds = [f"{row['cpu_ms']:,.0f}" for row in (dense, fast)]
            rows.append([f"{record['setting']['heads']} x {head_dim}", str(S), *milliseconds, ratio(fast)])
    return markdown("heads | S | dense mask, ms | fast path, ms | dense / fast", rows)


def memory(record: dict[str, Any]) -> str:
    lengths = [str(S) for S in dict.fromkeys(row["S"] for row in record["step"])]
    rows = []
    for row in record["memory"]:
        mib = [f"{row['mib_above_start'][S]:,.0f}" if S in row["mib_above_start"] else "-" for S in lengths]
        rows.append([f"{row['part']}, {row['kind']}", *mib, f"{row['exponent']:.2f}"])
    published = [f"{PUBLISHED[int(S)][1]:,}" if int(S) in PUBLISHED else "-" for S in lengths]
    rows.append(["step, published, elsewhere", *published, "1.94"])
    return markdown(" | ".join(["MiB above start", *(f"S = {S}" for S in lengths), "exponent"]), rows)


def profile(record: dict[str, Any]) -> str:
    """Our step by part and kind of work at two lengths, and the dense step's arithmetic beside it."""
    lengths = [512, 2048]
    times: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: {S: [0.0, 0.0] for S in lengths})
    for row in record["profile"]["ours"]:
        if row["S"] in lengths:
            part = {"head forward": "head", "backward": "head"}.get(row["phase"], row["phase"])
            cell = times[part, row["kind"]][row["S"]]
            cell[0] += row["ms"]
            cell[1] += row["gflop"] or 0.0
    total = {S: sum(cells[S][0] for cells in times.values()) for S in lengths}
    rows = []
    for (part, kind), cells in times.items():
        row = [f"{part}: {kind}"]
        for S in lengths:
            ms, gflop = cells[S]
            row += [f"{ms:.0f}", f"{100 * ms / total[S]:.0f} %", f"{1e3 * gflop / ms:.0f}" if gflop else "-"]
        rows.append(row)
    header = [f"{what} (S = {S})" for S in lengths for what in ("ms", "share", "GFLOP/s")]
    return markdown(" | ".join(["part and kind of work", *header]), rows)


def arithmetic(record: dict[str, Any]) -> str:
    def sums(kind: str, S: int) -> tuple[float, float]:
        rows = [row for row in record["profile"][kind] if row["S"] == S]
        return sum(row["gflop"] or 0.0 for row in rows), sum(row["ms"] for row in rows)

    rows = []
    for S in dict.fromkeys(row["S"] for row in record["profile"]["dense"]):
        dense, dense_ms = sums("dense", S)
        ours, our_ms = sums("ours", S)
        rows.append(
            [
                str(S),
                f"{dense:.1f}",
                f"{ours:.1f}",
                f"**{dense / ours:.1f}**",
                f"{1e3 * dense / dense_ms:.0f}",
                f"{1e3 * ours / our_ms:.0f}",
            ]
        )
    return markdown("S | dense, GFLOP | ours, GFLOP | ratio | dense, GFLOP/s | ours, GFLOP/s", rows)


def rollback(record: dict[str, Any]) -> str:
    return markdown(
        "restarts behind | context | cycle, ms | of a fresh cache, ms | ratio",
        (
            [
                f"{row['restarts_behind']:,}",
                f"{row['context']:,}",
                f"{row['cycle_ms']:.2f}",
                f"{row['fresh_cycle_ms']:.2f}",
                f"**{row['old_over_fresh']:.3f}**",
            ]
            for row in record["cycles"]["groups"]
        ),
    )


def rollback_memory(record: dict[str, Any]) -> str:
    cycles, memory = record["cycles"], record["memory"]
    return markdown(
        "what | measured",
        [
            ["tensor operations while going back", str(memory["tensor_operations_while_going_back"])],
            ["buffers of the cache", str(memory["buffers"])],
            ["of them moved or replaced after warm-up", str(memory["buffers_that_moved_or_were_replaced"])],
            ["bytes of Python objects kept (integers)", str(memory["python_bytes_kept_by_going_back"])],
            ["snapshots, all layers", f"{memory['snapshot_mib']:.2f} MiB"],
            ["going back, all layers", f"{cycles['return_us']:.0f} us"],
            ["a deep copy of the same cache", f"{cycles['deep_copy_us']:.0f} us"],
        ],
    )


def data_preparation(record: dict[str, Any]) -> str:
    return markdown(
        "step | chats | workers | seconds | chats/s | peak, MiB | largest worker, MiB",
        (
            [
                row["step"],
                f"{row['chats']:,}",
                str(row["workers"]),
                f"{row['seconds']:.1f}",
                f"{row['chats'] / row['seconds']:,.0f}",
                f"{row['peak_mib']:.0f}",
                f"{row['worker_peak_mib']:.0f}" if row["workers"] else "-",
            ]
            for row in record["preparation"]
        ),
    )


def data_packing(record: dict[str, Any]) -> str:
    return markdown(
        "rows | filled | batches | tokens/s | against random order",
        (
            [
                f"{name}, S = {part['capacity']}" if name == "packed" else name,
                f"{case['filled']:.1%}",
                str(case["batches"]),
                f"{case['tokens_per_second']:,.0f}",
                f"**{case['speed_against_random_order']:.2f} x**",
            ]
            for part in record["packing"]
            for name, case in part["cases"].items()
        ),
    )


#: Name of a table in the document -> what makes it, and from which record.
TABLES = {f.__name__: (f, "training_cost") for f in (source, step, attention, memory, profile, arithmetic)}
TABLES |= {f.__name__: (f, "rollback") for f in (rollback, rollback_memory)}
TABLES["rollback_source"] = (source, "rollback")
TABLES |= {f.__name__: (f, "data") for f in (data_preparation, data_packing)}
TABLES["data_source"] = (source, "data")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    text = DOCUMENT.read_text()
    for name, (table, source_of) in TABLES.items():
        record = json.loads((RECORDS / f"{source_of}.json").read_text())
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- /table -->)"
        text, count = re.subn(pattern, lambda m, t=table, r=record: f"{m[1]}{t(r)}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{DOCUMENT.relative_to(ROOT)} has {count} places for the table {name!r}: expected one.")
    temporary = DOCUMENT.with_name(f".{DOCUMENT.name}")
    temporary.write_text(text)
    temporary.replace(DOCUMENT)
    print(f"renewed {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
