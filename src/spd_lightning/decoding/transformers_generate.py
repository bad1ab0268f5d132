"""Decoding with a head from transformers: `model.generate(**inputs, custom_generate=DIR, trust_remote_code=True)`.

Every field of a GenerationConfig is honoured, or is without effect here, or is refused by name: no setting is ignored
in silence, and a field that a later transformers adds is refused as soon as it is set.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput

from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder
from spd_lightning.errors import InputError
from spd_lightning.head.folder import CONFIG_FILE
from spd_lightning.head.loading import find_head, load_head
from spd_lightning.target.target import Target

HONOURED = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "stop_strings",
    "max_time", "return_dict_in_generate",
}  # fmt: skip
#: Fields that change nothing about one sequence that is sampled or decoded greedily.
WITHOUT_EFFECT = {
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "early_stopping", "length_penalty", "use_cache",
    "cache_implementation", "cache_config", "prefill_chunk_size", "compile_config", "disable_compile",
    "renormalize_logits", "transformers_version", "_from_model_config",
}  # fmt: skip
#: Arguments of `generate` beside the config that may only be absent.
_ABSENT = ("logits_processor", "prefix_allowed_tokens_fn", "assistant_model", "negative_prompt_ids",
           "negative_prompt_attention_mask", "synced_gpus")  # fmt: skip
_DECODERS: WeakKeyDictionary[PreTrainedModel, dict[Any, SpdDecoder]] = WeakKeyDictionary()


def generate(
    model: PreTrainedModel,
    head: str | Path,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: Any = None,
    **arguments: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """One sequence, decoded by the pipeline of `head` with `model` as its target.

    Sampling follows torch's own random state (`torch.manual_seed`), but not draw by draw as transformers does.

    Args:
        model: a causal language model; its weights are shared, its mode and gradients are as before afterwards.
        head: an exported folder or a hub id.
        inputs: [1, P] prompt; or `input_ids` among the arguments.
        generation_config, arguments: as for `model.generate`.
        stopping_criteria: asked with the sequence so far [1, P + k] and no scores.
        streamer: gets the prompt, then every token as it becomes final.

    Returns:
        [1, P + new tokens], or an output with `sequences` under return_dict_in_generate.

    Raises:
        InputError: a setting that cannot be honoured, by name; a head that does not fit the model.
    """
    for name in _ABSENT:
        value = arguments.pop(name, None)
        if value is not None and value is not False and value != []:
            raise InputError(f"{name} cannot be honoured by speculative pipeline decoding: leave it out.")
    tokenizer = arguments.pop("tokenizer", None)
    lengths = (arguments.get("max_length"), getattr(generation_config, "max_length", None))
    unlimited = all(length is None for length in (*lengths, model.generation_config.max_length))
    prepare: Any = model._prepare_generation_config
    config, rest = prepare(generation_config, **arguments)
    check_generation_config(config)
    prompt = _prompt(inputs, rest)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(max_time=config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise InputError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer).")
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings))
    sampling = _sampling(config)
    if streamer is not None:
        streamer.put(prompt.cpu())

    def observe(event: CycleEvent) -> None:
        if streamer is not None and event.emitted is not None:
            streamer.put(torch.tensor([event.emitted]))

    def stop(tokens: Any) -> bool:
        so_far = torch.cat([prompt, prompt.new_tensor([tokens])], dim=1)
        return bool(torch.as_tensor(criteria(so_far, None)).all())

    with _Unchanged(model):
        found = _decoder(model, head).generate(
            prompt,
            _new_tokens(config, prompt.shape[1], unlimited),
            **sampling,
            eos_token_id=_ends(config.eos_token_id),
            observer=observe,
            stop=stop if criteria else None,
        )
    if streamer is not None:
        streamer.end()
    sequences = torch.cat([prompt, prompt.new_tensor([found.token_ids])], dim=1)
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast("torch.LongTensor", sequences))
    return sequences


def folder_of_this_call() -> str:
    """What was given as `custom_generate` to the `model.generate` that is running.

    transformers copies generate.py elsewhere and does not tell it where it came from; the call itself knows.

    Raises:
        InputError: no such call is running.
    """
    frame = sys._getframe(1)
    while frame is not None:
        given = frame.f_locals.get("custom_generate")
        if frame.f_code.co_name == "generate" and isinstance(given, str):
            return given
        frame = frame.f_back  # type: ignore[assignment]
    raise InputError(
        "no call of model.generate(custom_generate=FOLDER) is running: call "
        "spd_lightning.decoding.transformers_generate.generate(model, FOLDER, **inputs) instead."
    )


def check_generation_config(config: GenerationConfig) -> None:
    """Refuse by name what cannot be honoured.

    Raises:
        InputError: naming the field, its value and what it has to be.
    """
    plain = GenerationConfig()
    defaults = {**vars(plain), **GenerationConfig._get_default_generation_params()}
    for name, value in vars(config).items():
        if name in HONOURED or name in WITHOUT_EFFECT:
            continue
        allowed = (None, False, defaults.get(name), getattr(plain, name, None))
        if not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
            raise InputError(
                f"{name}={value!r} cannot be honoured by speculative pipeline decoding: set it to "
                f"{defaults.get(name)!r} in the call or the model's generation_config."
            )


class _Unchanged:
    """The model in eval mode, and afterwards as it was: a target freezes what it wraps."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modes = [(module, module.training) for module in model.modules()]
        self.gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exception: object) -> None:
        for module, training in self.modes:
            module.training = training
        for parameter, wanted in self.gradients:
            parameter.requires_grad_(wanted)


