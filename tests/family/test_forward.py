"""Layer by layer == the library's own full forward pass, for every family; and what each family does in between.

The pass over whole sequences (training, prefill) must be EXACTLY transformers' own: same kernels, same shapes. One
token through one stage after another uses other kernels, so it may differ by rounding, and by how much is stated.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from parity.test_lossless import VOCABULARY, OracleDrafter
from parity.test_rows import random_split
from torch import Tensor, nn

from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.errors import InputError
from spd_lightning.head.loading import new_head
from spd_lightning.target.loading import load_target
from spd_lightning.target.target import Target

from .common import HYBRID, VARIED, build, every_family, ids_tensor, random_prompt, staircase_of

#: float32, hidden states of all depths and logits, token by token against the full pass: largest difference relative
#: to the largest value of the vector. Two to three times what was measured. It is rounding: an ulp of noise on the
#: embedding alone moves the full pass by as much (7e-6 for llama, 3e-4 for qwen3_5_text, whose states add it up).
TOLERANCE = {
    "llama": 2e-5, "qwen2": 2e-5, "qwen3": 2e-5, "qwen3_moe": 1e-5, "qwen3_5_text": 4e-4, "qwen3_5_moe_text": 4e-4,
    "qwen3_next": 2e-4, "mistral": 2e-5, "mixtral": 2e-5, "gemma2": 1e-5, "gemma3_text": 1e-5, "gpt_oss": 2e-5,
    "olmo2": 1e-5, "olmo3": 2e-5, "smollm3": 4e-5,
}  # fmt: skip


@torch.no_grad()
def full_forward(target: Target, input_ids: Tensor, use_cache: bool = False) -> tuple[list[Tensor], Tensor]:
    """h_0 .. h_L and logits of transformers' own pass; its last hidden state is taken before the final norm.

    With a cache (of its own) a recurrent layer pads a prompt of one token, which is another shape.
    """
    last: list[Tensor] = []
    hook = target.layer(target.num_layers - 1).register_forward_hook(
        lambda module, args, output: last.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        output = target.model(input_ids, output_hidden_states=True, use_cache=use_cache)
    finally:
        hook.remove()
    assert len(output.hidden_states) == target.num_layers + 1
    return [*output.hidden_states[:-1], last[0]], output.logits


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@every_family
@pytest.mark.parametrize("layers", [5, 7])
@torch.no_grad()
def test_a_pass_over_whole_sequences_is_exactly_the_librarys(
    make_target: Callable[..., Target], family: str, layers: int, record_property: Any
) -> None:
    """Rows as long as a batch's, a single token, and lengths around the window; with a cache (prefill) and without."""
    split = random_split(3, layers, random.Random(layers))
    target = build(make_target, family, split, seed=layers)
    anchors = range(layers + 1)
    sizes = ((3, 23), (1, 1), (1, 5), (1, 6), (2, 7))
    for rows, length in sizes:
        ids = ids_tensor(rows, length, seed=length)
        caches = [None, target.new_cache(length + 4, target.stage_layers)] if rows == 1 else [None]
        for cache in caches:
            expected, logits = full_forward(target, ids, use_cache=cache is not None)
            states, last = target(ids, anchors, cache=cache)
            for index, (ours, theirs) in enumerate(zip(states, expected, strict=True)):
                assert torch.equal(ours, theirs), (family, length, index)
            assert torch.equal(last, expected[-1])
            assert torch.equal(target.logits(last), logits)
    some, _ = target(ids, (0, 2, layers))
    assert all(torch.equal(state, expected[anchor]) for state, anchor in zip(some, (0, 2, layers), strict=True))
    assert (expected[1] - expected[0]).abs().max() > 1e-3 * expected[0].abs().max(), "a layer does something"
    record_property("cases", sum(rows * length for rows, length in sizes))


