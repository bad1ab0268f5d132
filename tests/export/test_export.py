"""export and import: a run becomes a folder that proves itself, and whatever is changed in it is found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from spd_lightning import cli
from spd_lightning.decoding import decoder as decoder_module
from spd_lightning.errors import BrokenInvariantError, InputError
from spd_lightning.export import bundle
from spd_lightning.export.background import without_paths
from spd_lightning.export.check import check_folder, within
from spd_lightning.export.fixture import check_fixture, write_fixture
from spd_lightning.head.digest import matches, weights_digest
from spd_lightning.head.loading import load_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.head.version11 import write_version_11

FILES = {
    "README.md", "config.json", "custom_generate/generate.py", "custom_generate/requirements.txt", "model.safetensors",
    "parity_fixture.safetensors", "provenance.json",
}  # fmt: skip


PROVE = bundle.prove


@pytest.fixture(autouse=True)
def proof_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process for each export takes seconds; the fixtures below, and a test, have theirs."""
    monkeypatch.setattr(bundle, "prove", check_folder)


@pytest.fixture(scope="module")
def run(model_folder: Path, data_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with plots."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    fields = {
        "model.target": model_folder, "model.num_stages": 4, "data.train": data_files["train"],
        "data.validation": data_files["validation"], "data.batch_size": 4, "data.validation_samples": 6,
        "decoding.prompts": 2, "decoding.max_new_tokens": 8, "final.prompts": 4, "final.max_new_tokens": 8,
        "final.baselines": False, "trainer.accelerator": "cpu", "trainer.max_steps": 4,
        "trainer.val_check_interval": 2, "run_dir": directory,
        "model.head.anchor_norm": False,  # which version 11 cannot express
    }  # fmt: skip
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    assert cli.main(["fit", "--config", "tiny", *words]) == 0
    return directory


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "head"
    assert cli.main(["export", "--checkpoint", str(run), "--output", str(folder), "--dtype", "keep"]) == 0
    return folder


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance.json").read_text())


def tensors_equal(a: SpeculationHead, b: SpeculationHead) -> bool:
    theirs = b.state_dict()
    return a.config == b.config and all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def test_a_run_becomes_a_folder_that_holds_its_head_its_story_and_its_figures(run: Path, exported: Path) -> None:
    names = set(bundle.files_of(exported))
    assert names >= FILES and {name for name in names - FILES} == {f"plots/{p.name}" for p in (run / "plots").iterdir()}
    assert tensors_equal(load_head(exported), load_head(run))
    content, record = told(exported), json.loads((run / "run.json").read_text())
    final = {row["temperature"]: row for row in record["results"]["final"] if row["drafter"] == "trained head"}
    assert {m["temperature"] for m in content["metrics"]} == set(final)
    for metric in content["metrics"]:
        row = final[metric["temperature"]]
        assert metric["acceptance"] == row["acceptance"] and metric["theoretical_speedup"] == row["theoretical_speedup"]
        assert metric["wall_clock_speedup"] is None and metric["commit"] == record["commit"]
    assert content["training"]["tokens"] == record["results"]["tokens"]
    assert str(run.parent) not in (exported / "provenance.json").read_text() + (exported / "README.md").read_text()
    assert not list(exported.parent.glob(".*"))


