"""The tiny configurations, the list of families and the page about them name the same families."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
from family_table import BEGIN, COLUMNS, END, Collector, recipes_by_family, rows_of, write

from spd_lightning.target.families import FAMILIES, ROLLBACK

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def test_every_supported_family_has_a_tiny_configuration_and_so_runs_in_every_test_here() -> None:
    assert list(families.FAMILIES) == list(FAMILIES)


def test_the_page_has_exactly_one_row_per_family_and_every_one_of_them_holds() -> None:
    rows = rows_of(PAGE.read_text(encoding="utf-8").splitlines())
    assert [row[1] for row in rows] == [f"`{model_type}`" for model_type in FAMILIES]
    for row in rows:
        cells = dict(zip(COLUMNS, row, strict=True))
        family = FAMILIES[cells["model_type"].strip("`")]
        assert cells["family"] == family.title
        assert (cells["trains"], cells["decodes losslessly"]) == ("yes", "yes"), family.title
        assert cells["default head layers"] == ("Qwen3's" if family.head == "qwen3" else "its own")
        assert set(cells["rollback"].split(", ")) <= set(ROLLBACK.values())
        tokens, head_rows, generations, _ = cells[COLUMNS[-1]].split(" / ")
        assert all(int(count.replace(",", "")) > 30 for count in (tokens, head_rows, generations)), family.title


def test_the_page_lists_every_recipe_at_its_family() -> None:
    rows = {row[1].strip("`"): row[COLUMNS.index("recipes")] for row in rows_of(PAGE.read_text("utf-8").splitlines())}
    expected = {
        model_type: ", ".join(f"`{name}`" for name in names) for model_type, names in recipes_by_family().items()
    }
    assert {model_type: cell for model_type, cell in rows.items() if cell != "-"} == expected


def report(properties: list[tuple[str, object]], outcome: str = "passed", when: str = "call") -> pytest.TestReport:
    return pytest.TestReport("x", ("x", 0, "x"), {}, outcome, None, when, user_properties=properties)  # type: ignore[arg-type]


def test_one_failure_makes_a_family_fail_and_nothing_run_says_nothing(tmp_path: Path) -> None:
    collector = Collector(tmp_path / "page.md")
    for what in ("trains", "lossless"):
        collector.pytest_runtest_logreport(report([("family", f"llama:{what}"), ("cases", 30)]))
        collector.pytest_runtest_logreport(report([("family", f"qwen2:{what}")]))
    collector.pytest_runtest_logreport(report([("family", "llama:lossless"), ("cases", 12)]))
    collector.pytest_runtest_logreport(report([("family", "qwen2:trains")], "failed"))
    collector.pytest_runtest_logreport(report([("family", "qwen2:lossless")], "failed", when="setup"))
    collector.pytest_runtest_logreport(report([("recipe", "llama31")]))
    collector.pytest_sessionfinish()
    rows = {row[1]: row for row in rows_of((tmp_path / "page.md").read_text().splitlines())}
    assert rows["`llama`"][3:5] == ["yes", "yes"] and rows["`llama`"][-1] == "- / - / 42 / -"
    assert rows["`llama`"][7].startswith("`llama31`, `llama31_70b` (not run)")
    assert rows["`qwen2`"][3:5] == ["**no**", "**no**"]
    assert rows["`qwen3`"][3:5] == ["not tested", "not tested"]


def test_the_table_replaces_what_is_between_the_markers_and_leaves_the_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for table in ("one", "two"):
        write(page, table)
        assert page.read_text() == f"before\n\n{BEGIN}\n{table}\n{END}\n\nafter\n"
    assert list(tmp_path.iterdir()) == [page]
