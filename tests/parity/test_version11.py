"""Version-11 heads, both ways: what is read, written and read again is the same head, or is refused by name."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lightning.errors import InputError
from spd_lightning.head.config import LayerStyle
from spd_lightning.head.loading import draft_logits, load_head, new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.head.version11 import published_fields, read_version_11, write_version_11
from spd_lightning.target.loading import load_target
from spd_lightning.target.target import Target

GOLDEN = ("head_v11", "head_v11_dv128", "head_v11_n8_quick")


def moved(head: SpeculationHead) -> SpeculationHead:
    """Every trained weight moved, so that no norm is one and no W_k the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return head


def same(a: SpeculationHead, b: SpeculationHead) -> bool:
    theirs = b.state_dict()
    return a.config == b.config and all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def raw(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("vocabulary", [None, (3, 5, 8, 13, 40)])
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_moe", "gemma3_text", "llama"])
def test_a_head_trained_here_survives_the_trip_with_equal_logits(
    make_target: Callable[..., Target], tmp_path: Path, family: str, vocabulary: tuple[int, ...] | None
) -> None:
    target = make_target(family, num_layers=5, stage_layers=(2, 2, 1))
    head = moved(new_head(target, num_layers=2, draft_token_ids=vocabulary))
    assert (head.config.kind == "target") == family.startswith("qwen3_5")
    rounding = write_version_11(head, tmp_path / "head.pt", "org/model")
    assert 0 < rounding < 2**-8
    read = read_version_11(tmp_path / "head.pt", target)
    assert read.config == head.config
    ids = torch.arange(12)[None] % 60
    found = draft_logits(target, load_head(tmp_path / "head.pt", target), ids)
    torch.testing.assert_close(found, draft_logits(target, head, ids), rtol=0.1, atol=0.1)  # bfloat16 weights
    write_version_11(read, tmp_path / "again.pt", "org/model")
    again = read_version_11(tmp_path / "again.pt", target)
    assert same(read, again)
    assert torch.equal(found, draft_logits(target, load_head(tmp_path / "again.pt", target), ids))
    if family == "llama":  # the rounding is all that the trip does
        expected = copy.deepcopy(head).to(torch.bfloat16).float()
        expected.norm.weight.data = target.norm_weight()
        assert torch.equal(found, draft_logits(target, expected, ids))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_head_comes_back_bit_for_bit(golden: Path, tmp_path: Path, name: str) -> None:
    path, target = golden / "llama" / f"{name}.pt", load_target(golden / "llama" / "target")
    head = read_version_11(path, target)
    assert head.dtype == torch.bfloat16
    assert write_version_11(head, tmp_path / "head.pt", "elsewhere", published_fields(path)) == 0
    assert same(head, read_version_11(tmp_path / "head.pt", target))
    theirs, ours = raw(path), raw(tmp_path / "head.pt")
    assert set(theirs["state_dict"]) == set(ours["state_dict"])
    assert all(torch.equal(tensor, ours["state_dict"][key]) for key, tensor in theirs["state_dict"].items())
    assert {key: ours["config"][key] for key in theirs["config"]} == theirs["config"]
    assert set(ours["config"]) - set(theirs["config"]) == {"stage_layers", "train_span"}


def test_norms_that_are_stored_minus_one_lose_nothing_that_their_sum_could_show() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    stored = every[torch.isfinite(every) & (every.abs() < 2**15)]
    used = stored.float() + 1  # what the target's layers multiply by
    assert torch.equal((used - 1).to(torch.bfloat16).float() + 1, used)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"style": LayerStyle(norms="both")}, "style.norms='both'"),
        ({"style": LayerStyle(norms="after")}, "style.norms='after'"),
        ({"style": LayerStyle(qk_norm="none")}, "style.qk_norm='none'"),
        ({"style": LayerStyle(qkv_bias=True)}, "style.qkv_bias=True"),
        ({"style": LayerStyle(mlp_bias=True)}, "style.mlp_bias=True"),
        ({"style": LayerStyle(query_scale=0.3)}, "style.query_scale=0.3"),
        ({"style": LayerStyle(gate=True)}, "style.gate=True"),
        ({"logit_softcap": 30.0}, "logit_softcap=30.0"),
    ],
)
def test_an_option_that_the_format_cannot_express_is_named(
    make_target: Callable[..., Target], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    head = new_head(make_target(num_layers=4, num_stages=2))
    other = SpeculationHead(replace(head.config, kind="target", **changes))
    other.origin = head.origin
    with pytest.raises(InputError, match="cannot express") as caught:
        write_version_11(other, tmp_path / "head.pt", "org/model")
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_gated_head_is_refused_by_a_target_of_other_sizes(make_target: Callable[..., Target], tmp_path: Path) -> None:
    head = new_head(make_target("qwen3_5_text", num_layers=4, num_stages=2))
    write_version_11(head, tmp_path / "head.pt", "org/model")
    with pytest.raises(InputError, match="hidden_size is 32 .* 48"):
        load_head(tmp_path / "head.pt", make_target("qwen3_5_text", num_layers=4, num_stages=2, hidden=48))


class _Dangerous:
    def __reduce__(self) -> Any:
        return (open, ("was_executed", "w"))


def test_a_pickle_with_code_is_refused_and_not_executed(
    make_target: Callable[..., Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "config": {"version": 11}, "more": _Dangerous()}, "head.pt")
    with pytest.raises(InputError, match="nothing of it was executed"):
        load_head("head.pt", make_target(num_layers=4, num_stages=2))
    assert not Path("was_executed").exists()


def test_a_view_that_claims_more_numbers_than_there_are_allocates_nothing(
    make_target: Callable[..., Target], tmp_path: Path
) -> None:
    target = make_target(num_layers=4, num_stages=2)
    write_version_11(new_head(target), tmp_path / "head.pt", "org/model")
    content = raw(tmp_path / "head.pt")
    wide, H = 2**30, target.hidden_size
    for name in ("gate_proj", "up_proj"):
        for layer in range(2):
            content["state_dict"][f"spec_layers.{layer}.mlp.{name}.weight"] = torch.zeros(1).expand(wide, H)
            content["state_dict"][f"spec_layers.{layer}.mlp.down_proj.weight"] = torch.zeros(1).expand(H, wide)
    torch.save(content, tmp_path / "head.pt")
    with pytest.raises(InputError, match="too few numbers"):
        read_version_11(tmp_path / "head.pt", target)


def _broken(content: dict[str, Any], draw: random.Random) -> None:
    """One random change of a file's content."""
    config, weights = content["config"], content["state_dict"]
    values = [None, -1, 0, 2**40, 1.5, "text", [], [1, 2], [0, 0], {}, True, [10**12], float("nan"), [[1]], "11"]
    kind = draw.choice(["config", "drop", "drop tensor", "shape", "dtype", "rename", "no tensor", "transpose"])
    name = draw.choice(sorted(weights))
    if kind == "config":
        config[draw.choice([*sorted(config), "stage_layers", "draft_token_ids"])] = draw.choice(values)
    elif kind == "drop":
        config.pop(draw.choice(sorted(config)))
    elif kind == "drop tensor":
        weights.pop(name)
    elif kind == "shape":
        weights[name] = torch.zeros([draw.choice([0, 1, 3, 64]) for _ in range(draw.choice([0, 1, 2, 3]))])
    elif kind == "dtype":
        weights[name] = weights[name].to(draw.choice([torch.int32, torch.bool, torch.complex64, torch.int8]))
    elif kind == "rename":
        weights[draw.choice([name + "x", "x." + name, "lm_head.bias", "norm.weight"])] = weights.pop(name)
    elif kind == "no tensor":
        weights[name] = draw.choice(values)
    else:
        square = weights[name].ndim < 2 or weights[name].shape[0] == weights[name].shape[1]
        weights[name] = weights[name][:-1] if square else weights[name].t().contiguous()


@pytest.mark.parametrize("seed", range(120))
def test_a_mutated_file_is_refused_or_the_same_head(
    make_target: Callable[..., Target], tmp_path: Path, seed: int
) -> None:
    target, draw, path = make_target(num_layers=4, num_stages=2), random.Random(seed), tmp_path / "head.pt"
    write_version_11(new_head(target, num_layers=1, draft_token_ids=range(0, 60, 2)), path, "org/model")
    before = read_version_11(path, target)
    if seed % 2:
        content = raw(path)
        _broken(content, draw)
        torch.save(content, path)
    else:
        data = bytearray(path.read_bytes())
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        else:
            for _ in range(draw.choice([1, 8])):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
    try:
        after = read_version_11(path, target)
    except InputError as error:
        assert "head.pt" in str(error) or "does not fit" in str(error)
    else:
        assert same(before, after)
