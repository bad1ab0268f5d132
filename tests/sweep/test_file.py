"""One sweep file for W&B's agent and for this machine: what the agent renders, and that the command line takes it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from spd_lightning import cli
from spd_lightning.errors import InputError
from spd_lightning.sweep.file import Parameter, SweepFile, read_sweep

SWEEPS = sorted((Path(__file__).parents[2] / "recipes" / "sweeps").glob("*.yaml"))


def drawn(sweep: SweepFile, draw: random.Random) -> dict[str, Any]:
    """Values as a server would choose them."""

    def value(p: Parameter) -> Any:
        if p.values:
            return draw.choice(p.values)
        return draw.randint(int(p.low), int(p.high)) if p.integer else draw.uniform(p.low, p.high)

    return {name: value(p) for name, p in sweep.parameters.items()}


def by_wandb(sweep: SweepFile, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The words that W&B's own agent would start."""
    from wandb import wandb_agent

    started: list[list[str]] = []

    class Recorder:
        def __init__(self, command: list[str], **unused: Any) -> None:
            started.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Recorder)
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SWEEP_ID"):
        monkeypatch.setenv(name, "x")  # the agent sets them; they are gone again after the test
    agent = wandb_agent.Agent(api=None, queue=None, sweep_id="s")
    agent._sweep_command = list(sweep.command)
    arguments = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": "r0", "program": sweep.program, "args": arguments})
    return started[0]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
@pytest.mark.parametrize("seed", range(3))
def test_a_shipped_sweep_is_rendered_as_wandbs_agent_renders_it_and_fit_takes_it(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = read_sweep(path)
    values = drawn(sweep, random.Random(seed))
    words = by_wandb(sweep, values, monkeypatch, tmp_path)
    assert sweep.render(values) == words
    assert words[:5] == ["/usr/bin/env", "python", "-m", "spd_lightning", "fit"]
    assert cli.main([*words[4:], "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["tracking"]["wandb"] == "online"
    for name, value in values.items():
        found: Any = config
        for key in name.split("."):
            found = found[key]
        expected = yaml.safe_load(value) if isinstance(value, str) else value
        assert found == pytest.approx(expected) if isinstance(expected, float) else found == expected, name


def test_boolean_flags_hyphens_json_and_variables_are_rendered_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPD_TEST_WORD", "seven")
    path = tmp_path / "sweep.yaml"
    command = ["${interpreter}", "${program}", "${args_no_hyphens}", "${args_no_boolean_flags}", "${args_json}", "x"]
    path.write_text(yaml.safe_dump(content(command=[*command, "${envvar:SPD_TEST_WORD}"])))
    sweep = read_sweep(path)
    values = {"a.b": 3, "c": True, "d": False, "e": "[0, 2]", "f": 1e-5}
    assert sweep.render(values) == by_wandb(sweep, values, monkeypatch, tmp_path)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_metric_of_a_sweep_over_structure_is_predicted_speed_and_of_training_s(path: Path) -> None:
    sweep = read_sweep(path)
    varied = {name for name, p in sweep.parameters.items() if len(p.values) != 1}
    structural = varied & {"model.num_stages", "model.stage_layers", "model.head.num_layers", "model.head.anchors",
                           "model.head.draft_vocabulary"}  # fmt: skip
    assert sweep.metric == ("val/predicted_tokens_per_second" if structural else "val/theoretical_speedup")
    assert sweep.maximise and ("decoding.hardware" in sweep.parameters) == bool(structural)


def content(**changes: Any) -> dict[str, Any]:
    return {
        "method": "random",
        "metric": {"name": "val/theoretical_speedup", "goal": "maximize"},
        "parameters": {"model.learning_rate": {"min": 0.1, "max": 0.2}},
    } | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "annealing"}, "method='annealing': expected bayes, random, grid"),
        ({"metric": {"goal": "maximize"}}, "metric: expected name and goal"),
        ({"metric": {"name": "x", "goal": "up"}}, "metric.goal='up': expected maximize, minimize"),
        ({"parameters": {}}, "parameters: expected fields"),
        ({"parameters": {"a": {"parameters": {"b": {"value": 1}}}}}, "parameters.a: nested parameters"),
        ({"parameters": {"a": {"distribution": "beta", "min": 0, "max": 1}}}, "parameters.a.distribution='beta'"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, "parameters.a: expected value, values, or numbers"),
        ({"parameters": {"a": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "a logarithm needs more"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate: expected type hyperband"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 27}}, "early_terminate: max_iter is not known here"),
        ({"parameters": {"a": {"values": [1, 2], "probabilities": [0.9, 0.1]}}}, "a: probabilities is not known here"),
        ({"parameters": {"a": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}}}, "a.q=0: expected a number"),
        ({"parameters": {"a": {"distribution": "q_uniform", "min": 0.1, "max": 1, "q": 0.25}}}, "a multiple of q"),
        ({"run_cap": 0}, "run_cap=0: expected an integer of at least 1"),
        ({"runcap": 3}, "runcap: not a key of a sweep"),
        ({"command": "fit"}, "command: expected a list of words"),
    ],
)
def test_a_wrong_sweep_is_one_line_that_names_the_key(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content(**changes)))
    with pytest.raises(InputError) as caught:
        read_sweep(path)
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_an_unknown_macro_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content(command=["${programme}"])))
    with pytest.raises(InputError, match=r"\$\{programme\} is no macro"):
        read_sweep(path).render({})
