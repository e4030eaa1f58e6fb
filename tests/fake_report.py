"""The report of an artifact that nobody measured, for tests of what is made of reports."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from hbxt_compress.artifact import Artifact
from hbxt_compress.render.markdown import write_markdown
from hbxt_compress.report import SCHEMA, Control, Measurement, QualityReport, Verdict

__all__ = ["write_report"]

_NOISE = Control(
    name="ulp", kind="noise", text="weights moved by one ulp", n=2, values={"psnr": (90.5, 91.5)}
)
_UNMEASURED = Control(
    name="provider", kind="noise", text="another provider", n=0, values={}, note="there is no other"
)
_SAID = {
    "pass": "PASS: all promises are kept.",
    "fail": "FAIL: broken promises on psnr.",
    "undecided": "UNDECIDED: too few clips on psnr.",
}


def write_report(
    folder: Path, artifact: Path, outcome: Literal["pass", "fail", "undecided"] = "pass"
) -> Path:
    """Writes report.json, .md and .html as `evaluate` does, and returns their folder."""
    opened = Artifact.open(artifact, verify=False)
    manifest = opened.manifest
    document = json.loads(json.dumps(manifest.to_json()))
    report = QualityReport(
        schema=SCHEMA,
        recipe=document["recipe"],
        source=document["source"],
        suite={"name": "tiny", "n_steps": 3, "seed": 0},
        n_clips=8,
        components=document["components"],
        bytes_before=300,
        bytes_after=150,
        measurements=(
            Measurement(
                metric="psnr", value=41.25, interval=(40.5, 42.125), n=8, unit="dB",
                direction="higher", worst=38.0, interval_by="bootstrap over clips, 10000 resamples",
                per_clip=(38.0, 40.0, 41.0, 42.0, 42.0, 42.0, 42.0, 43.0),
            ),
            Measurement(
                metric="fvd_i3d", value=None, interval=None, n=0, unit="", direction="lower",
                family="distribution", note="needs HBXT_I3D",
            ),
        ),
        curves={},
        layers=tuple(json.loads(json.dumps(asdict(one))) for one in manifest.layers),
        verdicts=(Verdict(metric="psnr", limit=40.0, outcome=outcome, reason="40.5 dB or more"),),
        conclusion=_SAID[outcome],
        clips=(),
        made_with=document["made_with"], artifact=opened.manifest_sha256, seconds={},
        controls=(_NOISE, _UNMEASURED), findings=(), baseline=None,
    )  # fmt: skip
    report.save(folder)
    write_markdown(folder, report)
    (folder / "report.html").write_text("<!doctype html><title>quality</title>\n")
    return folder
