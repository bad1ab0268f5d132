"""benchmarks/one_gpu.py runs from end to end on a tiny shape, and says what it needs where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("one_gpu", BENCHMARKS / "one_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_measures_every_case_and_writes_nothing(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "write_record", lambda *arguments, **more: pytest.fail("a dry run writes no record"))
    assert script.main(["--dry-run"]) == 0
    (shape,) = json.loads(capsys.readouterr().out)["shapes"]
    plain, *cases = shape["cases"]
    assert plain["case"] == script.BASELINE and plain["speedup"] == 1 and plain["acceptance"] is None
    assert [case["case"] for case in cases] == ["n=2, p=0.8", "n=2, p=0.9", "n=4, p=0.8", "n=4, p=0.9"]
    for case in cases:
        assert case["cycle_ms"] > 0 and case["speedup"] > 0
        assert 1 <= case["theoretical_speedup"] <= case["num_stages"]
        assert abs(case["acceptance"] - case["asked_acceptance"]) < 0.25
    assert cases[1]["acceptance"] >= cases[0]["acceptance"], "the same coins, a lower bar"


def test_without_a_gpu_it_ends_with_one_line_and_status_2(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "CUDA" in err
