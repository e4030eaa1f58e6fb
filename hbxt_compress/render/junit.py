"""junit.xml: each verdict a test case, as CI systems read it."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as Xml

from hbxt_compress.report import QualityReport

__all__ = ["junit", "write_junit"]

_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: QualityReport) -> str:
    """The report as JUnit XML: fail is a failure, undecided an error, a missing metric skipped."""
    name = f"{report.recipe.get('name', '?')} on {report.suite.get('name', '?')}"
    cases = [(f"{v.against}.{v.metric}", v.outcome, v.reason) for v in report.verdicts] + [
        (f"failure.{f.failure}", f.outcome, f.text) for f in report.findings
    ]
    skipped = [(f"metric.{m.metric}", m.note) for m in report.measurements if m.value is None]
    counts = {outcome: sum(o == outcome for _, o, _ in cases) for outcome in ("fail", "undecided")}
    suite = Xml.Element(
        "testsuite",
        {
            "name": name, "tests": str(len(cases) + len(skipped)), "failures": str(counts["fail"]),
            "errors": str(counts["undecided"]), "skipped": str(len(skipped)),
        },
    )  # fmt: skip
    for case, outcome, text in cases:
        element = Xml.SubElement(
            suite, "testcase", {"classname": _clean(name), "name": _clean(case)}
        )
        if outcome == "pass":
            Xml.SubElement(element, "system-out").text = _clean(text)
        else:
            tag = "failure" if outcome == "fail" else "error"
            about = {"message": _clean(text.splitlines()[0] if text else outcome), "type": outcome}
            Xml.SubElement(element, tag, about).text = _clean(text)
    for case, why in skipped:
        element = Xml.SubElement(
            suite, "testcase", {"classname": _clean(name), "name": _clean(case)}
        )
        Xml.SubElement(element, "skipped", {"message": _clean(why)})
    suite.set("name", _clean(name))
    whole = Xml.Element("testsuites")
    whole.append(suite)
    Xml.indent(whole)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(whole, encoding="unicode") + "\n"
    )


def write_junit(folder: Path, report: QualityReport) -> Path:
    """Writes junit.xml and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "junit.xml"
    path.write_text(junit(report), encoding="utf-8")
    return path


def _clean(text: str) -> str:
    return _NOT_XML.sub("?", text)
