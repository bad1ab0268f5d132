"""Wrong input ends with ONE line that names the value, what was expected and the field; on the command line too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lightning import cli
from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.errors import InputError
from spd_lightning.head.folder import save_head
from spd_lightning.head.loading import draft_logits, load_head, new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.head.vocabulary import read_draft_vocabulary
from spd_lightning.target.loading import load_target, load_tokenizer
from spd_lightning.target.target import Target

VOCABULARY, CONTEXT = 64, 256
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def refusal(action: Callable[[], object], *says: str) -> str:
    """The action must end with an InputError of one line that says all of this."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    assert all(word in message for word in says), f"{says} in {message!r}"
    return message


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, make_target: Callable[..., Target]) -> Path:
    """A folder that is a target: 4 layers, a tokenizer of words and letters, a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pristine")
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = [*special, "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", unk_token="[UNK]", extra_special_tokens=special[:3]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    make_target(num_layers=4, vocab=VOCABULARY).model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "target"))


@pytest.fixture(scope="module")
def target(make_target: Callable[..., Target]) -> Target:
    return make_target(num_layers=4, vocab=VOCABULARY, num_stages=4)


@pytest.fixture(scope="module")
def head(target: Target) -> SpeculationHead:
    return new_head(target)


class WeightsReadError(BaseException):
    """Nothing that catches every Exception turns this one into an InputError."""


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here must be refused before any weight is read."""

    def read(*args: Any, **options: Any) -> None:
        raise WeightsReadError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)


def truncate(path: Path, keep: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


# -- targets ---------------------------------------------------------------------------------------------------------


def test_the_undamaged_folder_is_a_target(pristine: Path) -> None:
    assert load_target(pristine, num_stages=4).stage_layers == (1, 1, 1, 1)
    assert len(load_tokenizer(pristine)) == 31


@pytest.mark.usefixtures("no_weights")
def test_a_target_that_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    refusal(lambda: load_target(missing), f"target={str(missing)!r}", "does not exist")
    refusal(lambda: load_tokenizer(missing), str(missing), "does not exist")
    (tmp_path / "file").write_text("")
    refusal(lambda: load_target(tmp_path / "file"), str(tmp_path / "file"), "is a file", "folder")
    refusal(lambda: load_target("./missing"), "missing", "does not exist")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), ["without config.json", "Hugging Face model"]),
        (truncate, ["config.json", "truncated or damaged"]),
        (lambda path: path.write_text(""), ["config.json", "truncated or damaged"]),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), ["config.json"]),
        (lambda path: path.write_text("{}"), ["no readable config.json"]),
        (lambda path: path.write_text("[1]"), ["config.json"]),
        (lambda path: edit(path, num_hidden_layers="four"), ["config.json"]),
        (lambda path: edit(path, model_type="gpt2"), ["'gpt2'", "llama, qwen2, qwen3"]),
        (lambda path: edit(path, model_type="no_such_family"), ["no_such_family"]),
    ],
    ids=["missing", "truncated", "empty", "binary", "{}", "a list", "a wrong type", "other family", "no family"],
)
def test_a_damaged_config_is_refused_before_weights_are_read(
    folder: Path, damage: Callable[[Path], None], says: list[str]
) -> None:
    damage(folder / "config.json")
    refusal(lambda: load_target(folder, num_stages=4), str(folder), *says)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), ["has no weights", "model.safetensors"]),
        (truncate, ["cannot be read", "safetensors"]),
        (lambda path: path.write_bytes(b""), ["cannot be read", "safetensors"]),
        (lambda path: path.write_bytes(b"not a tensor file" * 20), ["cannot be read", "safetensors"]),
    ],
    ids=["missing", "truncated", "empty", "something else"],
)
def test_damaged_weights_are_refused_by_path(folder: Path, damage: Callable[[Path], None], says: list[str]) -> None:
    damage(folder / "model.safetensors")
    refusal(lambda: load_target(folder, num_stages=4), str(folder), *says)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 5}, {"intermediate_size": 128}], ids=["layers", "a width"])
