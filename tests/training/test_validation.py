"""DecodingValidation: figures that real decoding reproduces, and broken decoders that must not go unnoticed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from spd_lightning.decoding import decoder as decoding
from spd_lightning.decoding.checks import drift, lossless_divergence
from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.decoding.generation import Pooled
from spd_lightning.errors import BrokenInvariantError, InputError
from spd_lightning.head.loading import draft_logits, load_head, new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.loading import Loading, load_target
from spd_lightning.training import validation
from spd_lightning.training.data import SpdDataModule
from spd_lightning.training.module import SpdModule
from spd_lightning.training.validation import DecodingValidation

PROMPTS, NEW_TOKENS = 3, 10


class Setup:
    """A module, its data, the callback and a trainer, as `fit` wires them."""

    def __init__(self, model: Path, data: dict[str, str], directory: Path, **options: Any) -> None:
        prompts = options.pop("prompts", PROMPTS)
        self.module = SpdModule(str(model), num_stages=options.pop("num_stages", 4), learning_rate=3e-3)
        self.data = SpdDataModule(str(model), **data, batch_size=4, validation_samples=4)
        self.callback = DecodingValidation(prompts, NEW_TOKENS)
        self.keep = ModelCheckpoint(directory / "best", filename="{step}", monitor="val/acceptance", mode="max")
        settings: dict[str, Any] = {
            "default_root_dir": directory,
            "callbacks": [self.callback, self.keep],
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "max_steps": 2,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
        }
        self.trainer = L.Trainer(**(settings | options))

    def validate(self) -> dict[str, float]:
        (values,) = self.trainer.validate(self.module, datamodule=self.data, verbose=False)
        return dict(values)

    def fit(self) -> dict[str, float]:
        self.trainer.fit(self.module, datamodule=self.data)
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def by_hand(self, head: SpeculationHead | None = None) -> dict[str, float]:
        """What a validation of this head must log: the decoder itself on the same prompts."""
        target, trained = self.module.parts()
        head = (head or trained).eval()
        prompts = self.data.prompts(self.callback.prompts)
        found = [SpdDecoder(target, head).generate(prompt, NEW_TOKENS) for prompt in prompts]
        plain = [autoregressive_generate(target, prompt, NEW_TOKENS) for prompt in prompts]
        pooled = Pooled.of(found, head.staircase.num_stages)
        assert pooled.acceptance is not None and pooled.theoretical_speedup is not None
        assert not any(drift(target, head, prompt, g) for prompt, g in zip(prompts, found, strict=True))
        return {
            "val/acceptance": pooled.acceptance,
            "val/theoretical_speedup": pooled.theoretical_speedup,
            "val/lossless": float([g.token_ids for g in found] == [g.token_ids for g in plain]),
            "val/cycles": pooled.cycles,
            "val/decoded_tokens": pooled.new_tokens,
            "val/ties": 0.0,
            "val/drift": 0.0,
        }


@pytest.fixture
def make_setup(model_folder: Path, data_files: dict[str, str], tmp_path: Path) -> Callable[..., Setup]:
    def make(model: Path = model_folder, **options: Any) -> Setup:
        return Setup(model, data_files, tmp_path, **options)

    return make


# -- figures ---------------------------------------------------------------------------------------------------------


def test_the_logged_figures_are_those_of_the_decoder_on_the_same_prompts(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup()
    logged, expected = setup.validate(), setup.by_hand()
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, abs=1e-6), name
    assert 0 < logged["val/acceptance"] < 1 and logged["val/lossless"] == 1
    assert logged["val/decoding_seconds_simulated"] > 0 and 0 < logged["val/decoding_share_of_time"] <= 1
    assert 0 < logged["val/teacher_forced_top1"] < 1, "the teacher-forced metric has a name of its own"


def test_figures_in_training_are_those_of_the_best_checkpoint_and_real_acceptance_chooses_it(
    make_setup: Callable[..., Setup],
) -> None:
    setup = make_setup(max_steps=4)
    logged = setup.fit()
    assert setup.keep.monitor == "val/acceptance" and len(setup.callback.reference) == PROMPTS
    for name, value in setup.by_hand().items():
        assert logged[name] == pytest.approx(value, abs=1e-6), name
    best = load_head(setup.keep.best_model_path, setup.module.parts()[0])
    assert setup.keep.best_model_score is not None
    assert float(setup.keep.best_model_score) == pytest.approx(setup.by_hand(best)["val/acceptance"], abs=1e-6)


def test_a_sanity_check_decodes_nothing(make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(DecodingValidation, "measure", lambda *_: calls.append(1))
    setup = make_setup(num_sanity_val_steps=1, max_steps=1)
    setup.fit()
    assert not calls


def test_the_cost_is_bounded_by_prompts_and_new_tokens(
    make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelined, plain = [], []
    generate, baseline = SpdDecoder.generate, validation.autoregressive_generate
    monkeypatch.setattr(
        SpdDecoder, "generate", lambda self, *args, **kw: pipelined.append(args) or generate(self, *args, **kw)
    )
    monkeypatch.setattr(
        validation, "autoregressive_generate", lambda *args, **kw: plain.append(args) or baseline(*args, **kw)
    )
    setup = make_setup(prompts=2, max_steps=4)
    setup.fit()
    assert [len(pipelined), len(plain)] == [4, 2], "two validations; plain decoding once, as the target is frozen"
    assert all(args[1] == NEW_TOKENS for args in pipelined)


def test_the_share_of_time_belongs_to_the_run_that_is_going_on(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup()
    setup.callback.spent = 1000.0  # as after an earlier, longer run with this callback
    assert 0 < setup.validate()["val/decoding_share_of_time"] <= 1


def test_a_head_keeps_its_mode_through_a_validation(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup()
    setup.fit()
    target, head = setup.module.parts()
    for mode in (True, False):
        head.train(mode)
        setup.callback.measure(target, head, setup.data.prompts(1))
        assert head.training is mode


def test_a_bfloat16_target_is_validated_with_a_float32_head_in_training(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup()
    setup.module = SpdModule(str(setup.module.settings.target), num_stages=4, loading=Loading(dtype="bfloat16"))
    logged = setup.fit()
    target, head = setup.module.parts()
    assert (target.dtype, head.dtype) == (torch.bfloat16, torch.float32)
    assert logged["val/lossless"] == 1 and logged["val/drift"] == 0


@pytest.mark.parametrize(("field", "value", "least"), [("prompts", 0, 1), ("max_new_tokens", 1, 2)])
def test_too_little_to_measure_is_refused_by_field_and_value(field: str, value: int, least: int) -> None:
    with pytest.raises(InputError, match=rf"decoding\.{field}={value}: expected at least {least}"):
        DecodingValidation(**{field: value})


# -- what must fail the run ------------------------------------------------------------------------------------------


def test_an_error_in_decoding_fails_the_run(make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("the decoder broke")

    monkeypatch.setattr(SpdDecoder, "generate", broken)
    with pytest.raises(ZeroDivisionError, match="the decoder broke"):
        make_setup().fit()


def accept_always(run: Any, leaving: int) -> int:
    """A verdict that keeps every draft, right or wrong."""
    run.hidden.pop(leaving)
    return int(run.drafts[leaving + 1].token)


def forget_to_roll_back(self: Any, length: int) -> None:
    """A cache that keeps the keys and values of flushed tokens."""


original_step = SpeculationHead.step


def stale_head(self: SpeculationHead, rows: Sequence[Any], kept: Any, cache: Any, *rest: Any, **options: Any) -> Tensor:
    """A head that forgets to renew deeper rows: the newest position's row is all it computes."""
    return original_step(self, rows[-1:], kept, cache, *rest, **options)


