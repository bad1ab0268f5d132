"""The command doctor: it finds what is missing, proves what works, and says what to mend."""

from __future__ import annotations

import json

import pytest

from spd_lightning import cli
from spd_lightning.commands import doctor


@pytest.mark.slow
def test_a_whole_machine_passes_the_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--offline", "--json"]) == 0
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"python", "packages", "packages [train]", "processor", "torch.distributed", "memory"} <= set(findings)
    for name in ("decodes losslessly", "learns", "two ranks"):
        assert findings[name]["state"] == "good", findings[name]
    assert "gloo" in findings["torch.distributed"]["said"]


def test_what_is_missing_or_broken_is_told_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.version

    def version(name: str) -> str:
        if name == "wandb":
            raise doctor.PackageNotFoundError(name)
        return "4.0.0" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "_decodes", lambda folder: 1 / 0)
    assert cli.main(["doctor", "--offline"]) == 1
    out = capsys.readouterr().out
    assert "transformers 4.0.0 is not" in out and "pip install 'spd_lightning'" in out
    assert "wandb is missing (for fit, validate, sweep, report)" in out and "pip install 'spd_lightning[train]'" in out
    assert "BAD   decodes losslessly" in out and "ZeroDivisionError" in out and "To mend" in out
    assert "learns" not in out, "what builds on it is not tried"


def test_a_server_that_does_not_answer_is_a_note_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert cli.main(["doctor", "--no-self-test", "--json"]) == 0
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert "http://127.0.0.1:9 does not answer" in findings["Hugging Face hub"]["said"]
    assert findings["Hugging Face hub"]["state"] == "note"
    assert "no account" in findings["W&B"]["said"]
