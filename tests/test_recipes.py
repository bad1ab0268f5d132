"""Every recipe parses, keeps its word about sizes, and trains: on a tiny random target of its own family."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_targets import TARGETS, real_config

from spd_lightning import cli
from spd_lightning.commands import plan
from spd_lightning.commands.fit import recipe_files
from spd_lightning.head.loading import head_config, load_head
from spd_lightning.staircase import even_stage_layers
from spd_lightning.target.families import FAMILIES
from spd_lightning.target.sizes import (
    ByteRule,
    HeadParameters,
    active_stage_parameters,
    byte_rule,
    head_parameters,
    weightless_target,
)
from spd_lightning.target.target import Target

RECIPES = sorted(recipe_files())
REAL = [name for name in RECIPES if name != "tiny"]  # the embedded target is nothing to be sped up
LAYERS, STEPS = 9, 2
#: Decoded again after training as well, with every baseline; the others end with the exported head.
WITH_FINAL_DECODING = "qwen35_9b"


@lru_cache
def resolved(name: str) -> dict[str, Any]:
    """The recipe as the command line reads it: every field, every interpolation."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["fit", "--config", name, "--print_config"]) == 0
    return yaml.safe_load(printed.getvalue())


@lru_cache
def header(name: str) -> str:
    """The comment above the first key, as one line."""
    lines = recipe_files()[name].read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(" ".join(line.removeprefix("#") for line in comment).split())


def rule(name: str, num_layers: int | None = None) -> ByteRule:
    """The recipe's head beside a stage, in real sizes; with other head layers where given."""
    model = resolved(name)["model"]
    assert model["stage_layers"] is None and model["head"]["draft_vocabulary"] is None
    config, options = real_config(model["target"]), model["head"]
    target = weightless_target(config, even_stage_layers(config.num_hidden_layers, model["num_stages"]))
    layers = options["num_layers"] if num_layers is None else num_layers
    return byte_rule(
        config,
        head_config(
            target, layers, options["anchors"], kind=options["kind"], intermediate_size=options["intermediate_size"]
        ),
    )


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.0f}"


# -- what a recipe says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_names_a_target_whose_sizes_are_known(name: str) -> None:
    config = resolved(name)
    target = config["model"]["target"]
    assert target in TARGETS or target == "tiny", f"{target} needs a line in tests/recipe_targets.py"
    assert real_config(target).model_type in FAMILIES
    assert config["data"]["tokenizer"] == target and config["run_dir"] == f"runs/{name}"
    assert f"fit --config {name}" in header(name)


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_trains_on_the_published_number_of_sequences_per_step(name: str) -> None:
    config = resolved(name)
    trainer, data = config["trainer"], config["data"]
    assert data["global_batch_size"] == 64 and 64 % (data["batch_size"] * trainer["devices"]) == 0
    zero = {"llama31_70b": "deepspeed_stage_3"}.get(name, "deepspeed_stage_2")
    assert trainer["strategy"] == ("auto" if trainer["devices"] == 1 else zero)
    assert data["max_length"] == 2048 and trainer["max_epochs"] == 1 and config["model"]["learning_rate"] == 1e-4
    assert "NOT RUN YET" in header(name)


@pytest.mark.parametrize("name", REAL)
def test_the_header_states_the_sizes_that_are_counted(name: str) -> None:
    said, found = header(name), rule(name)
    head = found.head
    stated = re.search(
        r"bytes stage (\d+) M, head (\d+) M parameters \(layers (\d+) M, W_k (\d+) M, lm_head (\d+) M\): "
        r"(hidden|EXPOSED by (\d+) M)",
        said,
    )
    assert stated is not None, "no `bytes` line in the header"
    sizes = (found.stage, head.total, head.layers, head.aggregation, head.lm_head)
    assert stated.group(1, 2, 3, 4, 5) == tuple(map(millions, sizes))
    assert stated[6].startswith("hidden") == found.hidden
    if not found.hidden:
        assert stated[7] == millions(head.total - found.stage)
    ways = re.findall(r"with (\d)(?: head layers)? and at most ([\d,]+)", said)
    assert ways or found.hidden, "nothing is said about what would hide the head"
    for layers, ids in ways:
        assert rule(name, int(layers)).largest_vocabulary == int(ids.replace(",", "")), f"with {layers} layers"