def shifted_head(self: SpeculationHead, *args: Any, **options: Any) -> Tensor:
    """A head whose decoding arithmetic is off."""
    found = original_step(self, *args, **options)
    return found + 0.5 * found.abs().max() * torch.linspace(-1, 1, found.shape[-1]).sin()


def failure(setup: Setup) -> str:
    """The message of the run's failure; the checkpoint that it names must be there and loadable."""
    with pytest.raises(BrokenInvariantError) as caught:
        setup.fit()
    message = str(caught.value)
    where = re.search(r"saved to (.*)\.$", message)
    assert "\n" not in message and where is not None
    saved = load_head(where[1])
    for name, tensor in setup.module.parts()[1].state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
    return message


def test_a_verdict_that_accepts_every_draft_fails_the_run(
    make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding._Run, "_verdict", accept_always)
    message = failure(make_setup())
    assert message.startswith("Not lossless: prompt 0, new token 1 is") and "no tie" in message


def test_a_cache_that_does_not_roll_back_fails_the_run(
    make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup()
    monkeypatch.setattr("spd_lightning.target.cache.RollbackCache.truncate", forget_to_roll_back)
    with pytest.raises((BrokenInvariantError, RuntimeError)):
        setup.fit()


@pytest.mark.parametrize("step", [stale_head, shifted_head])
def test_a_head_that_decodes_something_else_than_it_trains_fails_the_run(
    make_setup: Callable[..., Setup],
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    step: Callable[..., Tensor],
) -> None:
    monkeypatch.setattr(SpeculationHead, "step", step)
    # flags are all that the check compares, so it needs a head that is often right
    setup = make_setup(model=make_model(num_layers=8, spread=0.05, embedding_scale=4.0), num_stages=8, prompts=6)
    setup.callback.max_new_tokens = 24
    torch.manual_seed(0)
    setup.module.configure_model()
    with torch.no_grad():  # weights of this size speak, and leave the head right often enough
        for parameter in setup.module.parts()[1].layers.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.06)
    message = failure(setup)
    assert message.startswith("Drift: prompt ") and "Not lossless" not in message


