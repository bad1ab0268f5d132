"""The manifest of a serving project: every field it wants, digests that hold, the tensors of the version-11 file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd_lightning.export.manifest import write_serving_folder
from spd_lightning.head.loading import new_head
from spd_lightning.target.target import Target


@pytest.mark.parametrize("vocabulary", [None, (3, 5, 8, 13)])
def test_a_manifest_describes_the_files_beside_it(
    make_target: Callable[..., Target], tmp_path: Path, vocabulary: tuple[int, ...] | None
) -> None:
    target = make_target(num_layers=5, stage_layers=(2, 2, 1))
    head = new_head(target, num_layers=2, draft_token_ids=vocabulary)
    write_serving_folder(head, tmp_path, "org/model", "llama")
    assert {file.name for file in tmp_path.iterdir()} == {"spd-head.json", "head_v11.pt", "head.safetensors"}
    manifest = json.loads((tmp_path / "spd-head.json").read_text())
    assert manifest["schema"] == "skippy-spd-head/v1"
    for part in ("checkpoint", "serving_checkpoint"):
        data = (tmp_path / manifest[part]["path"]).read_bytes()
        assert manifest[part]["bytes"] == len(data)
        assert manifest[part]["sha256"] == hashlib.sha256(data).hexdigest()
    served, published = (
        load_file(tmp_path / "head.safetensors"),
        torch.load(tmp_path / "head_v11.pt", weights_only=True),
    )
    assert set(served) == set(published["state_dict"])
    assert all(torch.equal(tensor, published["state_dict"][name]) for name, tensor in served.items())
    assert {tensor.dtype for tensor in served.values()} == {torch.bfloat16}
    assert {name: manifest["serving_checkpoint"][name] for name in ("format", "tensor_count", "dtype")} == {
        "format": "safetensors-spd-head-v1",
        "tensor_count": len(served),
        "dtype": "bfloat16",
    }
    assert set(manifest["source"]) == {
        "format", "reference_repo", "base_model_path", "model_type", "checkpoint_version",
    }  # fmt: skip
    assert manifest["topology"] == {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": target.vocab_size if vocabulary is None else 4,
        "draft_token_ids": None if vocabulary is None else [3, 5, 8, 13],
        "num_stages": 3,
        "stage_layer_boundaries": [0, 2, 4, 5],
        "num_spec_layers": 2,
        "anchors": list(head.config.anchors),
    }
