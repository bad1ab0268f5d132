"""Peak memory of real training steps beside what `spd-lightning plan` says before them.

    python benchmarks/memory.py                     every setting for this machine, some 10 minutes on two CPU cores
    python benchmarks/memory.py --settings padded   one of them; writes no record
    python benchmarks/memory.py --table             renew the table of docs/memory.md from the record

Each setting is a random Llama in a temporary folder and a few steps of `fit` in fresh processes, one per rank. On CPUs
the peak is that of the process's resident memory (VmHWM), counted anew from the second step on, when gradients and
optimizer state exist; the C library is told to return freed memory at once (MALLOC_ARENA_MAX and thresholds), so that
what is counted is what is held. On a machine with CUDA it is torch.cuda.max_memory_allocated, which knows nothing of
the CUDA context; the plan's assumption about that is left out of the comparison.

Prints a table and writes benchmarks/records/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import MIB, RECORDS, ROOT, console, write_record

DOCUMENT = ROOT / "docs" / "memory.md"
STEPS = 3


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        name: for people.
        target: fields of its LlamaConfig.
        fields: of the recipe; dots as double underscores.
        ranks: processes.
        documents: that share a packed row; 1: rows are padded.
        variables: of the environment.
    """

    name: str
    target: dict[str, int]
    fields: dict[str, Any]
    ranks: int = 1
    documents: int = 1
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The fields as arguments."""
        return [f"--{name.replace('__', '.')}={value}" for name, value in self.fields.items()]


def llama(hidden: int, intermediate: int, layers: int, heads: int, groups: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // groups,
        "vocab_size": vocabulary,
    }


SMALL, WIDE = llama(512, 1536, 8, 8, 2, 8192), llama(768, 2048, 8, 12, 3, 16384)
CPU = [
    Setting("padded", WIDE, {"data__max_length": 768, "data__batch_size": 2}),
    Setting("long and packed", SMALL, {"data__max_length": 4096, "data__batch_size": 1}, documents=3),
    Setting(
        "2 draws of restarts",
        SMALL,
        {"data__max_length": 1024, "data__batch_size": 1, "model__restart_draws": 2},
    ),
    Setting(
        "activation checkpointing",
        SMALL,
        {
            "data__max_length": 2048,
            "data__batch_size": 2,
            "model__head__num_layers": 3,
            "model__activation_checkpointing": "true",
        },
    ),
    Setting(
        "ddp, 2 ranks, 2 micro-batches",
        WIDE,
        {
            "data__max_length": 512,
            "data__batch_size": 2,
            "trainer__strategy": "ddp",
            "trainer__accumulate_grad_batches": 2,
        },
        ranks=2,
    ),
    *(
        Setting(
            f"ZeRO-{stage}, 2 ranks",
            WIDE,
            {"data__max_length": 512, "data__batch_size": 2, "trainer__strategy": f"deepspeed_stage_{stage}"},
            ranks=2,
        )
        for stage in (1, 2, 3)
    ),
    *(
        Setting(
            name,
            SMALL,
            {"data__max_length": 1024, "data__batch_size": 1, "trainer__precision": "bf16-mixed"},
            variables=variables,
        )
        for name, variables in (
            ("bf16-mixed", {}),
            ("bf16-mixed, no cache of kernels", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}),
        )
    ),
]
LARGE = llama(2048, 5632, 24, 16, 2, 32768)
CUDA = [
    Setting("padded", LARGE, {"data__max_length": 2048, "data__batch_size": 4}),
    Setting("long and packed", LARGE, {"data__max_length": 8192, "data__batch_size": 1}, documents=3),
    Setting(
        "activation checkpointing",
        LARGE,
        {
            "data__max_length": 2048,
            "data__batch_size": 8,
            "model__head__num_layers": 3,
            "model__activation_checkpointing": "true",
        },
    ),
]


# -- one rank, in a process of its own ---------------------------------------------------------------------------------


@dataclass
class Meter:
    """Peak memory of this process, in bytes."""

    cuda: bool
    before: int = field(default=0, init=False)
    after_steps: list[int] = field(default_factory=list, init=False)

    def reset(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

    def peak(self) -> int:
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        return status("VmHWM")


def status(name: str) -> int:
    """A field of this process's status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def rank(arguments: list[str], cuda: bool) -> None:
    """`fit` until STEPS optimizer steps are done; prints what was measured and ends there."""
    import torch

    from spd_lightning import cli
    from spd_lightning.training.module import SpdModule

    torch.set_num_threads(1)
    meter, configure = Meter(cuda), SpdModule.configure_model

    def configure_model(self: Any) -> None:
        meter.before = meter.before or status("VmRSS")
        configure(self)

    def on_train_batch_start(self: Any, *_: Any) -> None:
        if self.global_step == 1 and not hasattr(self, "_reset"):
            self._reset = True
            meter.reset()

    def on_train_batch_end(self: Any, *_: Any) -> None:
        meter.after_steps.append(status("VmRSS"))
        if self.global_step >= STEPS:
            found = {"before": meter.before, "peak": meter.peak(), "after_steps": meter.after_steps}
            print("MEASURED", json.dumps(found), flush=True)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            os._exit(0)

    # `fit` is measured as it is typed and builds its trainer itself: there is none to hand a callback to. What the
    # module's own on_train_batch_end would do is to log; of what it sums up, nothing is asked here.
    SpdModule.configure_model = configure_model  # type: ignore[method-assign]
    SpdModule.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    SpdModule.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
    sys.exit(cli.main(arguments))


