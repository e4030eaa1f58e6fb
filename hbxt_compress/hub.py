"""Hub: a release folder uploaded to a model repository.

HF_TOKEN says who, HF_ENDPOINT where, as for every tool of the Hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hbxt_compress.artifact import Artifact
from hbxt_compress.errors import RuntimeUnavailable, UsageError
from hbxt_compress.file_records import paths_under
from hbxt_compress.released import NOTES, RELEASE
from hbxt_compress.verify import open_release

__all__ = ["Upload", "look_through", "push"]

_REPO: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What goes where: path -> bytes. released: whether it is a release, not a bare artifact."""

    repo: str
    branch: str
    files: dict[str, int]
    released: bool


def look_through(folder: Path, repo: str, *, branch: str | None, force: bool = False) -> Upload:
    """What `push` would upload; every byte of it is read. Asks nobody.

    Raises:
        UsageError: the name is no `org/name`, or the folder is no release and `force` is not said.
        ArtifactError: it is not as it was released.
    """
    if _REPO.fullmatch(repo) is None:
        raise UsageError(f"{repo!r}: not the name of a repository; write it as org/name")
    released = (folder / RELEASE).exists()
    if released:
        open_release(folder)
    elif not force:
        raise UsageError(
            f"{folder}: no release: it has no model card, no report and no {RELEASE}; "
            "make one with `hbxt release`, or upload the bare artifact with --force"
        )
    else:
        Artifact.open(folder)
    paths = [path for path in paths_under(folder) if not path.startswith(NOTES)]
    sizes = {path: (folder / path).stat().st_size for path in paths}
    return Upload(repo=repo, branch=branch or "main", files=sizes, released=released)


def push(folder: Path, upload: Upload, *, private: bool = False) -> str:
    """Uploads what was looked through, in place of what the branch has; the commit's address.

    The repository and the branch are made if they are not there; private: then it is.

    Raises:
        RuntimeUnavailable: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(upload.repo, repo_type="model", private=private or None, exist_ok=True)
        if upload.branch != "main":
            hub.create_branch(upload.repo, branch=upload.branch, exist_ok=True)
        done = hub.upload_folder(
            repo_id=upload.repo,
            folder_path=folder,
            revision=upload.branch,
            commit_message=f"Release {folder.name} by hbxt_compress",
            allow_patterns=[_literal(path) for path in upload.files],
            delete_patterns="*",
        )
    except Exception as error:  # the hub raises a dozen kinds; all mean that it is not there
        told = next(iter(str(error).splitlines()), "")
        raise RuntimeUnavailable(
            f"{upload.repo}: could not be uploaded ({type(error).__name__}: {told}); "
            "is HF_TOKEN a token that may write there? The same command goes on"
        ) from None
    return str(done.commit_url)


def _literal(path: str) -> str:
    """A pattern that matches just this path."""
    return re.sub(r"([\[*?])", r"[\1]", path)