def _decoder(model: PreTrainedModel, head: str | Path) -> SpdDecoder:
    """Target and head of a model, made once per state of the head's folder."""
    found = find_head(head)
    changed = (found.path / CONFIG_FILE).stat().st_mtime_ns if found.kind == "folder" else None
    key = (str(found.path.resolve()), changed, model.device, model.dtype)
    kept = _DECODERS.setdefault(model, {})
    if key not in kept:
        # a model that was made in memory has no source, and no tokenizer to compare the head's with
        source = getattr(model, "name_or_path", "") or None
        target = Target(model, source=source)
        kept[key] = SpdDecoder(target, load_head(found.path, target))
    return kept[key]


def _prompt(inputs: Tensor | None, rest: Mapping[str, Any]) -> Tensor:
    """[1, P] token ids; whatever else came with them is refused."""
    prompt = rest.get("input_ids") if inputs is None else inputs
    for name, value in rest.items():
        if name not in ("input_ids", "attention_mask", "token_type_ids") and value is not None:
            raise InputError(f"{name} cannot be honoured by speculative pipeline decoding: leave it out.")
    if prompt is None or prompt.ndim != 2 or prompt.is_floating_point():
        raise InputError("input_ids: expected token ids [1, P].")
    if prompt.shape[0] != 1:
        raise InputError(
            f"input_ids holds {prompt.shape[0]} sequences: speculative pipeline decoding takes one at a time."
        )
    mask = rest.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise InputError("attention_mask hides tokens: give the one prompt without padding.")
    return prompt


def _sampling(config: GenerationConfig) -> dict[str, Any]:
    if not config.do_sample:
        return {"temperature": 0.0}
    given = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    chosen = {name: neutral[name] if value is None else value for name, value in given.items()}
    if not chosen["temperature"] > 0:
        raise InputError(f"temperature={config.temperature!r} with do_sample=True: expected a number above 0.")
    return chosen | {"seed": int(torch.randint(2**62, (1,)))}


def _new_tokens(config: GenerationConfig, length: int, unlimited: bool) -> int:
    """As transformers counts them: max_new_tokens, else max_length with the prompt, else 20 new tokens."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    total = config.max_length
    if unlimited:  # a default, which transformers too counts without the prompt
        return int(total)
    if total <= length:
        raise InputError(f"max_length={total}: the prompt has {length} tokens already. Set max_new_tokens.")
    return int(total) - length


def _ends(ids: Any) -> list[int]:
    if ids is None:
        return []
    values = ids.flatten().tolist() if isinstance(ids, Tensor) else ids
    return [int(i) for i in (values if isinstance(values, (list, tuple)) else [values])]
