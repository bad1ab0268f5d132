"""Heads of every family: training rows == decoding rows, and layers of the target's kind are the target's own layers.

Both kinds of head layers, for every family. Rows are compared in float64 on the states that the target handed out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity.test_lossless import VOCABULARY
from parity.test_rows import CoinDrafter, largest_difference, plain_greedy, random_gaps, random_split, spread_head
from torch import Tensor, nn

from spd_lightning.data.batches import Batch, collate
from spd_lightning.data.chat import Sample
from spd_lightning.decoding.decoder import SpdDecoder
from spd_lightning.errors import InputError
from spd_lightning.head.folder import save_head
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.head.loading import draft_logits, head_config, load_head, new_head
from spd_lightning.head.module import HeadLayer, SpeculationHead
from spd_lightning.target.families import dense_intermediate_size
from spd_lightning.target.target import Target
from spd_lightning.training.losses import chunked_draft_loss, draft_kl
from spd_lightning.training.warm_start import shrink, warm_start

from .common import FAMILIES, HYBRID, SLIDING, VARIED, WINDOW, build, every_family, ids_tensor, random_prompt

KINDS = ("qwen3", "target")
kinds_of_layers = pytest.mark.parametrize("kind", KINDS)


@every_family
@kinds_of_layers
@torch.no_grad()
def test_all_training_rows_equal_the_rows_of_a_cycle_by_cycle_decoder(
    make_target: Callable[..., Target], family: str, kind: str, record_property: Any
) -> None:
    """One sequence with restarts, one with early re-drafts; uneven stages; the fast attention and the dense mask."""
    generator = random.Random(f"{family} {kind}")
    worst, rows = 0.0, 0
    for case, n in enumerate((2, 4, 8)):
        split = random_split(n, n + generator.randint(1, 3), generator)
        target = build(make_target, family, split, seed=n)
        head = spread_head(target, n, num_layers=2 + case % 2, kind=kind).double()
        assert head.config.kind == kind
        ids = ids_tensor(2, n + 8, seed=n)
        states = [state.double() for state in target(ids, head.config.anchors)[0]]
        gaps = [random_gaps(gap, n, ids.shape[1], generator) for gap in ("restarts", "early re-drafts")]
        difference, compared = largest_difference(head, states, gaps, dense=case == 1)
        worst, rows = max(worst, difference), rows + compared
    print(f"{family}, {kind}: {rows} rows, largest difference {worst:.1e}")
    assert worst < 1e-10
    record_property("cases", rows)


@every_family
def test_draft_logits_equal_what_the_real_decoder_computed_in_every_cycle(
    make_target: Callable[..., Target], family: str
) -> None:
    """From token-by-token states there, from one pass over the finished text here: they differ by rounding alone."""
    target = build(make_target, family, (1, 2, 1, 2), seed=1, **VARIED.get(family, {}))
    head = spread_head(target, 2, num_layers=2)
    prompt = random_prompt(WINDOW - 2, random.Random(0))
    tokens = plain_greedy(target, prompt, 20)
    drafter = CoinDrafter(head, tokens, 0.7, seed=5)
    generation = SpdDecoder(target, drafter).generate(prompt, 20)
    assert prompt + generation.token_ids == tokens and 1 < len(generation.restart_positions) < 20
    expected = draft_logits(target, head, torch.tensor([tokens]), restarts=generation.restart_positions)[0]
    compared = range(len(prompt), len(tokens) - 1)
    worst = max(float((drafter.logits[at] - expected[at]).abs().max()) for at in compared) / float(expected.abs().max())
    print(f"{family}: {len(compared)} drafts, largest relative difference {worst:.1e}")
    assert worst < 5e-5


# -- layers of the target's kind -------------------------------------------------------------------------------

#: Family -> fields that switch off what a head's layer leaves out, so that the rest can be compared. A head has no
#: soft-cap of scores (Gemma 2) and no sinks (gpt-oss, see `without_sinks`); experts are replaced by one dense MLP.
PLAIN: dict[str, dict[str, Any]] = {"gemma2": {"attn_logit_softcapping": None}}
MIXTURES = ("qwen3_moe", "qwen3_5_moe_text", "qwen3_next", "mixtral", "gpt_oss")


def own_layer(target: Target) -> int:
    """The first layer that a head's layer resembles: attention over everything within a short text, with RoPE."""
    return next(i for i, kind in enumerate(target.layer_kinds) if kind != "linear_attention")


def without_sinks(layer: Any) -> None:
    if hasattr(layer.self_attn, "sinks"):
        layer.self_attn.sinks.data.fill_(-1e4)


def copy_weights(target: Target, theirs: nn.Module, ours: nn.Module) -> None:
    """All that the head's layer has, by name; norms that store their weight minus one get it back."""
    given = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(given.pop(name) + (target.norms_store_minus_one and "norm" in name))
    assert not [name for name in given if not name.endswith("sinks")], "nothing of the target's is left over"


