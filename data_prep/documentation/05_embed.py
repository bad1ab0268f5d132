"""Step 5: the sample of conversations that is shipped in the package, to train and validate heads offline.

About 9,000 training and 400 held-out conversations, chosen by the hash of their id (the choice depends
neither on the machine nor on the order of the corpus), with answers of 60 to 1200 characters that read as
whole texts. The gzip files carry no time stamp: the same conversations give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
from pathlib import Path

TRAIN_COUNT, HELDOUT_COUNT = 9000, 400
SIZE_LIMIT = 1_600_000  # bytes of train.jsonl.gz
DATA = Path(__file__).resolve().parents[2] / "src" / "spd_lightning" / "embedded" / "documentation"


def well_formed(sample: dict) -> bool:
    """A short whole text: starts like a sentence, ends like one, quotes and brackets closed."""
    answer = sample["messages"][-1]["content"]
    return (
        60 <= len(answer) <= 1200
        and re.match(r"[A-Z`]", answer) is not None
        and re.search(r"[.!?)`\]'\">}\d]$", answer) is not None
        and answer.count("`") % 2 == 0
        and all(answer.count(a) == answer.count(b) for a, b in ("()", "[]", "{}"))
    )


def choose(path: Path, count: int) -> list[dict]:
    """The well-formed conversations with the smallest hashes, in hash order."""
    with path.open(encoding="utf-8") as lines:
        samples = [s for s in map(json.loads, lines) if well_formed(s)]
    return sorted(samples, key=lambda s: hashlib.sha256(("embed:" + s["id"]).encode()).hexdigest())[:count]


def compress(samples: list[dict]) -> bytes:
    """Gzipped JSON lines without a time stamp."""
    text = "".join(json.dumps(s, ensure_ascii=False, separators=(",", ":")) + "\n" for s in samples)
    return gzip.compress(text.encode(), compresslevel=9, mtime=0)


def compress_within(samples: list[dict], limit: int) -> tuple[bytes, int]:
    """The largest leading part (in steps of 2 %) that fits the limit, and its length."""
    count = len(samples)
    while len(data := compress(samples[:count])) > limit:
        count -= max(1, len(samples) // 50)
    return data, count


def write(path: Path, data: bytes) -> None:
    """Temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def sources(manifest: dict, counts: dict[str, int], chosen: dict[str, int]) -> str:
    """SOURCES.md: what the conversations are, and whose words they quote."""
    rows = [
        f"| {p['name']} | {p['version']} | {p['license']} | {p['conversations']} | {chosen.get(p['name'], 0)} |"
        for p in sorted(manifest["packages"], key=lambda p: (-p["conversations"], p["name"]))
    ]
    whole, kept_out = manifest["train"], manifest["heldout"]
    text = f"""# Sources of the documentation conversations

`train.jsonl.gz` ({counts["train"]} conversations) and `heldout.jsonl.gz` ({counts["heldout"]}): templated
questions about Python symbols, answered by their docstrings. The docstrings belong to the authors of the
packages below and stay under the packages' licences; the licence texts and copyright notices come with each
package. Only permissive licences were taken (as the packages' own metadata state them).

Made by `data_prep/documentation/01_corpus.py` (Python {manifest["python"]}: reads installed source files,
imports nothing) and `05_embed.py` (choice by hash, answers of 60 to 1200 characters, whole texts only).
Training and held-out parts share no bare symbol name, no text and no first paragraph over 60 characters.
The embedded target was trained on the whole corpus ({whole["conversations"]:,} conversations,
{whole["answer_characters"]:,} characters of answers), never on its held-out part
({kept_out["conversations"]:,} conversations).

| package | version | licence | conversations in the corpus | in these files |
|---|---|---|---|---|
"""
    return text + "\n".join(rows) + "\n"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--corpus",
        type=Path,
        default=Path("build/documentation"),
        help="folder of step 1 (default: %(default)s)",
    )
    add("--out", type=Path, default=DATA, help="output folder (default: the package's embedded data)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write train.jsonl.gz, heldout.jsonl.gz and SOURCES.md."""
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    train = choose(args.corpus / "train.jsonl", TRAIN_COUNT)
    data, count = compress_within(train, SIZE_LIMIT)
    heldout = choose(args.corpus / "heldout.jsonl", HELDOUT_COUNT)
    write(args.out / "train.jsonl.gz", data)
    write(args.out / "heldout.jsonl.gz", compress(heldout))
    chosen: dict[str, int] = {}
    for sample in train[:count] + heldout:
        chosen[sample["source"]] = chosen.get(sample["source"], 0) + 1
    manifest = json.loads((args.corpus / "manifest.json").read_text(encoding="utf-8"))
    text = sources(manifest, {"train": count, "heldout": len(heldout)}, chosen)
    write(args.out / "SOURCES.md", text.encode())
    print(f"{count} training conversations in {len(data):,} bytes, {len(heldout)} held-out ones")


if __name__ == "__main__":
    main()
