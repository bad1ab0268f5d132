"""The command line: light help, recipes by name, overlays and overrides, and errors of one line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import yaml

import spd_lightning
from spd_lightning import cli
from spd_lightning.commands import fit as fit_command
from spd_lightning.errors import InputError
from spd_lightning.files import recipe_folder
from spd_lightning.training import cli as training_cli

HEAVY = ("torch", "transformers", "lightning", "matplotlib", "omegaconf", "numpy")

RECIPE = """\
run_dir: runs/a
model:
  target: tiny
  num_stages: 4
data:
  tokenizer: ${model.target}
  batch_size: 2
trainer:
  accelerator: cpu
  logger: false
  max_steps: 5
"""


class Module(L.LightningModule):
    """A stand-in.

    Args:
        target: what is trained on.
        lr: learning rate.
        num_stages: n.
        loss: which loss.
    """

    def __init__(
        self, target: str, lr: float = 1e-3, num_stages: int | None = None, loss: Literal["kl", "tv"] = "kl"
    ) -> None:
        super().__init__()
        if num_stages == 99:
            raise InputError("num_stages=99: expected at most 8.\nSet model.num_stages.")
        self.target, self.lr, self.num_stages = target, lr, num_stages


class Data(L.LightningDataModule):
    def __init__(self, tokenizer: str = "none", batch_size: int = 4) -> None:
        super().__init__()
        self.tokenizer, self.batch_size = tokenizer, batch_size


class Decoding(L.Callback):
    def __init__(self, prompts: int = 4) -> None:
        self.prompts = prompts


@dataclass
class Tracking:
    wandb: str = "disabled"


@dataclass
class Survival:
    keep: int = 2


@dataclass
class Final:
    prompts: int = 3
    temperatures: list[float] = field(default_factory=lambda: [0.0])


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[training_cli.SpdCLI]:
    """What `fit` was called with: stand-in classes, a stand-in run, and a.yaml in the working directory."""
    import spd_lightning.training.run as runs

    calls: list[training_cli.SpdCLI] = []
    monkeypatch.setattr(training_cli, "project_classes", lambda: (Module, Data, Decoding, Final, Tracking, Survival))
    monkeypatch.setattr(runs, "fit", calls.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(RECIPE)
    return calls


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that a refused command prints; it must be alone, and the status 2."""
    assert cli.main(arguments) == 2
    found = capsys.readouterr()
    lines = [line for line in found.err.splitlines() if line != "Seed set to 0"]  # Lightning's
    assert len(lines) == 1 and lines[0].startswith("error: "), found.err
    assert found.out == ""
    return lines[0]


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], *([c.name, "--help"] for c in cli.COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from spd_lightning.cli import main; status = main(sys.argv[1:]);"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (found.returncode, found.stderr.strip()) == (0, "[]")
    assert len(found.stdout.splitlines()) > 10


def test_the_top_level_help_teaches_every_command_in_its_group_and_a_first_example(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    positions = [text.index(f"\n  {command.name} ") for command in cli.COMMANDS]
    assert positions == sorted(positions)
    assert text.index("Main job") < positions[0]
    assert "spd-lightning fit --config tiny" in text
    assert cli.main([]) == 0 and capsys.readouterr().out == text


def test_the_help_of_fit_explains_every_section_and_lists_the_recipes(capsys):
    assert cli.main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (*fit_command.SECTIONS, *fit_command.recipe_files(), "${model.target}", "--help-fields"):
        assert word in text


def test_the_sections_of_the_help_are_the_sections_of_the_parser():
    known = training_cli._known_keys("spd-lightning fit", training_cli.project_classes())
    assert {key.partition(".")[0] for key in known} == set(fit_command.SECTIONS)


def test_help_fields_prints_the_fields_of_one_section(parsed, capsys):
    assert cli.main(["fit", "--help-fields", "model"]) == 0
    text = capsys.readouterr().out
    assert "--model.lr" in text and "learning rate" in text
    assert "--data.batch_size" not in text and "--trainer.max_steps" not in text


def test_both_program_names_are_the_same_program():
    found = subprocess.run([sys.executable, "-m", "spd_lightning", "--help"], capture_output=True, text=True)
    assert found.stdout.strip() == cli.help_text().strip()


def test_the_package_exposes_its_public_names_lazily():
    code = "import spd_lightning, sys; assert 'torch' not in sys.modules; spd_lightning.Staircase"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in spd_lightning.__all__:
        assert getattr(spd_lightning, name).__name__ == name
    assert set(spd_lightning.__all__) <= set(dir(spd_lightning))
    with pytest.raises(AttributeError, match="nonsense"):
        spd_lightning.nonsense  # noqa: B018


# -- recipes by name -------------------------------------------------------------------------------------------------


def test_a_config_name_finds_the_recipe_of_the_checkout():
    path = str(fit_command.recipe_files()["tiny"])
    assert Path(path).name == "tiny.yaml"
    for given in (["--config", "tiny"], ["--config=tiny"], ["-c", "tiny"], ["--config", "tiny.yaml"]):
        assert fit_command.resolve_config_names(given)[-1] in (path, f"--config={path}")


def test_an_installed_package_finds_its_recipes_inside_itself(tmp_path):
    inside, checkout = tmp_path / "site-packages" / "spd_lightning", tmp_path / "project" / "src" / "spd_lightning"
    (inside / "recipes").mkdir(parents=True)
    checkout.mkdir(parents=True)
    assert recipe_folder(inside) == inside / "recipes"
    assert recipe_folder(checkout) == tmp_path / "project" / "recipes"


def test_an_existing_file_wins_over_a_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("{}")
    assert fit_command.resolve_config_names(["--config", "tiny"]) == ["--config", "tiny"]


def test_an_unknown_config_name_lists_what_there_is(capsys):
    line = one_line_error(capsys, "fit", "--config", "tinny")
    assert "tinny" in line and "Did you mean tiny?" in line


@pytest.mark.parametrize("name", sorted(fit_command.recipe_files()))
def test_every_recipe_parses(name, capsys):
    assert cli.main(["fit", "--config", name, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert "${" not in str(config) and set(config) <= set(fit_command.SECTIONS)


# -- how a configuration is put together -----------------------------------------------------------------------------


def test_later_configs_and_dotted_arguments_win_and_interpolations_follow(parsed, tmp_path):
    (tmp_path / "b.yaml").write_text("model:\n  num_stages: 8\ndata:\n  batch_size: 3\n")
    overrides = ["--model.target", "other", "--data.batch_size", "7"]
    assert cli.main(["fit", "--config", "a.yaml", "--config", "b.yaml", *overrides]) == 0
    (found,) = parsed
    assert (found.model.target, found.model.num_stages) == ("other", 8)
    assert (found.datamodule.tokenizer, found.datamodule.batch_size) == ("other", 7)
    assert found.trainer.max_steps == 5
    assert found.config["run_dir"] == "runs/a" and found.config.get("ckpt_path") is None
    assert found.config["final"].as_dict() == {"prompts": 3, "temperatures": [0.0]}


def test_the_callback_of_real_decoding_is_attached_and_the_data_module_shards_itself(parsed):
    assert cli.main(["fit", "--config", "a.yaml", "--decoding.prompts", "9"]) == 0
    callbacks: list[Any] = parsed[0].trainer.callbacks
    assert [c.prompts for c in callbacks if isinstance(c, Decoding)] == [9]
    assert parsed[0].config.trainer.use_distributed_sampler is False


@pytest.mark.parametrize("argument", ["--model.lr=0.0003", "--model.lr=3e-4", "--model.lr=3e-04"])
def test_overrides_as_a_sweep_agent_writes_them(parsed, argument):
    assert cli.main(["fit", "--config=a.yaml", argument]) == 0
    assert parsed[0].model.lr == 0.0003


@pytest.mark.parametrize("where", [0, 4])
def test_print_config_resolves_everything_wherever_it_stands_and_can_be_used_again(parsed, capsys, tmp_path, where):
    arguments = ["--config", "a.yaml", "--model.target", "other"]
    assert cli.main(["fit", *arguments[:where], "--print_config", *arguments[where:]]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["data"]["tokenizer"] == "other"
    (tmp_path / "again.yaml").write_text(printed)
    assert cli.main(["fit", "--config", "again.yaml"]) == 0
    assert parsed[0].datamodule.tokenizer == "other"


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("ft", ["unknown command 'ft'", "Did you mean fit?"]),
        ("fit", ["--config tiny"]),
        ("fit --config", ["needs a value"]),
        ("fit --config a.yaml --lr 3", ["unknown argument --lr", "--SECTION.FIELD"]),
        ("fit --config a.yaml --num_stages 3", ["unknown argument --num_stages", "Did you mean --model.num_stages?"]),
        ("fit --config a.yaml --modle.lr 3", ["Did you mean --model.lr?"]),
        ("fit --config a.yaml --ckpt_path nothere.ckpt", ["ckpt_path='nothere.ckpt' does not exist"]),
        ("fit --help-fields modl", ["Did you mean model?"]),
    ],
)
def test_what_needs_no_parser_is_refused_before_lightning_is_touched(parsed, monkeypatch, capsys, arguments, expected):
    monkeypatch.setattr(fit_command, "_require_training_extra", lambda prog: pytest.fail("went on to the parser"))
    line = one_line_error(capsys, *arguments.split())
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("modle:\n  lr: 3\n", ["b.yaml", "'modle'", "Did you mean model?"]),
        ("model: [\n", ["b.yaml, line 2", "not valid YAML"]),
        ("- a\n", ["b.yaml", "expected a mapping"]),
        ("# a file cut off in its header\n", ["b.yaml", "found nothing"]),
        ("model:\n  lrr: 3\n", ["unknown field model.lrr", "Did you mean model.lr?", "set by b.yaml"]),
        ("model:\n  lr: fast\n", ["model.lr: expected float, found fast", "set by b.yaml"]),
        ("model:\n  num_stages: 3.0\n", ["model.num_stages: expected int or null, found 3.0"]),
        ("data:\n  batch_size: ${model.lr}\n", ["data.batch_size: expected int", "set by b.yaml"]),
        ("data:\n  tokenizer: ${model.targt}\n", ["data.tokenizer", "${model.targt}", "Did you mean model.target?"]),
        ("run_dir: ${oc.env:SPD_NOT_SET}\n", ["run_dir", "SPD_NOT_SET"]),
        ("run_dir: ${oops\n", ["run_dir", "cannot be interpolated"]),
        ("run_dir: ${model.target}\nmodel:\n  target: ${run_dir}\n", ["leads back to itself"]),
    ],
)
def test_a_wrong_overlay_is_one_line_that_names_the_key(parsed, tmp_path, capsys, content, expected):
    (tmp_path / "b.yaml").write_text(content)
    line = one_line_error(capsys, "fit", "--config", "a.yaml", "--config", "b.yaml")
    for part in expected:
        assert part in line
    assert not parsed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--model.lrr 3", ["unknown field model.lrr", "Did you mean --model.lr?"]),
        ("--model.lr fast", ["model.lr: expected float, found fast", "the command line"]),
        ("--model.loss kll", ["expected one of 'kl', 'tv', found kll"]),
        ("--trainer.max_stps 3", ["Did you mean --trainer.max_steps?"]),
        ("--trainer.max_st 3", ["unknown field trainer.max_st"]),  # no silent abbreviations
        ("--trainer.max_steps", ["--trainer.max_steps needs a value"]),
        ("model.lr=3", ["Write --model.lr=3"]),
        ("--model.num_stages 99", ["num_stages=99: expected at most 8. Set model.num_stages."]),
        ("--trainer.accelerator abacus", ["trainer:", "abacus"]),
        ("--trainer.logger CSVLogger --trainer.logger.nme x", ["trainer.logger", "CSVLogger", "'nme'"]),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_was_expected(parsed, capsys, arguments, expected):
    line = one_line_error(capsys, "fit", "--config", "a.yaml", *arguments.split())
    for part in expected:
        assert part in line
    assert not parsed


def test_required_fields_that_nobody_set_are_named(parsed, capsys):
    line = one_line_error(capsys, "fit", "--model.lr", "1")
    assert "model.target" in line and "run_dir" in line


def test_the_traceback_of_a_user_error_is_shown_on_request(monkeypatch, capsys):
    monkeypatch.setenv("SPD_DEBUG", "1")
    assert cli.main(["fit", "--config", "nothere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_status_130_and_one_line(monkeypatch, capsys):
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_command, "fit", interrupted)
    assert cli.main(["fit"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_bug_is_not_dressed_up_as_a_user_error(monkeypatch):
    def broken(argv: list[str]) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(fit_command, "fit", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["fit"])
