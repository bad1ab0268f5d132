"""Write the bundle: a head's folder with its card, provenance, parity fixture and certificate, whole or not at all.

Everything is written beside the wanted place, loaded and checked by a fresh process, and only then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spd_lightning.errors import BrokenInvariantError, InputError, first_line
from spd_lightning.export.background import Background, dtype_name, metric_fields, without_paths
from spd_lightning.export.card import certificate_line, model_card
from spd_lightning.export.fixture import FIXTURE_FILE, write_fixture
from spd_lightning.head.digest import weights_digest
from spd_lightning.head.folder import PROVENANCE_FILE, file_digest, save_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.provenance import provenance

FORMAT = "spd-export/1"
CARD_FILE, VOCABULARY_FILE, CERTIFICATE_FILE = "README.md", "draft_vocabulary.json", "certificate.json"
PLOTS_FOLDER, CODE_FOLDER = "plots", "custom_generate"
_CODE = Path(__file__).resolve().parent / "files" / CODE_FOLDER
_CHECK_SECONDS = 3600


def check_output(output: Path) -> None:
    """Refuse a place that holds something, before anything is loaded."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"--output {output} exists already: name a new folder, or remove this one.")


def write_bundle(
    head: SpeculationHead,
    output: Path,
    background: Background,
    certificate: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Path:
    """Write, check in a fresh process, rename.

    Args:
        head: in the dtype it is stored in.
        output: the folder; it must not hold anything.
        background: what is known of it.
        certificate: fields of a lossless certificate, `summary` among them.
        name: what the card calls it, such as a repository; default: the folder's name.

    Raises:
        InputError: the place cannot be written.
        BrokenInvariantError: what was written does not prove itself; nothing appears at `output`.
    """
    check_output(output)
    staged = output.with_name(f".{output.name}.part")  # what a killed process left of it is thrown away
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        _fill(head, staged, background, certificate, name or output.name)
        prove(staged)
        if output.is_dir():
            output.rmdir()
        staged.rename(output)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror or first_line(error)}.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return output


def _fill(
    head: SpeculationHead, folder: Path, background: Background, certificate: Mapping[str, Any] | None, name: str
) -> None:
    save_head(head, folder)
    write_fixture(head, folder / FIXTURE_FILE)
    ids = head.config.draft_token_ids
    if ids is not None:
        _write_json(folder / VOCABULARY_FILE, {"token_ids": list(ids)}, indent=None)
    if certificate is not None:
        _write_json(folder / CERTIFICATE_FILE, certificate)
    plots = []
    for plot in background.plots:
        (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(plot, folder / PLOTS_FOLDER / plot.name)
        plots.append(f"{PLOTS_FOLDER}/{plot.name}")
    (folder / CODE_FOLDER).mkdir()
    for file in sorted(_CODE.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / CODE_FOLDER / file.name)
    line = None if certificate is None else certificate_line(certificate)
    card = model_card(head, name, background, line, plots, None if ids is None else VOCABULARY_FILE)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    _write_json(
        folder / PROVENANCE_FILE,
        {
            "format": FORMAT,
            "exported": without_paths(provenance()),
            "source": background.source,
            "target": asdict(head.origin),
            "dtype": dtype_name(head),
            "weights_digest": weights_digest(head),
            "training": background.training,
            "metrics": [metric_fields(metric) for metric in background.metrics],
            "notes": list(background.notes),
            "published": background.published,
            "certificate": certificate,
            "plots": plots,
            "files": {entry: listed(folder / entry) for entry in files_of(folder)},
        },
    )


def prove(folder: Path) -> dict[str, Any]:
    """Load the folder in a fresh process and check it against its fixture and its list of files.

    Raises:
        BrokenInvariantError: it does not hold; the text of the check says why.
    """
    command = [sys.executable, "-m", "spd_lightning.export.check", str(folder.resolve())]
    root = str(Path(__file__).resolve().parents[2])  # a checkout need not be installed
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_CHECK_SECONDS, env=os.environ | {"PYTHONPATH": paths}
    )
    if done.returncode:
        raise BrokenInvariantError(f"the export does not prove itself: {done.stderr.strip()[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def files_of(folder: Path) -> list[str]:
    """Names of all files of a bundle, as in a repository, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def listed(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
