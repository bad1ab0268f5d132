"""`python -m spd_lightning.export.check DIR`: is an exported folder whole, and does its head compute what it should?

Export runs this in a fresh process before a folder gets its name; whoever receives one can repeat it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from spd_lightning.errors import InputError
from spd_lightning.head.folder import PROVENANCE_FILE

#: Packages of training: loading and decoding a head must do without them.
HEAVY = ("lightning", "deepspeed", "wandb", "datasets")


def check_folder(folder: Path) -> dict[str, Any]:
    """Load the head of a folder, compare it with its fixture and all files with their digests.

    Raises:
        InputError: naming the first file that is not what was exported.
    """
    from spd_lightning.export.fixture import FIXTURE_FILE, check_fixture
    from spd_lightning.head.folder import file_digest
    from spd_lightning.head.loading import load_head

    head = load_head(folder)
    apart = check_fixture(head, folder / FIXTURE_FILE)
    try:
        files = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))["files"]
        if outside := [name for name in files if not within(name)]:
            raise InputError(f"{folder / PROVENANCE_FILE} lists {outside[0][:80]!r}, which is no file of the folder.")
        changed = [name for name, entry in files.items() if file_digest(folder / name) != entry["sha256"]]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / PROVENANCE_FILE} does not list the folder's files: {error}") from error
    if changed:
        raise InputError(f"{folder / changed[0]} was changed after the export ({len(changed)} files).")
    return {"difference": apart, "heavy": [name for name in HEAVY if name in sys.modules]}


def within(name: str) -> bool:
    """Whether a name that a file tells stays within its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name


def main() -> int:
    try:
        result = check_folder(Path(sys.argv[1]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result["heavy"]:
        print(f"error: loading a head imported {', '.join(result['heavy'])}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