def test_the_card_is_one_that_the_hub_reads(exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "spd_lightning" and "speculative-decoding" in card.data.tags
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["acceptance, T = 0"] == round(told(exported)["metrics"][0]["acceptance"], 4)
    assert "Not certified" in card.text and "not measured" in card.text
    assert "base_model" not in (exported / "README.md").read_text()  # a local folder is no repository


def test_the_figures_stay_behind_when_another_checkpoint_is_exported(run: Path, tmp_path: Path) -> None:
    (last,) = run.glob("checkpoints/last.ckpt")
    content = torch.load(last, weights_only=True)
    content["state_dict"]["head.lm_head.weight"][0, 0] += 1
    other = last.with_name("other.ckpt")
    torch.save(content, other)
    try:
        assert cli.main(["export", "--checkpoint", str(other), "--output", str(tmp_path / "head")]) == 0
    finally:
        other.unlink()
    assert told(tmp_path / "head")["metrics"] == [] and not (tmp_path / "head" / "plots").exists()
    card = (tmp_path / "head" / "README.md").read_text()
    assert "Nothing was measured with these weights" in card and "measured another checkpoint" in card


def test_an_exported_folder_is_exported_again_with_its_story(exported: Path, tmp_path: Path) -> None:
    arguments = ["export", "--checkpoint", str(exported), "--output", str(tmp_path / "again"), "--dtype", "bfloat16"]
    assert cli.main(arguments) == 0
    first, again = told(exported), told(tmp_path / "again")
    assert again["metrics"] == first["metrics"] and again["training"] == first["training"]
    assert again["dtype"] == "bfloat16" and load_head(tmp_path / "again").dtype == torch.bfloat16
    assert (tmp_path / "again" / "model.safetensors").stat().st_size < 0.6 * (
        exported / "model.safetensors"
    ).stat().st_size


def test_a_certificate_is_made_with_the_target_and_goes_on_with_the_same_weights_only(
    exported: Path, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("the list\nof the path\n")
    certify = ["--certify", "--certify-prompts", str(tmp_path / "prompts.txt"), "--target", str(model_folder)]
    start = ["export", "--checkpoint", str(exported), "--dtype", "keep", "--output"]
    assert cli.main([*start, str(tmp_path / "one"), *certify]) == 0
    certificate = json.loads((tmp_path / "one" / "certificate.json").read_text())
    assert certificate["holds"] is True and certificate["prompts"] == 2 and certificate["versions"]["torch"]
    assert "Lossless in float32" in (tmp_path / "one" / "README.md").read_text()
    again = ["export", "--checkpoint", str(tmp_path / "one"), "--output"]
    assert cli.main([*again, str(tmp_path / "same"), "--dtype", "keep"]) == 0
    assert cli.main([*again, str(tmp_path / "rounded"), "--dtype", "bfloat16"]) == 0
    assert (tmp_path / "same" / "certificate.json").exists()
    assert not (tmp_path / "rounded" / "certificate.json").exists()


def test_nothing_is_exported_when_decoding_is_not_lossless(
    exported: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        decoder_module._Run,
        "_verdict",
        lambda self, leaving: self.hidden.pop(leaving) is None or self.drafts[leaving + 1].token,
    )
    (tmp_path / "prompts.txt").write_text("the list\n")
    arguments = ["--certify", "--certify-prompts", str(tmp_path / "prompts.txt"), "--target", str(model_folder)]
    with pytest.raises(BrokenInvariantError, match="NOT LOSSLESS"):
        cli.main(["export", "--checkpoint", str(exported), "--output", str(tmp_path / "head"), *arguments])
    assert not (tmp_path / "head").exists()


def test_a_folder_that_does_not_prove_itself_never_gets_its_name(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(head: SpeculationHead, path: Path) -> None:
        other = SpeculationHead(head.config)
        other.load_state_dict(head.state_dict())
        other.lm_head.weight.data[0] += 1
        write_fixture(other, path)

    monkeypatch.setattr(bundle, "write_fixture", wrong)
    monkeypatch.setattr(bundle, "prove", PROVE)
    with pytest.raises(BrokenInvariantError, match="differ from the fixture"):
        cli.main(["export", "--checkpoint", str(exported), "--output", str(tmp_path / "head")])
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_what_would_be_uploaded_and_asks_no_hub(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("the hub was asked"))
    arguments = ["export", "--checkpoint", str(exported), "--output", str(tmp_path / "head")]
    assert cli.main([*arguments, "--push-to-hub", "me/head", "--private", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "would upload to https://huggingface.co/me/head (private if it is new)" in out
    for name, entry in told(tmp_path / "head")["files"].items():
        assert f"{entry['sha256']}  {entry['bytes']:>12,}  {name}" in out


def test_an_upload_sends_the_folder_and_its_failure_keeps_it(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[dict[str, Any]] = []

    class Commit:
        commit_url = "https://huggingface.co/me/head/commit/1"

    def upload(self: Any, **options: Any) -> Commit:
        sent.append(options)
        if len(sent) > 1:
            raise OSError("no network")
        return Commit()

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo, **options: sent or None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    arguments = ["export", "--checkpoint", str(exported), "--push-to-hub", "me/head", "--output"]
    assert cli.main([*arguments, str(tmp_path / "one")]) == 0
    assert sent[0]["repo_id"] == "me/head" and set(sent[0]["allow_patterns"]) == set(bundle.files_of(tmp_path / "one"))
    assert cli.main([*arguments, str(tmp_path / "two")]) == 2
    assert "no network" in capsys.readouterr().err and (tmp_path / "two" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--format", "v11"], "ends in .pt"),
        (["--format", "manifest", "--certify"], "--certify belongs to --format folder"),
        (["--dry-run"], "give --push-to-hub"),
        (["--private"], "give --push-to-hub"),
        (["--push-to-hub", "head"], "expected OWNER/NAME"),
        (["--push-to-hub", "a/../b"], "expected OWNER/NAME"),
        (["--certify-prompts", "x.txt"], "give --certify too"),
        (["--dtype", "int8"], "--dtype int8: expected auto, keep"),
        (["--bench", "nothere.json"], "nothere.json cannot be read"),
        (["--checkpoint", "./nothere"], "nothere"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], says: str
) -> None:
    arguments = ["export", "--checkpoint", str(exported), "--output", str(tmp_path / "head"), *change]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line and not list(tmp_path.iterdir())


def test_an_output_that_holds_something_is_left_alone(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["export", "--checkpoint", str(exported), "--output", str(tmp_path)]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_version_11_file_comes_in_and_goes_out_again_bit_for_bit(
    exported: Path, model_folder: Path, tmp_path: Path
) -> None:
    first, out = tmp_path / "first.pt", tmp_path / "out.pt"
    write_version_11(load_head(exported), first, "org/model", {"train_span": 77, "colour": "red"})
    arguments = ["--target", str(model_folder), "--dtype", "keep", "--output"]
    assert cli.main(["import", str(first), *arguments, str(tmp_path / "in")]) == 0
    export = ["export", "--checkpoint", str(tmp_path / "in"), "--dtype", "keep", "--format", "v11", "--output"]
    assert cli.main([*export, str(out)]) == 0
    assert cli.main(["import", str(out), *arguments, str(tmp_path / "again")]) == 0
    assert tensors_equal(load_head(tmp_path / "in"), load_head(tmp_path / "again"))
    a, b = (torch.load(path, weights_only=True) for path in (first, out))
    assert a["config"] == b["config"] and all(torch.equal(t, b["state_dict"][k]) for k, t in a["state_dict"].items())
    assert told(tmp_path / "in")["published"]["colour"] == "red"


def test_a_version_11_file_is_sent_to_import(exported: Path, tmp_path: Path, capsys: Any) -> None:
    write_version_11(load_head(exported), tmp_path / "head.pt", "org/model")
    assert cli.main(["export", "--checkpoint", str(tmp_path / "head.pt"), "--output", str(tmp_path / "x")]) == 2
    assert "spd-lightning import" in capsys.readouterr().err


def test_a_manifest_folder_is_written(exported: Path, tmp_path: Path) -> None:
    arguments = ["export", "--checkpoint", str(exported), "--format", "manifest", "--output", str(tmp_path / "m")]
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "m" / "spd-head.json").read_text())["source"]["model_type"] == "llama"


def test_loading_a_head_and_decoding_import_nothing_of_training(exported: Path, model_folder: Path) -> None:
    code = f"""
import sys
from spd_lightning import SpdDecoder, load_head, load_target
target = load_target({str(model_folder)!r})
SpdDecoder(target, load_head({str(exported)!r}, target)).generate([1, 2, 3], 8)
print(sorted(name for name in ("lightning", "deepspeed", "wandb", "datasets", "matplotlib") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_digest_names_the_numbers_whatever_they_are_stored_in(exported: Path) -> None:
    head, rounded = load_head(exported), load_head(exported, dtype=torch.bfloat16)
    assert matches(head, weights_digest(rounded)) and not matches(rounded, weights_digest(head))
    rounded.lm_head.weight.data[0, 0] += 1
    assert not matches(head, weights_digest(rounded))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "C:\\x", "a\\b"])
def test_a_name_that_leaves_the_folder_is_refused(exported: Path, tmp_path: Path, name: str) -> None:
    assert not within(name)
    copy = _copy(exported, tmp_path)
    content = told(copy)
    content["files"] = {name: {"sha256": "0", "bytes": 0}}
    (copy / "provenance.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="no file of the folder"):
        check_folder(copy)


def test_paths_of_this_machine_are_not_told() -> None:
    argv = ["fit", "--x", "/srv/me/data.jsonl", "--run_dir=/srv/run", "a/b", "org/model", "../up/x", "~/y", "C:\\d\\z"]
    assert without_paths(argv) == ["fit", "--x", "data.jsonl", "--run_dir=run", "a/b", "org/model", "x", "y", "z"]


def _copy(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to / "copy"))


@pytest.mark.parametrize("seed", range(60))
def test_any_change_of_any_file_of_a_folder_is_found_by_its_check(exported: Path, tmp_path: Path, seed: int) -> None:
    draw, copy = random.Random(seed), _copy(exported, tmp_path)
    name = draw.choice(bundle.files_of(copy))
    path = copy / name
    data = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "cut", "delete"])
    if kind == "delete":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(bytes(data[: draw.randrange(len(data))]))
    else:
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
    if name == "provenance.json" and kind == "flip":
        try:  # it lists the others and cannot list itself
            check_folder(copy)
        except InputError:
            return
        assert tensors_equal(load_head(copy), load_head(exported))
    else:
        with pytest.raises(InputError):
            check_folder(copy)


def test_a_fixture_tells_a_head_whose_arithmetic_differs(exported: Path) -> None:
    head = load_head(exported)
    assert check_fixture(head, exported / "parity_fixture.safetensors") < 1e-5
    head.layers[0].input_layernorm.weight.data[0] *= 1.2
    with pytest.raises(InputError, match="differ from the fixture"):
        check_fixture(head, exported / "parity_fixture.safetensors")
