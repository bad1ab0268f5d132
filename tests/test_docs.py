"""The pages under docs/ hold: the examples of api.md run, top to bottom, and links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spd_lightning.export.background import Background
from spd_lightning.export.bundle import write_bundle
from spd_lightning.head.folder import save_head
from spd_lightning.head.loading import new_head
from spd_lightning.target.loading import load_target

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_examples_of_the_api_page_run_top_to_bottom(tmp_path: Path) -> None:
    head = new_head(load_target("tiny", num_stages=8), num_layers=1)
    (tmp_path / "heads").mkdir()
    save_head(head, tmp_path / "runs" / "tiny" / "head")
    write_bundle(head, tmp_path / "heads" / "tiny", Background({"name": "tiny", "kind": "run"}))
    examples = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)
    assert len(examples) >= 7
    code = "\n".join(examples)
    code += "\nimport sys; assert not {'lightning', 'deepspeed', 'wandb', 'datasets'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "input_ids is empty" in done.stdout


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (DOCS / link).exists()] == []
