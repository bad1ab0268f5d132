"""What W&B, TensorBoard and CSV get of a run; that a run which goes on is the same W&B run; that secrets stay here."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scale_runs import Case, Done

from spd_lightning import cli
from spd_lightning.errors import InputError
from spd_lightning.training.tracking import SUMMARIES, Tracking

Go = Callable[..., Done]


def records(run: Path) -> Iterator[Any]:
    """What a W&B run wrote, in its own protocol: records in a log of blocks of 32 KiB (LevelDB's format)."""
    from wandb.proto import wandb_internal_pb2

    (path,) = run.glob("run-*.wandb")
    content, at, kept = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        kept += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(kept)
            kept = b""
            yield record


def offline(directory: Path) -> list[Path]:
    return sorted((directory / "wandb").glob("offline-run-*"))


@pytest.fixture(scope="module")
def runs(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is stopped and goes on, everything tracked; and its final decoding."""
    folder = tmp_path_factory.mktemp("tracking")
    fields = {
        "trainer__max_steps": 6, "decoding__every_steps": 3, "final__prompts": 3, "final__max_new_tokens": 12,
        "final__baselines": False, "tracking__wandb": "offline", "tracking__tensorboard": True, "tracking__csv": True,
        "tracking__samples": 2, "tracking__tags": "[a, b]", "tracking__project": "drafts",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE")
        patch.setenv("SPD_TEST_SECRET", "hf_verysecret")
        cases = [
            Case("stopped", fields, stop_at=4),
            Case("resumed", fields | {"run_dir": folder / "stopped", "ckpt_path": "last"}),
        ]
        done = go(folder, cases)
    assert done.returned == {"stopped": 128 + signal.SIGTERM, "resumed": 0}, done.output
    return folder / "stopped"


def test_a_run_that_goes_on_is_the_same_wandb_run(runs: Path) -> None:
    folders = offline(runs)
    ids = {next(r.run.run_id for r in records(folder) if r.HasField("run")) for folder in folders}
    assert len(folders) == 2 and ids == {json.loads((runs / "run.json").read_text())["tracking"]["wandb"]["id"]}


def test_wandb_has_configuration_metrics_with_definitions_summaries_samples_plots_and_the_head(runs: Path) -> None:
    found = list(records(offline(runs)[-1]))
    run = next(r.run for r in found if r.HasField("run"))
    assert run.project == "drafts" and list(run.tags) == ["a", "b"]
    config: dict[str, Any] = {}
    for record in found:
        for item in record.config.update if record.HasField("config") else []:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert config["model"]["num_stages"] == 4 and config["trainer"]["max_steps"] == 6
    assert config["provenance"]["commit"] == json.loads((runs / "run.json").read_text())["commit"]
    assert config["provenance"]["data"]["train"]["fingerprint"]
    defined = {r.metric.name: r.metric for r in found if r.HasField("metric")}
    assert set(SUMMARIES) <= set(defined) and defined["val/acceptance"].summary.max
    assert not defined["val/theoretical_speedup"].summary.max, "a sweep's metric keeps a plain summary"
    history: dict[str, list[Any]] = {}
    for record in found:
        for item in record.history.item if record.HasField("history") else []:
            history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    ours = [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
    acceptances = [line["val/acceptance"] for line in ours if "val/acceptance" in line]
    assert history["val/acceptance"] == pytest.approx(acceptances[-1:]), "what was logged after the state"
    for name in ("generations", "plots/training", "plots/occupancy"):
        assert f"{name}/sha256" in history, name
    (table,) = (offline(runs)[-1] / "files").rglob("generations*.json")
    assert json.loads(table.read_text())["columns"] == ["prompt", "generation", "accepted", "corrected", "p", "S"]
    artifacts = [r.artifact for r in found if r.HasField("artifact")] + [
        r.request.log_artifact.artifact for r in found if r.HasField("request")
    ]
    head = next(a for a in artifacts if a.type == "speculation-head")
    assert {entry.path for entry in head.manifest.contents} >= {"config.json", "model.safetensors"}
    assert json.loads(head.metadata)["data"]["train"] == config["provenance"]["data"]["train"]["fingerprint"]


def test_wandb_itself_would_sync_both_parts(runs: Path) -> None:
    words = [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, offline(runs))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "Would sync 2 run(s)" in done.stdout + done.stderr


def test_no_secret_of_the_environment_is_in_what_would_be_sent(runs: Path) -> None:
    for path in (runs / "wandb").rglob("*"):
        if path.is_file():
            assert b"hf_verysecret" not in path.read_bytes(), path


def test_tensorboard_and_csv_have_the_same_metrics(runs: Path) -> None:
    assert list((runs / "tensorboard").glob("events.out.tfevents.*"))
    header = (runs / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/acceptance", "train/loss"} <= set(header)


def test_the_run_has_samples_and_a_report(runs: Path) -> None:
    content = json.loads((runs / "generations.json").read_text())
    assert len(content["samples"]) == 2 and content["num_stages"] == 4
    for sample in content["samples"]:
        flags = [token["accepted"] for token in sample["tokens"]]
        assert flags[0] is None and all(isinstance(flag, bool) for flag in flags[1:])
        verified = flags[1:]
        assert sample["acceptance"] == pytest.approx(sum(verified) / len(verified))
        corrected = [token for token in sample["tokens"] if token["accepted"] is False]
        assert corrected and all(token["drafted_id"] not in (None, token["id"]) for token in corrected)
    assert (runs / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"wandb": "onlin"}, "tracking.wandb='onlin': expected online, offline, disabled"),
        ({"samples": -1}, "tracking.samples=-1"),
        ({"project": " "}, "tracking.project=''"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        Tracking(**fields)
    assert says in str(caught.value)


def test_online_without_an_account_is_one_line_before_anything_is_loaded(
    base_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = base_fields | {"tracking__wandb": "online", "run_dir": tmp_path / "run"}
    words = [f"--{name.replace('__', '.')}={value}" for name, value in fields.items()]
    assert cli.main(["fit", "--config", "tiny", *words]) == 2
    assert "error: tracking.wandb=online: no W&B account is set up" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Tracking(wandb="online").check()  # the environment wins
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(InputError, match="WANDB_MODE=onlin: expected"):
        Tracking().check()
