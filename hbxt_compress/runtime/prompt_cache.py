"""PromptCache: text features of prompts on disk, so that the next clip need not open the encoder.

A file is named after the sha256 of all that its numbers depend on: the encoder's files, the token
ids, what runs the graph. It holds the rows that are not padding and their sha256. Files are written
whole or not at all, by any number of processes; the folder keeps the last used ones, up to 1 GB.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import numpy as np
import onnxruntime
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hbxt_compress.manifest import Manifest
from hbxt_compress.runtime.session import Provider, installed_providers
from hbxt_compress.runtime.settings import ProviderSettings

__all__ = ["MOST_BYTES", "PromptCache"]

MOST_BYTES: Final = 1_000_000_000
_log = logging.getLogger(__name__)
_FORGOTTEN_S = 3600.0  # an unfinished file of that age was left by a process that was killed


class PromptCache:
    """The features of prompts in one setting. A folder that cannot be used is a warning.

    about: all that features depend on besides the token ids and the mask, as JSON has it.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, object], *, most_bytes: int = MOST_BYTES
    ) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self._about = json.dumps(about, sort_keys=True).encode()

    @classmethod
    def of(
        cls,
        folder: Path,
        manifest: Manifest,
        *,
        provider: Provider,
        n_threads: int | None,
        settings: Mapping[str, ProviderSettings],
    ) -> Self:
        """The cache of an artifact's text encoder as a provider runs it on this machine."""
        digests = {one.path: one.sha256 for one in manifest.files}
        about = {
            "encoder": {p: d for p, d in digests.items() if p.startswith("text_encoder/")},
            "session": dict(manifest.session),
            "provider": [provider, *(installed_providers() if provider == "auto" else ())],
            "settings": repr(sorted(settings.items())),
            "threads": n_threads or os.cpu_count(),
            "onnxruntime": onnxruntime.__version__,
            "processor": _processor(),
        }
        return cls(folder, about)

    def get(self, ids: np.ndarray, mask: np.ndarray, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Features float32 1 L D of token ids and mask (int64 1 L), from disk or from `make`.

        `make` must give zeros where the mask has them.
        """
        path = self.folder / f"{self._key(ids, mask)}.safetensors"
        kept = mask[0] > 0
        rows = _read(path, int(kept.sum()))
        if rows is not None:
            with suppress(OSError):  # when it was used last
                os.utime(path)
            features = np.zeros((1, len(kept), rows.shape[1]), dtype=np.float32)
            features[0, kept] = rows
            return features
        features = make()
        if np.isfinite(features).all():
            try:
                self._write(path, np.ascontiguousarray(features[0, kept]))
            except OSError as error:
                _log.warning("the prompt's features are not kept for the next clip: %s", error)
        return features

    def _key(self, ids: np.ndarray, mask: np.ndarray) -> str:
        digest = hashlib.sha256(self._about)
        for values in (ids, mask):
            digest.update(f" {values.dtype} {values.shape} ".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def _write(self, path: Path, rows: np.ndarray) -> None:
        content = save({"rows": rows}, metadata={"sha256": _sha256(rows)})
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(suffix=".partial", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        """Removes what was used longest ago, until the rest is no more than the bound."""
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process makes room, too
                about = path.stat()
                if path.suffix == ".safetensors" and path != newest:
                    found.append((about.st_mtime_ns, about.st_size, path))
                elif path.suffix == ".partial" and time.time() - about.st_mtime > _FORGOTTEN_S:
                    path.unlink()
        left = newest.stat().st_size + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            left -= size


def _processor() -> str:
    """What tells processors apart whose kernels may add in another order: model and features."""
    about = Path("/proc/cpuinfo")
    text = about.read_text(errors="replace") if about.is_file() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in lines.items()}
    told = [named.get(key, "") for key in ("model name", "flags", "Features", "CPU part")]
    return " ".join([platform.machine(), platform.processor(), *told])


def _read(path: Path, n_rows: int) -> np.ndarray | None:
    """The rows in a file, float32 N D; None if there is none. One that is damaged is removed."""
    try:
        with safe_open(path, framework="numpy") as file:
            rows, expected = file.get_tensor("rows"), file.metadata()["sha256"]
        if rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != n_rows:
            raise ValueError(f"{rows.dtype} {rows.shape}, expected float32 with {n_rows} rows")
        if _sha256(rows) != expected:
            raise ValueError("its sha256 is not the one that was written")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        _log.warning("%s: not readable (%s); the prompt is encoded anew", path, error)
        with suppress(OSError):
            path.unlink()
        return None
    return np.asarray(rows)


def _sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()
