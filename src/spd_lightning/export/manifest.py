"""A head for a serving project in Rust: safetensors, a version-11 file and spd-head.json (skippy-spd-head/v1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_lightning.export.bundle import listed
from spd_lightning.files import write_whole
from spd_lightning.head.module import SpeculationHead
from spd_lightning.head.version11 import VERSION, version_11_weights, write_version_11

SCHEMA, SERVING_FORMAT = "skippy-spd-head/v1", "safetensors-spd-head-v1"
MANIFEST_FILE, CHECKPOINT_FILE, SERVING_FILE = "spd-head.json", "head_v11.pt", "head.safetensors"
#: Where the published implementation's format is at home.
REFERENCE = "https://arxiv.org/abs/2605.30852"


def write_serving_folder(
    head: SpeculationHead,
    folder: Path,
    base_model_path: str,
    model_type: str,
    published: Mapping[str, Any] | None = None,
    train_span: int | None = None,
) -> None:
    """Write the three files into a folder that exists, the manifest last.

    Args:
        head: in any dtype; it is written in bfloat16.
        folder: where to.
        base_model_path: id or path of the target.
        model_type: the target's family, as in its config.json.
        published, train_span: see `write_version_11`.

    Raises:
        InputError: an option of the head that version 11 cannot express; a file cannot be written.
    """
    from safetensors.torch import save_file

    write_version_11(head, folder / CHECKPOINT_FILE, base_model_path, published, train_span)
    weights, _ = version_11_weights(head)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / SERVING_FILE)
    manifest = {
        "schema": SCHEMA,
        "checkpoint": {"path": CHECKPOINT_FILE, **listed(folder / CHECKPOINT_FILE)},
        "serving_checkpoint": {
            "path": SERVING_FILE,
            **listed(folder / SERVING_FILE),
            "format": SERVING_FORMAT,
            "tensor_count": len(weights),
            "dtype": "bfloat16",
        },
        "source": {
            "format": "spd-checkpoint",
            "reference_repo": REFERENCE,
            "base_model_path": base_model_path,
            "model_type": model_type,
            "checkpoint_version": VERSION,
        },
        "topology": topology(head),
    }
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n", "--output")


def topology(head: SpeculationHead) -> dict[str, Any]:
    """Sizes, stages and anchors; `stage_layer_boundaries` are l_0 = 0 .. l_n = L, one more than there are stages."""
    config = head.config
    ids = config.draft_token_ids
    return {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "draft_token_ids": None if ids is None else list(ids),
        "num_stages": len(config.stage_layers),
        "stage_layer_boundaries": list(head.staircase.boundaries),
        "num_spec_layers": config.num_layers,
        "anchors": list(config.anchors),
    }
