"""A prompt as the token ids that WanPipeline would feed its text encoder.

WanPipeline cleans a prompt with ftfy if that is installed. Ids must not depend on what is
installed, so the part of ftfy that matters for a typed prompt (curly quotes, ligatures, full-width
characters, control characters, composed accents) is done here; repairing wrongly decoded text is
left out.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hbxt_compress.errors import ArtifactError, UsageError

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
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises the bare class
            raise ArtifactError(f"{folder}: no readable tokenizer ({error})") from error
        pad = config.get("pad_token")
        pad = pad["content"] if isinstance(pad, dict) else pad
        pad_id = None if pad is None else self._tokenizer.token_to_id(pad)
        if pad_id is None:
            raise ArtifactError(f"{folder}: padding token {pad!r} is not in the vocabulary")
        side = config.get("padding_side", "right")
        self._tokenizer.enable_padding(
            direction=side, length=n_tokens, pad_id=pad_id, pad_token=pad
        )
        cut = config.get("truncation_side", "right")
        self._tokenizer.enable_truncation(n_tokens, direction=cut)

    def __call__(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and attention mask, int64 1 L; too long a prompt is cut and keeps its end token."""
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt is text, got {type(prompt).__name__}")
        encoding = self._tokenizer.encode(clean_prompt(prompt))
        return (
            np.array([encoding.ids], dtype=np.int64),
            np.array([encoding.attention_mask], dtype=np.int64),
        )
