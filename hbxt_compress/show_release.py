"""What a person sees of `hbxt release`, `verify`, `explain` and `push`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbxt_compress import show
from hbxt_compress.render.table import power_db, size

if TYPE_CHECKING:
    from hbxt_compress.hub import Upload
    from hbxt_compress.released import Release

__all__ = ["difference", "layer_story", "layers", "released", "story", "upload"]


def released(folder: Path, found: Release, digest: str, *, checked: str) -> None:
    """Prints what was verified of a release. checked: by which key or identity, "" by none."""
    total = size(sum(one.size_bytes for one in found.files))
    lines = [
        f"{folder}: {len(found.files)} files, {total}: as released",
        f"recipe {found.name}, quality: {found.outcome}, licence: {found.licence}",
        f"digest: {digest}",
    ]
    if checked:
        lines.append(f"signature: of {checked}")
    elif found.signed:
        lines.append("signature: signed, not checked: give --key PUBLIC.pem, or --identity")
    else:
        lines.append("signature: none; compare the digest with a trusted one (--digest)")
    show.lines(lines)


def upload(told: Upload, where: str) -> None:
    """Prints every file with its size, and where they went or would go."""
    rows = [(path, size(n)) for path, n in told.files.items()]
    total = f"{len(rows)} files, {size(sum(told.files.values()))}"
    title = f"{told.repo}, branch {told.branch}"
    show.rows(title, ("file", ">size"), rows, [f"{total}: {where}"])


def layers(found: Mapping[str, tuple[str, str]]) -> None:
    """Prints a row per layer: name, format, why."""
    show.rows("layers", ("layer", "format", "why"), [(n, *about) for n, about in found.items()], [])


def story(told: Mapping[str, Any]) -> None:
    """Prints how an artifact came about."""
    rows = []
    for rule in told["rules"]:
        formats = ", ".join(f"{n} {name}" for name, n in sorted(rule["formats"].items()))
        sizes = [size(rule[key]) for key in ("bytes_before", "bytes_after")]
        rows.append((str(rule["rule"]), rule["match"], formats or "-", *sizes, rule.get("why", "")))
    head = (">rule", "selects", "became", ">before", ">after", "why")
    recipe = told["recipe"]
    show.rows(f"recipe {recipe['name']}, {recipe['digest'][:16]}", head, rows, _lines(told))


def _lines(told: Mapping[str, Any]) -> Iterator[str]:
    source, recipe = told["source"], told["recipe"]
    yield f"source: {source['model']} ({source['family']}), {len(source['files'])} files"
    yield from (f"  {sha256[:16]}  {name}" for name, sha256 in source["files"].items())
    for key in ("summary", "budget"):
        if key in recipe:
            yield f"{key}: {recipe[key]}"
    if recipe.get("distill") or recipe.get("decoder"):
        made = [*recipe.get("distill", []), *filter(None, [recipe.get("decoder")])]
        yield f"a student, made by: {'; '.join(map(_options, made))}"
    for phase in ("prepare", "refine"):
        if told[phase]:
            yield f"{phase}: {'; '.join(map(_options, told[phase]))}"
    if told["round"]:
        yield f"round: {_options(told['round'])}"
    shown = told["calibration"]
    yield f"calibration: {shown['name']}, {shown['text']}" if shown else "calibration: none"
    yield from (f"{one['step']}: left out: {one['reason']}" for one in told["left_out"])
    for step in told["stages"]:
        yield " ".join(filter(None, (
            f"stage {step['stage']}",
            f"version {step['version']}" if "version" in step else "",
            step.get("digest", "")[:16],
        )))  # fmt: skip
    yield "made with: " + ", ".join(f"{name} {n}" for name, n in told["made_with"].items())
    for target, nodes in told["targets"].items():
        yield f"{target}: " + ", ".join(f"{n} {verdict}" for verdict, n in nodes.items() if n)


def layer_story(told: Mapping[str, Any]) -> None:
    """Prints how a layer came about."""
    rule, place = told["rule"], told["place"]
    out = [
        f"{told['name']}: {told['format']}"
        + (f", inputs {told['activations']}" if told["activations"] != "keep" else ""),
        f"{' x '.join(map(str, told['shape']))}, layer {place[0]} of {place[1]} of "
        f"{told['component']}; {size(told['bytes_before'])} -> {size(told['bytes_after'])}, "
        f"{told['bits']:.3f} bits a weight",
    ]
    if rule is not None:
        offers = (
            rule["weights"] if isinstance(rule["weights"], str) else " or ".join(rule["weights"])
        )
        out.append(f"rule {rule['rule']} is the first that matches: `{rule['match']}`: {offers}")
    out.append(f"why: {told['reason']}")
    out.append(f"rounded by: {told['how'] or 'nothing, it stays in high precision'}")
    out += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in told["errors"]]
    for side, one in told["beside"].items():
        out.append(f"{side}: {one['name']}: {one['format']}, error {power_db(one['error'])}")
    show.lines(out)


def difference(told: Mapping[str, Any]) -> None:
    """Prints what differs between two artifacts, and why."""
    files, found = told["files"], told["layers"]
    if told["same"]:
        return show.lines([f"the same: {files['same']} files, {found['both']} layers"])
    out = [f"because of {reason}" for reason in told["reasons"]]
    out.append(f"files: {files['same']} the same, {len(files['differing'])} differ")
    out += [f"  differs: {path}" for path in files["differing"]]
    for key, where in (("only_first", "first"), ("only_second", "second")):
        out += [f"  only in the {where}: {path}" for path in files[key]]
    out.append(f"layers: {found['same']} of {found['both']} in both are the same")
    for what, names in found["differing"].items():
        more = ", ..." if len(names) > 3 else ""
        out.append(f"  {len(names)} differ in {what}: {', '.join(names[:3])}{more}")
    for key, where in (("only_first", "first"), ("only_second", "second")):
        if found[key]:
            out.append(f"  {len(found[key])} only in the {where}: {', '.join(found[key][:3])}")
    return show.lines(out)


def _options(about: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in about.items() if key != "use")
    return f"{about['use']} ({rest})" if rest else str(about["use"])