def run_causally(layer: HeadLayer, head: SpeculationHead, hidden: Tensor, upto: str) -> Tensor:
    """A head's layer over a plain causal sequence [S, H]: what attention writes, or the whole layer's output."""
    rotary = head.rotary_table(hidden.shape[0])
    normed = layer.input_layernorm(hidden)
    key, value = layer.self_attn.key_value(normed, rotary)
    query, gate = layer.self_attn.query(normed, rotary)
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    attended = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    if upto == "layer":
        return layer.finish(hidden, attended, gate)
    if gate is not None:
        attended = attended * torch.sigmoid(gate)
    return layer.self_attn.o_proj(attended.flatten(-2))


def observed(target: Target, module: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of a module within the target's own full pass, [S, H] each."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen.append((given[0], output[0] if isinstance(output, Tensor) else output[0][0]))

    hook = module.register_forward_hook(look, with_kwargs=True)
    target.model(ids, use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])
@torch.no_grad()
def test_a_layer_of_kind_target_with_the_targets_weights_is_the_targets_layer(
    make_target: Callable[..., Target], family: str
) -> None:
    """Dense families, whole layers, on a text shorter than a window; both of full attention and of a window."""
    target = build(make_target, family, (2, 3), seed=8, **PLAIN.get(family, {}))
    theirs: Any = target.layer(own_layer(target))
    if family in ("gemma2", "gemma3_text", "olmo3"):  # kinds differ by window and RoPE: a head has full attention's
        theirs = target.layer(target.layer_kinds.index("full_attention"))
    head = new_head(target, num_layers=1, kind="target", seed=1)
    ours: Any = head.layers[0]
    copy_weights(target, theirs, ours)
    ids = ids_tensor(1, 30 if "full_attention" in target.layer_kinds else WINDOW, seed=2)
    given, expected = observed(target, theirs, ids)
    found = run_causally(ours, head, given, "layer")
    worst = float((found - expected).abs().max() / expected.abs().max())
    print(f"{family}: largest relative difference {worst:.1e}")
    assert worst < 1e-5


@every_family
@torch.no_grad()
def test_attention_of_kind_target_with_the_targets_weights_is_the_targets_attention(
    make_target: Callable[..., Target], family: str
) -> None:
    """Mixtures too: their experts are all that a head's layer has in another form."""
    target = build(make_target, family, (2, 3), seed=9, **PLAIN.get(family, {}))
    index = own_layer(target)
    if "full_attention" in target.layer_kinds:
        index = target.layer_kinds.index("full_attention")
    theirs: Any = target.layer(index)
    without_sinks(theirs)
    head = new_head(target, num_layers=1, kind="target", seed=1)
    ours: Any = head.layers[0]
    copy_weights(target, theirs.self_attn, ours.self_attn)
    ours.input_layernorm = nn.Identity()  # the input is observed after it
    ids = ids_tensor(1, 30 if "full_attention" in target.layer_kinds else WINDOW, seed=2)
    given, expected = observed(target, theirs.self_attn, ids)
    found = run_causally(ours, head, given, "attention")
    worst = float((found - expected).abs().max() / expected.abs().max())
    print(f"{family}: largest relative difference {worst:.1e}")
    assert worst < 1e-5


@every_family
def test_the_published_kind_is_the_same_for_all_families_and_auto_is_what_was_published(
    make_target: Callable[..., Target], family: str
) -> None:
    target = build(make_target, family, (2, 3))
    assert head_config(target).kind == ("target" if family.startswith("qwen3_5") else "qwen3")
    qwen3 = head_config(target, kind="qwen3").style
    assert (qwen3.norms, qwen3.qk_norm, qwen3.gate, qwen3.qkv_bias, qwen3.output_bias, qwen3.query_scale) == (
        "before", "head", False, False, False, None,
    )  # fmt: skip


@every_family
def test_the_style_of_kind_target_is_the_familys(make_target: Callable[..., Target], family: str) -> None:
    style = head_config(build(make_target, family, (2, 3)), kind="target").style
    assert style.norms == {
        "gemma2": "both", "gemma3_text": "both", "olmo2": "after", "olmo3": "after",
    }.get(family, "before")  # fmt: skip
    assert style.qk_norm == {
        "qwen3": "head", "qwen3_moe": "head", "qwen3_5_text": "head", "qwen3_5_moe_text": "head", "qwen3_next": "head",
        "gemma3_text": "head", "olmo2": "row", "olmo3": "row",
    }.get(family, "none")  # fmt: skip
    assert style.gate == (family in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"))
    assert (style.qkv_bias, style.output_bias) == (family in ("qwen2", "gpt_oss"), family == "gpt_oss")
    assert style.query_scale == (0.25 if family in ("gemma2", "gemma3_text") else None), "16 ** -0.5, heads have 8"


def texts(count: int, length: int) -> list[Batch]:
    """Batches of random texts, one of each padded."""
    rows = ids_tensor(count, length, seed=5).numpy().astype(np.int32)
    samples = [Sample(index, row[: length - index % 2], ((1, 3),)) for index, row in enumerate(rows)]
    return [collate([[sample] for sample in samples[at : at + 2]]) for at in range(0, count, 2)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*MIXTURES, "smollm3")])
