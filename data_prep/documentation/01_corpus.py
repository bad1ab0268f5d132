"""Step 1: turn installed docstrings into chat samples, offline and without importing any of the packages.

The Python standard library and the permissively licensed packages of the running environment hold tens of
thousands of docstrings: real technical English that everyone already has on disk. Each becomes one
conversation, a templated question about the symbol and its docstring as the answer.

The split must not flatter a model that memorises: all docstrings of one bare symbol name lie on the same side
(``forward`` of every class, say), and no text and no long first paragraph lies on both.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

MIN_CHARACTERS = 40
MAX_CHARACTERS = 2000
SHARED_PARAGRAPH = 60  # a first paragraph longer than this may not occur on both sides of the split
HELDOUT_SHARE = 0.03
PARTS_VERSION = 1  # raise it when the extraction changes, so that cached parts are not reused

SKIPPED_FOLDERS = {
    "test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__",
    "_vendor", "vendor", "vendored", "third_party", "extern", "externals", "pydoc_data", "turtledemo",
    "node_modules",
}  # fmt: skip
SKIPPED_PACKAGES = {"spd-lightning"}
PERMISSIVE = (
    "mit", "mit-cmu", "mit no attribution", "bsd", "bsd-2-clause", "bsd-3-clause", "0bsd",
    "apache", "apache-2.0", "apache-2.0 with llvm-exception", "psf-2.0", "python-2.0", "cnri-python",
    "isc", "zlib", "cc0-1.0", "bsl-1.0", "unlicense", "hpnd",
)  # fmt: skip
PERMISSIVE_TEXT = ("mit", "bsd", "apache", "python software foundation", "psf", "isc", "matplotlib", "kiwi")
NOT_PERMISSIVE_TEXT = ("gpl", "mpl", "mozilla", "proprietary", "commercial", "cc-by", "eupl")

TEMPLATES = {
    "module": (
        "What is the module {module} about?",
        "Describe the module `{module}`.",
        "What does the module {module} provide?",
    ),
    "class": (
        "What is the class `{name}` of the module {module} for?",
        "Explain the class `{name}` from {module}.",
        "What does `{name}` of the module {module} represent?",
        "Document the class `{module}.{name}`.",
    ),
    "function": (
        "What does `{name}` of the module {module} do?",
        "Explain the function `{name}` from {module}.",
        "How is `{module}.{name}` used?",
        "Document the function `{name}` of {module}.",
    ),
    "method": (
        "What does the method `{name}` of the module {module} do?",
        "Explain `{name}` from {module}.",
        "Document the method `{name}` of {module}.",
        "How does the method `{name}` in {module} work?",
    ),
}

_JUNK = re.compile(
    r"copyright|licensed under|license agreement|permission is hereby|all rights reserved|spdx-license"
    r"|redistribution and use|auto-?generated|do not edit|[\w.+-]+@[\w-]+\.[a-z]{2,}|\(c\) (19|20)\d\d",
    re.IGNORECASE,
)
_COMMON = re.compile(r"\b(the|a|an|of|to|is|in|for|and|if|return|returns|this|with|from|be|by|or|not)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Package:
    """One source of docstrings: where its files lie (never written anywhere) and their licence."""

    name: str
    version: str
    license: str
    root: Path
    files: tuple[str, ...]


def digest(text: str) -> int:
    """A number that depends on the text alone: every choice below must be the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def normalise(text: str) -> str:
    """Lower case, white space folded, digits folded: what must not occur on both sides of the split."""
    return re.sub(r"\d+", "0", " ".join(text.lower().split()))


def first_paragraph(text: str) -> str:
    """The normalised first paragraph; copied docstrings usually differ only after it."""
    return normalise(re.split(r"\n\s*\n", text, maxsplit=1)[0])


def cut_at_paragraph(text: str, limit: int) -> str:
    """The longest run of whole paragraphs within the limit; empty if the first one alone is longer."""
    if len(text) <= limit:
        return text
    end = text.rfind("\n\n", 0, limit + 1)
    return text[:end].rstrip() if end > 0 else ""