def test_weights_that_do_not_belong_to_the_config_are_refused(folder: Path, change: dict[str, int]) -> None:
    edit(folder / "config.json", **change)
    refusal(lambda: load_target(folder, num_stages=4), str(folder), "config.json")


@pytest.mark.parametrize(
    "damage",
    [truncate, lambda path: path.write_text("{}"), lambda path: path.unlink()],
    ids=["truncated", "empty", "missing"],
)
def test_a_damaged_tokenizer_is_refused_by_path(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "tokenizer.json")
    refusal(lambda: load_tokenizer(folder), "tokenizer", str(folder), "cannot be read")


def test_a_dtype_that_is_none_is_refused_by_its_name(pristine: Path) -> None:
    for name in ("float33", "int8", "nn", "bf16"):
        refusal(lambda name=name: load_target(pristine, dtype=name), f"dtype={name!r}", "float32, bfloat16")  # type: ignore[misc]


# -- stages and anchors ----------------------------------------------------------------------------------------------

SPLITS: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_stages": 9}, ["num_stages=9", "4 layers", "2 <= num_stages <= 8"]),
    ({"num_stages": 1}, ["num_stages=1", "2 <= num_stages <= 8"]),
    ({"num_stages": 0}, ["num_stages=0", "2 <= num_stages <= 8"]),
    ({"num_stages": -2}, ["num_stages=-2", "2 <= num_stages <= 8"]),
    ({"stage_layers": [2, 1]}, ["stage_layers=[2, 1]", "a sum of 4", "the sum is 3"]),
    ({"stage_layers": [4]}, ["stage_layers=[4]", "at least two stages"]),
    ({"stage_layers": [5, -1]}, ["stage_layers=[5, -1]", "no negative number"]),
    ({"stage_layers": [1.9, 2.1]}, ["stage_layers=[1.9, 2.1]", "whole numbers"]),
    ({"stage_layers": []}, ["stage_layers=[]", "at least two stages"]),
    ({"stage_layers": "even"}, ["stage_layers='even'", "a list"]),
    ({"stage_layers": 4}, ["stage_layers=4", "a list"]),
    ({"stage_layers": ["2", "2"]}, ["stage_layers=['2', '2']", "whole numbers"]),
    ({"num_stages": "4"}, ["num_stages='4'", "2 <= num_stages"]),
    ({"stage_layers": "auto"}, ["stage_layers='auto'", "set num_stages"]),
    ({"num_stages": 4, "stage_layers": [2, 2]}, ["num_stages=4", "contradicts", "stage_layers=[2, 2]"]),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("split", "says"), SPLITS, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_an_impossible_split_is_refused_before_weights_are_read(
    pristine: Path, split: dict[str, Any], says: list[str]
) -> None:
    refusal(lambda: load_target(pristine, **split), *says)


@pytest.mark.parametrize(
    "anchors",
    [[0, 5], [0, 2, 1], [0, 1, 1, 4], [1, 4], [], [-1, 0, 4]],
    ids=["out of range", "unsorted", "twice", "not from 0", "none", "negative"],
)
def test_impossible_anchors_are_refused_with_the_range(target: Target, anchors: list[int]) -> None:
    refusal(lambda: new_head(target, anchors=anchors), f"anchors={anchors}", "start at 0", "at most at 4")


@pytest.mark.parametrize("layers", [0, -1])
def test_a_head_without_layers_is_refused(target: Target, layers: int) -> None:
    refusal(lambda: new_head(target, num_layers=layers), f"num_layers={layers}", "at least 1")


