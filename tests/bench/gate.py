"""How often the gate is wrong about full precision disturbed by rounding: it should hardly fail.

    python tests/bench/gate.py [--repeats 200] [--clips 12] [--steps 6]

The built-in model's fp32 artifact is the reference, and its own report the accepted baseline. Each
repeat moves every weight by one float32 ulp, with another seed, makes the clips anew and asks for a
verdict: promises of the recipe fp16, baseline and failure detectors. Every artifact of --damaged is
asked about, too, and should not pass. Writes gate.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from markdown_table import markdown_table

from hbxt_compress import evaluation, pipeline
from hbxt_compress.artifact import Artifact
from hbxt_compress.baseline import Accepted
from hbxt_compress.machine import Machine
from hbxt_compress.recipe import load_recipe
from hbxt_compress.report import QualityReport
from hbxt_compress.source import BUILTIN
from hbxt_compress.stages.disturb import FOLDER, disturb
from hbxt_compress.store import Store, Work
from hbxt_compress.suite import Suite, load_suite

_METRICS = ("psnr", "ssim", "lpips_squeeze", "temporal_error", "latent_error", "prompt_following")


def main(repeats: int, clips: int, steps: int, recipes: list[str], store: Store, out: Path) -> None:
    suite = _suite(clips, steps)
    exact = Artifact.open(pipeline.compress(load_recipe("fp32"), BUILTIN, store, machine=Machine()))
    own = evaluation.evaluate(exact.folder, suite, store, machine=Machine())
    baseline = "fp32", Accepted.of(own, "2026-01-01", "full precision")
    outcomes, why = Counter[str](), Counter[str]()
    for k in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            disturb(Work(Path(folder)), exact, seed=1000 + k)
            moved = Path(folder) / FOLDER
            found = evaluation.evaluate(moved, suite, store, machine=Machine(), baseline=baseline)
        outcomes[found.outcome] += 1
        why.update(_why(found))
        sys.stderr.write(f"\r{k + 1} of {repeats}: {dict(outcomes)} ")
    rows = [
        ("fp32, an ulp moved", str(repeats), *(str(outcomes[o]) for o in _OUTCOMES), _told(why))
    ]
    for name in recipes:
        made = pipeline.compress(load_recipe(name), BUILTIN, store, machine=Machine())
        found = evaluation.evaluate(made, suite, store, machine=Machine(), baseline=baseline)
        rows.append(
            (name, "1", *(str(int(found.outcome == o)) for o in _OUTCOMES), _told(_why(found)))
        )
    out.mkdir(parents=True, exist_ok=True)
    document = {"repeats": repeats, "clips": clips, "steps": steps, "rows": rows}
    (out / "gate.json").write_text(json.dumps(document, indent=1) + "\n")
    heads = ("candidate", "repeats", *_OUTCOMES, "by")
    sys.stdout.write("\n" + "\n".join(markdown_table(heads, rows, n_words=1)) + "\n")


_OUTCOMES = ("pass", "undecided", "fail")


def _suite(clips: int, steps: int) -> Suite:
    prompts = load_suite("reference").prompts[:clips]
    changed = {"prompts": prompts, "n_steps": steps, "metrics": _METRICS, "controls": ("ulp",)}
    return load_suite("tiny").model_copy(update=changed)


def _why(report: QualityReport) -> Counter[str]:
    told = [v.metric for v in report.verdicts if v.outcome == "fail"]
    return Counter(told + [f.failure for f in report.findings if f.outcome == "fail"])


def _told(why: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in why.most_common()) or "-"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=200)
    arguments.add_argument("--clips", type=int, default=12)
    arguments.add_argument("--steps", type=int, default=6)
    arguments.add_argument("--damaged", nargs="*", default=["w8a16", "w4a16-fast"])
    arguments.add_argument("--store", type=Path, default=Path(".hbxt"))
    arguments.add_argument("--out", type=Path, default=Path("build/bench"))
    given = arguments.parse_args()
    main(given.repeats, given.clips, given.steps, given.damaged, Store(given.store), given.out)
