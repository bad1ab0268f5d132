"""A target is refused where its configuration and the code of its family do not agree about its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spd_lightning.errors import InputError
from spd_lightning.head.loading import new_head
from spd_lightning.target.families import FAMILIES, dense_intermediate_size, layer_kinds, logit_softcap
from spd_lightning.target.target import Target

FULL, SLIDING = "full_attention", "sliding_attention"
CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 4, "layer_types": [FULL, SLIDING, FULL, SLIDING]}, "2 x full_attention"),
    ("mixtral", {"sliding_window": 4, "layer_types": [FULL] * 4}, "4 x full_attention"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "layer_types": [FULL] * 4}, "sliding"),
    ("llama", {"sliding_window": 4}, "runs 4 x full_attention"),
    ("olmo2", {"sliding_window": 4}, "runs 4 x full_attention"),
    ("llama", {"layer_types": [SLIDING] * 4}, "runs 4 x full_attention"),
    ("llama", {"attention_chunk_size": 4}, "attention_chunk_size=4"),
    ("gemma3_text", {"sliding_window": None}, "without a sliding_window"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("llama", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
]


@pytest.mark.parametrize(("family", "fields", "says"), CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_a_configuration_that_its_familys_code_does_not_follow_is_refused(
    make_target: Callable[..., Target], family: str, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match="cannot be a target") as error:
        make_target(family, num_layers=4, **fields)
    assert says in str(error.value)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_window_that_all_layers_share_is_what_the_model_runs(
    make_target: Callable[..., Target], family: str, window: int | None
) -> None:
    target = make_target(family, num_layers=4, sliding_window=window)
    assert set(target.layer_kinds) == {FULL if window is None else SLIDING}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(target.logits(target(ids, ())[1]), target.model(ids).logits)


def test_a_soft_cap_that_the_familys_code_ignores_is_ignored(make_target: Callable[..., Target]) -> None:
    target = make_target("llama", num_layers=2, final_logit_softcapping=1.0)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(target.logits(target(ids, ())[1]), target.model(ids).logits)
    assert logit_softcap(target.config) is None


def test_packed_documents_under_a_kernel_without_masks_are_refused(make_target: Callable[..., Target]) -> None:
    target = make_target("llama", num_layers=2)
    target.config._attn_implementation = "flash_attention_2"
    ids, documents = torch.arange(6)[None], torch.tensor([[0, 0, 0, 1, 1, 1]])
    with pytest.raises(InputError, match="flash_attention_2.*sdpa"):
        target(ids, (), documents=documents)


def test_a_hidden_size_that_heads_do_not_divide_gives_a_head_of_either_kind(make_target: Callable[..., Target]) -> None:
    """Qwen3.5 27B: 5120 is no multiple of its 24 heads of 256."""
    for family in ("qwen3", "qwen3_5_text", "mistral", "gpt_oss"):
        target = make_target(
            family, num_layers=4, num_stages=2, hidden=40, num_attention_heads=3, num_key_value_heads=1, head_dim=16
        )
        for kind in ("qwen3", "target"):
            assert new_head(target, kind=kind).rotary_table(4)[0].shape[0] == 4


def test_the_width_of_a_heads_mlp_is_the_dense_or_the_active_one(make_target: Callable[..., Target]) -> None:
    widths = {family: dense_intermediate_size(make_target(family, num_layers=4).config) for family in FAMILIES}
    assert widths["qwen3_moe"] == widths["llama"] == 64  # stated
    assert widths["mixtral"] == widths["gpt_oss"] == 2 * 64  # two experts of the stated width
    assert layer_kinds(make_target("qwen3_next", num_layers=3).config).count("linear_attention") == 2
