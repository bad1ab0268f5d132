"""Options of loading, splitting and the head, through the command line and into the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spd_lightning import cli
from spd_lightning.errors import InputError
from spd_lightning.head.loading import load_head
from spd_lightning.target.balance import Costs, Split
from spd_lightning.target.loading import Loading, load_target
from spd_lightning.training.module import SpdModule


@pytest.fixture(scope="module")
def fit(model_folder: Path, data_files: dict[str, str]) -> Callable[..., None]:
    """`fit` of 2 steps with one validation; keywords with dots for double underscores change fields."""

    def run(run_dir: Path, **changes: Any) -> None:
        fields = {
            "model.target": model_folder,
            "model.num_stages": 4,
            "data.train": data_files["train"],
            "data.validation": data_files["validation"],
            "data.batch_size": 4,
            "data.validation_samples": 4,
            "decoding.prompts": 2,
            "decoding.max_new_tokens": 6,
            "final.prompts": 0,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": 2,
            "trainer.val_check_interval": 2,
            "run_dir": run_dir,
        } | {name.replace("__", "."): value for name, value in changes.items()}
        words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        assert cli.main(["fit", "--config", "tiny", *words]) == 0

    return run


def saved(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "head" / "config.json").read_text())


def test_a_measured_split_is_printed_trained_and_kept_when_the_run_is_resumed(
    fit: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another clock would split otherwise tomorrow; the resumed run must not ask for another head."""
    costs = Costs(0.0, (0.001,) * 4, 0.002)
    monkeypatch.setattr("spd_lightning.training.module.measured_split", lambda target, n: Split((1, 2, 1, 0), costs))
    fit(tmp_path / "first", model__stage_layers="auto")
    assert saved(tmp_path / "first")["stage_layers"] == [1, 2, 1, 0]
    assert "stage_layers: auto -> [1, 2, 1, 0]" in capfd.readouterr().out
    monkeypatch.setattr("spd_lightning.training.module.measured_split", lambda target, n: Split((2, 1, 1, 0), costs))
    fit(
        tmp_path / "second",
        model__stage_layers="auto",
        ckpt_path=tmp_path / "first" / "checkpoints" / "last.ckpt",
        trainer__max_steps=4,
    )
    assert saved(tmp_path / "second")["stage_layers"] == [1, 2, 1, 0]
    assert json.loads((tmp_path / "second" / "run.json").read_text())["status"] == "finished"


def test_a_really_measured_split_trains(fit: Callable[..., None], tmp_path: Path) -> None:
    fit(tmp_path / "run", model__stage_layers="auto", model__num_stages=3)
    assert len(saved(tmp_path / "run")["stage_layers"]) == 3 and sum(saved(tmp_path / "run")["stage_layers"]) == 4


def test_auto_without_a_number_of_stages_is_refused(fit: Callable[..., None], tmp_path: Path) -> None:
    module = SpdModule(stage_layers="auto")
    with pytest.raises(InputError, match="model.stage_layers=auto: set model.num_stages"):
        module.check()


def test_a_head_of_the_targets_kind_is_trained_and_loads(
    fit: Callable[..., None], tmp_path: Path, model_folder: Path
) -> None:
    fit(tmp_path / "run", model__head__kind="target", model__head__intermediate_size=24, model__head__num_layers=1)
    config = saved(tmp_path / "run")
    assert (config["kind"], config["style"]["qk_norm"], config["intermediate_size"]) == ("target", "none", 24)
    head = load_head(tmp_path / "run", load_target(model_folder))
    assert head.config.intermediate_size == 24 and not hasattr(head.layers[0].self_attn, "q_norm")


@pytest.mark.slow
def test_training_on_a_target_that_is_partly_on_disk_gives_the_same_head(
    fit: Callable[..., None], tmp_path: Path
) -> None:
    places: dict[str, str] = {
        name: "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    }
    places |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(4)}
    final = {"final__prompts": 2, "final__max_new_tokens": 6}
    fit(tmp_path / "plain", **final)
    fit(
        tmp_path / "offloaded",
        **final,
        model__loading__device_map=json.dumps(places),
        model__loading__offload_folder=tmp_path / "offload",
    )
    heads = [load_head(tmp_path / name) for name in ("plain", "offloaded")]
    for one, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(one, other)
    results = [json.loads((tmp_path / name / "run.json").read_text())["results"] for name in ("plain", "offloaded")]
    for arms in zip(results[0]["final"], results[1]["final"], strict=True):
        one, other = ({k: v for k, v in arm.items() if "seconds" not in k} for arm in arms)
        assert one == other
    assert results[0]["lossless"] == results[1]["lossless"] == {"identical": 2, "ties": 0, "mismatches": 0}


def test_a_device_map_with_several_processes_is_refused(model_folder: Path) -> None:
    module = SpdModule(str(model_folder), Loading(device_map="auto"), num_stages=4)
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), world_size=2)  # type: ignore[assignment]
    with pytest.raises(InputError, match="device_map='auto'.*2 processes.*trainer.devices"):
        module.configure_model()


def test_the_tokenizer_of_the_target_is_asked_for_as_the_target_is(
    fit: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spd_lightning.data import store

    asked: list[Loading] = []
    real = store.load_tokenizer
    monkeypatch.setattr(store, "load_tokenizer", lambda source, loading: asked.append(loading) or real(source, loading))
    fit(tmp_path / "run", model__loading__offline="true")
    assert asked and all(loading.offline for loading in asked)