def clean(raw: str) -> str | None:
    """The answer made from a raw docstring, or None if it is too short, foreign, binary or legal text."""
    text = inspect.cleandoc(raw).replace("\r", "").replace("\u00a0", " ")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()
    text = cut_at_paragraph(text, MAX_CHARACTERS)
    if len(text) < MIN_CHARACTERS or _JUNK.search(text):
        return None
    if any(not c.isprintable() and c != "\n" for c in text) or sum(ord(c) > 126 for c in text) > 0.01 * len(text):
        return None
    letters = sum(c.isalpha() for c in text)
    if letters < 0.5 * len(text) or len(_COMMON.findall(text)) * 40 < min(len(text), 400) // 2:
        return None
    return text


def question(kind: str, module: str, name: str) -> str:
    """One of a handful of phrasings, chosen by the symbol's hash."""
    templates = TEMPLATES[kind]
    return templates[digest(f"{module}:{name}") % len(templates)].format(module=module, name=name)


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, qualified name inside the module, raw docstring) of a parsed file, depth first."""
    text = ast.get_docstring(tree, clean=False)
    if text:
        yield "module", "", text
    yield from _members(tree, "", in_class=False)


def _members(node: ast.AST, prefix: str, in_class: bool) -> Iterator[tuple[str, str, str]]:
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.If, ast.Try)):
            yield from _members(child, prefix, in_class)
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        name = prefix + child.name
        is_class = isinstance(child, ast.ClassDef)
        text = ast.get_docstring(child, clean=False)
        if text:
            yield ("class" if is_class else "method" if in_class else "function"), name, text
        if is_class:
            yield from _members(child, name + ".", in_class=True)


def module_name(relative: str) -> str:
    """``a/b/__init__.py`` -> ``a.b``."""
    parts = Path(relative).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wanted(relative: str) -> bool:
    """Library code only: no tests, no vendored copies (their licence is not the package's), no stubs."""
    parts = Path(relative).parts
    return (
        relative.endswith(".py")
        and not SKIPPED_FOLDERS.intersection(parts)
        and not parts[-1].startswith(("test_", "conftest"))
        and all(p.removesuffix(".py").isidentifier() for p in parts)
    )


def samples_of_file(source: str, module: str, package: str) -> Iterator[dict]:
    """All usable conversations of one source text; a file that does not parse has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for kind, name, raw in docstrings(tree):
        text = clean(raw)
        if text is not None:
            yield {
                "messages": [
                    {"role": "user", "content": question(kind, module, name)},
                    {"role": "assistant", "content": text},
                ],
                "id": f"{module}.{name}" if name else module,
                "source": package,
            }


def samples_of_package(package: Package) -> Iterator[dict]:
    """All usable conversations of a package, files in sorted order."""
    for relative in package.files:
        try:
            source = (package.root / relative).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield from samples_of_file(source, module_name(relative), package.name)


def license_of(metadata: importlib.metadata.PackageMetadata) -> str:
    """The licence in a few words: SPDX expression, else classifiers, else the first line of the free text."""
    if metadata.get("License-Expression"):
        return metadata["License-Expression"].strip()
    classifiers = [
        c.split("::")[-1].strip() for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    if classifiers:
        return " AND ".join(sorted(set(classifiers)))
    text = (metadata.get("License") or "").strip()
    return text.splitlines()[0].strip()[:60] if text else "unknown"


def is_permissive(license_text: str) -> bool:
    """True if EVERY part of the licence is permissive; unknown counts as not."""
    text = license_text.lower()
    if any(word in text for word in NOT_PERMISSIVE_TEXT):
        return False
    parts = [p.strip(" ()") for p in re.split(r"\band\b|\bor\b|,|;", text)]
    return all(p in PERMISSIVE or any(re.search(rf"\b{w}\b", p) for w in PERMISSIVE_TEXT) for p in parts)


def standard_library() -> Package:
    """The running interpreter's own library (PSF licence)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*.py"))
    version = platform.python_version()
    return Package("python", version, "PSF-2.0", root, tuple(f for f in files if wanted(f)))


def installed_packages(excluded: Iterable[str]) -> Iterator[Package]:
    """Installed distributions under a permissive licence, by name."""
    skip = {name.lower().replace("_", "-") for name in (*excluded, *SKIPPED_PACKAGES)}
    seen: set[str] = set()
    for dist in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        name = dist.metadata["Name"].lower().replace("_", "-")
        license_text = license_of(dist.metadata)
        if name in skip or name in seen or not is_permissive(license_text):
            continue
        seen.add(name)
        files = sorted(str(f) for f in dist.files or () if wanted(str(f)))
        if files:
            yield Package(name, dist.version, license_text, Path(str(dist.locate_file(""))), tuple(files))


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """JSON lines under a temporary name, renamed when complete: a stopped run leaves no half file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def part_of(package: Package, folder: Path) -> list[dict]:
    """The package's samples, from the cached part if an earlier run finished it."""
    path = folder / f"{package.name}-{package.version}-v{PARTS_VERSION}.jsonl"
    if not path.exists():
        write_lines(path, samples_of_package(package))
    return read_lines(path)


def symbol(sample: dict) -> str:
    """The bare symbol: ``inspect.Signature.bind`` -> ``bind``."""
    return sample["id"].rsplit(".", 1)[-1]


def is_heldout(sample: dict, share: float) -> bool:
    """The side is a function of the bare symbol alone."""
    return digest("split:" + symbol(sample)) < share * 2**64


def unique(samples: Iterable[dict]) -> list[dict]:
    """The first of each normalised answer and of each id."""
    seen: set[str] = set()
    kept = []
    for sample in samples:
        keys = {"text:" + normalise(sample["messages"][-1]["content"]), "id:" + sample["id"]}
        if not keys & seen:
            kept.append(sample)
        seen |= keys
    return kept


def split(samples: Iterable[dict], share: float = HELDOUT_SHARE) -> tuple[list[dict], list[dict]]:
    """(train, held-out), disjoint by bare symbol, text and long first paragraph; clashes leave held-out."""
    samples = unique(samples)
    train = [s for s in samples if not is_heldout(s, share)]
    known = {first_paragraph(s["messages"][-1]["content"]) for s in train}
    heldout = []
    for sample in samples:
        paragraph = first_paragraph(sample["messages"][-1]["content"])
        if is_heldout(sample, share) and not (len(paragraph) > SHARED_PARAGRAPH and paragraph in known):
            heldout.append(sample)
    return train, heldout


def describe(samples: list[dict], path: Path) -> dict:
    """Size and fingerprint of a written file."""
    return {
        "conversations": len(samples),
        "answer_characters": sum(len(s["messages"][-1]["content"]) for s in samples),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def collect(packages: list[Package], parts: Path) -> list[dict]:
    """Samples of all packages, with a progress bar; finished packages are read back."""
    parts.mkdir(parents=True, exist_ok=True)
    samples: list[dict] = []
    bar = tqdm(packages, desc="packages", unit="package")
    for package in bar:
        bar.set_postfix_str(package.name)
        samples += part_of(package, parts)
    return samples


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; its --help is the documentation of the step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Next: python data_prep/documentation/02_tokenizer.py",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("build/documentation"), help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--heldout",
        type=float,
        default=HELDOUT_SHARE,
        help="share of bare symbols held out (default: %(default)s)",
    )
    parser.add_argument("--exclude", nargs="*", default=[], metavar="PACKAGE", help="installed packages to leave out")
    parser.add_argument("--force", action="store_true", help="run again although the manifest of a finished run exists")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write train.jsonl, heldout.jsonl and manifest.json."""
    args = parse_arguments(argv)
    manifest = args.out / "manifest.json"
    if manifest.exists() and not args.force:
        print(f"{manifest} exists: nothing to do (--force runs again)")
        return
    packages = [standard_library(), *installed_packages(args.exclude)]
    samples = collect(packages, args.out / "parts")
    train, heldout = split(samples, args.heldout)
    write_lines(args.out / "train.jsonl", train)
    write_lines(args.out / "heldout.jsonl", heldout)
    used = Counter(s["source"] for s in train + heldout)
    record = {
        "argv": ["01_corpus.py", *(sys.argv[1:] if argv is None else argv)],
        "python": platform.python_version(),
        "train": describe(train, args.out / "train.jsonl"),
        "heldout": describe(heldout, args.out / "heldout.jsonl"),
        "dropped_as_duplicates_or_leaks": len(samples) - len(train) - len(heldout),
        "packages": [
            {"name": p.name, "version": p.version, "license": p.license, "conversations": used[p.name]}
            for p in packages if used[p.name]
        ],
    }  # fmt: skip
    partial = manifest.with_name("manifest.json.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, manifest)
    print(json.dumps({k: record[k] for k in ("train", "heldout")}, indent=1))


if __name__ == "__main__":
    main()
