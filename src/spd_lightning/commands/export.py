"""The commands export and import: a head as a sealed folder that proves itself, or in a published format."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import BrokenInvariantError, InputError

if TYPE_CHECKING:
    from spd_lightning.export.background import Background
    from spd_lightning.export.publish import Upload
    from spd_lightning.head.module import SpeculationHead
    from spd_lightning.target.loading import Loading
    from spd_lightning.target.target import Target

_EXPORT = """\
Write a head as a folder that can be handed on: weights, sealed config with the identity of its target, model card,
provenance, a parity fixture and, with --certify, a lossless certificate. A fresh process loads the folder and checks it
before it gets its name. Figures on the card come from the run's own record; no target is loaded without --certify."""

_EXPORT_EXAMPLES = """\
examples
  spd-lightning export --checkpoint runs/tiny --output heads/tiny
  spd-lightning export --checkpoint runs/tiny --output heads/tiny --certify
  spd-lightning export --checkpoint runs/llama31 --output heads/llama31 --bench benches/mt.json --push-to-hub me/head
  spd-lightning export --checkpoint runs/llama31 --output heads/llama31.pt --format v11     the published format

formats
  folder     what load_head, generate, bench and transformers' custom_generate read
  v11        one .pt file of the published implementation's format, version 11, bfloat16
  manifest   a folder with spd-head.json (skippy-spd-head/v1), a version-11 file and safetensors with its names"""

_IMPORT = """\
Turn a head that was published as a version-11 .pt file into a folder as `export` writes it. Such a file carries neither
final norm nor RoPE, so its target is loaded too."""

_IMPORT_EXAMPLES = """\
example
  spd-lightning import head.pt --target meta-llama/Llama-3.1-8B-Instruct --output heads/llama31"""

CERTIFICATE_TOKENS = 64


def export_parser() -> CommandParser:
    """The arguments of export."""
    made = CommandParser("spd-lightning export", _EXPORT, _EXPORT_EXAMPLES)
    made.add_argument(
        "--checkpoint",
        required=True,
        metavar="SOURCE",
        help="run directory, .ckpt (file or folder), head folder or hub id",
    )
    made.add_argument("--output", required=True, type=Path, metavar="PATH", help="new folder; a .pt file for v11")
    made.add_argument("--format", choices=("folder", "v11", "manifest"), default="folder", help="default: folder")
    _add_dtype(made, "auto")
    story = made.add_argument_group("card")
    story.add_argument(
        "--bench", type=Path, nargs="+", default=[], metavar="RECORD", help="records of bench, made with these weights"
    )
    story.add_argument("--certify", action="store_true", help="load the target, prove that decoding is lossless")
    story.add_argument("--certify-prompts", type=Path, metavar="FILE", help="one prompt per line; default: 16 built in")
    _add_target(made, required=False)
    hub = made.add_argument_group("hub")
    hub.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder, in one commit")
    hub.add_argument("--private", action="store_true", help="make a new repository private")
    hub.add_argument("--dry-run", action="store_true", help="show exactly what would be uploaded; upload nothing")
    return made


def import_parser() -> CommandParser:
    """The arguments of import."""
    made = CommandParser("spd-lightning import", _IMPORT, _IMPORT_EXAMPLES)
    made.add_argument("head", type=Path, metavar="HEAD.pt", help="a version-11 file")
    made.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
    _add_dtype(made, "keep")
    _add_target(made, required=True)
    return made


def _add_dtype(parser: CommandParser, default: str) -> None:
    parser.add_argument(
        "--dtype",
        default=default,
        help=f"auto (of the published target), keep (as stored), or a torch name; default: {default}",
    )


def _add_target(parser: CommandParser, required: bool) -> None:
    group = parser.add_argument_group("target" if required else "target, for --certify")
    default = "" if required else "; default: the one that the head names"
    group.add_argument("--target", required=required, help=f"folder or hub id{default}")
    group.add_argument("--revision", help="hub revision: branch, tag or commit")
    group.add_argument("--target-dtype", default="auto", help="auto (bfloat16 on a GPU, else float32) or a torch name")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    group.add_argument("--offline", action="store_true", help="use only what is on this machine already")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the target")