# -- a setting ---------------------------------------------------------------------------------------------------------


def measure(setting: Setting, cuda: bool) -> dict[str, Any]:
    """Plan and measurement of a setting; of several ranks the largest peak counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_target(setting, folder / "target")
        length = setting.fields["data__max_length"]
        write_chats(folder / "chats.jsonl", length // setting.documents if setting.documents > 1 else length)
        arguments = ["--config", "tiny", *fields(setting, folder, cuda), *setting.words]
        planned = plan(arguments, setting, cuda)
        found = run(["fit", *arguments, f"--run_dir={folder / 'run'}"], setting, folder, cuda)
    strategy = setting.fields.get("trainer__strategy", "ddp")
    said = next(one for one in planned["strategies"] if one["strategy"] == strategy)
    other = said["parts"]["other"] if cuda else 0
    peak = max(one["peak"] for one in found)
    before = max(one["before"] for one in found)
    row = {
        "setting": setting.name,
        "ranks": setting.ranks,
        "variables": setting.variables,
        "target": setting.target,
        "fields": setting.fields,
        "trained_parameters": planned["trained_parameters"],
        "target_parameters": planned["target_parameters"],
        "planned_mib": round((said["total"] - other) / MIB),
        "measured_mib": round(peak / MIB),
        "process_before_mib": round(before / MIB),
        "peaks_mib": [round(one["peak"] / MIB) for one in found],
        "resident_after_steps_mib": [round(count / MIB) for count in found[0]["after_steps"]],
        "planned_over_measured": round((said["total"] - other) / peak, 3),
        "moment": said["moment"],
        "parts_mib": {part: round(count / MIB) for part, count in said["parts"].items()},
    }
    if not cuda:
        above = (said["total"] - said["parts"]["other"]) / (peak - before)
        row["planned_over_measured_without_process"] = round(above, 3)
    console.print(row)
    return row


def fields(setting: Setting, folder: Path, cuda: bool) -> list[str]:
    """What all settings share."""
    values = {
        "model.target": folder / "target",
        "model.num_stages": 8,
        "model.optimizer": "adamw",  # what DeepSpeed knows
        "data.tokenizer": "tiny",
        "data.train": folder / "chats.jsonl",
        "data.validation": folder / "chats.jsonl",
        "data.packing": "true" if setting.documents > 1 else "false",
        "data.validation_samples": 2,
        "data.cleaning.decontaminate": "[]",
        "decoding.prompts": 2,
        "decoding.max_new_tokens": 2,
        "final.prompts": 0,
        "trainer.accelerator": "gpu" if cuda else "cpu",
        "trainer.devices": setting.ranks,
        "trainer.max_steps": STEPS + 1,
        "trainer.val_check_interval": STEPS + 1,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
    }
    return [f"--{name}={value}" for name, value in values.items()]


def write_target(setting: Setting, folder: Path) -> None:
    """Random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**setting.target, max_position_embeddings=16384, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_chats(path: Path, tokens: int) -> None:
    """Chats that are at least so long, nearly all of it the assistant's, and all different."""
    draws = random.Random(0)
    words = ["".join(draws.choices("etaoinshrdlu", k=draws.randint(2, 7))) for _ in range(2000)]
    lines = []
    for number in range(40):
        text = " ".join(draws.choices(words, k=tokens))  # a word of such letters is at least a token
        messages = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")


