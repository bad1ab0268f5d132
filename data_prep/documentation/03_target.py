"""Step 3: train the tiny documentation model, a Llama of 5.8 M parameters, in a budget of minutes on a CPU.

Design, with what decided it:
- Sequences are whole conversations, batched with others of similar length and padded on the right: no token
  ever attends to another document, no mask is needed (plain causal attention), and short texts do not pay for
  the attention over 512 packed tokens. Some conversations are chained with those after them into a longer
  one, so that the model has seen several turns and positions up to 1024.
- The loss covers questions and answers alike: at this size every token of English helps.
- The learning rate follows TIME (elapsed / budget): the run ends with a finished schedule however busy the
  machine is. A repetition on another machine therefore sees another number of tokens, and gets other weights.
- Everything is stored in the checkpoint, the data position included: stop with Ctrl-C or SIGTERM, go on with
  --resume.
- Where other programs share the cores, set OMP_WAIT_POLICY=PASSIVE: threads that wait by spinning took most
  of the processor time that the run was given.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

MAX_LENGTH = 1024
CHAINED_SHARE = 0.2
SORT_WINDOW = 4096  # sequences sorted by length together: large enough for little padding, small enough to stay random
IGNORED = -100
REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = REPOSITORY / "src" / "spd_lightning" / "embedded" / "target"


def model_config(tokenizer: PreTrainedTokenizerFast, layers: int = 8) -> LlamaConfig:
    """The architecture: 8 layers, unless asked otherwise, so that it can be cut into 2, 4 or 8 stages."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Fresh weights; what writes into the residual stream starts smaller, as in GPT-2."""
    torch.manual_seed(seed)
    AttentionInterface.register("short", short_attention)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("short")
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


# ----------------------------------------------------------------------------------------------- data


def encode(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of every conversation of a JSON lines file, through the chat template."""
    with path.open(encoding="utf-8") as lines:
        texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


def chain(sequences: list[list[int]], share: float, random_: random.Random) -> list[list[int]]:
    """Join a share of the conversations with those after them, up to MAX_LENGTH tokens."""
    chained: list[list[int]] = []
    open_ended = False
    for ids in sequences:
        if open_ended and len(chained[-1]) + len(ids) <= MAX_LENGTH:
            chained[-1] = chained[-1] + ids
        else:
            chained.append(ids[:MAX_LENGTH])
            open_ended = random_.random() < share / 3  # a chain takes in about three more conversations
    return chained


def batches_of_epoch(sequences: list[list[int]], epoch: int, tokens: int, seed: int) -> list[list[list[int]]]:
    """The epoch's batches, at most `tokens` padded tokens each; a function of (seed, epoch) alone."""
    random_ = random.Random(f"{seed}:{epoch}")
    order = chain(random_.sample(sequences, len(sequences)), CHAINED_SHARE, random_)
    batches: list[list[list[int]]] = []
    for start in range(0, len(order), SORT_WINDOW):
        batch: list[list[int]] = []
        for ids in sorted(order[start : start + SORT_WINDOW], key=len):
            if batch and (len(batch) + 1) * len(ids) > tokens:
                batches.append(batch)
                batch = []
            batch.append(ids)
        batches.append(batch)
    random_.shuffle(batches)
    return batches


def pad(batch: list[list[int]], pad_id: int) -> torch.Tensor:
    """[B, 16 i + 1], padded on the right: causal attention never looks there; odd input lengths are slow."""
    length = (max(map(len, batch)) + 14) // 16 * 16 + 1
    return torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in batch])


