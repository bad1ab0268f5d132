"""Step 4: measure the exported documentation model and write TRAINING.json beside it.

What is measured is what is shipped: the bfloat16 weights, read back and run in float32. Greedy text of a
small model loops, and a loop is easy to draft for; the repetition rate says how much of that is in every
acceptance figure that is measured on this target. It is recorded next to the same figure of the real answers.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

TARGET = Path(__file__).resolve().parents[2] / "src" / "spd_lightning" / "embedded" / "target"
NGRAM = 4
REPETITION_TOKENS = 64
MAX_NEW_TOKENS = 128


def repeated(tokens: list[int], n: int = NGRAM) -> tuple[int, int]:
    """(n-grams that already occurred earlier in these tokens, all n-grams)."""
    seen: set[tuple[int, ...]] = set()
    count = 0
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    for gram in grams:
        count += gram in seen
        seen.add(gram)
    return count, len(grams)


def repetition_rate(texts: Iterable[list[int]], n: int = NGRAM) -> float:
    """Share of repeated n-grams, pooled over the texts."""
    pairs = [repeated(tokens, n) for tokens in texts]
    return sum(a for a, _ in pairs) / max(1, sum(b for _, b in pairs))


def chosen(samples: list[dict], count: int) -> list[dict]:
    """A deterministic choice, independent of the file's order."""
    return sorted(samples, key=lambda s: hashlib.sha256(s["id"].encode()).hexdigest())[:count]


@torch.no_grad()
def losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, samples: list[dict]) -> dict[str, float]:
    """Mean loss per token, and per token of the answers; one conversation at a time, no padding."""
    total = answer = 0.0
    tokens = answer_tokens = 0
    for sample in tqdm(samples, desc="held-out loss"):
        encoded = tokenizer.apply_chat_template(
            sample["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, mask = encoded["input_ids"], torch.as_tensor(encoded["assistant_masks"]).view(-1)[1:].bool()
        logits = model(input_ids=ids[:, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total, tokens = total + float(loss.sum()), tokens + len(loss)
        answer, answer_tokens = answer + float(loss[mask].sum()), answer_tokens + int(mask.sum())
    return {"heldout_loss": total / tokens, "heldout_answer_loss": answer / answer_tokens}


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, samples: list[dict], batch: int = 20
) -> list[list[int]]:
    """New tokens of every question, end token included, nothing after it."""
    texts: list[list[int]] = []
    for start in tqdm(range(0, len(samples), batch), desc="greedy text"):
        prompts = [s["messages"][:-1] for s in samples[start : start + batch]]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        rows = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        for row in rows[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            texts.append(row[:end])
    return texts


def quality(folder: Path, corpus: Path, prompts: int, loss_samples: int) -> dict:
    """Everything measured on the stored weights, run in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with (corpus / "heldout.jsonl").open(encoding="utf-8") as lines:
        heldout = [json.loads(line) for line in lines]
    samples = chosen(heldout, prompts)
    texts = greedy(model, tokenizer, samples)
    answers = [tokenizer.encode(s["messages"][-1]["content"], add_special_tokens=False) for s in samples]
    return {
        "evaluated": "the stored bfloat16 weights, run in float32",
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_conversations": min(loss_samples, len(heldout)),
        **losses(model, tokenizer, chosen(heldout, loss_samples)),
        "greedy_prompts": len(samples),
        "repetition_definition": f"share of generated {NGRAM}-grams that already occurred earlier in "
        f"the same generation, first {REPETITION_TOKENS} tokens, pooled over the prompts",
        "repetition_rate": repetition_rate(t[:REPETITION_TOKENS] for t in texts),
        "repetition_rate_of_the_real_answers": repetition_rate(a[:REPETITION_TOKENS] for a in answers),
        "ended_within_tokens": MAX_NEW_TOKENS,
        "ended_share": sum(t[-1] == tokenizer.eos_token_id for t in texts) / len(texts),
        "mean_new_tokens": sum(map(len, texts)) / len(texts),
        "distinct_texts": len({tuple(t) for t in texts}) / len(texts),
        "samples": [
            {"question": s["messages"][0]["content"], "greedy_answer": tokenizer.decode(t)}
            for s, t in list(zip(samples, texts, strict=True))[:6]
        ],
    }


def curves(log: Path) -> dict:
    """Training and held-out loss over the run, thinned to some hundred points."""
    with log.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    training = [r for r in rows if "loss" in r]
    every = max(1, len(training) // 100)
    return {
        "steps": rows[-1]["step"],
        "tokens_seen": rows[-1]["tokens"],
        "training_seconds": rows[-1]["seconds"],
        "tokens_per_second": round(rows[-1]["tokens"] / rows[-1]["seconds"]),
        "train_curve": [{k: r[k] for k in ("step", "tokens", "seconds", "loss", "lr")} for r in training[::every]],
        "heldout_curve": [r for r in rows if "heldout_loss" in r],
    }


def processor() -> str:
    """The CPU's model name and the number of cores, nothing that names the machine."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The repository's commit, if there is one."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Before: 03_target.py. Next: python data_prep/documentation/05_embed.py",
    )
    add = parser.add_argument
    add(
        "--corpus",
        type=Path,
        default=Path("build/documentation"),
        help="folder of steps 1 to 3 (default: %(default)s)",
    )
    add(
        "--target",
        type=Path,
        default=TARGET,
        help="exported model folder (default: the package's embedded target)",
    )
    add("--prompts", type=int, default=120, help="held-out questions answered greedily (default: %(default)s)")
    add(
        "--loss-samples",
        type=int,
        default=600,
        help="held-out conversations of the loss (default: %(default)s)",
    )
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write TARGET/TRAINING.json."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    run = json.loads((args.corpus / "target-run.json").read_text())
    manifest = json.loads((args.corpus / "manifest.json").read_text())
    record = {
        **run,
        "commit": commit(),
        "machine": processor(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        "corpus": {k: manifest[k] for k in ("train", "heldout")},
        "weights_sha256": hashlib.sha256((args.target / "model.safetensors").read_bytes()).hexdigest(),
        "quality": quality(args.target, args.corpus, args.prompts, args.loss_samples),
        "training": curves(args.corpus / "target-log.jsonl"),
    }
    partial = args.target / "TRAINING.json.partial"
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, args.target / "TRAINING.json")
    print(json.dumps(record["quality"], indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
