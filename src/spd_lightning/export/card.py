"""The model card of an exported head, README.md in the hub's format: what it is, how to run it, what was measured."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from spd_lightning.export.background import Background, Metric, dtype_name
from spd_lightning.head.module import SpeculationHead

NOT_CERTIFIED = "**Not certified.** Nobody has compared this head's decoding with its target for this card."


def model_card(
    head: SpeculationHead,
    name: str,
    background: Background,
    certificate: str | None,
    plots: Sequence[str],
    vocabulary_file: str | None,
) -> str:
    """The text of README.md.

    Args:
        head: in the dtype it is exported in.
        name: of the folder or repository.
        background: where it comes from and what was measured.
        certificate: one line about the lossless certificate; None: there is none.
        plots: pictures in the folder.
        vocabulary_file: of the draft vocabulary, where it is smaller than the target's.
    """
    parts = [
        f"---\n{_metadata(head, name, background.metrics).to_yaml()}\n---",
        f"# {name}",
        _about(head, vocabulary_file),
        _use(head, name),
        _measured(background.metrics, background.notes),
        f"## Lossless\n\n{certificate or NOT_CERTIFIED}",
        _training(background),
        *(f"![{_title(plot)}]({plot})" for plot in plots),
        _FILES,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_FILES = """\
## Files

`config.json` (sealed) and `model.safetensors` are the head; `provenance.json` says where it comes from and lists the
SHA-256 of every file; `parity_fixture.safetensors` holds inputs and the logits they must give. Check all of it with
`python -m spd_lightning.export.check .`."""


def _metadata(head: SpeculationHead, name: str, metrics: Sequence[Metric]) -> ModelCardData:
    source = head.origin.source or ""
    return ModelCardData(
        library_name="spd_lightning",
        base_model=source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else None,
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "speculative-pipeline-decoding", "draft-head"],
        model_name=name if metrics else None,
        eval_results=[result for metric in metrics if metric.category is None for result in _evaluations(metric)]
        or None,
    )


def _evaluations(metric: Metric) -> list[EvalResult]:
    values = (("acceptance", metric.acceptance), ("theoretical speedup", metric.theoretical_speedup))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", metric.prompts),
            dataset_name=f"{metric.prompts} ({metric.count} prompts x {metric.new_tokens} tokens)",
            metric_type=kind.replace(" ", "-"),
            metric_name=f"{kind}, T = {metric.temperature:g}",
            metric_value=round(value, 4),
        )
        for kind, value in values
        if value is not None
    ]


def _about(head: SpeculationHead, vocabulary_file: str | None) -> str:
    config, origin = head.config, head.origin
    parameters = sum(p.numel() for p in head.parameters())
    target = f"`{origin.source}`" if origin.source else f"a target of family {origin.model_type or 'unknown'}"
    ids = "all ids" if config.draft_token_ids is None else f"{config.draft_vocab_size} ids, [{vocabulary_file}]"
    if config.draft_token_ids is not None:
        ids += f"({vocabulary_file})"
    rows = {
        "target": target,
        "revision": origin.commit or origin.revision or "not recorded",
        "architecture": origin.architecture or "not recorded",
        "digest of its config": _short(origin.config_digest),
        "digest of its tokenizer": _short(origin.tokenizer_digest),
        "stages n": f"{len(config.stage_layers)} (layers {list(config.stage_layers)})",
        "anchors": f"{list(config.anchors)}",
        "head layers": f"{config.num_layers}, kind {config.kind}",
        "draft vocabulary": f"{ids} of {config.vocab_size}",
        "parameters": f"{parameters / 1e6:.1f} M in {dtype_name(head)}",
    }
    return (
        f"A draft head for speculative pipeline decoding of {target}: the frozen target is cut into "
        f"{len(config.stage_layers)} pipeline stages that work on several tokens of one sequence at once, and this "
        "head drafts the next token in time. The target verifies every token.\n\n"
        + _table(("", ""), list(rows.items()))
    )


def _use(head: SpeculationHead, name: str) -> str:
    target = head.origin.source or "TARGET"
    return f"""\
## Use

```python
from spd_lightning import SpdDecoder, load_head, load_target

target = load_target("{target}")
print(SpdDecoder(target, load_head("{name}", target)).generate([1, 2, 3], max_new_tokens=32))
```

```bash
spd-lightning generate --target {target} --head {name}
spd-lightning bench --target {target} --head {name} --prompts questions.jsonl
```

In transformers, for a model that is loaded already: `model.generate(**inputs, custom_generate="{name}",
trust_remote_code=True)`. This runs `custom_generate/generate.py` of this folder and needs the package spd_lightning."""


def _measured(metrics: Sequence[Metric], notes: Sequence[str]) -> str:
    lines = ["## Measured", ""]
    if metrics:
        head = ("prompts", "T", "p (95 %)", "A", "S", "wall clock", "identical", "weights", "date", "commit")
        lines += [_table(head, [_row(metric) for metric in metrics]), ""]
        lines.append(
            "p: accepted / verified drafts. A: accepted drafts between two restarts. S: theoretical speedup, tokens "
            "per full target pass: what parallel stages gain at most. Wall clock is measured only where stages really "
            "run in parallel. Identical: greedy outputs equal to plain decoding, token for "
            "token. Weights: the dtype they were measured in."
        )
    else:
        lines.append("Nothing was measured with these weights.")
    lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines).strip()


def _row(metric: Metric) -> tuple[str, ...]:
    interval = "" if metric.interval is None else f" ({metric.interval[0]:.3f} - {metric.interval[1]:.3f})"
    where = metric.prompts if metric.category is None else f"{metric.prompts}: {metric.category}"
    return (
        f"{where}, {metric.count} x {metric.new_tokens} tokens",
        f"{metric.temperature:g}",
        f"{metric.acceptance:.3f}{interval}",
        _number(metric.accepted_per_restart),
        _number(metric.theoretical_speedup),
        "not measured" if metric.wall_clock_speedup is None else f"{metric.wall_clock_speedup:.2f}",
        "-" if metric.identical is None else f"{metric.identical} of {metric.count}",
        metric.weights or "-",
        (metric.date or "-")[:10],
        _short(metric.commit, 9),
    )


def _training(background: Background) -> str:
    lines = ["## Training", ""]
    told = background.training
    if told:
        seconds = sum((told.get("seconds") or {}).values())
        rows = {
            "data": f"`{told.get('train')}`",
            "held out": f"`{told.get('validation')}`",
            "tokens": f"{told['tokens'] / 1e6:.2f} M" if told.get("tokens") else "not recorded",
            "began": told.get("began") or "not recorded",
            "seconds": f"{seconds:.0f}, real decoding included" if seconds else "not recorded",
            "commit": _short(told.get("commit"), 40),
            "versions": ", ".join(f"{k} {v}" for k, v in (told.get("versions") or {}).items()),
        }
        lines += [_table(("", ""), list(rows.items())), "", "```bash", shlex.join(told.get("command") or []), "```"]
    else:
        lines.append("Not recorded: the head was exported without its run.")
    if background.published:
        lines += ["", f"Imported from the published format, version 11 (`{background.source.get('name')}`)."]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _short(digest: Any, length: int = 16) -> str:
    return f"`{str(digest)[:length]}`" if digest else "not recorded"


def _title(plot: str) -> str:
    return plot.rpartition("/")[2].removesuffix(".png").replace("_", " ").capitalize()


def certificate_line(certificate: Mapping[str, Any]) -> str:
    """What a certificate says, for the card."""
    return f"{certificate['summary']} Details: [certificate.json](certificate.json)."
