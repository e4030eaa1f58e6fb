"""A prompt as the token ids that WanPipeline would feed its text encoder.

WanPipeline cleans a prompt with ftfy if that is installed. Ids must not depend on what is
installed, so the part of ftfy that matters for a typed prompt (curly quotes, ligatures, full-width
characters, control characters, composed accents) is done here; repairing wrongly decoded text is
left out.
"""

from __future__ import annotations

import errno
import html
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hbxt_compress.errors import ArtifactError, UsageError
from hbxt_compress.json_text import read_json

__all__ = ["PromptTokenizer", "clean_prompt"]

_QUOTES = str.maketrans(
    {
        **dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
    }
)
_COMPATIBLE = re.compile(
    "[\ufb00-\ufb06\u0132\u0133\u01c4-\u01cc\u01f1-\u01f3\u0149\u3000\uff01-\uffee]"
)
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]|\x1b\\[[0-9;]*[A-Za-z]"
)
_SIDES = ("left", "right")
_LINE_BREAKS = str.maketrans(dict.fromkeys("\x0c\x85\u2028\u2029", "\n"))


def clean_prompt(text: str) -> str:
    """The prompt without typographic variants, HTML entities and runs of white space."""
    text = _CONTROL.sub("", text)
    text = _COMPATIBLE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFC", text.translate(_QUOTES).translate(_LINE_BREAKS))
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


class PromptTokenizer:
    """The tokenizer of an artifact; every prompt becomes exactly n_tokens ids."""

    def __init__(self, folder: Path, n_tokens: int) -> None:
        """Reads tokenizer.json, and tokenizer_config.json for the padding token."""
        try:
            self._tokenizer = _from_file(folder / "tokenizer.json")
            config = read_json(folder / "tokenizer_config.json")
        except (ValueError, OSError) as error:
            raise ArtifactError(f"{folder}: no readable tokenizer ({error})") from error
        if not isinstance(config, dict):
            raise ArtifactError(f"{folder / 'tokenizer_config.json'}: not a JSON object")
        pad = config.get("pad_token")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        pad_id = self._tokenizer.token_to_id(pad) if isinstance(pad, str) else None
        if pad_id is None:
            raise ArtifactError(f"{folder}: padding token {pad!r} is not in the vocabulary")
        sides = {key: config.get(key, "right") for key in ("padding_side", "truncation_side")}
        if wrong := [f"{k}: {side!r}" for k, side in sides.items() if side not in _SIDES]:
            raise ArtifactError(
                f"{folder / 'tokenizer_config.json'}: must be left or right: {', '.join(wrong)}"
            )
        self._folder = folder
        self._tokenizer.enable_padding(
            direction=sides["padding_side"], length=n_tokens, pad_id=pad_id, pad_token=pad
        )
        try:
            self._tokenizer.enable_truncation(n_tokens, direction=sides["truncation_side"])
        except ValueError as error:  # fewer tokens than the tokenizer itself adds
            raise ArtifactError(f"{folder}: no prompt fits in {n_tokens} tokens: {error}") from None

    def __call__(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and attention mask, int64 1 L; too long a prompt is cut and keeps its end token."""
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt is text, got {type(prompt).__name__}")
        try:
            encoding = self._tokenizer.encode(clean_prompt(prompt))
        except BaseException as error:
            raise _refused(self._folder / "tokenizer.json", error) from error
        return (
            np.array([encoding.ids], dtype=np.int64),
            np.array([encoding.attention_mask], dtype=np.int64),
        )


def _from_file(path: Path) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        with _muted():
            found = Tokenizer.from_file(str(path))
            found.encode("a")  # a template of tokens that are not there panics only now
    except BaseException as error:
        raise _refused(path, error) from error
    return found


@contextmanager
def _muted() -> Iterator[None]:
    """Nothing reaches the process's stderr: Rust's panics print there before one can catch them."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _refused(path: Path, error: BaseException) -> BaseException:
    """What to raise for an error of tokenizers: of the bare class, or a panic of its Rust code."""
    if type(error) is Exception or type(error).__name__ == "PanicException":
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        return ArtifactError(f"{path}: tokenizers cannot use it ({reason})")
    return error
