"""Version-11 heads of Qwen3.5: the target's own gated layers, whose norms are stored minus one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spd_lightning.errors import InputError
from spd_lightning.head.loading import draft_logits, load_head, new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.target import Target


def moved(head: SpeculationHead) -> SpeculationHead:
    """Every trained weight moved, so that no norm is one and no W_k the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return head


def write_version_11(head: SpeculationHead, path: Path, minus_one: bool) -> None:
    """The published format: their names, no final norm, no RoPE; layers of Qwen3.5 store norms minus one."""
    state = {}
    for name, tensor in head.state_dict().items():
        if name == "norm.weight":
            continue
        if minus_one and name.endswith("norm.weight"):
            tensor = tensor - 1
        state[name.replace("aggregation.", "aggr_projs.").replace("layers.", "spec_layers.")] = tensor.clone()
    config = head.config
    torch.save(
        {
            "state_dict": state,
            "config": {
                "version": 11,
                "hidden_size": config.hidden_size,
                "vocab_size": config.vocab_size,
                "num_stages": len(config.stage_layers),
                "stage_layers": list(config.stage_layers),
                "num_spec_layers": config.num_layers,
                "aggr_feature_bound": list(config.anchors),
            },
        },
        path,
    )


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_moe", "gemma3_text", "llama"])
def test_a_version_11_file_is_read_with_the_layers_that_its_family_publishes(
    make_target: Callable[..., Target], tmp_path: Path, family: str
) -> None:
    target = make_target(family, num_layers=5, stage_layers=(2, 2, 1))
    head = moved(new_head(target, num_layers=2))
    own = head.config.kind == "target"
    assert own == family.startswith("qwen3_5")
    write_version_11(head, tmp_path / "head.pt", minus_one=own)
    read = load_head(tmp_path / "head.pt", target)
    assert read.config == head.config
    ids = torch.arange(12)[None] % 60
    torch.testing.assert_close(draft_logits(target, read, ids), draft_logits(target, head, ids), rtol=1e-5, atol=1e-5)


def test_a_gated_head_is_refused_by_a_target_of_other_sizes(make_target: Callable[..., Target], tmp_path: Path) -> None:
    head = new_head(make_target("qwen3_5_text", num_layers=4, num_stages=2))
    write_version_11(head, tmp_path / "head.pt", minus_one=True)
    with pytest.raises(InputError, match="hidden_size is 32 .* 48"):
        load_head(tmp_path / "head.pt", make_target("qwen3_5_text", num_layers=4, num_stages=2, hidden=48))
