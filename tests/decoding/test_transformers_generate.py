"""An exported folder as custom generation method of transformers: same text, every setting honoured or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList

from spd_lightning.decoding.transformers_generate import check_generation_config, generate
from spd_lightning.errors import InputError
from spd_lightning.export import bundle
from spd_lightning.export.background import Background
from spd_lightning.export.check import check_folder
from spd_lightning.head.loading import new_head
from spd_lightning.target.target import Target

PROMPT = torch.tensor([[5, 9, 3, 14, 7]])
Run = Callable[..., Any]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text", "qwen3_5_text"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: Any, make_target: Callable[..., Target]) -> Any:
    """A model and the folder of a head for it."""
    target = make_target(request.param, num_layers=5, num_stages=3, spread=0.06, embedding_scale=3.0)
    folder = tmp_path_factory.mktemp("heads") / f"head_{request.param}"
    head = new_head(target, num_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "prove", check_folder)  # without a process of its own
        bundle.write_bundle(head, folder, Background({"name": "test", "kind": "folder"}))
    model = target.model
    model.requires_grad_(True)
    model.generation_config.eos_token_id = None
    return model, folder


@pytest.fixture
def run(exported: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> Run:
    model, folder = exported
    return lambda **options: model.generate(
        **{"input_ids": PROMPT, "custom_generate": str(folder), "trust_remote_code": True, **options}
    )


def test_greedy_text_is_that_of_transformers(exported: Any, run: Run) -> None:
    model, _ = exported
    assert torch.equal(run(max_new_tokens=24), model.generate(PROMPT, max_new_tokens=24, do_sample=False))
    assert torch.equal(run(max_length=11), model.generate(PROMPT, max_length=11, do_sample=False))
    assert torch.equal(run(), model.generate(PROMPT, do_sample=False))  # 20 new tokens where nothing is said
    assert torch.equal(run(generation_config=GenerationConfig(max_new_tokens=7)), run(max_new_tokens=7))
    mask = torch.ones_like(PROMPT)
    assert torch.equal(run(attention_mask=mask, max_new_tokens=7), run(max_new_tokens=7))


def test_an_end_of_sequence_id_or_a_list_of_them_ends_the_text(exported: Any, run: Run) -> None:
    model, _ = exported
    plain = model.generate(PROMPT, max_new_tokens=24, do_sample=False)[0, 5:].tolist()
    for ends in (plain[4], [plain[9], plain[4]], torch.tensor([plain[9]])):
        expected = model.generate(PROMPT, max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=0)
        assert torch.equal(run(max_new_tokens=24, eos_token_id=ends, pad_token_id=0), expected)


def test_stopping_criteria_end_the_text_where_transformers_ends_it(exported: Any, run: Run) -> None:
    model, _ = exported
    criteria = StoppingCriteriaList([lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 12])])
    found = run(max_new_tokens=24, stopping_criteria=criteria)
    assert found.shape[1] == 12
    assert torch.equal(found, model.generate(PROMPT, max_new_tokens=24, do_sample=False, stopping_criteria=criteria))


class Recorder:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_prompt_and_tokens_as_from_transformers(exported: Any, run: Run) -> None:
    model, _ = exported
    ours, theirs = Recorder(), Recorder()
    run(max_new_tokens=9, streamer=ours)
    model.generate(PROMPT, max_new_tokens=9, do_sample=False, streamer=theirs)
    assert (ours.tokens, ours.ended) == (theirs.tokens, theirs.ended)


def test_sampling_follows_torchs_random_state(exported: Any, run: Run) -> None:
    def sampled(seed: int, **options: Any) -> list[int]:
        torch.manual_seed(seed)
        return run(max_new_tokens=16, do_sample=True, **options)[0].tolist()

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) > 1
    assert sampled(1, top_k=1) == run(max_new_tokens=16)[0].tolist()
    assert sampled(1, top_p=1e-6) == run(max_new_tokens=16)[0].tolist()


def test_a_dictionary_is_returned_where_one_is_asked_for(run: Run) -> None:
    found = run(max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(found.sequences, run(max_new_tokens=5))


def test_the_model_is_afterwards_as_it_was(exported: Any, run: Run) -> None:
    model, _ = exported
    model.train()
    model.get_decoder().layers[1].eval()
    run(max_new_tokens=3)
    assert model.training and not model.get_decoder().layers[1].training
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"repetition_penalty": 1.05},
        {"min_p": 0.1, "do_sample": True}, {"typical_p": 0.9, "do_sample": True}, {"min_new_tokens": 3},
        {"bad_words_ids": [[3]]}, {"no_repeat_ngram_size": 2}, {"output_scores": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True}, {"suppress_tokens": [4]},
        {"forced_eos_token_id": 4}, {"prompt_lookup_num_tokens": 3}, {"token_healing": True}, {"guidance_scale": 1.5},
        {"stop_strings": "end"}, {"logits_processor": [lambda ids, scores: scores]}, {"penalty_alpha": 0.6, "top_k": 4},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [1]}, {"inputs_embeds": torch.zeros(1, 3, 8)},
        {"past_key_values": ((1,),)}, {"dola_layers": "high"}, {"exponential_decay_length_penalty": (3, 1.1)},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(run: Run, options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        run(max_new_tokens=4, **options)
    assert next(iter(options)) in str(caught.value) and "\n" not in str(caught.value)


def test_batches_and_padding_are_refused(run: Run) -> None:
    with pytest.raises(InputError, match="2 sequences"):
        run(input_ids=PROMPT.repeat(2, 1))
    with pytest.raises(InputError, match="attention_mask hides"):
        run(attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))


def test_a_field_that_a_later_transformers_adds_is_refused_once_it_is_set() -> None:
    config = GenerationConfig()
    check_generation_config(config)
    config.levitation = 0.3
    with pytest.raises(InputError, match="levitation=0.3"):
        check_generation_config(config)


def test_a_head_of_another_target_is_refused(exported: Any, make_target: Callable[..., Target]) -> None:
    _, folder = exported
    other = make_target("llama", num_layers=4, hidden=64, num_stages=2).model
    with pytest.raises(InputError, match="does not fit"):
        generate(other, Path(folder), PROMPT, max_new_tokens=3)


def test_nothing_runs_without_consent(exported: Any) -> None:
    model, folder = exported
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(PROMPT, custom_generate=str(folder), max_new_tokens=3)
