"""The project's own files: Makefile, continuous integration, pins, no path of one machine."""

import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest requires it on 3.10

ROOT = Path(__file__).resolve().parents[1]
PYTHON_VERSIONS = ("3.10", "3.11", "3.12", "3.13")


@lru_cache
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared_requirements() -> list[Requirement]:
    """Core and extras, without the project's reference to itself."""
    project = pyproject()["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group]
    return [r for r in requirements if canonicalize_name(r.name) != canonicalize_name(project["name"])]


@lru_cache
def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def pinned_versions(name: str, python: str) -> list[str]:
    """The versions constraints.txt allows for a package on one Python version."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return [
        next(iter(pin.specifier)).version
        for pin in pins()
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate(environment))
    ]


def test_every_makefile_target_has_a_help_text():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, flags=re.MULTILINE))
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    documented = set(re.findall(r"^  make ([a-z-]+) +\S", listed, flags=re.MULTILINE))
    assert targets == documented
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert phony is not None and set(phony.group(1).split()) == targets


def test_continuous_integration_runs_the_test_command_of_the_readme():
    commands = [line for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines() if "make" in line]
    assert commands == ["make test"]
    if not (ROOT / "README.md").exists():
        pytest.skip("no README.md yet")
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_line_of_the_constraints_is_one_exact_pin_without_a_build_label():
    for pin in pins():
        specifiers = list(pin.specifier)
        assert [s.operator for s in specifiers] == ["=="], pin
        assert Version(specifiers[0].version).local is None, f"{pin}: the build is chosen by tools/setup.sh"


@pytest.mark.parametrize("python", PYTHON_VERSIONS)
def test_pins_satisfy_the_ranges_of_pyproject(python):
    for requirement in declared_requirements():
        versions = pinned_versions(requirement.name, python)
        assert len(versions) == 1, f"{requirement.name}: {versions} in constraints.txt for Python {python}"
        assert requirement.specifier.contains(versions[0], prereleases=True), f"{requirement} but {versions[0]}"


def test_no_package_is_pinned_twice_for_one_python_version():
    for python in PYTHON_VERSIONS:
        for name in {canonicalize_name(pin.name) for pin in pins()}:
            assert len(pinned_versions(name, python)) <= 1, f"{name} on Python {python}"


def test_no_tracked_text_file_names_a_path_of_one_machine():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    # The pieces are apart so that this file passes its own test.
    folders = "|".join([r"root\b", r"work\b", "home/" + r"\w", "Users/" + r"\w", "tmp/" + r"\w"])
    machine_path = re.compile(rf"(?<![\w.~/$}}-])/(?:{folders})[\w/]*")
    found = []
    for name in filter(None, listing.stdout.decode().split("\0")):
        path = ROOT / name
        if not path.is_file() or b"\0" in (content := path.read_bytes()):
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            found += [f"{name}:{number}: {hit.group()}" for hit in machine_path.finditer(line)]
    assert not found, "\n".join(found)