def plan(arguments: list[str], setting: Setting, cuda: bool) -> dict[str, Any]:
    """What the command says."""
    command = [sys.executable, "-m", "spd_lightning", "plan", *arguments, f"--gpus={setting.ranks}", "--json"]
    command += [] if cuda else ["--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def run(arguments: list[str], setting: Setting, folder: Path, cuda: bool) -> list[dict[str, Any]]:
    """Start all ranks as torchrun would; what each measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).resolve()), "--rank", json.dumps(arguments), *(["--cuda"] * cuda)]
    processes = []
    for number in range(setting.ranks):
        variables = environment() | {"SPD_CACHE": str(folder / "cache")} | setting.variables
        if setting.ranks > 1:
            variables |= {
                "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(setting.ranks),
                "LOCAL_WORLD_SIZE": str(setting.ranks), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "memory",
            }  # fmt: skip
        with (folder / f"rank{number}.txt").open("w") as out:
            processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables, cwd=folder))
    found = []
    for number, process in enumerate(processes):
        process.wait()
        text = (folder / f"rank{number}.txt").read_text()
        measured = re.search(r"^MEASURED (.*)$", text, re.MULTILINE)
        if measured is None:
            raise RuntimeError(f"{setting.name}, rank {number}:\n{text[-3000:]}")
        found.append(json.loads(measured[1]))
    return found


def environment() -> dict[str, str]:
    """One thread per process; freed memory goes back to the system at once."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }


# -- telling -----------------------------------------------------------------------------------------------------------


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: measured beside planned."""
    lines = [
        "| setting | ranks | trained / target parameters, M | S x batch | measured, MiB | planned, MiB | "
        "planned / measured | without the process | needs most in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        without = row.get("planned_over_measured_without_process")
        sizes = f"{row['trained_parameters'] / 1e6:.0f} / {row['target_parameters'] / 1e6:.0f}"
        shape = f"{row['fields']['data__max_length']} x {row['fields']['data__batch_size']}"
        lines.append(
            f"| {row['setting']} | {row['ranks']} | {sizes} | {shape} | {row['measured_mib']:,} | "
            f"{row['planned_mib']:,} | **{row['planned_over_measured']:.2f}** | "
            f"{'-' if without is None else f'{without:.2f}'} | {row['moment']} |"
        )
    return "\n".join(lines)


def renew_document() -> None:
    """Put the record's table between the marks of docs/memory.md."""
    record = json.loads((RECORDS / "memory.json").read_text())
    machine = record["machine"]
    source = (
        f"`python {' '.join(record['argv'])}`, {record['date'][:10]}, commit {record['commit'][:7]}"
        f"{' (with changes)' if record['dirty'] else ''}, torch {record['versions']['torch']}, "
        f"{record['device']}, {machine['processor']} ({machine['cores']} cores)."
    )
    text, count = re.subn(
        r"(<!-- table: memory -->\n).*?(<!-- /table -->)",
        lambda found: f"{found[1]}{source}\n\n{table(record['settings'])}\n{found[2]}",
        DOCUMENT.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"docs/memory.md has {count} places for the table: expected one.")
    DOCUMENT.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="only those whose name begins so; no record")
    parser.add_argument("--table", action="store_true", help="renew the table of docs/memory.md only")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--cuda", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(json.loads(options.rank), options.cuda)
        return
    if options.table:
        renew_document()
        return
    import torch

    cuda = torch.cuda.is_available()
    settings = CUDA if cuda else CPU
    wanted = tuple(options.settings or ("",))
    rows = [measure(setting, cuda) for setting in settings if setting.name.startswith(wanted)]
    print(table(rows))
    if options.settings is None:
        device = torch.cuda.get_device_name() if cuda else "CPU"
        write_record("memory", {"device": device, "steps": STEPS, "settings": rows}, threads=1)


if __name__ == "__main__":
    main()