@every_family
@pytest.mark.parametrize("layers", [5, 7])
@torch.inference_mode()
def test_one_token_through_one_stage_after_another_equals_the_librarys_full_pass(
    make_target: Callable[..., Target], family: str, layers: int, record_property: Any
) -> None:
    """A prompt, then token by token; the stages' caches are those of a pipeline that can roll back."""
    worst, cases = 0.0, 0
    for prompt_length in (1, 5, 6, 9):
        n = 2 + prompt_length % 3
        split = random_split(n, layers, random.Random(prompt_length))
        target = build(make_target, family, split, seed=layers + prompt_length)
        ids = ids_tensor(1, prompt_length + 14, seed=prompt_length)
        expected, logits = full_forward(target, ids)
        cache, rotary = target.new_cache(ids.shape[1], split), target.rotary_table(ids.shape[1])
        target(ids[:, :prompt_length], (), cache=cache)
        keep = {index: index for index in range(layers + 1)}
        bounds = staircase_of(target).boundaries
        for position in range(prompt_length, ids.shape[1]):
            hidden = target.embed(int(ids[0, position]))
            kept = torch.full((layers + 1, target.hidden_size), torch.nan)
            kept[0] = hidden[0, 0]
            for start, stop in zip(bounds, bounds[1:], strict=False):
                hidden = target.run_layers(hidden, range(start, stop), position, rotary, cache, keep, kept)
            assert torch.equal(kept[-1], hidden[0, 0])
            for index in range(layers + 1):
                worst = max(worst, relative(kept[index], expected[index][0, position]))
            worst = max(worst, relative(target.logits(hidden)[0, 0], logits[0, position]))
            cases += 1
    print(f"{family}, {layers} layers: {cases} tokens, largest relative difference {worst:.1e}")
    assert worst < TOLERANCE[family]
    record_property("cases", cases)


@every_family
@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it(make_target: Callable[..., Target], family: str) -> None:
    """Two paddings of one row agree, and both agree with the row alone, up to the rounding of other kernels."""
    target = build(make_target, family, (2, 1, 2), seed=1)
    ids = ids_tensor(2, 20, seed=0)
    other = ids.clone()
    other[0, 13:], other[1, 8:] = 0, (other[1, 8:] + 7) % VOCABULARY
    anchors = range(6)
    states, last = target(ids, anchors)
    padded, padded_last = target(other, anchors)
    for row, length in ((0, 13), (1, 8)):
        alone, alone_last = target(ids[row : row + 1, :length], anchors)
        for full, short, cut in zip([*states, last], [*padded, padded_last], [*alone, alone_last], strict=True):
            assert relative(short[row, :length], full[row, :length]) < TOLERANCE[family]
            assert relative(short[row, :length], cut[0]) < TOLERANCE[family]
    assert (padded_last[0, 13:] - last[0, 13:]).abs().max() > 0.01, "padding was another text"


@every_family
@torch.no_grad()
def test_packed_documents_equal_separate_ones_or_are_refused(make_target: Callable[..., Target], family: str) -> None:
    target = build(make_target, family, (2, 1, 2), seed=2)
    lengths = (9, 4, 12)
    ids = ids_tensor(2, sum(lengths), seed=1)
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    if family in HYBRID:
        with pytest.raises(InputError, match="recurrent layers"):
            target(ids, (0, 5), position_ids=positions, documents=documents)
        return
    states, last = target(ids, range(6), position_ids=positions, documents=documents)
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        alone, alone_last = target(ids[:, here], range(6))
        for packed, single in zip([*states, last], [*alone, alone_last], strict=True):
            assert relative(packed[:, here], single) < TOLERANCE[family]
        start += length
    _, mixed = target(ids, (), position_ids=positions)
    assert relative(mixed[:, lengths[0] :], last[:, lengths[0] :]) > 1e-3, "without documents they do see each other"


# -- a text model inside a composite one -----------------------------------------------------------------------

VISION: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2, "num_position_embeddings": 16,
    },
    "gemma3": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    },
}  # fmt: skip
VISION["qwen3_5_moe"] = VISION["qwen3_5"]
COMPOSITE = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "gemma3": "gemma3_text"}


