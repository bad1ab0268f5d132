"""The command doctor: what this machine has, what a run would miss, and how to mend it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import first_line

_ABOUT = """\
Look at this machine: versions, devices, distributed backends, access to the Hugging Face hub and W&B, disk; then prove
in about 20 seconds that it decodes, trains, and runs stages on two processes. Prints what to mend. Exit status: 1 if
something is broken. No account and no network is needed, and nothing is sent."""

_EXAMPLES = """\
examples
  spd-lightning doctor
  spd-lightning doctor --no-self-test --json"""

#: Extras whose packages are asked for, and what is missing without them.
_EXTRAS = {"train": "fit, validate, sweep, report", "server": "data regenerate by a server"}
_ROOM_GB = 20


@dataclass(frozen=True)
class Finding:
    """What was looked at. state: good, note (works, but) or bad; mend: what to do, empty if nothing."""

    what: str
    state: str
    said: str
    mend: str = ""


def parser() -> CommandParser:
    """The arguments of doctor."""
    made = CommandParser("spd-lightning doctor", _ABOUT, _EXAMPLES)
    made.add_argument("--no-self-test", action="store_true", help="look only, run nothing")
    made.add_argument("--offline", action="store_true", help="do not ask the hub or W&B whether they answer")
    made.add_argument("--json", action="store_true", help="print the findings as JSON")
    return made


def run(argv: list[str]) -> int:
    """`spd-lightning doctor`."""
    options = parser().parse_args(argv)
    findings = []
    for finding in _findings(options):
        findings.append(finding)
        if not options.json:
            _print(finding)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    elif mends := [finding.mend for finding in findings if finding.mend]:
        print("\nTo mend" if any(f.state == "bad" for f in findings) else "\nTo have more")
        for mend in dict.fromkeys(mends):
            print(f"  {mend}")
    else:
        print("\nNothing to mend.")
    return int(any(finding.state == "bad" for finding in findings))


def _print(finding: Finding) -> None:
    from rich.console import Console
    from rich.text import Text

    mark, style = {"good": ("ok  ", "green"), "note": ("note", "yellow"), "bad": ("BAD ", "bold red")}[finding.state]
    Console(soft_wrap=True).print(Text.assemble((mark, style), f"  {finding.what:<22}{finding.said}"))


def _findings(options: Namespace) -> Iterator[Finding]:
    yield Finding("python", "good", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _devices()
    yield from _backends()
    yield _memory()
    yield from _disk()
    yield from _hub(options.offline)
    yield from _wandb(options.offline)
    if not options.no_self_test:
        yield from _self_test()


# -- what is installed -----------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    """Every package that the core and the extras ask for, against the range they ask for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("spd_lightning") or []]
    except PackageNotFoundError:
        yield Finding("spd_lightning", "note", "run from a source tree, not installed", "pip install -e '.[train]'")
        return
    for extra, what in {"": "decoding", **_EXTRAS}.items():
        found, wrong = [], []
        for requirement in wanted:
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            if extra and (requirement.marker is None or "extra" not in str(requirement.marker)):
                continue
            try:
                has = version(requirement.name)
            except PackageNotFoundError:
                wrong.append(f"{requirement.name} is missing")
                continue
            if requirement.specifier.contains(has, prereleases=True):
                found.append(f"{requirement.name} {has}")
            else:
                wrong.append(f"{requirement.name} {has} is not {requirement.specifier}")
        name = f"packages [{extra}]" if extra else "packages"
        if not wrong:
            yield Finding(name, "good", ", ".join(dict.fromkeys(found)))
            continue
        install = f"spd_lightning[{extra}]" if extra else "spd_lightning"
        state = "note" if extra else "bad"
        yield Finding(name, state, f"{'; '.join(wrong)} (for {what})", f"pip install '{install}'")


def _devices() -> Iterator[Finding]:
    import torch

    from spd_lightning.provenance import machine

    cores = os.cpu_count() or 1
    yield Finding("processor", "good", f"{machine()['processor']}, {cores} cores")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: set trainer.precision=16-mixed"
        yield Finding(f"GPU {index}", "good", f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, {half}")
    if count:
        return
    driver = shutil.which("nvidia-smi") is not None
    if driver and "+cpu" in torch.__version__:
        yield Finding("GPU", "bad", "a driver is there, but torch is a CPU build", "install a CUDA build of torch")
    else:
        yield Finding("GPU", "note", "none: the recipe tiny trains on a CPU, larger targets need GPUs")


def _backends() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("torch.distributed", "bad", "not built in", "install another build of torch")
        return
    has = [name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there]
    lacks = torch.cuda.is_available() and "nccl" not in has
    mend = "install a build of torch with NCCL" if lacks else ""
    yield Finding("torch.distributed", "bad" if lacks or not has else "good", ", ".join(has) or "no backend", mend)


def _memory() -> Finding:
    try:
        bytes_ = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Finding("memory", "note", "unknown on this system")
    few = bytes_ < 4e9
    mend = "the recipe tiny needs about 2 GB; close what else runs" if few else ""
    return Finding("memory", "note" if few else "good", f"{bytes_ / 1e9:.0f} GB", mend)


def _disk() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"here": Path.cwd(), "hub cache": Path(HF_HUB_CACHE), "temporary": Path(tempfile.gettempdir())}
    for place, path in places.items():
        name = f"disk, {place}"
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        if not os.access(there, os.W_OK):
            yield Finding(name, "bad", f"{there} cannot be written", f"make {there} writable")
            continue
        free = shutil.disk_usage(there).free / 1e9
        few = free < _ROOM_GB
        mend = f"{there}: an 8 B target takes 16 GB; states of a run some GB each" if few else ""
        yield Finding(name, "note" if few else "good", f"{free:.0f} GB free", mend)


