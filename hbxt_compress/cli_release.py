"""`hbxt release`, `verify`, `explain` and `push`: what publishes an artifact, and who checks it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hbxt_compress.errors import UsageError

if TYPE_CHECKING:
    from hbxt_compress.release import Allowed
    from hbxt_compress.signing import Identity

__all__ = ["explain_", "push_", "release_", "verify"]

_path = click.Path(path_type=Path)


@click.command("release")
@click.argument("artifact", type=_path)
@click.option("--report", type=_path, required=True, help="Folder that `evaluate` wrote.")
@click.option("--out", type=_path, required=True, help="Folder to write; must not exist.")
@click.option("--key", type=_path, help="Private key (PEM, elliptic curve) to sign with.")
@click.option("--sigstore", is_flag=True, help="Sign with an identity; needs the network.")
@click.option("--licence", help="Hub's name of the licence; needed if the source had no file.")
@click.option("--base-model", "base", metavar="ORG/NAME", help="Where the source is on the Hub.")
@click.option(
    "--allow", type=click.Choice(["pass", "undecided", "fail"]), default="pass",
    help="Worst outcome of the report that is released; the card says so.",
)  # fmt: skip
@click.option("--link", is_flag=True, help="Hard links in place of copies.")
def release_(
    artifact: Path, report: Path, out: Path, key: Path | None, sigstore: bool, licence: str | None,
    base: str | None, allow: Allowed, link: bool,
) -> None:  # fmt: skip
    """Make a folder of ARTIFACT that explains itself.

    The artifact as it is, with a model card, the report, the source's licences and a record of
    every byte, signed if you like.
    """
    from hbxt_compress import show_release
    from hbxt_compress.file_records import sha256_of
    from hbxt_compress.release import release
    from hbxt_compress.released import RELEASE

    made = release(
        artifact, report, out, key=key, sigstore=sigstore, licence=licence, base=base,
        allow=allow, link=link,
    )  # fmt: skip
    checked = str(key) if key is not None else "who just signed it" if sigstore else ""
    show_release.released(out, made, sha256_of(out / RELEASE), checked=checked)


@click.command()
@click.argument("folder", type=_path, metavar="ARTIFACT|RELEASE")
@click.option("--key", type=_path, help="Public key (PEM) that must have signed the release.")
@click.option("--identity", help="Who must have signed it with Sigstore; needs the network.")
@click.option("--issuer", help="That identity's OpenID issuer.")
@click.option("--digest", help="sha256 that the release's record must have.")
def verify(
    folder: Path, key: Path | None, identity: str | None, issuer: str | None, digest: str | None
) -> None:
    """Check every byte of an artifact or a release.

    Of a release also its card, report, licences and signature.
    """
    from hbxt_compress import show
    from hbxt_compress.artifact import Artifact
    from hbxt_compress.released import RELEASE

    by = _signer(key, identity, issuer)
    if not (folder / RELEASE).exists():
        found = Artifact.open(folder, verify=True)
        if by is not None or digest is not None:
            raise UsageError(
                f"{folder}: an artifact, whole, but no release: it has no signature and no record "
                "to compare; leave --key, --identity and --digest out, or ask for a release"
            )
        return show.verified(found)
    from hbxt_compress import show_release
    from hbxt_compress.file_records import sha256_of
    from hbxt_compress.verify import open_release

    release = open_release(folder, by=by, digest=digest)
    checked = str(key or identity or "")
    return show_release.released(folder, release, sha256_of(folder / RELEASE), checked=checked)


@click.command("explain")
@click.argument("artifact", type=_path)
@click.argument("layer", required=False)
@click.option("--against", type=_path, help="Another artifact: what differs, and why.")
@click.option("--layers", "every_layer", is_flag=True, help="List the layers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def explain_(
    artifact: Path, layer: str | None, against: Path | None, every_layer: bool, as_json: bool
) -> None:
    """Tell how ARTIFACT, or a LAYER of it, came about.

    From its manifest alone: source, rules and which matched, calibration, stages, versions; of a
    layer its format, how it was rounded and what that cost. Of a release, too.
    """
    from hbxt_compress import explain, show, show_release
    from hbxt_compress.artifact import Artifact

    if sum((layer is not None, against is not None, every_layer)) > 1:
        raise UsageError("LAYER, --against and --layers: one of them")
    manifest = Artifact.open(artifact, verify=False).manifest
    if against is not None:
        other = Artifact.open(against, verify=False).manifest
        told, tell = explain.difference(manifest, other), show_release.difference
    elif layer is not None:
        told, tell = explain.layer_story(manifest, layer), show_release.layer_story
    elif every_layer:
        found = {one.name: (one.format, one.reason) for one in manifest.layers}
        return show.as_json(list(found)) if as_json else show_release.layers(found)
    else:
        told, tell = explain.artifact_story(manifest), show_release.story
    return show.as_json(told) if as_json else tell(told)


@click.command("push")
@click.argument("folder", type=_path, metavar="RELEASE")
@click.argument("repo", metavar="ORG/NAME")
@click.option("--branch", "--revision-branch", "branch", help="Default: main.")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--dry-run", is_flag=True, help="Only check, and list what would go.")
@click.option("--force", is_flag=True, help="Upload a bare artifact, without card and report.")
def push_(
    folder: Path, repo: str, branch: str | None, private: bool, dry_run: bool, force: bool
) -> None:
    """Upload RELEASE to the Hub, verified first.

    What the branch had is replaced. HF_TOKEN says who you are, HF_ENDPOINT which Hub.
    """
    from hbxt_compress import show_release
    from hbxt_compress.hub import look_through, push

    told = look_through(folder, repo, branch=branch, force=force)
    where = "would go; nothing was sent" if dry_run else push(folder, told, private=private)
    show_release.upload(told, where)


def _signer(key: Path | None, identity: str | None, issuer: str | None) -> Path | Identity | None:
    from hbxt_compress.signing import Identity

    if (identity is None) != (issuer is None):
        raise UsageError("--identity and --issuer: give both, or --key")
    if identity is None or issuer is None:
        return key
    if key is not None:
        raise UsageError("--key and --identity: a release has one signature; give one of them")
    return Identity(identity=identity, issuer=issuer)