# -- draft vocabularies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ["cannot be read"]),
        ("", ["cannot be read"]),
        ('{"token_ids": [1, 2', ["cannot be read"]),
        ("[1, 2]", ['expected {"token_ids"']),
        ('{"ids": [1]}', ['expected {"token_ids"']),
        ('{"token_ids": []}', ['expected {"token_ids"']),
        ('{"token_ids": [1.5]}', ['expected {"token_ids"']),
        ('{"token_ids": ["a"]}', ['expected {"token_ids"']),
        ('{"token_ids": [true]}', ['expected {"token_ids"']),
        ('{"token_ids": [3, 3, 4]}', ["distinct ids in 0..63", "1 duplicates"]),
        ('{"token_ids": [3, 64]}', ["distinct ids in 0..63", "3..64"]),
        ('{"token_ids": [-1, 3]}', ["distinct ids in 0..63", "-1..3"]),
    ],
    ids=[
        "missing", "empty", "truncated", "a list", "other key", "no id", "a fraction", "text", "a truth", "twice",
        "large", "negative",
    ],
)  # fmt: skip
def test_a_wrong_draft_vocabulary_is_refused_by_its_path(tmp_path: Path, content: str | None, says: list[str]) -> None:
    path = tmp_path / "vocabulary.json"
    if content is not None:
        path.write_text(content)
    refusal(lambda: read_draft_vocabulary(path, VOCABULARY), f"draft_vocabulary={str(path)!r}", *says)


@pytest.mark.parametrize("ids", [[3, 64], [-1, 2], []], ids=["too large", "negative", "none"])
def test_draft_ids_outside_the_vocabulary_are_refused(target: Target, ids: list[int]) -> None:
    refusal(lambda: new_head(target, draft_token_ids=ids), "draft_token_ids", "within 0..63")


# -- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"hidden": 64}, ["hidden size is 32 in the head and 64 in the target"]),
        ({"vocab": 60}, ["vocabulary size is 64 in the head and 60 in the target"]),
        ({"num_layers": 6}, ["number of layers is 4 in the head and 6 in the target"]),
        ({"num_layers": 4, "num_stages": 2}, ["[1, 1, 1, 1] in the head and [2, 2] in the target", "num_stages"]),
        ({"num_layers": 5, "num_stages": 4}, ["number of layers is 4 in the head and 5 in the target"]),
    ],
    ids=["hidden size", "vocabulary", "layers", "stages", "layers in as many stages"],
)
def test_a_head_of_another_target_is_refused_with_both_values(
    make_target: Callable[..., Target], head: SpeculationHead, tmp_path: Path, other: dict[str, Any], says: list[str]
) -> None:
    stranger = make_target(**({"num_layers": 4, "vocab": VOCABULARY} | other))
    save_head(head, tmp_path / "head")
    for action in (lambda: SpdDecoder(stranger, head), lambda: load_head(tmp_path / "head", stranger)):
        refusal(action, "does not fit the target", *says)


def test_a_source_that_holds_no_head_is_refused_by_its_path(tmp_path: Path) -> None:
    refusal(lambda: load_head(tmp_path), f"head={str(tmp_path)!r}", "holds no head", "model.safetensors")
    for name in ("missing", "missing.ckpt", "missing.pt"):
        refusal(lambda name=name: load_head(tmp_path / name), str(tmp_path / name), "does not exist")  # type: ignore[misc]
    (tmp_path / "notes.txt").write_text("")
    refusal(lambda: load_head(tmp_path / "notes.txt"), str(tmp_path / "notes.txt"), "folder, .ckpt or .pt")


def test_a_checkpoint_of_something_else_is_refused_by_its_path(head: SpeculationHead, tmp_path: Path) -> None:
    for name, content in (("other.ckpt", {"state_dict": {}}), ("list.ckpt", [1, 2]), ("tensor.ckpt", torch.zeros(3))):
        torch.save(content, tmp_path / name)
        refusal(lambda name=name: load_head(tmp_path / name), str(tmp_path / name), "head_config")  # type: ignore[misc]
    torch.save({"state_dict": {f"head.{k}": v for k, v in head.state_dict().items()}}, tmp_path / "cut.ckpt")
    truncate(tmp_path / "cut.ckpt")
    refusal(lambda: load_head(tmp_path / "cut.ckpt"), str(tmp_path / "cut.ckpt"), "truncated, damaged")
    torch.save({"state_dict": {}, "head_config": {"colour": "red"}}, tmp_path / "unknown.ckpt")
    refusal(lambda: load_head(tmp_path / "unknown.ckpt"), str(tmp_path / "unknown.ckpt"), "colour")


