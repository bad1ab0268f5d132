"""The command plan: what it says, as text and as JSON, what it advises, and what it refuses; without Lightning."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_targets import TARGETS, real_config

from spd_lightning import cli
from spd_lightning.commands import plan
from spd_lightning.commands.fit import recipe_files
from spd_lightning.commands.merging import FIELDS, merged
from spd_lightning.commands.plan import parse_bytes
from spd_lightning.memory.ranks import PARTS, STRATEGIES
from spd_lightning.target.sizes import active_stage_parameters

Planned = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A folder with the config.json of a published model and nothing else."""
    root = tmp_path_factory.mktemp("targets")

    def make(target: str) -> str:
        if target == "tiny":
            return target
        folder = root / target.replace("/", "_")
        if not folder.exists():
            real_config(target).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str], folder_of: Callable[[str], str]) -> Planned:
    """The plan of a recipe as JSON, without a hub."""

    def call(recipe: str, *arguments: str) -> dict[str, Any]:
        target = yaml.safe_load(recipe_files()[recipe].read_text())["model"]["target"]
        words = ["--config", recipe, "--model.target", folder_of(target), "--json", *arguments]
        assert cli.main(["plan", *words]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def row(found: dict[str, Any], strategy: str) -> dict[str, Any]:
    return next(one for one in found["strategies"] if one["strategy"] == strategy)


# -- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(recipe_files()) - {"tiny"}))
def test_a_recipe_fits_on_the_gpus_that_its_header_names(name: str, planned: Planned) -> None:
    stated = re.search(r"hardware +(?:one|\d+) GPUs? with (\d+) GB", recipe_files()[name].read_text())
    assert stated is not None
    found = planned(name, "--gpu-memory", f"{stated[1]}GB")
    assert "It fits as configured" in found["advice"]
    assert [one["strategy"] for one in found["strategies"]] == [strategy.name for strategy in STRATEGIES]
    for one in found["strategies"]:
        assert one["total"] == sum(one["parts"].values()) == max(one["moments"].values())
        assert tuple(one["parts"]) == PARTS
        assert one["fits"] == (one["total"] <= found["memory"]) == (one["largest_batch_size"] >= found["batch_size"])


def test_the_target_is_counted_by_its_parameters(planned: Planned) -> None:
    target = "meta-llama/Llama-3.1-8B-Instruct"
    stored = active_stage_parameters(real_config(target), [4] * 8).stored
    found = planned("llama31", "--gpus", "4")
    assert found["target_parameters"] == stored and row(found, "ddp")["parts"]["target"] == 2 * stored
    assert row(found, "deepspeed_stage_3")["parts"]["target"] == 2 * stored // 4
    wide = planned("llama31", "--model.loading.dtype", "float32")
    assert row(wide, "ddp")["parts"]["target"] == 4 * stored


def test_overrides_and_overlays_count_as_in_fit(planned: Planned, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data:\n  batch_size: 2\n  max_length: 1024\n")
    found = planned("llama31", "--config", str(overlay), "--data.batch_size=3", "--supervised", "0.5")
    assert (found["batch_size"], found["max_length"], found["supervised"]) == (3, 1024, 0.5)
    assert planned("llama31", "--model.activation_checkpointing", "true")["activation_checkpointing"] is True
    nested = planned("llama31", "--model.head", "{num_layers: 1}")
    assert nested["trained_parameters"] < found["trained_parameters"]


def test_the_text_names_every_part_and_the_configured_strategy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plan", "--config", "tiny", "--gpus", "2", "--trainer.strategy", "deepspeed_stage_2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first_words = [line.split()[0] for line in lines if line.split()]
    assert set(first_words) >= {*PARTS, "total", "fits", "largest"}
    assert any("ZeRO-2 *" in line for line in lines) and max(map(len, lines)) <= 80
    assert "It fits as configured: trainer.strategy=deepspeed_stage_2" in " ".join(lines[-3:])


def test_a_process_on_a_cpu_is_planned_in_float32(planned: Planned) -> None:
    found = planned("tiny", "--device", "cpu", "--gpu-memory", "4GiB")
    assert (found["device"], found["precision"], found["memory"]) == ("cpu", "32-true", 4 * 2**30)
    assert row(found, "ddp")["parts"]["target"] == 4 * found["target_parameters"]


# -- advice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "It fits as configured: trainer.strategy=ddp, data.batch_size=4; up to data.batch_size="),
        (["--data.batch_size", "64"], "Set data.batch_size="),
        (["--gpus", "8", "--data.batch_size", "12"], "Set trainer.strategy=deepspeed_stage_1, or data.batch_size="),
        (["--gpus", "8", "--gpu-memory", "40GB", "--data.batch_size", "1"], "Set trainer.strategy=deepspeed_stage_1."),
        (["--gpu-memory", "24GB"], "ids it does: trainer.strategy="),
        (["--gpu-memory", "8GB"], "Neither does it with activation checkpointing and a draft vocabulary"),
    ],
    ids=lambda value: " ".join(value) or "as it is" if isinstance(value, list) else "",
)
def test_one_line_says_what_to_set(arguments: list[str], said: str, planned: Planned) -> None:
    found = planned("llama31", *arguments)
    assert said in found["advice"] and "\n" not in found["advice"]
    if found["advice"].startswith("Set data.batch_size="):
        size = int(found["advice"].split("=")[1].split(",")[0])
        again = planned("llama31", *arguments, "--data.batch_size", str(size))
        assert "It fits as configured" in again["advice"]