# -- what answers ----------------------------------------------------------------------------------------------------


def _hub(offline: bool) -> Iterator[Finding]:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    token = get_token()
    account = "with a token" if token else "no token: gated targets such as Llama need one"
    if HF_HUB_OFFLINE or offline:
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "not asked (--offline)"
        yield Finding("Hugging Face hub", "note", f"{why}; {account}")
        return
    if problem := _unreachable(ENDPOINT):
        yield Finding(
            "Hugging Face hub", "note", f"{problem}; {account}",
            f"targets and data by hub id need {ENDPOINT}: allow it, or use local folders",
        )  # fmt: skip
        return
    if token:
        try:
            account = f"as {HfApi().whoami()['name']}"
        except Exception as error:  # whatever a refused token raises
            yield Finding("Hugging Face hub", "bad", f"refuses the token: {first_line(error)}", "hf auth login")
            return
    yield Finding("Hugging Face hub", "good", f"answers, {account}", "" if token else "gated targets: hf auth login")


def _wandb(offline: bool) -> Iterator[Finding]:
    try:
        version("wandb")
        from spd_lightning.training.tracking import has_account
    except (PackageNotFoundError, ModuleNotFoundError):
        return  # told as a missing package
    account = has_account()
    said = "an account is set up" if account else "no account: runs are kept offline"
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not offline and (problem := _unreachable(url)):
        yield Finding("W&B", "note", f"{said}; {problem}", "" if not account else f"allow {url}")
        return
    yield Finding("W&B", "good" if account else "note", said, "" if account else "to watch runs live: wandb login")


def _unreachable(url: str, seconds: float = 4.0) -> str | None:
    """Why a server does not answer; None if it does, whatever it says."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"{url} does not answer ({first_line(error)})"


# -- self-test -------------------------------------------------------------------------------------------------------


def _self_test() -> Iterator[Finding]:
    """Decode, learn, and decode on two processes, with the embedded target."""
    with tempfile.TemporaryDirectory(prefix="spd_doctor_") as folder:
        for name, test in (("decodes losslessly", _decodes), ("learns", _learns), ("two ranks", _two_ranks)):
            began = time.perf_counter()
            try:
                said = test(Path(folder))
            except Exception as error:  # a self-test tells whatever goes wrong
                if os.environ.get("SPD_DEBUG"):
                    traceback.print_exc()
                yield Finding(name, "bad", f"{type(error).__name__}: {first_line(error)}", _REPORT)
                return
            yield Finding(name, "good", f"{said} ({time.perf_counter() - began:.1f} s)")


_REPORT = "a self-test failed: SPD_DEBUG=1 spd-lightning doctor shows where"
_PROMPT = [1, 300, 301, 302, 303, 304]


def _models() -> tuple[Any, Any]:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from spd_lightning.head.loading import new_head
    from spd_lightning.target.loading import load_target

    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target("tiny", num_stages=2, device=device)
    return target, new_head(target, num_layers=1)


def _decodes(folder: Path) -> str:
    from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
    from spd_lightning.head.folder import save_head

    target, head = _models()
    found = SpdDecoder(target, head.eval()).generate(_PROMPT, 24, eos_token_id=[])
    plain = autoregressive_generate(target, _PROMPT, 24, eos_token_id=[])
    if found.token_ids != plain.token_ids:
        raise RuntimeError(f"the pipeline gave {found.token_ids}, plain decoding {plain.token_ids}")
    save_head(head, folder / "head")
    return f"{len(found.token_ids)} tokens equal to plain decoding, on {target.device}"


def _learns(folder: Path) -> str:
    import torch

    from spd_lightning.head.layout import StaircaseLayout

    target, head = _models()
    ids = torch.tensor([_PROMPT * 8], device=target.device)
    states, _ = target(ids, head.config.anchors)
    layout = StaircaseLayout.from_restarts(head.staircase, [(0,)], ids.shape[1], device=ids.device)
    optimizer = torch.optim.AdamW((p for p in head.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(4):
        logits = head.logits(head([state.to(head.dtype) for state in states], layout))
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"


def _two_ranks(folder: Path) -> str:
    words = [
        sys.executable, "-m", "spd_lightning", "generate", "--target", "tiny", "--head", str(folder / "head"), "--raw",
        "--prompt", "import os", "--max-new-tokens", "16", "--workers", "2", "--device", "cpu", "--json",
        str(folder / "generation.json"),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=folder)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return "two processes over gloo decode one sequence"