# -- version-11 files ------------------------------------------------------------------------------------------------


def published(head: SpeculationHead, ids: Sequence[int] | None = None) -> dict[str, Any]:
    """The head as the published implementation would have saved it."""

    def rename(name: str) -> str:
        return name.replace("aggregation.", "aggr_projs.").replace("layers.", "spec_layers.", 1)

    weights = {rename(name): tensor for name, tensor in head.state_dict().items() if name != "norm.weight"}
    config = {
        "version": 11, "num_stages": 4, "aggr_feature_bound": list(head.config.anchors), "num_spec_layers": 2,
        "hidden_size": 32, "vocab_size": VOCABULARY, "draft_token_ids": None if ids is None else list(ids),
    }  # fmt: skip
    return {"state_dict": weights, "config": config}


def test_a_version_11_file_is_the_head_it_was_made_of(target: Target, head: SpeculationHead, tmp_path: Path) -> None:
    torch.save(published(head), tmp_path / "head.pt")
    loaded = load_head(tmp_path / "head.pt", target)
    assert loaded.config == head.config
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_rows_of_a_version_11_file_belong_to_its_draft_ids_in_ascending_order(target: Target, tmp_path: Path) -> None:
    ids = [40, 3, 17, 9]
    head = new_head(target, draft_token_ids=ids)
    torch.save(published(head, ids), tmp_path / "head.pt")  # the format: row i <-> i-th smallest id
    loaded = load_head(tmp_path / "head.pt", target)
    tokens = torch.tensor([[5, 6, 7]])
    assert loaded.config.draft_token_ids == (3, 9, 17, 40)
    assert torch.equal(draft_logits(target, loaded, tokens), draft_logits(target, head, tokens))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data["config"].update(version=10), ["version 10", "Only version 11"]),
        (lambda data: data["config"].pop("version"), ["version 'None'", "only version 11"]),
        (lambda data: data.pop("config"), ["head.pt", "state_dict and config"]),
        (lambda data: data.update(config="text"), ["head.pt", "state_dict and config"]),
        (lambda data: data["config"].update(hidden_size=64), ["hidden_size is 64"]),
        (lambda data: data["config"].update(vocab_size=99), ["vocab_size is 99"]),
        (lambda data: data["config"].update(num_stages=9), ["num_stages=9"]),
        (lambda data: data["config"].pop("num_stages"), ["head.pt", "num_stages"]),
        (lambda data: data["config"].pop("hidden_size"), ["head.pt", "hidden_size is None"]),
        (lambda data: data["config"].update(aggr_feature_bound=[0, 9]), ["anchors=[0, 9]"]),
        (lambda data: data["config"].update(num_spec_layers=3), ["head.pt", "layers.2"]),
        (lambda data: data["state_dict"].pop("lm_head.weight"), ["head.pt", "lm_head.weight"]),
        (lambda data: data["state_dict"].pop("spec_layers.0.mlp.gate_proj.weight"), ["head.pt", "gate_proj"]),
        (lambda data: data["state_dict"].update({"lm_head.weight": torch.zeros(3, 3)}), ["head.pt", "lm_head.weight"]),
    ],
    ids=[
        "version 10", "no version", "no config", "config is text", "hidden size", "vocabulary", "stages",
        "no stages", "no hidden size", "anchors", "a layer too few", "no lm_head", "no gate", "wrong shape",
    ],
)  # fmt: skip
def test_a_wrong_version_11_file_is_refused(
    target: Target, head: SpeculationHead, tmp_path: Path, damage: Callable[[Any], object], says: list[str]
) -> None:
    content = published(head)
    damage(content)
    torch.save(content, tmp_path / "head.pt")
    refusal(lambda: load_head(tmp_path / "head.pt", target), *says)


