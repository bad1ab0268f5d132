"""Upload a bundle to a model repository of the hub, or show exactly what would be uploaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spd_lightning.errors import InputError, first_line
from spd_lightning.export.bundle import files_of, listed


@dataclass(frozen=True)
class Upload:
    """What goes to the hub: every file of `folder`, in one commit to the main branch of `repo`.

    Attributes:
        files: name in the repository, bytes, SHA-256.
    """

    folder: Path
    repo: str
    private: bool
    message: str
    files: tuple[tuple[str, int, str], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.files)


def check_repository(repo: str) -> None:
    """Refuse what is no name of a repository, without asking the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repo}: expected OWNER/NAME. {first_line(error)}") from error
    if repo.count("/") != 1:
        raise InputError(f"--push-to-hub {repo}: expected OWNER/NAME.")


def plan_upload(folder: Path, repo: str, private: bool = False) -> Upload:
    """What `push` will send."""
    files = []
    for name in files_of(folder):
        entry = listed(folder / name)
        files.append((name, entry["bytes"], entry["sha256"]))
    return Upload(folder, repo, private, f"Speculation head {folder.name}", tuple(files))


def push(upload: Upload) -> str:
    """Create the repository where there is none, upload, and return the commit's address.

    Raises:
        InputError: the hub refuses; the folder stays where it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            commit_message=upload.message,
            allow_patterns=[name for name, _, _ in upload.files],
        )
    except Exception as error:  # the hub client's errors have no common base
        raise InputError(
            f"--push-to-hub {upload.repo}: the hub refused ({first_line(error)}). Log in with `hf auth login` or set "
            f"HF_TOKEN; the export is complete in {upload.folder}: `hf upload {upload.repo} {upload.folder}` sends it."
        ) from error
    return str(commit.commit_url)