def run_export(argv: list[str]) -> int:
    """`spd-lightning export`."""
    options = export_parser().parse_args(argv)
    _check(options)
    from spd_lightning.export.background import background_of, metrics_of_bench
    from spd_lightning.head.loading import find_head, read_source

    found = find_head(options.checkpoint)
    if found.kind == "version 11":
        raise InputError(
            f"--checkpoint {options.checkpoint} is a version-11 file, which needs its target: spd-lightning import "
            f"{options.checkpoint} --target TARGET --output DIR"
        )
    head = read_source(found)
    background = background_of(found, head)
    stored, head = copy.deepcopy(head), _cast(head, options.dtype)
    measured = [metric for record in options.bench for metric in metrics_of_bench(record, (stored, head))]
    background = replace(background, metrics=[*background.metrics, *measured])
    if options.format == "v11":
        return _write_v11(head, options, background)
    if options.format == "manifest":
        return _write_manifest(head, options, background)
    certificate = _certificate(head, options, background)
    return _write_folder(head, options, background, certificate)


def run_import(argv: list[str]) -> int:
    """`spd-lightning import`."""
    options = import_parser().parse_args(argv)
    from spd_lightning.export.background import background_of
    from spd_lightning.export.bundle import check_output, write_bundle
    from spd_lightning.head.loading import find_head, read_source

    check_output(options.output)
    found = find_head(options.head)
    if found.kind != "version 11":
        raise InputError(f"{options.head} is no version-11 .pt file: spd-lightning export --checkpoint {options.head}")
    target = _load_target(options, options.target)
    head = read_source(found, target)
    head = _cast(head.to("cpu"), options.dtype)
    write_bundle(head, options.output, background_of(found, head))
    _report(head, options.output, options.target)
    return 0


def _check(options: Namespace) -> None:
    """Refuse what contradicts itself or cannot be written, before anything is imported or loaded."""
    if options.format == "v11":
        if options.output.suffix != ".pt":
            raise InputError(f"--output {options.output}: --format v11 writes one file, whose name ends in .pt.")
        if options.output.exists():
            raise InputError(f"--output {options.output} exists already: name a new file, or remove this one.")
        if not options.output.parent.is_dir():
            raise InputError(f"--output {options.output}: the folder {options.output.parent} does not exist.")
    if options.format != "folder":
        for flag in ("certify", "push_to_hub", "bench"):
            if getattr(options, flag):
                raise InputError(f"--{flag.replace('_', '-')} belongs to --format folder, not to {options.format}.")
    if options.push_to_hub is None:
        for flag in ("private", "dry_run"):
            if getattr(options, flag):
                raise InputError(f"--{flag.replace('_', '-')} is about an upload: give --push-to-hub OWNER/NAME too.")
    if options.certify_prompts is not None and not options.certify:
        raise InputError("--certify-prompts is used by nothing: give --certify too.")
    if options.push_to_hub is not None:
        from spd_lightning.export.publish import check_repository

        check_repository(options.push_to_hub)
    if options.format != "v11":
        from spd_lightning.export.bundle import check_output

        check_output(options.output)


def _cast(head: SpeculationHead, wanted: str) -> SpeculationHead:
    """The head in the dtype it is stored in: `auto`, `keep` or a name."""
    import torch

    from spd_lightning.head.folder import FLOATS

    if wanted == "keep" or (wanted == "auto" and head.origin.dtype is None):
        return head
    name = head.origin.dtype if wanted == "auto" else wanted
    dtype = getattr(torch, str(name), None)
    if dtype not in FLOATS:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
        raise InputError(f"--dtype {name}: expected auto, keep, {names}.")
    return head.to(dtype)


def _loading(options: Namespace) -> Loading:
    from spd_lightning.target.loading import Loading

    return Loading(
        revision=options.revision,
        dtype=options.target_dtype,
        offline=options.offline,
        trust_remote_code=options.trust_remote_code,
    )


def _load_target(options: Namespace, source: str) -> Target:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from spd_lightning.target.loading import check_target, load_target

    disable_progress_bar()
    loading = _loading(options)
    check_target(source, loading=loading, named=lambda name: "--" + name.replace("_", "-"))
    return load_target(
        source, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"), loading=loading
    )