def test_a_version_11_file_needs_its_target_and_all_of_its_bytes(
    target: Target, head: SpeculationHead, tmp_path: Path
) -> None:
    path = tmp_path / "head.pt"
    torch.save(published(head), path)
    refusal(lambda: load_head(path), str(path), "load_head(path, target)")
    truncate(path)
    refusal(lambda: load_head(path, target), str(path), "damaged")


# -- prompts and sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"input_ids": []}, ["input_ids is empty", "at least one token"]),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, ["input_ids is empty"]),
        ({"input_ids": [[1, 2], [3, 4]]}, ["2 sequences", "takes one"]),
        ({"input_ids": [5] * (CONTEXT - 3)}, [f"{CONTEXT - 3} tokens", "max_new_tokens=4", f"{CONTEXT} tokens"]),
        ({"input_ids": [5] * 2 * CONTEXT}, ["context", f"{CONTEXT} tokens"]),
        ({"input_ids": [1, VOCABULARY]}, [f"1..{VOCABULARY}", f"0..{VOCABULARY - 1}"]),
        ({"input_ids": [1, -1]}, ["-1..1", f"0..{VOCABULARY - 1}"]),
        ({"max_new_tokens": 0}, ["max_new_tokens=0", "at least 1"]),
        ({"max_new_tokens": -5}, ["max_new_tokens=-5", "at least 1"]),
        ({"temperature": -0.5}, ["temperature=-0.5", ">= 0"]),
        ({"temperature": float("nan")}, ["temperature=nan", "finite"]),
        ({"temperature": float("inf")}, ["temperature=inf", "finite"]),
        ({"temperature": 1.0, "top_k": -1}, ["top_k=-1", ">= 0"]),
        ({"temperature": 1.0, "top_p": 0.0}, ["top_p=0.0", "(0, 1]"]),
        ({"temperature": 1.0, "top_p": 1.5}, ["top_p=1.5", "(0, 1]"]),
        ({"temperature": 1.0, "top_p": float("nan")}, ["top_p=nan", "(0, 1]"]),
    ],
    ids=lambda case: "" if isinstance(case, list) else str(case)[:40],
)
def test_what_cannot_be_decoded_is_refused_by_decoder_and_baseline(
    target: Target, head: SpeculationHead, arguments: dict[str, Any], says: list[str]
) -> None:
    given: dict[str, Any] = {"input_ids": [1, 2, 3], "max_new_tokens": 4} | arguments
    refusal(lambda: SpdDecoder(target, head).generate(**given), *says)
    refusal(lambda: autoregressive_generate(target, **given), *says)


def test_a_prompt_that_just_fits_is_decoded(target: Target, head: SpeculationHead) -> None:
    found = SpdDecoder(target, head).generate([5] * (CONTEXT - 2), 2, eos_token_id=[])
    assert len(found.token_ids) == 2


def test_restarts_outside_the_sequence_are_refused(target: Target, head: SpeculationHead) -> None:
    refusal(lambda: draft_logits(target, head, torch.tensor([[1, 2, 3]]), restarts=(0, 3)), "[3]", "3 tokens")


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten conversations, the same for training and validation."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{letter} b c"}, {"role": "assistant", "content": f"d e {letter}"}]}
        for letter in "fghijklmno"
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], *says: str) -> str:
    """The command must end with status 2 and exactly one line on stderr."""
    status = cli.main(arguments)
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert status == 2 and len(lines) == 1, output.err
    assert lines[0].startswith("error: ") and "Traceback" not in output.err + output.out
    assert all(word in lines[0] for word in says), f"{says} in {lines[0]!r}"
    return lines[0]


