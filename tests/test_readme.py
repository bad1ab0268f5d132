"""README is the front door: its figures come from the record, its files exist, its commands parse."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scripts import benchmark

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def first_run() -> ModuleType:
    return benchmark("first_run")


def test_the_table_of_a_deployed_head_is_the_one_that_the_record_gives() -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / "deployment.json").read_text())
    assert benchmark("deployment").table(record) in README
    assert record["installed"]["of_training"] == [] and record["commands"]["generate"]["identical"] is True


def test_the_table_of_strategies_is_the_one_that_the_record_gives() -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / "scale.json").read_text())
    assert benchmark("scale").table(record) in README
    for row in record["runs"]:
        assert row["largest_relative_difference_of_losses"] < 1e-2 and row["cycles"] == record["runs"][0]["cycles"]
        assert row["tensors_of_target"] == 0 and row["tensors"] > 20
        assert row["state_mib"] < 4 * record["runs"][0]["state_mib"]


def test_the_bench_record_is_of_80_prompts_and_lossless() -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / "bench_spec_bench.json").read_text())
    whole = [metric for metric in record["metrics"] if metric["category"] is None]
    assert [(metric["temperature"], metric["count"]) for metric in whole] == [(0.0, 80), (1.0, 80)]
    assert whole[0]["identical"] == 80 and record["settings"]["max_new_tokens"] == 64


def test_the_table_is_the_one_that_the_record_gives(first_run: ModuleType) -> None:
    record = json.loads(first_run.RECORD.read_text())
    assert first_run.table(record) in README


def test_the_record_is_of_a_finished_lossless_run_with_at_least_50_prompts_of_64_tokens(first_run: ModuleType) -> None:
    record = json.loads(first_run.RECORD.read_text())
    results = record["results"]
    assert record["status"] == "finished"
    assert results["prompts"] >= 50 and results["max_new_tokens"] == 64
    assert results["lossless"]["mismatches"] == 0
    for versus in results["versus"].values():
        assert versus["difference"] >= 0.15 and versus["interval"][0] > 0.10


def test_every_file_that_it_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("fit", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_python_example_uses_public_names() -> None:
    import spd_lightning

    example = README.split("```python")[1].split("```")[0]
    names = re.search(r"from spd_lightning import (.+)", example)
    assert names is not None
    for name in names[1].split(", "):
        assert hasattr(spd_lightning, name)
    compile(example, "README.md", "exec")


def data_commands(folder: Path) -> list[list[str]]:
    """The block of data commands, in a folder, smaller: fewer conversations, shorter answers, two steps."""
    block = README.split("## Data that is right")[1].split("```bash\n")[1].split("```")[0]
    smaller = {"documentation:train --limit 2000": "documentation:train --limit 80", "0.1 ": "0.3 ", " 64 ": " 8 "}
    smaller |= {"$B": str(folder / "docs"), "runs/docs": str(folder / "run"), "\\\n": " "}
    for before, after in smaller.items():
        assert before in block
        block = block.replace(before, after)
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("$S ")]


def test_the_data_commands_lead_from_a_corpus_to_real_acceptance(tmp_path: Path) -> None:
    from spd_lightning import cli

    *steps, fit = data_commands(tmp_path)
    assert [words[1] for words in steps] == ["prepare", "preview", "regenerate", "vocab"] and fit[0] == "fit"
    for words in steps:
        assert cli.main(words) == 0
    assert (tmp_path / "docs" / "preview.html").is_file()
    quick = "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.batch_size 4 --data.validation_samples 4"
    quick += " --decoding.prompts 2 --decoding.max_new_tokens 6 --final.prompts 2 --final.max_new_tokens 6"
    assert cli.main([*fit, *quick.split(), "--trainer.enable_progress_bar", "false"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished" and record["results"]["lossless"]["mismatches"] == 0
    vocabulary = json.loads((tmp_path / "docs" / "vocab.json").read_text())["token_ids"]
    config = json.loads((tmp_path / "run" / "head" / "config.json").read_text())
    assert config["draft_token_ids"] == vocabulary


def test_the_lines_that_hand_a_head_on_work_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spd_lightning import cli
    from spd_lightning.head.folder import save_head
    from spd_lightning.head.loading import new_head
    from spd_lightning.target.loading import load_target

    monkeypatch.chdir(tmp_path)
    save_head(new_head(load_target("tiny", num_stages=8), num_layers=1), tmp_path / "runs" / "tiny" / "head")
    (tmp_path / "few.txt").write_text("What is itertools for?\n")
    block = README.split("## Hand a head on")[1].split("```bash\n")[1].split("```")[0]
    smaller = {"--certify ": "--certify --certify-prompts few.txt ", "--output bench": "--limit 2 --output bench"}
    smaller |= {"src/spd_lightning/export": f"{ROOT}/src/spd_lightning/export"}
    for before, after in smaller.items():
        assert before in block
        block = block.replace(before, after)
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("$S ")]
    assert [words[0] for words in lines] == ["export", "generate", "bench", "export"]
    for words in lines:
        assert cli.main(words) == 0, words
    card = (tmp_path / "heads" / "card" / "README.md").read_text()
    assert "files/prompts, 2 x 64 tokens" in card and "Lossless in float32" in card


@pytest.mark.slow
def test_the_lines_on_stages_at_the_same_time_work_one_after_another(tmp_path: Path) -> None:
    """In processes: ranks are started by the command that is typed."""
    block = README.split("## Stages at the same time")[1].split("```bash\n")[1].split("```")[0]
    assert "src/spd_lightning/export" in block
    block = block.replace("src/spd_lightning/export", f"{ROOT}/src/spd_lightning/export")
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("$S ")]
    assert [words[0] for words in lines] == ["fit", "generate", "bench"]
    quick = "--trainer.max_steps 2 --decoding.every_steps 2 --data.batch_size 2 --data.validation_samples 4"
    quick += " --decoding.prompts 2 --decoding.max_new_tokens 6 --final.prompts 0"
    lines[0] += quick.split()
    lines[2] += ["--limit", "2", "--max-new-tokens", "16"]
    for words in lines:
        done = subprocess.run(
            [sys.executable, "-m", "spd_lightning", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (words, done.stderr[-2000:])
    assert (tmp_path / "trace.png").is_file()
    assert json.loads((tmp_path / "bench.json").read_text())["metrics"][-1]["wall_clock_speedup"] > 0


def test_every_recipe_that_it_names_exists() -> None:
    for name in re.findall(r"--config (\w+)(?!\S*\.yaml)", README):
        if not name.startswith("my_"):
            assert (ROOT / "recipes" / f"{name}.yaml").is_file()