def test_the_last_state_is_saved_in_the_directory_that_was_asked_for(
    make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(decoding._Run, "_verdict", accept_always)
    setup = make_setup()
    setup.callback.directory = str(tmp_path / "elsewhere")
    assert str(tmp_path / "elsewhere" / "broken_invariant.ckpt") in failure(setup)


# -- ties ------------------------------------------------------------------------------------------------------------


def doubled_vocabulary(model: Any) -> None:
    """Every second row of the lm_head is its neighbour's: two logits are the largest everywhere."""
    weight = model.get_output_embeddings().weight.data
    weight[1::2] = weight[0::2]


def other_twin(run: Any, leaving: int) -> int:
    """A verdict that prefers the larger of two equal logits' ids, as another kernel's rounding might."""
    logits = run.target.logits(run.hidden.pop(leaving))[0, 0]
    return int(logits.argmax()) ^ 1


@pytest.fixture(scope="module")
def twin_folder(make_model: Callable[..., Path]) -> Path:
    return make_model(doubled_vocabulary, spread=0.06, embedding_scale=3.0, eos_token_id=None)


def test_a_tie_is_reported_and_does_not_fail_the_run(
    make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch, twin_folder: Path
) -> None:
    monkeypatch.setattr(decoding._Run, "_verdict", other_twin)
    logged = make_setup(model=twin_folder).fit()
    assert logged["val/lossless"] == 1 and logged["val/ties"] >= PROMPTS


def test_a_tie_excuses_nothing_but_the_two_tokens_that_are_tied(
    make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch, twin_folder: Path
) -> None:
    monkeypatch.setattr(decoding._Run, "_verdict", accept_always)
    with pytest.raises(BrokenInvariantError, match="Not lossless"):
        make_setup(model=twin_folder).fit()


def test_a_length_is_never_excused_by_a_tie(twin_folder: Path) -> None:
    target = load_target(twin_folder)
    plain = autoregressive_generate(target, [7, 9], 6)
    short = replace(plain, token_ids=plain.token_ids[:4])
    divergence = lossless_divergence(target, [7, 9], short, plain)
    assert divergence is not None and divergence.position == 4 and not divergence.tie


def test_drift_of_an_accepted_token_far_below_the_best_is_no_tie(twin_folder: Path) -> None:
    target = load_target(twin_folder, num_stages=4)
    head = new_head(target)
    found = SpdDecoder(target, head).generate([7, 9], 8)
    assert not all(found.accepted_flags)
    claimed = replace(found, restart_positions=found.restart_positions[:1])  # claims every draft was accepted
    ids = torch.tensor([[7, 9, *found.token_ids]])
    logits = draft_logits(target, head, ids, claimed.restart_positions)[0]
    wrong = {
        index for index in range(1, 8) if logits[1 + index, found.token_ids[index]] < logits[1 + index].max() - 1e-3
    }
    reported = drift(target, head, [7, 9], claimed)
    assert wrong and {d.position for d in reported if not d.tie} == wrong