def _certificate(head: SpeculationHead, options: Namespace, background: Background) -> dict[str, Any] | None:
    """The fields of a new certificate, or of that of an earlier export with the same weights."""
    from spd_lightning.head.digest import weights_digest

    digest = weights_digest(head)
    if not options.certify:
        earlier = background.certificate
        return dict(earlier) if earlier is not None and earlier.get("weights_digest") == digest else None
    from spd_lightning.data.progress import progress_bar
    from spd_lightning.decoding.certificate import certify
    from spd_lightning.head.loading import check_fits
    from spd_lightning.provenance import provenance
    from spd_lightning.target.loading import load_tokenizer

    source = options.target or head.origin.source
    if source is None:
        raise InputError("--certify needs the target, and the head does not say which it is: give --target.")
    if options.target is None and options.revision is None:
        options.revision = head.origin.commit or head.origin.revision
    target = _load_target(options, source)
    check_fits(head, target)
    used = copy.deepcopy(head).to(target.device, target.dtype).eval()  # as load_head would give it
    tokenizer = load_tokenizer(source, _loading(options))
    prompts = [_encode(tokenizer, text) for text in _certificate_prompts(options.certify_prompts)]
    with progress_bar("certifying", "generations") as progress:
        made = certify(target, used, prompts, max_new_tokens=CERTIFICATE_TOKENS, on_progress=progress)
    record = provenance(("torch", "transformers", "spd_lightning"))
    fields = made.fields() | {"weights_digest": digest, "target": asdict(target.identity)}
    fields |= {"date": record["date"], "commit": record["commit"], "versions": record["versions"]}
    if not made.holds:
        raise BrokenInvariantError(f"decoding with this head is NOT lossless here, nothing is exported: {made.summary}")
    return fields


def _certificate_prompts(path: Path | None) -> list[str]:
    file = path or Path(__file__).resolve().parent.parent / "export" / "files" / "prompts.txt"
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"--certify-prompts {file} cannot be read: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"--certify-prompts {file} holds no prompt: expected one per line.")
    return prompts


def _encode(tokenizer: Any, text: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(text)["input_ids"])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _write_folder(
    head: SpeculationHead, options: Namespace, background: Background, certificate: dict[str, Any] | None
) -> int:
    from spd_lightning.export.bundle import write_bundle

    repo = options.push_to_hub
    write_bundle(head, options.output, background, certificate, name=repo)
    _report(head, options.output, options.target or head.origin.source)
    for note in background.notes:
        _say(f"note: {note}")
    if certificate is None:
        _say("not certified: --certify loads the target and proves losslessness")
    if repo is not None:
        from spd_lightning.export.publish import plan_upload, push

        upload = plan_upload(options.output, repo, options.private)
        _show_upload(upload, options.dry_run)
        if not options.dry_run:
            _say(f"uploaded: {push(upload)}")
    return 0


def _write_v11(head: SpeculationHead, options: Namespace, background: Background) -> int:
    from spd_lightning.head.version11 import write_version_11

    write_version_11(head, options.output, _base_model(head, options), background.published)
    _say(f"{options.output}: {_size(options.output.stat().st_size)}, version 11, bfloat16")
    return 0


def _write_manifest(head: SpeculationHead, options: Namespace, background: Background) -> int:
    from spd_lightning.export.manifest import write_serving_folder

    model_type = head.origin.model_type
    if model_type is None:
        raise InputError("--format manifest needs the family of the target, which this head does not name.")
    staged = options.output.with_name(f".{options.output.name}.part")
    import shutil

    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        write_serving_folder(head, staged, _base_model(head, options), model_type, background.published)
        if options.output.is_dir():
            options.output.rmdir()
        staged.rename(options.output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _table(options.output)
    return 0


def _base_model(head: SpeculationHead, options: Namespace) -> str:
    source = options.target or head.origin.source
    if source is None:
        raise InputError(
            f"--format {options.format} names the target, and this head does not say which it is: give --target."
        )
    return str(source)


def _report(head: SpeculationHead, folder: Path, target: str | None) -> None:
    from spd_lightning.export.background import dtype_name

    _table(folder)
    parameters = sum(p.numel() for p in head.parameters())
    _say(f"{parameters:,} parameters in {dtype_name(head)}; loaded and checked by a fresh process")
    target = target or "TARGET"
    _say("Try next:")
    _say(f"  spd-lightning generate --target {target} --head {folder}")
    _say(f"  spd-lightning bench --target {target} --head {folder} --prompts questions.jsonl")


def _table(folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from spd_lightning.export.bundle import files_of

    table = Table(title=str(folder), title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    total = 0
    for name in files_of(folder):
        size = (folder / name).stat().st_size
        total += size
        table.add_row(name, _size(size))
    table.add_row("total", _size(total), style="bold")
    Console(file=sys.stdout).print(table)


def _show_upload(upload: Upload, dry_run: bool) -> None:
    does = "would upload" if dry_run else "uploading"
    visibility = "private" if upload.private else "public"
    _say(f"{does} to https://huggingface.co/{upload.repo} ({visibility} if it is new), one commit: {upload.message!r}")
    for name, size, digest in upload.files:
        _say(f"  {digest}  {size:>12,}  {name}")
    _say(f"  {len(upload.files)} files, {_size(upload.bytes)}")


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _say(text: str) -> None:
    print(text, flush=True)
