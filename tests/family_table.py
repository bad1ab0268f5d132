"""`pytest --families-table docs/families.md`: what the tests of this run proved about every family, as a table.

Outcomes of every test that takes a `family` and of every test of a recipe are collected over all workers; at the end
the table is written between the markers of the page, or is the whole file where there is none yet. A test that counts
its cases says so with `record_property("cases", number)`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
#: File of tests/family -> what its tests show.
SHOWS = {
    "test_training.py": "trains",
    "test_lossless.py": "lossless",
    "test_forward.py": "forward",
    "test_head.py": "head",
    "test_sampling.py": "sampled",
}
COLUMNS = (
    "family", "model_type", "kinds of layers", "trains", "decodes losslessly", "rollback", "default head layers",
    "recipes", "compared: tokens / head rows / generations / draws",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-table", metavar="PATH", help="write the table of families to this page at the end")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--families-table")
    if path and not hasattr(config, "workerinput"):  # the controller alone has heard of every test
        config.pluginmanager.register(Collector(Path(path)), "families-table")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Reports carry properties from workers to the controller, parameters they do not carry."""
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if "family" in parameters and item.path.parent.name == "family":
            item.user_properties.append(("family", f"{parameters['family']}:{SHOWS.get(item.path.name)}"))
        if item.path.name == "test_recipes.py" and "name" in parameters:
            item.user_properties.append(("recipe", parameters["name"]))


@dataclass
class Collector:
    """Outcomes of this run: tests passed and failed, and cases passed, by (family, what it shows) and by recipe."""

    path: Path
    passed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    cases: Counter[str] = field(default_factory=Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        for kind in ("family", "recipe"):
            if kind in properties:
                key = f"{kind}:{properties[kind]}"
                self.failed[key] += report.failed
                if report.when == "call" and report.passed:
                    self.passed[key] += 1
                    cases = properties.get("cases", 0)
                    assert isinstance(cases, int)
                    self.cases[key] += cases

    def pytest_sessionfinish(self) -> None:
        write(self.path, self.table())

    def table(self) -> str:
        from spd_lightning.target.families import FAMILIES, ROLLBACK

        recipes = recipes_by_family()
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for model_type, family in FAMILIES.items():
            kinds = kinds_of_layers(model_type)
            compared = [self._compared(model_type, what) for what in ("forward", "head", "lossless", "sampled")]
            cells = (
                family.title,
                f"`{model_type}`",
                ", ".join(kind.removesuffix("_attention") for kind in kinds),
                self._verdict(f"family:{model_type}:trains"),
                self._verdict(f"family:{model_type}:lossless"),
                ", ".join(ROLLBACK[kind] for kind in kinds),
                "Qwen3's" if family.head == "qwen3" else "its own",
                ", ".join(f"`{name}`{self._doubt(name)}" for name in recipes.get(model_type, ())) or "-",
                " / ".join(compared),
            )
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _verdict(self, key: str) -> str:
        if self.failed[key]:
            return "**no**"
        return "yes" if self.passed[key] else "not tested"

    def _compared(self, model_type: str, what: str) -> str:
        key = f"family:{model_type}:{what}"
        if self.failed[key]:
            return "**failed**"
        return f"{self.cases[key]:,}" if self.passed[key] else "-"

    def _doubt(self, recipe: str) -> str:
        return {"yes": "", "**no**": " (**fails**)"}.get(self._verdict(f"recipe:{recipe}"), " (not run)")


def write(path: Path, table: str) -> None:
    """Between the markers of the page, under a temporary name first."""
    page = f"{BEGIN}\n{table}\n{END}\n"
    if path.is_file():
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if begin and end:
            page = f"{before}{BEGIN}\n{table}\n{END}{after}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def kinds_of_layers(model_type: str) -> list[str]:
    """The kinds of layers that the tiny configuration has."""
    import families
    from transformers import AutoConfig

    from spd_lightning.target.families import ROLLBACK, layer_kinds

    fields = families.fields(model_type, 6) | {"num_hidden_layers": 6}
    found = set(layer_kinds(AutoConfig.for_model(model_type, **fields)))
    return [kind for kind in ROLLBACK if kind in found]


def recipes_by_family() -> dict[str, list[str]]:
    import yaml
    from recipe_targets import TARGETS

    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        target = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["target"]
        if target == "tiny":
            embedded = ROOT / "src" / "spd_lightning" / "embedded" / "target" / "config.json"
            model_type = json.loads(embedded.read_text(encoding="utf-8"))["model_type"]
        else:
            model_type = TARGETS[target]["model_type"]
        found.setdefault(model_type, []).append(path.stem)
    return found


def rows_of(page: Iterable[str]) -> list[list[str]]:
    """The cells of the table's rows on a page, without its header."""
    lines = list(page)
    inside = lines[lines.index(BEGIN) + 1 : lines.index(END)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in inside[2:]]
