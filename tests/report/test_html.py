"""The run report: complete without a network, honest about what was not measured, readable in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spd_lightning import cli
from spd_lightning.report.generations import FORMAT
from spd_lightning.report.html import config_differences

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def make_run(folder: Path, **changes: Any) -> Path:
    """A run directory with everything a report can show."""
    folder.mkdir(parents=True)
    rate = changes.get("learning_rate", 1e-3)
    row = {
        "drafter": "trained head", "temperature": 0.0, "num_stages": 4, "acceptance": 0.75,
        "acceptance_interval": [0.71, 0.79], "theoretical_speedup": 2.3, "cycles": 900, "new_tokens": 640,
        "by_fill": [{"fill": f, "count": 100, "top1": 0.8 - 0.02 * f} for f in (1, 2, 3, 4)],
        "by_position": [{"position": p, "count": 80, "top1": 0.7 + p / 400} for p in (0, 8, 16)],
    }  # fmt: skip
    plain = row | {"drafter": "plain", "acceptance": None, "acceptance_interval": None, "theoretical_speedup": None}
    record = {
        "config": {"model": {"target": "tiny", "num_stages": 4, "learning_rate": rate, "head": {"num_layers": 2}},
                   "run_dir": str(folder)},
        "argv": ["spd-lightning", "fit", "--config", "tiny"], "began": "2026-01-01T00:00:00+00:00", "commit": "abc",
        "versions": {"torch": "2.13.0"}, "status": "finished", "seconds": {"train and validate": 200.0, "plots": 3.0},
        "data": {"train": {"samples": 10, "tokens": 999, "fingerprint": "f00"}},
        "results": {
            "final": [plain, row], "prompts": 10, "max_new_tokens": 64, "tokens": 560000,
            "lossless": {"identical": 10, "ties": 0, "mismatches": changes.get("mismatches", 0)},
            "drift": {"differing_flags": 0, "ties": 0}, "peak_memory_bytes": 2_000_000_000,
            "teacher_forced_by_fill": [{"fill": f, "count": 100, "top1": 0.7} for f in (1, 2, 3, 4)],
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    lines = [{"step": s, "tokens": 1000 * s, "train/loss": 3 / (s + 1)} for s in range(20)]
    lines += [
        {"step": s, "tokens": 1000 * s, "val/acceptance": s / 25, "val/theoretical_speedup": 2.0} for s in (9, 19)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    tokens = [{"text": "<b>The", "accepted": None}, {"text": " file", "accepted": True},
              {"text": " opens", "accepted": False, "drafted": ' "runs'}]  # fmt: skip
    grid = [[["accepted", " file"], ["empty", None], ["rejected", None], ["flushed", "x"]]] * 3
    sample = {"prompt": "What & <why>?", "acceptance": 0.5, "theoretical_speedup": 1.5, "cycles": 3,
              "tokens": tokens, "grid": grid}  # fmt: skip
    (folder / "generations.json").write_text(json.dumps({"format": FORMAT, "num_stages": 4, "samples": [sample]}))
    return folder


def report(*words: str | Path) -> int:
    return cli.main(["report", *map(str, words)])


class Links(HTMLParser):
    """Everything a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action") and value:
                self.found.append(value)


def test_one_file_shows_the_run_and_fetches_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    head = {"name": "heads/a", "digest": "0123456789abcdef"}
    row = {"prompts": "spec_bench", "temperature": 0.0, "count": 8, "acceptance": 0.6, "acceptance_interval": None,
           "theoretical_speedup": 2.0, "wall_clock_speedup": None}  # fmt: skip
    bench = {"head": head, "metrics": [row | {"category": c} for c in (None, "math")]}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    assert report(run, "--bench", tmp_path / "bench.json") == 0
    page = (run / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.found and all(link.startswith(("data:", "#")) for link in links.found)
    assert not re.search(r"url\(|@import|<script", page)
    for shown in ("0.750", "0.710 – 0.790", "2.30", "10 of 10 outputs identical", "not measured", "math", "f00", "abc"):
        assert shown in page, shown
    assert "What &amp; &lt;why&gt;?" in page and "&lt;b&gt;The" in page and "<b>The" not in page, "texts are texts"
    assert 'class="corrected"' in page and "drafted: " in page
    assert page.count('class="fate-accepted"') == 3


def test_a_wrong_output_is_red_and_a_run_that_goes_on_shows_its_last_validation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "wrong", mismatches=1)
    assert report(run) == 0
    assert '<div class="card bad"><span class="quiet">Lossless</span><b>NO</b>' in (run / "report.html").read_text()
    record = json.loads((run / "run.json").read_text())
    record |= {"results": {}, "status": "running"}
    (run / "run.json").write_text(json.dumps(record))
    (run / "generations.json").unlink()
    assert report(run) == 0
    page = (run / "report.html").read_text()
    assert "0.760" in page and "last validation; running" in page


def test_damaged_generations_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    for content in ('{"samples": [', "{}", "[]"):
        (run / "generations.json").write_text(content)
        assert report(run) == 2
        assert "generations.json is damaged" in capsys.readouterr().err


def test_several_runs_stand_side_by_side_with_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, learning_rate=rate) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    assert report(*runs, "--output", tmp_path / "both.html") == 0
    page = (tmp_path / "both.html").read_text()
    assert "2 runs side by side" in page and "<td>model.learning_rate</td><td>0.001</td><td>0.002</td>" in page
    assert "<td>run_dir</td><td>" not in page.split("Complete configuration")[0]


def test_differences_are_of_fields_and_lacking_ones_are_a_dash() -> None:
    first, second = (
        {"a": {"b": 1, "c": [1, 2]}, "run_dir": "x"},
        {"a": {"b": 2, "c": [1, 2]}, "d": None, "run_dir": "y"},
    )
    assert config_differences([first, second]) == [("a.b", ["1", "2"]), ("d", ["–", "None"])]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none"], "none is no run directory: run.json"),
        (["a", "--output", "x.pdf"], "--output x.pdf: expected a name that ends in .html"),
        (["a", "--output", "no/x.html"], "the folder no does not exist"),
        (["a", "--bench", "b.json"], "--bench b.json: no such file"),
        (["a", "a", "--bench", "b.json"], "--bench belongs to one run"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("a"))
    assert report(*words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_errors_and_nothing_sticks_out(tmp_path: Path, width: int) -> None:
    """The page is opened from disk in a headless browser that cannot reach a network."""
    runs = [make_run(tmp_path / name, learning_rate=rate) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    assert report(*runs, "--output", tmp_path / "page.html") == 0
    # a probe beside the page measures it in a frame of the width in question, and counts pictures that failed
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id="f" src="page.html" width="{width}" height="900" style="border:0"></iframe><pre id="o"></pre>'
        "<script>f.onload=()=>{const d=f.contentDocument;o.textContent='RESULT '+JSON.stringify({"
        "wide:d.documentElement.scrollWidth,broken:[...d.images].filter(i=>!i.naturalWidth).length,"
        "images:d.images.length})}</script>"
    )
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=8000",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(re.search(r"RESULT (\{.*?\})", done.stdout.replace("&quot;", '"'))[1])  # type: ignore[index]
    assert found["images"] >= 7 and found["broken"] == 0
    assert found["wide"] <= width, "the page does not scroll sideways; only boxes in it do"
    assert "CONSOLE" not in done.stderr, done.stderr
