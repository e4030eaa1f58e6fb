"""Released: release.json, which vouches for every file of a release, itself included.

    <the artifact's files>  manifest.json  README.md  .gitattributes  licences/  quality/
    release.json        path, sha256 and size of all of these, then the digest of what it says
    model.sig           OpenSSF model signature over all of the above, if it is signed
    model.sig.sha256    tells a damaged signature from a wrong one

release.json has one spelling only: another one of the same content is a change, too.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final, Self

from hbxt_compress.errors import ArtifactError, listing
from hbxt_compress.file_records import (
    is_sealed,
    paths_under,
    record_problems,
    sealed,
    sha256_of,
)
from hbxt_compress.manifest import FileRecord

__all__ = [
    "NOTES",
    "RELEASE",
    "SCHEMA",
    "SIGNATURE",
    "SIGNATURE_SHA256",
    "Release",
    "is_note",
    "released_beside",
    "sha256_line",
]

SCHEMA: Final = 1
RELEASE: Final = "release.json"
SIGNATURE: Final = "model.sig"
SIGNATURE_SHA256: Final = "model.sig.sha256"
_UNLISTED: Final = (RELEASE, SIGNATURE, SIGNATURE_SHA256)
NOTES: Final = ".cache/huggingface/"
"""where the Hub's client notes what it downloaded"""
_REMEDY: Final = "get the release again from where it was published"


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What release.json says.

    name: the recipe's, recipe: its digest. model: what it was made from. licence: the Hub's name of
    it, or `other`. outcome: the report's. signed: whether a signature must be there.
    """

    schema: int
    name: str
    recipe: str
    model: str
    licence: str
    outcome: str
    signed: bool
    made_with: str
    files: tuple[FileRecord, ...]

    def text(self) -> str:
        """What release.json holds, sealed."""
        return sealed({**asdict(self), "files": [asdict(one) for one in self.files]})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record of a folder, proven to be as it was written.

        Raises:
            ArtifactError: there is none, or a byte of it was changed.
        """
        path = folder / RELEASE
        try:
            content = path.read_bytes()
            document = json.loads(content)
        except OSError as error:
            raise ArtifactError(
                f"{folder}: not a release, {RELEASE} cannot be read ({error.strerror}); "
                "make one with `hbxt release`"
            ) from None
        except ValueError as error:
            raise ArtifactError(f"{path}: not JSON ({error}); {_REMEDY}") from None
        schema = document.get("schema") if isinstance(document, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise ArtifactError(
                f"{path}: schema {schema}, this hbxt_compress reads {SCHEMA}: it was written by a "
                "newer one; upgrade (pip install -U hbxt_compress)"
            )
        if not isinstance(document, dict) or not is_sealed(content, document):
            raise ArtifactError(
                f"{path}: not as it was written: it and its own digest differ; {_REMEDY}"
            )
        kinds = {"schema": int, "signed": bool, "files": list}
        names = [field.name for field in fields(cls)]
        wrong = [name for name in names if type(document.get(name)) is not kinds.get(name, str)]
        try:
            files = _files(document.get("files"))
        except ValueError:
            wrong.append("files")
        if wrong or len(document) != len(names) + 1:
            raise ArtifactError(f"{path}: not a release's record; {_REMEDY}")
        return cls(**{**{name: document[name] for name in names}, "files": files})

    def require_whole(self, folder: Path) -> None:
        """Reads every byte.

        Raises:
            ArtifactError: what is missing, changed, unlisted or a link (all named).
        """
        problems = [
            *record_problems(folder, self.files, by=RELEASE, verify=True),
            *_stray(folder, self),
            *_signature_problems(folder, signed=self.signed),
        ]
        if problems:
            raise ArtifactError(
                f"the release {folder} is not whole:\n{listing(problems)}\n{_REMEDY}"
            )


def released_beside(folder: Path) -> frozenset[str]:
    """Paths that a release adds to an artifact's folder; empty for a folder that is none.

    Raises:
        ArtifactError: release.json was changed.
    """
    if not (folder / RELEASE).exists():
        return frozenset()
    return frozenset((*_UNLISTED, *(one.path for one in Release.read(folder).files)))


def is_note(path: str, beside: Collection[str] = (RELEASE,)) -> bool:
    """Whether the Hub's client left this file in a release; nothing reads it, no release lists it.

    beside: what `released_beside` gave; in a folder that is no release there are no such files.
    """
    return RELEASE in beside and path.startswith(NOTES)


def _files(records: object) -> tuple[FileRecord, ...]:
    """The file records of a document; ValueError if they are none."""
    wanted = {"path": str, "sha256": str, "size_bytes": int}
    for one in records if isinstance(records, list) else [None]:
        if not isinstance(one, dict) or {key: type(one[key]) for key in one} != wanted:
            raise ValueError("not a file's record")
    assert isinstance(records, list)
    return tuple(FileRecord(**one) for one in records)


def _stray(folder: Path, release: Release) -> Iterator[str]:
    """What is there and must not be: links, unlisted files and folders, names that clash."""
    listed = {*_UNLISTED, *(one.path for one in release.files)}
    for path in paths_under(folder):
        if is_note(path):
            continue
        if path not in listed:
            yield f"{path}: not in {RELEASE}"
        elif (folder / path).is_symlink():
            yield f"{path}: a link; download with `hf download --local-dir`, which makes files"
    parents = {parent.as_posix() for path in listed for parent in Path(path).parents}
    for where, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(where, name).relative_to(folder).as_posix()
            if path not in parents and not f"{path}/".startswith(NOTES) and path != ".cache":
                yield f"{path}/: a folder that is not in {RELEASE}"
    for path, n in Counter(one.path.casefold() for one in release.files).items():
        if n > 1:
            yield f"{path}: {n} files whose names differ in case only"


def _signature_problems(folder: Path, *, signed: bool) -> Iterator[str]:
    """A signature is there if and only if it must be, and has the digest beside it."""
    there = {name: (folder / name).is_file() for name in (SIGNATURE, SIGNATURE_SHA256)}
    for name, is_there in there.items():
        if is_there != signed:
            yield f"{name}: " + (f"missing, {RELEASE} says it is signed" if signed else "not meant")
    if signed and all(there.values()):
        wanted = sha256_line(folder / SIGNATURE)
        if (folder / SIGNATURE_SHA256).read_bytes() != wanted.encode():
            yield f"{SIGNATURE}: not what {SIGNATURE_SHA256} says"


def sha256_line(path: Path) -> str:
    """A file's line as `sha256sum` writes and checks it."""
    return f"{sha256_of(path)}  {path.name}\n"