# -- what it reads ---------------------------------------------------------------------------------------------------


def test_fields_and_defaults_are_those_of_fit() -> None:
    from lightning.pytorch import Trainer

    from spd_lightning.target.loading import Loading
    from spd_lightning.training.data import SpdDataModule
    from spd_lightning.training.module import HeadOptions, SpdModule

    owners: dict[str, Any] = {
        "model": SpdModule, "model.loading": Loading, "model.head": HeadOptions, "data": SpdDataModule,
        "trainer": Trainer,
    }  # fmt: skip
    for field, default in FIELDS.items():
        group, _, name = field.rpartition(".")
        assert inspect.signature(owners[group]).parameters[name].default == default, field


def test_the_strategies_are_those_that_fit_knows() -> None:
    from spd_lightning.training.strategies import ZERO_STRATEGIES

    for strategy in STRATEGIES[1:]:
        assert ZERO_STRATEGIES[strategy.name] == (strategy.stage, strategy.offload)


def test_interpolations_are_followed(planned: Planned, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data:\n  max_length: ${data.window}\n  window: 768\n")
    assert planned("llama31", "--config", str(overlay))["max_length"] == 768


def test_later_values_win() -> None:
    files = [recipe_files()["llama31"]]
    content = merged(["--data.batch_size", "2", "--data.batch_size=5"], files)
    assert content["data"]["batch_size"] == 5 and content["data"]["max_length"] == 2048


@pytest.mark.parametrize(
    "text, count", [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 1_500_000_000), ("512MiB", 2**29)]
)
def test_sizes_are_read_with_their_units(text: str, count: int) -> None:
    assert parse_bytes(text, "--gpu-memory") == count


def test_neither_lightning_nor_deepspeed_is_imported() -> None:
    code = (
        "import sys; from spd_lightning.cli import main; assert main(['plan', '--config', 'tiny', '--gpus', '1']) == 0;"
        "assert not {'lightning', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "needs a configuration"),
        (["--config", "tiny", "--gpus", "0"], "--gpus 0: expected at least 1"),
        (["--config", "tiny", "--gpus", "3", "--nodes", "2"], "--gpus 3: expected a multiple of --nodes 2"),
        (["--config", "tiny", "--gpu-memory", "80XB"], "--gpu-memory 80XB: expected a size such as 80GB"),
        (["--config", "tiny", "--gpu-memory", "0GB"], "--gpu-memory 0GB: expected a size"),
        (["--config", "tiny", "--supervised", "2"], "--supervised 2.0: expected a share"),
        (["--config", "tiny", "--gpuss", "2"], "unknown argument --gpuss. Did you mean --gpus?"),
        (["--config", "tinny"], "Did you mean tiny?"),
        (["--config", "tiny", "fast"], "unexpected argument 'fast'"),
        (
            ["--config", "tiny", "--data.batch_siz", "2"],
            "unknown field data.batch_siz. Did you mean --data.batch_size?",
        ),
        (["--config", "tiny", "--data.batch_size", "many"], "data.batch_size='many': expected an integer"),
        (["--config", "tiny", "--trainer.devices", "auto"], "say how many with --gpus"),
        (["--config", "tiny", "--trainer.strategy", "fsdp"], "trainer.strategy='fsdp': a plan knows auto, ddp"),
        (["--config", "tiny", "--trainer.precision", "64"], "trainer.precision=64: expected 32-true"),
        (["--config", "tiny", "--model.num_stages", "50"], "num_stages"),
        (["--config", "tiny", "--model.restart_rate", "7"], "model.restart_rate=7: expected a number from 0 to 1"),
        (["--config", "tiny", "--model.loading.dtype", "int3"], "model.loading.dtype='int3': expected float64"),
        (["--config", "tiny", "--model.target", "./nowhere"], "does not exist"),
        (["--config", "tiny", "--data.batch_size"], "--data.batch_size needs a value"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("error: ") and len(found.err.splitlines()) == 1
    assert told in found.err


@pytest.mark.parametrize(
    "content", ['{"model_type": "llama", "hidden_', '{"model_type": "llama", "hidden_size": "wide"}', "{}"]
)
def test_a_damaged_config_json_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert cli.main(["plan", "--config", "tiny", "--model.target", str(tmp_path)]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("error: ") and len(found.err.splitlines()) == 1
    assert str(tmp_path) in found.err and "config.json" in found.err


def test_all_targets_of_recipes_are_planned_from_config_json_alone(folder_of: Callable[[str], str]) -> None:
    for target in TARGETS:
        assert [path.name for path in Path(folder_of(target)).iterdir()] == ["config.json"]
    assert min(fields["vocab_size"] for fields in TARGETS.values()) > plan.SMALL_VOCABULARY
