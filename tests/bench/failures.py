"""How often failures are caught and honest candidates are not: the detectors on a corpus.

    python tests/bench/failures.py [--real folder of videos] [--reference ClipSet folder]
                                   [--candidate ClipSet folder] [--out build/bench/failures]

Every failure of corpus.py at every strength is done to every scene, then an honest damage chosen by
chance (none, noise, 8-bit-like, 4-bit-like, H.264), and the signals are kept, one JSON file a
failure: a run that is stopped goes on, unless detectors or corpus changed. Trials are drawn from
them: sets of 16 scenes that are all damaged, or of which one is. Prints Markdown tables, of misses
at each strength (the visible one is marked) and of false alarms, and writes failures.json.
--candidate: clips of a real artifact, of the same prompts and seeds as --reference, for whose
findings nobody vouches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from corpus import FAILURES as CORPUS
from corpus import Damage
from honest_damage import HONEST
from markdown_table import markdown_table
from scenes import Scene, drawn, filmed, generated

from hbxt_compress.clips import Clip, ClipSet
from hbxt_compress.metrics import failures
from hbxt_compress.metrics.failures import FAILURES, find, signals
from hbxt_compress.metrics.pixels import psnr
from hbxt_compress.report import Finding

__all__ = ["caught", "false_alarms", "measured", "seen"]

N_IN_SET = 16
_ALSO = ("nothing",)  # beside honest damage, what may happen to a clip before it is judged
_UNSEEN_DB = 35.0  # over the frames that change: no more than 4 bits do to any clip

Signals = dict[str, list[float | None]]


def honest(clip: Clip, kind: str, rng: np.random.Generator) -> Clip:
    """The clip after an honest damage; `nothing` leaves it as it is."""
    return clip if kind == "nothing" else replace(clip, frames=HONEST[kind](clip.frames, rng))


def seen(reference: np.ndarray, frames: np.ndarray) -> bool:
    """Whether a damage can be seen at all, in the frames that it changes."""
    changed = (reference != frames).any(axis=(1, 2, 3))
    return bool(changed.any()) and psnr(reference[changed], frames[changed]) < _UNSEEN_DB


def measured(
    scenes: Sequence[Scene],
    damage: Damage | None,
    strength: float,
    kinds: Sequence[str],
    names: Sequence[str] = tuple(FAILURES),
) -> tuple[Signals, list[bool]]:
    """Signals of every scene that shows the damage, and whether it is seen there.

    None as damage: the scenes as they are. kinds: of honest damage, one is drawn for each scene.
    names: of detectors.
    """
    pairs, visible = [], []
    if damage is not None and damage.smeared:
        kinds = [kind for kind in kinds if kind != "h264"]
    for i, scene in enumerate(scenes):
        rng = np.random.default_rng([i, round(abs(strength) * 1000)])
        made = scene.frames if damage is None else damage.make(scene, strength, rng)
        if made is None:
            continue
        clip = made if isinstance(made, Clip) else replace(scene.clip, frames=made)
        always = isinstance(made, Clip) or (damage is not None and not damage.by_content)
        visible.append(always or seen(scene.frames, clip.frames))
        pairs.append((scene.clip, honest(clip, kinds[int(rng.integers(len(kinds)))], rng)))
    return {n: [FAILURES[n].signal(*pair) for pair in pairs] for n in names}, visible


def _picked(pool: Signals, rows: Sequence[int]) -> Signals:
    return {name: [values[i] for i in rows] for name, values in pool.items()}


def _rng(name: str, trial: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), trial])


def _sets(pool: Signals, name: str, n_trials: int) -> Iterator[Signals]:
    """Random sets of 16; where there are fewer, some clips stand twice."""
    n = len(next(iter(pool.values())))
    for trial in range(n_trials):
        yield _picked(pool, _rng(name, trial).choice(n, N_IN_SET, replace=n < N_IN_SET).tolist())


def _found(chosen: Signals, trial: int) -> list[Finding]:
    """Findings on what is beyond a tolerance or an alarm; the rest passes, and is left out."""
    beyond = {}
    for name, values in chosen.items():
        sizes = [value for value in values if value is not None]
        alarm = FAILURES[name].alarm
        alone = alarm is not None and any(abs(value) > alarm for value in sizes)
        if sizes and (alone or abs(float(np.mean(sizes))) > FAILURES[name].tolerance):
            beyond[name] = values
    return find(beyond, trial)


def caught(
    damaged: Mapping[str, list[float | None]],
    good: Mapping[str, list[float | None]],
    visible: Sequence[bool],
    damage: Damage,
    n_trials: int,
) -> tuple[float, float | None]:
    """Percent of sets in which a detector that must says so: all damaged, and one of 16 damaged.

    The second is None for a failure that one clip does not make, or where none can be seen.
    """
    damaged, good = ({n: pool[n] for n in damage.caught_by} for pool in (damaged, good))
    whole = [
        any(one.outcome == "fail" for one in _found(chosen, trial))
        for trial, chosen in enumerate(_sets(damaged, "all", n_trials))
    ]
    apt = np.flatnonzero(visible)
    if not damage.alone or not len(apt):
        return 100 * float(np.mean(whole)), None
    alone = []
    for trial, chosen in enumerate(_sets(good, "one", n_trials)):
        rng = _rng("which", trial)
        at, row = int(rng.integers(N_IN_SET)), int(apt[rng.integers(len(apt))])
        for name, values in chosen.items():
            values[at] = damaged[name][row]
        alone.append(any(at in one.clips for one in _found(chosen, trial)))
    return 100 * float(np.mean(whole)), 100 * float(np.mean(alone))


def false_alarms(good: Signals, n_trials: int) -> tuple[float, float, dict[str, int]]:
    """Percent of sets in which anything fires, or is undecided; how often each detector did."""
    fired, unsure, by = 0, 0, dict.fromkeys(good, 0)
    for trial, chosen in enumerate(_sets(good, "honest", n_trials)):
        found = _found(chosen, trial)
        names = [one.failure for one in found if one.outcome == "fail"]
        for name in names:
            by[name] += 1
        fired += bool(names)
        unsure += any(one.outcome == "undecided" for one in found)
    return 100 * fired / n_trials, 100 * unsure / n_trials, {n: k for n, k in by.items() if k}


def _code() -> str:
    """sha256 of the detectors and of the corpus: signals of other code are made anew."""
    folders = Path(failures.__file__).parent, Path(__file__).parent
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _kept(path: Path, make: Mapping[str, object]) -> tuple[Signals, list[bool]]:
    """measured(**make), from the file if this code wrote it."""
    code = _code()
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("code") == code:
            return record["signals"], record["seen"]
    began = time.process_time()
    found, visible = measured(**make)  # type: ignore[arg-type]
    seconds = time.process_time() - began
    record = {"signals": found, "seen": visible, "seconds": seconds, "code": code}
    path.write_text(json.dumps(record), encoding="utf-8")
    return found, visible


def cost_ms(scenes: Sequence[Scene]) -> dict[str, float]:
    """Processor milliseconds a clip of each detector: the least of three, mean over scenes."""
    found = dict.fromkeys(FAILURES, 0.0)
    for i, scene in enumerate(scenes):
        candidate = honest(scene.clip, "four_bit", np.random.default_rng(i))
        for name, detector in FAILURES.items():
            took = []
            for _ in range(3):
                began = time.process_time()
                detector.signal(scene.clip, candidate)
                took.append(time.process_time() - began)
            found[name] += 1e3 * min(took) / len(scenes)
    return found


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, help="folder of .mp4 and .mkv files")
    parser.add_argument("--reference", type=Path, help="ClipSet folder of the full model's clips")
    parser.add_argument("--candidate", type=Path, help="ClipSet folder, of the same prompts")
    parser.add_argument("--out", type=Path, default=Path("build/bench/failures"))
    parser.add_argument("--drawn", type=int, default=24, help="procedural scenes")
    parser.add_argument("--size", type=int, default=96, help="pixels of real clips")
    parser.add_argument("--cuts", type=int, default=1, help="of each video, at most")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--only", nargs="*", help="failures, by name; honest ones are always done")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    scenes = drawn(given.drawn)
    scenes += filmed(given.real, given.size, given.cuts) if given.real else []
    scenes += generated(given.reference) if given.reference else []
    kinds = (*_ALSO, *HONEST)

    rows, alarms, document = [], [], {"n_scenes": len(scenes), "n_trials": given.trials}
    good, _ = _kept(given.out / "honest.json", {
        "scenes": scenes, "damage": None, "strength": 0.0, "kinds": kinds,
    })  # fmt: skip
    for name, damage in CORPUS.items():
        if given.only and name not in given.only:
            continue
        for strength in damage.strengths:
            path = given.out / f"{name.replace(' ', '-')}-{strength:g}.json"
            make = {
                "scenes": scenes, "damage": damage, "strength": strength, "kinds": kinds,
                "names": damage.caught_by,
            }  # fmt: skip
            damaged, visible = _kept(path, make)
            if not visible:
                continue
            whole, alone = caught(damaged, good, visible, damage, given.trials)
            mark = " (visible)" if strength == damage.visible else ""
            by = ", ".join(damage.caught_by)
            told = (_percent(whole), _percent(alone), f"{sum(visible)} of {len(visible)}")
            rows.append((name, f"{strength:g}{mark}", by, *told))
    for kind in HONEST if not given.only else ():
        make = {"scenes": scenes, "damage": None, "strength": 0.0, "kinds": (kind,)}
        pool, _ = _kept(given.out / f"honest-{kind}.json", make)
        fired, unsure, who = false_alarms(pool, given.trials)
        alarms.append((kind, f"{fired:.1f}", f"{unsure:.1f}", str(who or "")))
    fired, unsure, who = false_alarms(good, given.trials)
    alarms.append(("any of these", f"{fired:.1f}", f"{unsure:.1f}", str(who or "")))
    spent = cost_ms(drawn(3))
    spent["all"] = sum(spent.values())
    titles = ("failure", "strength", "by", "16 of 16 caught (%)", "1 of 16 (%)", "seen in")
    heads = ("honest damage", "anything fires (%)", "undecided (%)", "by")
    times = [(name, f"{ms:.2f}") for name, ms in spent.items()]
    lines = [
        *markdown_table(titles, rows, n_words=3),
        "",
        *markdown_table(heads, alarms, n_words=1),
        "",
        *markdown_table(("detector", "ms a clip"), times, n_words=1),
    ]
    if given.candidate and given.reference:
        both = zip(ClipSet.load(given.reference).clips, ClipSet.load(given.candidate).clips,
                   strict=True)  # fmt: skip
        lines += ["", *(f"- {one.outcome}: {one.text}" for one in find(signals(both), 0))]
    print("\n".join(lines))  # noqa: T201
    document |= {"failures": rows, "honest": alarms, "ms_a_clip": spent}
    (given.out / "failures.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