def short_attention(module, query_BHSD, key, value, attention_mask, scaling, **_unused):
    """Plain causal attention for transformers' attention interface; (output [B, S, H, D], None).

    Conversations are short. At 128 tokens the written-out products take half the time of the CPU's bfloat16
    flash kernel (27 against 52 ms, forward and backward); at 512 they take twice as long: those go to the
    kernel.
    """
    batch, heads, length, width = query_BHSD.shape
    groups = key.shape[1]
    if length > 320:
        output = torch.nn.functional.scaled_dot_product_attention(
            query_BHSD, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None
    future = torch.full((length, length), -torch.inf).triu(1)
    scores = query_BHSD.reshape(batch, groups, -1, width) @ key.transpose(-1, -2)
    weights = (scores.view(batch, heads, length, length).float() * scaling + future).softmax(-1).to(value.dtype)
    output = weights.view(batch, groups, -1, length) @ value
    return output.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of hidden @ weight.T, chunk by chunk, with both gradients computed on the way.

    The [tokens, vocabulary] tensors of the plain formula (logits, log-softmax and their gradients) are 64 MiB
    each at 4096 tokens; a chunk stays in the processor's cache and the process needs some 2 GB less memory.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, labels_N, dtype, chunk=256):
        """The loss; dtype is that of the matrix products."""
        weight = weight_VH.to(dtype)
        hidden = hidden_NH.to(dtype)
        gradient_hidden = torch.empty_like(hidden)
        gradient_weight = torch.zeros_like(weight_VH)
        total = torch.zeros(())
        for h, labels, g in zip(hidden.split(chunk), labels_N.split(chunk), gradient_hidden.split(chunk), strict=True):
            scores = (h @ weight.T).float()
            scores -= scores.logsumexp(-1, keepdim=True)
            total -= scores.gather(1, labels[:, None]).sum()
            errors = scores.exp_()
            errors.scatter_add_(1, labels[:, None], torch.full((len(labels), 1), -1.0))
            errors = errors.to(dtype)
            torch.mm(errors, weight, out=g)
            gradient_weight += errors.T @ h
        count = len(labels_N)
        ctx.save_for_backward(gradient_hidden.float() / count, gradient_weight / count)
        return total / count

    @staticmethod
    def backward(ctx, gradient):
        """Both gradients were kept by the forward pass."""
        gradient_hidden, gradient_weight = ctx.saved_tensors
        return gradient_hidden * gradient, gradient_weight * gradient, None, None, None


def loss_of(model: LlamaForCausalLM, input_ids: torch.Tensor, pad_id: int) -> tuple[torch.Tensor, int]:
    """(mean next-token loss, number of predicted tokens); logits only where there is something to predict."""
    labels = input_ids[:, 1:]
    hidden = model.model(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state
    keep = labels != pad_id
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
    loss = ChunkedCrossEntropy.apply(hidden[keep].float(), model.lm_head.weight, labels[keep], dtype)
    return loss, int(keep.sum())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, sequences: list[list[int]], pad_id: int) -> float:
    """Mean loss per token of the given conversations, dropout-free by construction."""
    total = count = 0.0
    ordered = sorted((ids[:MAX_LENGTH] for ids in sequences), key=len)
    for start in range(0, len(ordered), 16):
        loss, tokens = loss_of(model, pad(ordered[start : start + 16], pad_id), pad_id)
        total, count = total + float(loss) * tokens, count + tokens
    return total / count


# ------------------------------------------------------------------------------------------- training


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: giving them back at each step cost a quarter of the speed."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library: slower, nothing else
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


@dataclass
class Progress:
    """Where the run stands; saved and restored as plain numbers."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0


def learning_rate(done: float, peak: float, warm_up: float = 0.02, floor: float = 0.02) -> float:
    """Linear warm-up, then cosine to floor * peak; `done` is the share of the time budget that is used."""
    if done < warm_up:
        return peak * (done + 1e-3) / (warm_up + 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm_up) / (1 - warm_up))))
    return peak * (floor + (1 - floor) * cosine)


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Temporary name, then rename: a stop in the middle leaves the last good checkpoint."""
    partial = path.with_name(path.name + ".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(progress)}
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Restore in place."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def batches_from(sequences: list[list[int]], progress: Progress, tokens: int, seed: int) -> Iterator[list[list[int]]]:
    """Endless batches from where `progress` stands; advances it."""
    while True:
        batches = batches_of_epoch(sequences, progress.epoch, tokens, seed)
        for batch in batches[progress.batch :]:
            progress.batch += 1
            yield batch
        progress.epoch, progress.batch = progress.epoch + 1, 0


class Log:
    """JSON lines, appended and flushed; a resumed run continues the file."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.file = path.open("w" if fresh else "a", encoding="utf-8")

    def write(self, progress: Progress, **values: float) -> None:
        """One line with the position of the run and the given values."""
        row = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 1)}
        row |= {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def train(args: argparse.Namespace, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Progress:
    """Train until the time budget is used; returns where the run stands (it may have been stopped)."""
    pad_id = tokenizer.pad_token_id
    sequences = encode(args.corpus / "train.jsonl", tokenizer)
    heldout = encode(args.corpus / "heldout.jsonl", tokenizer)[:256]
    checkpoint = args.corpus / "target-checkpoint.pt"
    optimizer = new_optimizer(model)
    progress = load_checkpoint(checkpoint, model, optimizer) if args.resume else Progress()
    log = Log(args.corpus / "target-log.jsonl", fresh=not args.resume)
    budget = args.minutes * 60
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _frame: stop.append(n))
    forward = torch.compile(loss_of, dynamic=True) if args.compile else loss_of
    bar = tqdm(total=round(budget), initial=round(progress.seconds), unit="s", mininterval=5, desc="training")
    next_save, next_heldout = progress.seconds + 120, progress.seconds + args.heldout_every
    window_loss, window_tokens, window_start = 0.0, 0, progress.seconds
    for batch in batches_from(sequences, progress, args.batch_tokens, args.seed):
        started = time.monotonic()
        rate = learning_rate(progress.seconds / budget, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss, count = forward(model, pad(batch, pad_id), pad_id)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        window_loss, window_tokens = window_loss + float(loss.detach()) * count, window_tokens + count
        progress.step, progress.tokens = progress.step + 1, progress.tokens + count
        progress.seconds += time.monotonic() - started
        bar.update(round(progress.seconds) - bar.n)
        if progress.step % args.log_every == 0:
            speed = window_tokens / (progress.seconds - window_start)
            log.write(
                progress,
                loss=window_loss / window_tokens,
                lr=rate,
                gradient_norm=float(norm),
                tokens_per_second=speed,
                epoch=progress.epoch,
            )
            bar.set_postfix_str(f"step {progress.step}, loss {window_loss / window_tokens:.3f}, {speed:.0f} tokens/s")
            window_loss, window_tokens, window_start = 0.0, 0, progress.seconds
        over = progress.seconds >= budget or bool(stop)
        if over or progress.seconds >= next_heldout:
            log.write(progress, heldout_loss=heldout_loss(model, heldout, pad_id))
            next_heldout = progress.seconds + args.heldout_every
        if over or progress.seconds >= next_save:
            save_checkpoint(checkpoint, model, optimizer, progress)
            next_save = progress.seconds + 120
        if over:
            break
    return progress


# --------------------------------------------------------------------------------------------- export


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model folder: bfloat16 weights, configs and tokenizer; temporary name, then rename."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    stored = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_diff_dict())).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    stored.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, folder)


def measure(
    args: argparse.Namespace, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int = 8
) -> None:
    """Print tokens/s of the precisions: take the faster one whose loss is healthy."""
    sequences = encode(args.corpus / "heldout.jsonl", tokenizer)
    batches = batches_of_epoch(sequences, 0, args.batch_tokens, args.seed)[: steps + 3]
    forward = torch.compile(loss_of, dynamic=True) if args.compile else loss_of
    optimizer = new_optimizer(model)
    for precision in ("bf16", "fp32"):
        for i, batch in enumerate(batches):
            if i == 3:
                started, tokens = time.monotonic(), 0
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, count = forward(model, pad(batch, tokenizer.pad_token_id), tokenizer.pad_token_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens = count if i < 3 else tokens + count
        print(
            f"{precision}: {tokens / (time.monotonic() - started):.0f} tokens/s, loss {float(loss.detach()):.3f}",
            flush=True,
        )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Before: 02_tokenizer.py. Next: python data_prep/documentation/04_report.py",
    )
    add = parser.add_argument
    add(
        "--corpus",
        type=Path,
        default=Path("build/documentation"),
        help="folder of steps 1 and 2, checkpoint and log (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=TARGET,
        help="exported model folder (default: the package's embedded target)",
    )
    add(
        "--minutes",
        type=float,
        default=60,
        help="time budget of the whole run, resumed parts included (default: %(default)s)",
    )
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--batch-tokens", type=int, default=2048, help="padded tokens per step (default: %(default)s)")
    add(
        "--precision",
        choices=("bf16", "fp32"),
        default="bf16",
        help="autocast of the matrix products (default: %(default)s)",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the forward and backward pass (needs a C++ compiler)",
    )
    add("--layers", type=int, default=8, help="decoder layers (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add(
        "--heldout-every",
        type=float,
        default=240,
        help="seconds between held-out losses (default: %(default)s)",
    )
    add("--log-every", type=int, default=20, help="steps between log lines (default: %(default)s)")
    add("--seed", type=int, default=0, help="weights and data order (default: %(default)s)")
    add("--resume", action="store_true", help="continue from the checkpoint in --corpus")
    add("--export-only", action="store_true", help="write --out from the checkpoint and stop")
    add("--measure", action="store_true", help="print tokens/s of bf16 and fp32 and stop")
    return parser.parse_args(argv)


def record_run(args: argparse.Namespace, argv: list[str]) -> None:
    """Keep what was asked for beside the checkpoint, for step 4; no paths."""
    path = args.corpus / "target-run.json"
    if args.resume:
        record = json.loads(path.read_text())
        record.setdefault("resumed", []).append(argv)
    else:
        settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
        record = {"argv": ["03_target.py", *argv], "settings": settings}
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Train and export, or one of the two, or measure."""
    args = parse_arguments(argv)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.corpus / "tokenizer")
    model = new_model(model_config(tokenizer, args.layers), args.seed)
    if args.measure:
        measure(args, model, tokenizer)
        return
    if args.export_only:
        progress = load_checkpoint(args.corpus / "target-checkpoint.pt", model)
    else:
        record_run(args, sys.argv[1:] if argv is None else argv)
        progress = train(args, model, tokenizer)
    export(model, tokenizer, args.out)
    print(json.dumps(vars(progress)))


if __name__ == "__main__":
    main()