@pytest.fixture
def fit(pristine: Path, data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of `fit` that would work, less what is changed."""

    def arguments(**changes: Any) -> list[str]:
        fields: dict[str, Any] = {
            "model.target": pristine, "model.num_stages": 4, "data.train": data, "data.validation": data,
            "data.batch_size": 2, "data.validation_samples": 2, "decoding.prompts": 2, "decoding.max_new_tokens": 4,
            "final.prompts": 0, "trainer.accelerator": "cpu", "trainer.max_steps": 3, "trainer.val_check_interval": 3,
            "run_dir": tmp_path / "run",
        }  # fmt: skip
        fields |= {name.replace("__", "."): value for name, value in changes.items()}
        words = [word for name, value in fields.items() if value is not None for word in (f"--{name}", str(value))]
        return ["fit", "--config", "tiny", *words]

    return arguments


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model__num_stages": 9}, ["num_stages=9", "4 layers", "2 <= num_stages <= 8"]),
        ({"model__num_stages": "four"}, ["model.num_stages", "four"]),
        ({"model__stage_layers": "[1, 1]", "model__num_stages": "null"}, ["stage_layers=[1, 1]", "a sum of 4"]),
        ({"model__head__anchors": "[0, 9]"}, ["anchors=[0, 9]", "at most at 4"]),
        ({"model__head__anchors": "[]"}, ["anchors=[]", "start at 0"]),
        ({"model__loading__device_map": "nonsense"}, ["model.loading.device_map='nonsense'", "auto"]),
        ({"model__loading__device_map": '{"model": "cuda:7"}'}, ["model.loading.device_map", "cuda:7", "GPUs"]),
        ({"model__loading__attention": "paged|eager"}, ["model.loading.attention='paged|eager'", "roll back"]),
        ({"model__stage_layers": "auto", "model__num_stages": "null"}, ["stage_layers=auto", "set model.num_stages"]),
        ({"model__target": "./no/such/folder"}, ["no/such/folder", "does not exist"]),
        ({"model__head__draft_vocabulary": "no/such/file.json"}, ["draft_vocabulary='no/such/file.json'"]),
        ({"model__learning_rate": -1}, ["model.learning_rate=-1", "positive"]),
        ({"model__loss__tv": -1}, ["model.loss.tv=-1", "at least 0"]),
        ({"model__loss__kl": 0}, ["model.loss", "above 0"]),
        (
            {"model__optimizer": "muon", "trainer__strategy": "deepspeed_stage_2"},
            ["model.optimizer=muon", "trainer.strategy"],
        ),
        (
            {"model__head__warm_start": "true", "model__optimizer": "adamw", "trainer__strategy": "deepspeed_stage_3"},
            ["model.head.warm_start", "trainer.strategy"],
        ),
        ({"model__head__warm_start": "true"}, ["model.head.warm_start", "model.head.kind to target"]),
        ({"model__restart_rate": 1.5}, ["model.restart_rate=1.5", "from 0 to 1"]),
        ({"model__head__num_layers": 0}, ["model.head.num_layers=0", "at least 1"]),
        ({"model__loading__dtype": "float33"}, ["dtype='float33'", "bfloat16"]),
        ({"data__train": "no/such/file.jsonl"}, ["data.train='no/such/file.jsonl'", "does not exist"]),
        ({"data__batch_size": 0}, ["data.batch_size=0", "at least 1"]),
        ({"decoding__prompts": 0}, ["decoding.prompts=0", "at least 1"]),
        ({"decoding__prompts": 11}, ["11 held-out prompts", "10 conversations"]),
        ({"ckpt_path": "no/such.ckpt"}, ["ckpt_path='no/such.ckpt'", "does not exist"]),
        ({"model__colour": "red"}, ["unknown field model.colour"]),
    ],
    ids=lambda case: "" if isinstance(case, list) else " ".join(case),
)
def test_fit_refuses_wrong_fields_in_one_line_before_weights_are_read(
    fit: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], change: dict[str, Any], says: list[str]
) -> None:
    complaint(fit(**change), capsys, *says)


@pytest.mark.usefixtures("no_weights")
def test_fit_refuses_data_that_it_cannot_use_before_weights_are_read(
    fit: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    empty, cut = tmp_path / "empty.jsonl", tmp_path / "cut.jsonl"
    empty.write_text("")
    cut.write_text(data.read_text()[:-20])
    complaint(fit(data__train=empty), capsys, f"data.train='{empty}'", "is empty")
    says = ("data.validation: 1 of 10 rows are bad", f"{cut}:10: truncated last line")
    complaint(fit(data__validation=cut), capsys, *says)


@pytest.mark.usefixtures("no_weights")
def test_fit_refuses_a_tokenizer_of_another_target(
    fit: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    complaint(fit(data__tokenizer="tiny"), capsys, "data.tokenizer", "vocabulary")


@pytest.mark.usefixtures("no_weights")
def test_fit_refuses_fewer_conversations_than_one_batch(
    fit: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    complaint(fit(data__batch_size=11), capsys, "data.train has 10 conversations", "data.batch_size=11")


def test_fit_ends_in_one_line_when_the_loss_is_not_finite(
    fit: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    changes = {"model__learning_rate": "1e30", "trainer__gradient_clip_val": "null", "survival__skipped_steps": 1}
    changes |= {"model__adamw_learning_rate": "1e30"}
    arguments = fit(**changes, model__warmup=0, trainer__max_steps=6, trainer__val_check_interval=6)
    says = "survival.skipped_steps=1: step 3 is number 2 whose"
    status = cli.main(arguments)
    error = capsys.readouterr().err.rstrip("\n").replace("\r", "\n").splitlines()[-1]  # after the progress bar
    assert status == 2 and f"error: {says}" in error and "model.learning_rate (now 1e+30)" in error
    status = json.loads((tmp_path / "run" / "run.json").read_text())["status"]
    assert status.startswith(f"failed: InputError: {says}")


def test_a_process_of_its_own_ends_with_status_2_and_one_line_on_stderr(fit: Callable[..., list[str]]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spd_lightning", *fit(model__num_stages=9)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: num_stages=9 does not fit") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--target", "./missing"], ["missing", "does not exist"]),
        (["--head", "./missing"], ["missing", "does not exist"]),
        (["--num-stages", "2"], ["[1, 1, 1, 1] in the head and [2, 2] in the target"]),
        (["--num-stages", "9"], ["num_stages=9", "4 layers"]),
        (["--device-map", "nonsense"], ["--device-map='nonsense'", "auto"]),
        (["--offload-folder", "x"], ["--offload-folder='x'", "--device-map"]),
        (["--quantization", "4bit"], ["--quantization=4bit"]),
        (["--attention", "no_such"], ["--attention='no_such'", "sdpa"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens 0", "at least 1"]),
        (["--max-new-tokens", "300"], ["max_new_tokens=300", "256 tokens"]),
        (["--temperature", "-1"], ["temperature=-1.0"]),
        (["--top-p", "2"], ["top_p=2.0"]),
        (["--prompt", "", "--raw"], ["prompt"]),
        (["--dtype", "float33"], ["dtype='float33'"]),
    ],
    ids=lambda case: " ".join(case) if case and case[0].startswith("--") else "",
)
def test_generate_refuses_wrong_arguments_in_one_line(
    pristine: Path,
    head: SpeculationHead,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    says: list[str],
) -> None:
    save_head(head, tmp_path / "head")
    arguments = ["--target", str(pristine), "--head", str(tmp_path / "head"), "--prompt", "a b c"]
    complaint(["generate", *arguments, *change], capsys, *says)
