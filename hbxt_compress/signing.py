"""Signing: a folder signed, and its signature checked, as OpenSSF's model signing does it.

With an elliptic-curve key (PEM: P-256, P-384 or P-521), offline, or with an identity through
Sigstore, which needs the network. `model_signing` itself makes and checks the same signatures; as
there git's own files, such as .gitattributes, are left out. A release's record vouches for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hbxt_compress.errors import ArtifactError, RuntimeUnavailable, UsageError

if TYPE_CHECKING:
    from model_signing import hashing

__all__ = ["Identity", "sign", "verify"]

_REMEDY: Final = "pip install 'hbxt-compress[sign]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who signed, such as a mail address or a workflow's URL, and the OpenID issuer that knows."""

    identity: str
    issuer: str


def sign(folder: Path, signature: Path, *, key: Path | None, unsigned: tuple[str, ...]) -> None:
    """Writes the signature of all files in a folder but the `unsigned` ones (paths in it).

    key: a private key without passphrase; None: Sigstore asks who is signing, in a browser or by
    the identity that a CI job has.

    Raises:
        UsageError: the key is none, or encrypted.
        RuntimeUnavailable: the extra `sign` is not installed, or Sigstore does not answer.
    """
    _require_file(key, "private")
    hashing, signing, _ = _library()
    config = signing.Config().set_hashing_config(_hashing(hashing, unsigned))
    if key is not None:
        try:
            config.use_elliptic_key_signer(private_key=key)
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{key}: not a private key to sign with ({_first_line(error)}); make one with "
                "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"
            ) from None
        config.sign(folder, signature)
        return
    _online(lambda: config.use_sigstore_signer(use_ambient_credentials=True))
    _online(lambda: config.sign(folder, signature))


def verify(
    folder: Path, signature: Path, by: Path | Identity, *, unsigned: tuple[str, ...]
) -> None:
    """Checks a signature against a public key (PEM) or an identity, and the folder against it.

    Raises:
        UsageError: the key is none.
        ArtifactError: the signature is somebody else's or damaged, or not of these files.
        RuntimeUnavailable: the extra `sign` is not installed, or Sigstore does not answer.
    """
    _require_file(by if isinstance(by, Path) else None, "public")
    hashing, _, verifying = _library()
    config = verifying.Config().set_hashing_config(_hashing(hashing, unsigned))
    if isinstance(by, Path):
        try:
            config.use_elliptic_key_verifier(public_key=by)
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{by}: not a public key ({_first_line(error)}); "
                "`openssl ec -in key.pem -pubout` writes that of a private key"
            ) from None
    else:
        _online(lambda: config.use_sigstore_verifier(identity=by.identity, oidc_issuer=by.issuer))
    try:
        config.verify(folder, signature)
    except Exception as error:  # a dozen kinds, of four libraries; all mean that it does not hold
        who = by if isinstance(by, Path) else f"{by.identity} ({by.issuer})"
        told = _first_line(error) or type(error).__name__
        raise ArtifactError(
            f"{signature}: not a signature of these files by {who}: {told}; "
            "get the release again, and its signer's key from a place that you trust"
        ) from None


def _hashing(hashing: Any, unsigned: tuple[str, ...]) -> hashing.Config:
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    return config.set_ignored_paths(paths=unsigned)


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise RuntimeUnavailable(
            f"signatures need the package model-signing ({error}): {_REMEDY}"
        ) from None
    return hashing, signing, verifying


def _require_file(key: Path | None, kind: str) -> None:
    if key is not None and not key.is_file():
        raise UsageError(f"{key}: no such file; give a {kind} key in PEM")


def _online(act: Callable[[], object]) -> None:
    try:
        act()
    except Exception as error:  # as above, and those of the network
        raise RuntimeUnavailable(
            f"Sigstore could not be used ({type(error).__name__}: {_first_line(error)}); it needs "
            "the network; --key signs and checks without"
        ) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