@torch.no_grad()
def test_a_warm_start_is_the_end_of_the_target_where_an_anchor_enters_its_last_layers(
    make_target: Callable[..., Target], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deepest row sees nothing but deepest rows: with the state itself among the anchors nothing is left to guess."""
    monkeypatch.setattr("spd_lightning.training.warm_start.RIDGE", 1e-12)
    # attention over everything is every third layer of a hybrid; some turn by other angles in every second layer
    last = 1 if family in (*HYBRID, "gemma3_text", "olmo3") else 2
    target = build(make_target, family, (6 - last, last), seed=8, **PLAIN.get(family, {}))
    head = new_head(target, num_layers=last, anchors=(0, 6 - last), kind="target")
    ids = ids_tensor(2, WINDOW if family in SLIDING else 20, seed=2)
    states, end = target(ids, head.config.anchors)
    layout = StaircaseLayout.from_restarts(head.staircase, [(0,)] * 2, ids.shape[1])
    apart = []
    for starts in (False, True):
        if starts:
            warm_start(target, head, texts(40, 20))
        deepest = head([state.to(head.dtype) for state in states], layout, all_rows=True)[:, -1]
        found, expected = head.logits(deepest), target.logits(end)
        apart.append(float((found - expected).abs().max() / expected.abs().max()))
    print(f"{family}: largest relative difference {apart[0]:.1e}, with a warm start {apart[1]:.1e}")
    assert apart[1] < 1e-4 < 1e-2 < apart[0]


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("olmo")])
@torch.no_grad()
def test_a_head_that_reads_and_writes_a_seventh_drafts_the_same(
    make_target: Callable[..., Target], family: str
) -> None:
    """Norms forget the size; those of OLMo's layers do not see what is read."""
    target = build(make_target, family, (2, 2, 2), seed=8)
    head = new_head(target, num_layers=2, kind="target")
    ids = ids_tensor(2, 12, seed=3)
    expected = draft_logits(target, head, ids, restarts=(0, 5))
    before = [weight.clone() for weight in head.parameters()]
    shrink(head, 7.0)
    assert sum(not weight.equal(was) for weight, was in zip(head.parameters(), before, strict=True)) >= 4
    found = draft_logits(target, head, ids, restarts=(0, 5))
    worst = float((found - expected).abs().max() / expected.abs().max())
    print(f"{family}: largest relative difference {worst:.1e}")
    assert worst < 0.02, "but for what norms add to the square of a small embedding"


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixtures_experts_are_no_warm_start(make_target: Callable[..., Target], family: str) -> None:
    target = build(make_target, family, (3, 3))
    with pytest.raises(InputError, match=r"model.head.warm_start: the head's mlp.* has shape"):
        warm_start(target, new_head(target, num_layers=1, kind="target"), texts(2, 10))


# -- RoPE, norms, widths, caps ---------------------------------------------------------------------------------


@every_family
def test_a_head_turns_by_the_angles_of_the_targets_full_attention(
    make_target: Callable[..., Target], family: str
) -> None:
    target = build(make_target, family, (2, 3))
    theirs = target.rotary_table(50)
    full = theirs.get("full_attention") or theirs["sliding_attention"]  # Mistral has windows alone, and one RoPE
    for kind in KINDS:
        for ours, of_target in zip(new_head(target, kind=kind).rotary_table(50), full, strict=True):
            width = of_target.shape[-1]  # gpt-oss keeps one half of them, which are equal
            assert torch.equal(ours[:, :width], of_target[0])
            assert torch.equal(ours[:, -width:], of_target[0])
    if family in ("gemma3_text", "olmo3"):
        config = new_head(target).config
        assert config.rope_parameters == target.config.rope_parameters["full_attention"]
        assert config.rope_parameters != target.config.rope_parameters["sliding_attention"]
        assert not torch.equal(theirs["sliding_attention"][0], theirs["full_attention"][0])


@every_family
@torch.no_grad()
def test_a_heads_final_norm_and_lm_head_are_the_targets(make_target: Callable[..., Target], family: str) -> None:
    """The norm multiplies by what the target's multiplies by, also where that is stored minus one."""
    target = build(make_target, family, (2, 3), seed=3)
    assert target.norms_store_minus_one == (family.startswith(("gemma", "qwen3_5", "qwen3_next")))
    hidden = 2 * torch.randn(7, target.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = target.logits(hidden)
    assert torch.allclose(new_head(target).logits(hidden), expected, atol=1e-4)
    ids = [3, 4, 9, 31]
    assert torch.allclose(new_head(target, draft_token_ids=ids).logits(hidden), expected[:, ids], atol=1e-4)


def test_a_heads_mlp_is_as_wide_as_what_a_token_of_the_target_passes() -> None:
    """By the libraries' default configurations, which are those of published models."""
    from transformers import AutoConfig

    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "llama": (11008, {}),
        "qwen3_moe": (6144, {}),  # stated for dense layers, and 8 x 768
        "qwen3_next": (5632, {}),  # stated for dense layers, and (10 + 1) x 512
        "qwen3_5_moe_text": (8 * 512 + 512, {}),  # 8 experts and a shared one
        "mixtral": (2 * 14336, {}),
        "gpt_oss": (4 * 2880, {}),
    }
    for family, (expected, fields) in cases.items():
        assert dense_intermediate_size(AutoConfig.for_model(family, **fields)) == expected, family


def test_the_width_can_be_chosen(make_target: Callable[..., Target]) -> None:
    for family in ("llama", "mixtral"):
        target = build(make_target, family, (2, 3))
        default = new_head(target)
        assert default.config.intermediate_size == {"llama": 64, "mixtral": 128}[family]
        narrow: Any = new_head(target, intermediate_size=20).layers[0]
        assert narrow.mlp.gate_proj.out_features == 20


def test_draft_logits_of_a_gemma_2_head_are_capped_as_the_targets_are(make_target: Callable[..., Target]) -> None:
    target = build(make_target, "gemma2", (2, 3), seed=1)
    for kind in KINDS:
        head = spread_head(target, 1, kind=kind)
        with torch.no_grad():
            head.lm_head.weight.mul_(4)
        assert head.config.logit_softcap == 3.0
        capped = draft_logits(target, head, ids_tensor(1, 12, seed=0))
        object.__setattr__(head.config, "logit_softcap", None)
        free = draft_logits(target, head, ids_tensor(1, 12, seed=0))
        assert 2.5 < capped.abs().max() <= 3 < free.abs().max()
        assert torch.allclose(capped, 3 * torch.tanh(free / 3), atol=1e-6)


@pytest.mark.parametrize("draft_ids", [None, torch.tensor([0, 3, 4, 9, 17, 30])], ids=["all ids", "draft vocabulary"])
@pytest.mark.parametrize("chunk", [3, 7, 1000])
@pytest.mark.parametrize("cap", [0.7, 3.0, None])
def test_the_chunked_loss_of_capped_logits_equals_its_definition_in_value_and_gradient(
    cap: float | None, chunk: int, draft_ids: Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(chunk)
    hidden, target_hidden, target_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 8), (40, 8), (31, 8))
    )
    lm_head = (target_head if draft_ids is None else target_head[draft_ids]).clone().requires_grad_()
    hidden.requires_grad_()
    teacher = 3 * torch.tanh(target_hidden @ target_head.T / 3)
    logits = hidden @ lm_head.T
    expected = draft_kl(logits if cap is None else cap * torch.tanh(logits / cap), teacher, draft_ids).sum()
    loss, table = chunked_draft_loss(
        hidden, lm_head, target_hidden, lambda x: 3 * torch.tanh(x @ target_head.T / 3), draft_ids,
        torch.ones(40, dtype=torch.long), 2, chunk, softcap=cap,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert table[:, -1].sum().item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(2 * one, (hidden, lm_head)) for one in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-12 * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo3", "gemma2"])
def test_a_saved_head_of_kind_target_loads_with_the_same_logits(
    make_target: Callable[..., Target], family: str, tmp_path: Path
) -> None:
    target = build(make_target, family, (1, 2, 2), seed=1)
    head = spread_head(target, 3, kind="target", draft_token_ids=list(range(0, VOCABULARY, 2)))
    with torch.no_grad():
        head.norm.weight.copy_(target.norm_weight())  # frozen, and what says whose head it is
    save_head(head, tmp_path)
    loaded = load_head(tmp_path, target)
    assert loaded.config == head.config and loaded.config.style == head.config.style
    ids = ids_tensor(2, 15, seed=0)
    expected = draft_logits(target, head, ids, restarts=(0, 4))
    assert torch.equal(draft_logits(target, loaded, ids, restarts=(0, 4)), expected)
    other = build(make_target, family, (1, 2, 2), seed=1)
    assert torch.equal(draft_logits(other, load_head(tmp_path), ids, restarts=(0, 4)), expected)