@pytest.mark.parametrize("composite", COMPOSITE)
def test_the_text_model_of_a_saved_composite_checkpoint_is_the_target(
    make_target: Callable[..., Target], composite: str, tmp_path: Path
) -> None:
    """Images aside: logits are the composite model's own, and decoding is lossless."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    family = COMPOSITE[composite]
    text = build(make_target, family, (2, 1, 2), seed=6, **VARIED.get(family, {}))
    config = AutoConfig.for_model(
        composite,
        text_config=text.config.to_dict(),
        vision_config=VISION[composite],
        tie_word_embeddings=text.config.tie_word_embeddings,
        eos_token_id=None,
        **({"mm_tokens_per_image": 4} if composite == "gemma3" else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    inner: Any = model.get_decoder() if composite == "gemma3" else model.model.language_model
    inner.load_state_dict(text.model.get_decoder().state_dict())
    model.get_output_embeddings().weight.data.copy_(text.lm_head.weight)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)

    target = load_target(tmp_path, num_stages=3)
    assert target.stage_layers == (2, 2, 1) and target.config.model_type == family
    ids = ids_tensor(2, 17, seed=3)
    with torch.no_grad():
        states, last = target(ids, range(6))
        expected, logits = full_forward(target, ids)
        assert torch.equal(target.logits(last), logits)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, expected, strict=True))
        for origin in (text.model, model):  # the same weights elsewhere in memory: kernels may round otherwise
            assert relative(origin(ids).logits, logits) < 1e-5
    prompt = random_prompt(5, random.Random(1))
    tokens = autoregressive_generate(target, prompt, 14).token_ids
    assert tokens == autoregressive_generate(text, prompt, 14).token_ids and len(set(tokens)) > 2
    oracle = OracleDrafter(staircase_of(target), prompt + tokens, 0.6)
    for drafter in (new_head(target), oracle):
        assert SpdDecoder(target, drafter).generate(prompt, 14).token_ids == tokens


# -- what a family does is really done -------------------------------------------------------------------------


@torch.no_grad()
def logits_of(target: Target, length: int = 20) -> Tensor:
    _, last = target(ids_tensor(1, length, seed=4), ())
    return target.logits(last)


@torch.no_grad()
def is_exact(target: Target, length: int = 20) -> bool:
    return torch.equal(logits_of(target, length), full_forward(target, ids_tensor(1, length, seed=4))[1])


@every_family
def test_tied_and_untied_embeddings_both_run_exactly(make_target: Callable[..., Target], family: str) -> None:
    for tied in (False, True):
        target = build(make_target, family, (2, 1, 2), tie_word_embeddings=tied, **VARIED.get(family, {}))
        same = target.lm_head.weight.data_ptr() == target.model.get_input_embeddings().weight.data_ptr()
        assert same == tied and is_exact(target)
        prompt = random_prompt(4, random.Random(0))
        tokens = autoregressive_generate(target, prompt, 8).token_ids
        drafter = OracleDrafter(staircase_of(target), prompt + tokens, 0.5)
        assert SpdDecoder(target, drafter).generate(prompt, 8).token_ids == tokens


#: what: family, the setting, the setting without it
ACTIVE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama 3.1's RoPE scaling": ("llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "YaRN": ("gpt_oss", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
    "partial RoPE": ("qwen3_5_text", {}, {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    }}),
    "layers without RoPE": ("smollm3", {}, {"no_rope_layers": [1] * 5}),
    "the soft-cap of logits": ("gemma2", {}, {"final_logit_softcapping": None}),
    "the soft-cap of scores": ("gemma2", {"attn_logit_softcapping": 0.5}, {"attn_logit_softcapping": None}),
    "the factor of scores": ("gemma3_text", {}, {"query_pre_attn_scalar": 256}),
    "the window": ("mistral", {}, {"sliding_window": 200}),
    "experts per token": ("mixtral", {}, {"num_experts_per_tok": 1}),
    "kinds of layers": ("olmo3", {}, {"layer_types": ["full_attention"] * 5}),
}  # fmt: skip


@pytest.mark.parametrize("what", ACTIVE)
def test_a_setting_of_a_family_is_active_and_exact(make_target: Callable[..., Target], what: str) -> None:
    family, on, off = ACTIVE[what]
    # a random network of this spread attends to few tokens: what changes scores shows
    active, plain = (build(make_target, family, (2, 1, 2), seed=3, **more) for more in (on, off))
    weights = zip(active.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights), "the same weights, another setting"
    assert is_exact(active) and is_exact(plain)
    assert relative(logits_of(active), logits_of(plain)) > 1e-3


def test_the_tiny_rope_of_qwen3_5_turns_a_part_of_a_head(make_target: Callable[..., Target]) -> None:
    target = build(make_target, "qwen3_5_text", (2, 3))
    assert target.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert target.rotary_table(3)["full_attention"][0].shape[-1] == target.config.head_dim // 4


def test_sliding_and_full_layers_turn_by_bases_of_their_own(make_target: Callable[..., Target]) -> None:
    for family in ("gemma3_text", "olmo3"):
        target = build(make_target, family, (2, 3))
        rotary = target.rotary_table(30)
        assert relative(rotary["sliding_attention"][0][0, 20], rotary["full_attention"][0][0, 20]) > 0.1, family


def test_attention_biases_are_active_and_exact(make_target: Callable[..., Target]) -> None:
    """Llama has them where its config says so, Qwen2 always (on queries, keys and values), gpt-oss everywhere."""
    cases: list[tuple[str, dict[str, Any], set[str]]] = [
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}),
        ("qwen2", {}, {"q_proj", "k_proj", "v_proj"}),
        ("gpt_oss", {}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ]
    for family, more, expected in cases:
        target = build(make_target, family, (2, 1, 2), **more)
        biases = {name: p for name, p in target.model.named_parameters() if name.endswith("_proj.bias")}
        assert expected <= {name.split(".")[-2] for name in biases}
        before = logits_of(target)
        generator = torch.Generator().manual_seed(0)
        for bias in biases.values():
            bias.copy_(torch.randn(bias.shape, generator=generator))
        assert is_exact(target) and relative(logits_of(target), before) > 1e-2, family
        prompt = random_prompt(4, random.Random(0))
        tokens = autoregressive_generate(target, prompt, 10).token_ids
        drafter = OracleDrafter(staircase_of(target), prompt + tokens, 0.5)
        assert SpdDecoder(target, drafter).generate(prompt, 10).token_ids == tokens


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_h_0_of_a_gemma_carries_the_scale_of_its_embedding(make_target: Callable[..., Target], family: str) -> None:
    """In training, prefill and decoding alike: the head reads h_0 as the first layer does."""
    target = build(make_target, family, (2, 3))
    row = target.model.get_input_embeddings().weight[11]
    states, _ = target(torch.tensor([[11]]), (0,))
    assert torch.equal(states[0][0, 0], target.embed(11)[0, 0])
    assert relative(target.embed(11)[0, 0], row * target.hidden_size**0.5) < 1e-3
    assert relative(target.embed(11)[0, 0], row) > 1


def test_logits_of_gemma_2_stay_below_its_cap(make_target: Callable[..., Target]) -> None:
    capped = build(make_target, "gemma2", (2, 3))
    assert capped.config.final_logit_softcapping == 3.0
    free = build(make_target, "gemma2", (2, 3), final_logit_softcapping=None)
    assert logits_of(capped).abs().max() < 3 < logits_of(free).abs().max()


def test_every_norm_is_exercised_with_weights_that_are_not_one(make_target: Callable[..., Target]) -> None:
    for family in families.FAMILIES:
        target = build(make_target, family, (2, 3))
        norms = [p for name, p in target.model.named_parameters() if "norm" in name]
        assert norms and all(p.std() > 0.02 for p in norms), family


def test_casting_a_target_leaves_its_rotary_frequencies_exact(make_target: Callable[..., Target]) -> None:
    target = make_target()
    before = {name: buffer.clone() for name, buffer in target._rotary_embedding.named_buffers()}
    nn.ModuleList([target]).to(torch.bfloat16)
    assert target.dtype == torch.bfloat16 and before
    for name, buffer in target._rotary_embedding.named_buffers():
        assert buffer.dtype == torch.float32 and buffer.equal(before[name]), name