@pytest.mark.parametrize("name", REAL)
def test_the_header_states_the_memory_that_plan_counts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "_target_config", lambda config: real_config(config["model.target"]))
    assert cli.main(["plan", "--config", name, "--gpu-memory", "80GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (mine,) = [entry for entry in found["strategies"] if entry["strategy"] == found["strategy"]]
    assert mine["fits"], "on the GPUs that the header names"
    words = {"target": "target", "weights": "head's weights"}
    parts = ", ".join(f"{words.get(part, part)} {size / 1e9:.1f}" for part, size in mine["parts"].items())
    assert f"planned, not measured{', per GPU' if found['ranks'] > 1 else ''}" in header(name)
    assert f"in GB: {parts}: {mine['total'] / 1e9:.0f} GB" in header(name)
    assert found["ranks"] == resolved(name)["trainer"]["devices"]


@pytest.mark.parametrize("name", REAL)
def test_the_list_of_recipes_states_what_the_file_does(name: str) -> None:
    rows = [
        line
        for line in (Path(__file__).resolve().parents[1] / "recipes" / "README.md").read_text().splitlines()
        if f"({name}.yaml)" in line
    ]
    assert len(rows) == 1, f"recipes/README.md needs one row for {name}"
    config, found = resolved(name), rule(name)
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    head_layers = config["model"]["head"]["num_layers"]
    assert cells[1:3] == [config["model"]["target"], f"{config['model']['num_stages']} / {head_layers}"]
    assert cells[3] == f"{millions(found.stage)} M, {millions(found.head.total)} M"
    assert cells[4] == ("hidden" if found.hidden else "exposed")
    memory = re.fullmatch(r"(\d+) x (\d+) GB", cells[5])
    assert memory is not None and int(memory[1]) == config["trainer"]["devices"]
    assert f": {memory[2]} GB" in header(name)


# -- how sizes are counted -------------------------------------------------------------------------------------------


def test_the_example_of_the_method_is_counted_as_it_stands_there() -> None:
    llama = real_config("meta-llama/Llama-3.1-8B-Instruct")
    target = weightless_target(llama, [4] * 8)
    three = byte_rule(llama, head_config(target, 3))
    two = byte_rule(llama, head_config(target, 2, draft_token_ids=range(32_000)))
    assert (millions(three.stage), millions(three.head.total), three.hidden) == ("872", "1431", False)
    assert (millions(two.head.total), two.hidden) == ("819", True)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mixtral", "gpt_oss", "qwen3_5_moe_text"])
def test_a_token_reads_its_stages_but_only_the_experts_it_passes(
    family: str, make_target: Callable[..., Target]
) -> None:
    target = make_target(family, num_layers=5)
    layers = [target.layer(index) for index in range(5)]
    whole = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    idle = [  # half of the four experts, which the tiny configurations have wherever they are mixtures
        sum(p.numel() for name, p in layer.named_parameters() if ".experts." in name) // 2 for layer in layers
    ]
    found = active_stage_parameters(target.config, [2, 0, 3])
    assert all(idle) == (family != "qwen3")
    assert found.stages == (sum(whole[:2]) - sum(idle[:2]), 0, sum(whole[2:]) - sum(idle[2:]))
    assert found.stored == sum(p.numel() for p in target.parameters())
    assert found.verification == target.lm_head.weight.numel() + target.norm.weight.numel()


def test_a_head_is_counted_whole_but_for_its_frozen_norm(make_target: Callable[..., Target]) -> None:
    from spd_lightning.head.loading import new_head

    head = new_head(make_target("qwen3_5_text", num_stages=4), 3, draft_token_ids=range(10))
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    assert head_parameters(head.config).total == trained


def test_the_largest_hidden_vocabulary_is_hidden_and_one_id_more_is_not() -> None:
    head = HeadParameters(layers=500, aggregation=300, lm_head=0)

    def hidden(ids: int) -> bool:
        return ByteRule(1000, HeadParameters(500, 300, 16 * ids), hidden_size=16).hidden

    assert ByteRule(1000, head, 16).largest_vocabulary == 12 and hidden(12) and not hidden(13)
    assert ByteRule(700, head, 16).largest_vocabulary == 0


# -- a recipe runs ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one round, as many packed rows as the largest accumulation of a recipe needs."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"{a} {b} {c}"}, {"role": "assistant", "content": f"{c} d {a} e {c} f {a}"}]
        for a in "ghijklm"
        for c in "nopqrst"
        for b in "uvw"
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, make_target: Callable[..., Target]) -> Callable[[str], Path]:
    """Writes a tiny random target of a family, with a tokenizer of words and letters, to a folder."""

    @lru_cache
    def make(family: str) -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp(family)
        special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
        vocabulary = {token: i for i, token in enumerate([*special, "[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner,
            pad_token="<|pad|>",
            eos_token="<|end|>",
            unk_token="[UNK]",
            extra_special_tokens=special[1:3],
        )
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        make_target(family, num_layers=LAYERS, vocab=len(vocabulary)).model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("overlay", sorted((Path(__file__).parents[1] / "recipes" / "overlays").glob("*.yaml")))
def test_an_overlay_changes_fields_of_the_tiny_recipe_and_says_how_it_is_launched(
    overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "--config", "tiny", "--config", str(overlay), "--print_config"]) == 0
    whole, changes = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(overlay.read_text())
    assert f"--config recipes/overlays/{overlay.name}" in overlay.read_text()

    def holds(fields: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict):
            return all(holds(fields[name], value) for name, value in wanted.items())
        return bool(fields == wanted)

    assert holds(whole, changes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_validates_by_decoding_and_leaves_a_head_of_its_familys_kind(
    name: str, model_folder: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    recipe = resolved(name)
    family = real_config(recipe["model"]["target"]).model_type
    # what has to be smaller here; everything else is the recipe's own
    fields: dict[str, Any] = {
        "run_dir": tmp_path / "run", "model.target": model_folder(family), "model.loading.dtype": "float32",
        "data.train": data, "data.validation": data, "data.batch_size": 1, "data.validation_samples": 4,
        "data.global_batch_size": 2 if name != "tiny" else "null", "decoding.every_steps": STEPS,
        "data.max_length": 32, "data.cleaning.decontaminate": "[]",
        "data.num_workers": 0, "decoding.prompts": 2, "decoding.max_new_tokens": 6,
        "final.prompts": 2 if name == WITH_FINAL_DECODING else 0, "final.max_new_tokens": 6,
        "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.strategy": "auto",
        "trainer.precision": "32-true", "trainer.max_steps": STEPS,
        "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": False,
    }  # fmt: skip
    overrides = [word for field, value in fields.items() for word in (f"--{field}", str(value))]
    assert cli.main(["fit", "--config", name, *overrides]) == 0

    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {key: [line[key] for line in lines if key in line] for line in lines for key in line}
    assert len(logged["train/loss"]) == STEPS and all(math.isfinite(loss) for loss in logged["train/loss"])
    assert len(logged["val/acceptance"]) == 1 and logged["val/lossless"] == [1.0] and logged["val/drift"] == [0.0]
    assert ("final" in record["results"]) == (name == WITH_FINAL_DECODING)

    head = load_head(tmp_path / "run").config
    wanted = recipe["model"]
    assert head.stage_layers == even_stage_layers(LAYERS, wanted["num_stages"])
    assert head.num_layers == wanted["head"]["num_layers"]
    assert head.kind == FAMILIES[family].head and head.style.gate == family.startswith("qwen3_5")
