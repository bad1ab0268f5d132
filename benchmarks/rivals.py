"""What other ways to draft reach on the same target, data and tokens: tokens per target pass, beside SPD's own S.

Two trained rivals share SPD's trainer (data, order, optimizer, schedule), decoder layers, lm_head and vocabulary:

- `chain`: an EAGLE-3-style head (2503.01840). It fuses a low, a middle and the last hidden state of the newest finished
  token with the embedding of the token after it, and drafts a chain of K tokens, each from its own output before; it is
  trained on such chains (training-time test). A pass of the target verifies a chain.
- `exit d`: an early exit in the manner of PPSD (pipeline-parallel self-speculative decoding): the next token is drafted
  from what a token is at depth d, and enters d + 1 cycles after it.

What a drafter would have done on a text depends on the text alone, so the target's own text is decoded once and every
rival is replayed on it, position by position. Greedy: a draft is kept iff it is the text's token. At temperature 1 the
text is a sample of the target, and given its token y a drafter had drawn and kept it with chance min(1, Q(y) / P(y)).

    .venv/bin/python benchmarks/rivals.py train chain        one of: chain, exit1, exit2, exit4
    .venv/bin/python benchmarks/rivals.py compare --run RUN  replays all beside SPD's, writes records/rivals.json
    .venv/bin/python benchmarks/rivals.py table              renews docs/quality.md from the record
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import RECORDS, ROOT, console, renew_readme, write_record  # noqa: E402
from lightning.pytorch.callbacks import TQDMProgressBar  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from spd_lightning.data.batches import Batch, supervised_positions  # noqa: E402
from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate  # noqa: E402
from spd_lightning.decoding.drafters import PromptLookupDrafter  # noqa: E402
from spd_lightning.decoding.evaluation import bootstrap_difference  # noqa: E402
from spd_lightning.decoding.generation import Pooled  # noqa: E402
from spd_lightning.head.config import HeadConfig  # noqa: E402
from spd_lightning.head.loading import head_config, load_head  # noqa: E402
from spd_lightning.head.module import HeadLayer, LmHead, _rotary_embedding  # noqa: E402
from spd_lightning.target.loading import load_target  # noqa: E402
from spd_lightning.target.target import Target  # noqa: E402
from spd_lightning.training.data import SpdDataModule  # noqa: E402
from spd_lightning.training.losses import Loss, chunked_draft_loss  # noqa: E402
from spd_lightning.training.metrics import DraftStatistics  # noqa: E402
from spd_lightning.training.module import SpdModule  # noqa: E402

RUNS = ROOT / "runs" / "rivals"
STEPS = 7  # drafts of a chain, as the paper's speed figures use
DECAY = 0.8  # of a later draft's weight in the loss
NEW = 64
EXITS = (1, 2, 4)
NAMES = ("chain", *(f"exit{d}" for d in EXITS))
#: How SPD's best head of docs/quality.md is trained; its normed states are in the rivals' heads themselves.
SETTINGS = {
    "optimizer": "muon", "learning_rate": 6e-3, "adamw_learning_rate": 5e-4, "schedule": "linear",
    "final_learning_rate": 0.0, "loss": Loss(hidden=3.0),
}  # fmt: skip


class Rival(nn.Module):
    """What both heads are: decoder layers of SPD's kind, the target's frozen norm, a trained lm_head."""

    anchors: tuple[int, ...]

    def __init__(self, target: Target, config: HeadConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(HeadLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps).requires_grad_(False)
        self.lm_head = LmHead(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = _rotary_embedding(config)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # as `new_head` does
            for name, weight in self.layers.named_parameters():
                if weight.ndim == 2:
                    share = 2 * config.num_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                    weight.normal_(0, weight.shape[1] ** -0.5 / share, generator=random)
            self.lm_head.weight.copy_(target.lm_head_rows())
            self.norm.weight.copy_(target.norm_weight())

    def hidden(self, target: Target, states: list[Tensor], ids: Tensor) -> list[tuple[Tensor, int]]:
        """Outputs [B, S, H], each with its shift: at index t they draft x of position t + shift."""
        raise NotImplementedError

    def attend(self, layer: HeadLayer, x: Tensor, first: int, before: list[tuple[Tensor, Tensor]]) -> Tensor:
        """A layer over x [B, S, H] at RoPE positions first..; `before`: keys and values of the chain's earlier steps.

        Index t sees the first of them (or itself, where there is none) up to t, and of the others index t alone.
        """
        S, normed = x.shape[1], layer.input_layernorm(x)
        cos, sin = self.rotary(x, torch.arange(first, first + S)[None])
        query, gate = layer.self_attn.query(normed, (cos, sin))
        before.append(layer.self_attn.key_value(normed, (cos, sin)))
        (keys, values), *steps = before
        groups = query.shape[2] // keys.shape[2]
        scores = torch.einsum("bqnd,bknd->bnqk", query, keys.repeat_interleave(groups, 2))
        scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf)
        own = [(query * key.repeat_interleave(groups, 2)).sum(-1).transpose(1, 2)[..., None] for key, _ in steps]
        shares = (torch.cat([scores, *own], -1) * query.shape[-1] ** -0.5).softmax(-1)
        out = torch.einsum("bnqk,bknd->bqnd", shares[..., :S], values.repeat_interleave(groups, 2))
        for index, (_, value) in enumerate(steps):
            out = out + shares[..., S + index].transpose(1, 2)[..., None] * value.repeat_interleave(groups, 2)
        return layer.finish(x, out, gate)


class ChainHead(Rival):
    """EAGLE-3-style: fused features and the next token's embedding, then its own outputs in their place."""

    def __init__(self, target: Target, config: HeadConfig, seed: int) -> None:
        super().__init__(target, config, seed)
        H, depth = config.hidden_size, target.num_layers
        self.anchors = (max(1, depth // 4), depth // 2, depth)
        self.fuse = nn.Linear(3 * H, H, bias=False)
        self.join = nn.Linear(2 * H, H, bias=False)
        with torch.no_grad():
            eye, none = torch.eye(H), torch.zeros(H, H)
            self.fuse.weight.copy_(torch.cat([none, none, eye], 1))
            self.join.weight.copy_(torch.cat([0.5 * eye, 0.5 * eye], 1))

    def hidden(self, target: Target, states: list[Tensor], ids: Tensor) -> list[tuple[Tensor, int]]:
        H, S = self.config.hidden_size, ids.shape[1]
        normed = partial(F.rms_norm, normalized_shape=(H,), eps=self.config.rms_norm_eps)
        feature = self.fuse(torch.cat([normed(state) for state in states], -1))
        caches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        found = []
        for step in range(STEPS):
            shift = step + 1  # index t reads x_{t+shift}; past the end anything, nothing is asked there
            entering = torch.cat([ids[:, shift:], ids[:, :1].expand(-1, min(shift, S))], 1)[:, :S]
            embedded = normed(target.model.get_input_embeddings()(entering))
            x = self.join(torch.cat([embedded, normed(feature)], -1))
            for layer, cache in zip(self.layers, caches, strict=True):
                x = self.attend(layer, x, shift, cache)
            found.append((x, shift + 1))
            feature = x
        return found


class ExitHead(Rival):
    """Early exit: causal layers over the hidden states of one depth."""

    def __init__(self, target: Target, config: HeadConfig, seed: int, depth: int) -> None:
        super().__init__(target, config, seed)
        assert target.stage_layers is not None
        self.anchors = (sum(target.stage_layers[:depth]),)

    def hidden(self, target: Target, states: list[Tensor], ids: Tensor) -> list[tuple[Tensor, int]]:
        x = F.rms_norm(states[0], (self.config.hidden_size,), eps=self.config.rms_norm_eps)
        for layer in self.layers:
            x = self.attend(layer, x, 0, [])
        return [(x, 1)]


def make(name: str, target: Target, seed: int = 0) -> Rival:
    config = head_config(target, 2)
    return ChainHead(target, config, seed) if name == "chain" else ExitHead(target, config, seed, int(name[4:]))


class RivalModule(SpdModule):
    """SPD's module with another head and its loss; everything else is the same."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(target="tiny", num_stages=8, **settings)
        self.name = name

    def configure_model(self) -> None:
        if self.head is None:
            self.target = load_target("tiny").partition(8)
            self.head = make(self.name, self.target, self.settings.seed)
            self.train_statistics, self.val_statistics = DraftStatistics(8), DraftStatistics(8)

    def loss(self, batch: Batch, statistics: bool) -> tuple[Tensor, Tensor]:
        target, head = self.parts()
        ids = batch["input_ids"]
        states, last = target(ids, head.anchors)
        drafted = supervised_positions(batch)  # at u: whether x_{u+1} is one that is drafted
        total, weights, kept = last.new_zeros(()), 0.0, None
        for step, (hidden, shift) in enumerate(head.hidden(target, states, ids)):
            S, back = ids.shape[1], shift - 1  # index t is judged at position t + back
            asked = drafted[:, back:]
            loss = partial(
                chunked_draft_loss,
                target_hidden=target.normed(last[:, back:][asked]),
                target_logits=target.logits_of_normed,
                draft_ids=None,
                fills=torch.ones(int(asked.sum()), dtype=torch.long),
                num_stages=8,
                statistics=statistics and step == 0,
                options=self.loss_options,
            )
            value, table = head.lm_head(head.norm(hidden[:, : S - back][asked]), loss)
            total, weights = total + DECAY**step * value, weights + DECAY**step
            kept = table if kept is None else kept
        assert kept is not None
        return total / weights / batch["supervised"].clamp(min=1).to(total.dtype), kept

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.clear()  # no checkpoint of these: the head is written at the end


def train(name: str, settings: dict[str, Any], batch: int, rows: int, folder: Path) -> None:
    """The tiny recipe with a rival in it; writes folder/head.pt and folder/words.json."""
    L.seed_everything(0, verbose=False)
    module = RivalModule(name, **settings)
    data = SpdDataModule(max_length=320, batch_size=batch, packing=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=rows // batch, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        callbacks=[TQDMProgressBar(refresh_rate=20)],
    )  # fmt: skip
    began = time.monotonic()
    trainer.fit(module, data)
    seconds = time.monotonic() - began
    folder.mkdir(parents=True, exist_ok=True)
    _, head = module.parts()
    torch.save(head.state_dict(), folder / "head.pt")
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    words = {"settings": settings, "batch": batch, "rows": rows, "tokens": module.tokens_seen, "seconds": seconds}
    (folder / "words.json").write_text(json.dumps(words | {"parameters": trained}, indent=1))
    console.print(f"{folder.name}: {seconds:.0f} s, {module.tokens_seen / 1e6:.2f} M tokens")


# -- replay ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def kept_drafts(name: str, head: Rival, target: Target, ids: list[int], temperature: float, seed: int) -> np.ndarray:
    """[K, S] bool: would the draft of step j at index t, all before it kept, have been kept?"""
    tokens = torch.tensor([ids])
    states, last = target(tokens, head.anchors)
    random = torch.from_numpy(np.random.default_rng(seed).random((STEPS, len(ids))))
    rows = []
    for step, (hidden, shift) in enumerate(head.hidden(target, states, tokens)):
        logits = head.lm_head(head.norm(hidden))[0, : len(ids) - shift]
        said, row = tokens[0, shift:], torch.zeros(len(ids), dtype=torch.bool)
        if temperature == 0:
            row[: len(said)] = logits.argmax(-1) == said
        else:
            P = (target.logits(last[0, shift - 1 : -1]) / temperature).softmax(-1)
            Q = (logits / temperature).softmax(-1)
            ratio = (Q / P).gather(-1, said[:, None])[:, 0]
            row[: len(said)] = random[step, : len(said)] < ratio
        rows.append(row.numpy())
    return np.stack(rows)


def chain_passes(kept: np.ndarray, start: int, stop: int, drafts: int) -> tuple[int, int]:
    """Target passes, and drafts that were verified, for positions start + 1 .. stop - 1 after the prefill's x_start."""
    at, passes, verified = start, 0, 0
    while at < stop - 1:
        accepted, asked = 0, min(drafts, stop - 2 - at)  # the last token is a pass's own
        while accepted < asked and kept[accepted, at - 1]:
            accepted += 1
        verified += min(asked, accepted + 1)
        passes, at = passes + 1, at + accepted + 1
    return passes, verified


def exit_cycles(kept: np.ndarray, start: int, stop: int, depth: int, n: int) -> int:
    """Cycles for the same tokens: a kept draft enters depth + 1 cycles after its predecessor, a correction n."""
    gaps = [depth + 1 if kept[0, t] else n for t in range(start, stop - 2)]
    return sum(gaps) + n if stop - start > 1 else 0


def lookup_kept(ids: list[int], drafts: int, longest: int = 3) -> np.ndarray:
    """Prompt lookup as a chain, in the form of `kept_drafts`: what followed the last earlier occurrence."""
    kept = np.zeros((drafts, len(ids)), bool)
    for t in range(len(ids) - 2):
        known = ids[: t + 2]
        for size in range(min(longest, len(known) - 1), 0, -1):
            tail = known[-size:]
            found = next((i for i in range(len(known) - size - 1, -1, -1) if known[i : i + size] == tail), None)
            if found is not None:
                said = known[found + size :][:drafts]
                for step, token in enumerate(said):
                    kept[step, t] = t + 2 + step < len(ids) and ids[t + 2 + step] == token
                break
    return kept


def prompts_of(count: int) -> list[list[int]]:
    from tree import prompts_of as held_out

    return held_out(200, 200 + count)


def seconds_of(run: Any, repeats: int = 200) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


@torch.inference_mode()
def draft_cost(target: Target, head: ChainHead) -> float:
    """Time of one draft step of the chain over that of one pass of the target with a token; both after 128 tokens."""
    length, nothing = 128, torch.empty(0, target.hidden_size)
    cache, table = target.new_cache(2 * length), target.rotary_table(2 * length)
    target(torch.arange(10, 10 + length)[None], (), cache=cache)

    def target_pass() -> None:
        hidden = target.run_layers(target.embed(7), range(target.num_layers), length, table, cache, {}, nothing)
        target.logits(hidden).argmax()
        cache.truncate(length)

    config, x = head.config, torch.randn(1, 1, target.hidden_size)
    keys = torch.randn(1, config.num_key_value_heads, length, config.head_dim)
    here = head.rotary(x, torch.tensor([[length]]))

    def draft() -> None:
        row = head.join(torch.cat([x, x], -1))
        for layer in head.layers:
            normed = layer.input_layernorm(row)
            query, gate = layer.self_attn.query(normed, here)
            layer.self_attn.key_value(normed, here)
            out = F.scaled_dot_product_attention(query.transpose(1, 2), keys, keys, enable_gqa=True)
            row = layer.finish(row, out.transpose(1, 2), gate)
        head.lm_head(head.norm(row)).argmax()

    for run in (target_pass, draft):
        seconds_of(run, 20)
    return seconds_of(draft) / seconds_of(target_pass)


@torch.inference_mode()
def compare(run: Path, count: int) -> dict[str, Any]:
    target = load_target("tiny").partition(8)
    n, prompts = 8, prompts_of(count)
    heads: dict[str, Rival] = {}
    for name in NAMES:
        if (RUNS / name / "head.pt").exists():
            heads[name] = make(name, target).eval()
            heads[name].load_state_dict(torch.load(RUNS / name / "head.pt"))
    cost = draft_cost(target, heads["chain"]) if "chain" in heads else None
    spd = load_head(run, target)
    rows = []
    for temperature in (0.0, 1.0):
        texts = [
            [*prompt, *autoregressive_generate(target, prompt, NEW, temperature, seed=i).token_ids]
            for i, prompt in enumerate(prompts)
        ]
        spans = [(len(prompt), len(text)) for prompt, text in zip(prompts, texts, strict=True)]
        new = sum(stop - start - 1 for start, stop in spans)
        rows.append({"temperature": temperature, "name": "plain", "S": 1.0})
        for name, drafter in (("SPD", spd), ("prompt lookup, SPD's pipeline", None)):
            decoder = SpdDecoder(target, drafter or PromptLookupDrafter(spd.staircase, target.vocab_size))
            made = [decoder.generate(prompt, NEW, temperature, seed=i) for i, prompt in enumerate(prompts)]
            pooled = Pooled.of(made, n)
            rows.append(
                {
                    "temperature": temperature, "name": name, "p": pooled.acceptance,
                    "interval": bootstrap_difference(made), "S": pooled.theoretical_speedup,
                }
            )  # fmt: skip
        chains = {"prompt lookup, chain": [lookup_kept(text, STEPS) for text in texts]}
        if "chain" in heads:
            chains["EAGLE-3-style chain"] = [
                kept_drafts("chain", heads["chain"], target, text, temperature, i) for i, text in enumerate(texts)
            ]
        for name, kept in chains.items():
            for drafts in range(1, STEPS + 1):
                found = [chain_passes(k, *span, drafts) for k, span in zip(kept, spans, strict=True)]
                passes, verified = (sum(column) for column in zip(*found, strict=True))
                free = new / passes
                priced = cost if name.startswith("EAGLE") and cost is not None else 0.0
                rows.append(
                    {
                        "temperature": temperature, "name": name, "drafts": drafts, "S": free,
                        "p": (new - passes) / verified, "S_charged": free / (1 + drafts * priced),
                    }
                )  # fmt: skip
        for name, head in heads.items():
            if isinstance(head, ExitHead):
                depth = int(name[4:])
                kept = [kept_drafts(name, head, target, text, temperature, i) for i, text in enumerate(texts)]
                flags = [bool(k[0, t]) for k, (a, b) in zip(kept, spans, strict=True) for t in range(a, b - 1)]
                cycles = sum(exit_cycles(k, *span, depth, n) for k, span in zip(kept, spans, strict=True))
                rows.append(
                    {
                        "temperature": temperature, "name": f"early exit at depth {depth}",
                        "p": sum(flags) / len(flags), "S": n * new / cycles,
                    }
                )  # fmt: skip
        console.print(f"temperature {temperature:g} done")
    trained = {name: json.loads((RUNS / name / "words.json").read_text()) for name in heads}
    return {"prompts": count, "new": NEW, "rows": rows, "draft_cost": cost, "trained": trained}


def markdown(found: dict[str, Any]) -> str:
    lines = []
    for temperature in (0.0, 1.0):
        rows = [row for row in found["rows"] if row["temperature"] == temperature]
        shown: dict[tuple[str, int], dict[str, Any]] = {}
        for measure in ("S_charged", "S"):  # a chain's best length by either
            for name in dict.fromkeys(row["name"] for row in rows):
                best = max((row for row in rows if row["name"] == name), key=lambda row: row.get(measure, row["S"]))
                shown[name, best.get("drafts", 0)] = best
        lines += [
            f"Temperature {temperature:g}, {found['prompts']} held-out prompts x {found['new']} tokens, n = 8.",
            "",
            "| drafter | drafts kept | tokens per target pass, drafting free | drafting charged |",
            "|---|---|---|---|",
        ]
        for row in sorted(shown.values(), key=lambda row: -row.get("S_charged", row["S"])):
            name = f"{row['name']} of {row['drafts']}" if "drafts" in row else row["name"]
            kept = f"{row['p']:.3f}" if "p" in row else ""
            lines.append(f"| {name} | {kept} | {row['S']:.2f} | {row.get('S_charged', row['S']):.2f} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("train", "compare", "table"))
    parser.add_argument("name", nargs="?", choices=NAMES)
    parser.add_argument("--learning-rate", type=float, default=SETTINGS["learning_rate"], help="peak, of Muon")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4480, help="conversations")
    parser.add_argument("--folder", help="under runs/rivals; the name by default")
    parser.add_argument("--run", type=Path, help="compare: a finished SPD run of as many tokens")
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.work == "train":
        if options.name is None:
            parser.error(f"train: which of {', '.join(NAMES)}?")
        settings = SETTINGS | {"learning_rate": options.learning_rate}
        train(options.name, settings, options.batch, options.rows, RUNS / (options.folder or options.name))
        return 0
    if options.work == "compare":
        if options.run is None or not options.run.is_dir():
            parser.error(f"compare --run {options.run}: expected the folder of a finished run of the tiny recipe")
        write_record("rivals", compare(options.run, options.prompts), threads=1)
    found = json.loads((RECORDS / "rivals.json").read_text())
    renew_readme("rivals", markdown(found), "docs/quality.md")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
