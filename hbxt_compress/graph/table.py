"""What a runtime does with a graph, as a data file: `graph/runtimes/<name>.yaml`.

A table lists the operators that the runtime knows, with element types where they matter, and rules
that say what becomes of a node that they describe. To add a runtime: a file there. To bring one up
to date: edit its version, source and lists; each rule says where it was found.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from hbxt_compress.graph.traits import TRAITS
from hbxt_compress.strict import Settings, did_you_mean, load

__all__ = [
    "DEFAULT_TARGETS",
    "MODEL",
    "RUNTIMES",
    "VERDICTS",
    "Condition",
    "Rule",
    "RuntimeTable",
    "Setting",
    "Verdict",
    "default_runtime",
    "known_target",
    "table",
    "targets",
]

Verdict = Literal["runs", "slow", "falls_back", "misparsed", "fails"]
VERDICTS: Final[tuple[Verdict, ...]] = ("runs", "slow", "falls_back", "misparsed", "fails")
"""from good to bad: of several rules that describe a node, the worst verdict counts"""

DEFAULT_TARGETS: Final = ("gfx942", "gfx1100", "gfx1151", "gfx1201", "cpu")
"""what is checked where no target is named: a card of each kind, and the processor"""

MODEL: Final = "model"  # as an operator: the model itself, once
_FOLDER = Path(__file__).parent / "runtimes"
_EVERY = "*"
_Element = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9]*$")]


class Condition(Settings):
    """What describes a node: everything that is given must hold."""

    op: tuple[str, ...] = (_EVERY,)
    """`MatMul` of ai.onnx, `com.microsoft::MatMulNBits`, `*::Attention` of any domain, `*` any
    node, `model` the model itself"""
    opset_from: int | None = None
    """the model imports at least this version of ai.onnx"""
    ir_from: int | None = None
    """the model has at least this IR version"""
    inputs_from: int | None = None
    """that many inputs or more; one that is left out at the end does not count"""
    inputs_to: int | None = None
    types: tuple[_Element, ...] = ()
    """an input or output has one of these ONNX element types"""
    attributes: Annotated[dict[str, tuple[int | str, ...]], Field(default_factory=dict)]
    """each is there, with one of these values"""
    attributes_other: Annotated[dict[str, tuple[int | str, ...]], Field(default_factory=dict)]
    """each is there, with none of these values"""
    not_constant: tuple[int, ...] = ()
    """one of these inputs is there and no initializer"""
    traits: tuple[str, ...] = ()
    """all of these hold, see graph/traits.py"""
    without: tuple[str, ...] = ()
    """none of these traits holds"""
    gpus: tuple[str, ...] = ()
    """the target is one of these; `gfx11*` is a pattern"""
    unless: Annotated[dict[str, str], Field(default_factory=dict)]
    """the artifact does not set these environment variables so; a value may stand in a list"""

    @field_validator("traits", "without")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in TRAITS:
                raise ValueError(
                    f"unknown trait {name!r}{did_you_mean(name, TRAITS)}; known: "
                    + ", ".join(sorted(TRAITS))
                )
        return names

    @property
    def about_model(self) -> bool:
        """Whether it describes the model rather than a node."""
        return MODEL in self.op

    def names(self, domain: str, op_type: str) -> bool:
        """Whether the operator is among those described."""
        for pattern in self.op:
            wanted, _, kind = pattern.rpartition("::")
            if pattern == _EVERY or (kind == op_type and wanted in (_EVERY, domain)):
                return True
        return False


class Rule(Settings):
    """What becomes of the nodes that a condition describes."""

    when: Condition
    verdict: Verdict
    reason: Annotated[str, Field(min_length=1)]
    """what happens, and what to do instead"""
    source: Annotated[str, Field(min_length=1)]
    """where that was found: file and line, issue, or what was run"""


class Setting(Settings):
    """What a runtime is told so that it does well on some targets."""

    gpus: tuple[str, ...]
    """with patterns"""
    environment: Annotated[dict[str, str], Field(default_factory=dict)]
    """variables that are set before a graph is compiled"""
    options: Annotated[dict[str, str], Field(default_factory=dict)]
    """of the provider; `{cache}` stands for a folder that outlives the process"""
    why: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]


class RuntimeTable(Settings):
    """One runtime, at one version."""

    name: str
    title: str
    like: str | None = None
    """a table whose operators (where none are listed here), rules and variables hold here, too; not
    its options, which each provider names its own way"""
    provider: str
    """ONNX Runtime's name of the execution provider"""
    version: str
    source: str
    """what was read or run to write this table, with dates"""
    verified: bool
    """whether it was tried on the hardware; if not it was read in source code"""
    gpus: tuple[str, ...]
    """targets that it can compute on, with patterns"""
    newest_opset: int
    """of ai.onnx that it accepts"""
    beyond_opset: Verdict
    """what becomes of a model with a newer one"""
    newest_ir: int
    unsupported: Verdict
    """what becomes of a node whose operator or types are not listed"""
    most_unsupported: int | None = None
    """with more such nodes it takes none at all, and says nothing"""
    functions: bool
    """whether a model's local functions reach it inlined"""
    operators: Annotated[dict[str, tuple[str, ...]], Field(default_factory=dict)]
    """by domain"""
    types: tuple[_Element, ...]
    """element types that an operator takes"""
    only: Annotated[dict[str, tuple[_Element, ...]], Field(default_factory=dict)]
    """`MatMul`, `com.microsoft::Gelu`: the element types of operators that take others"""
    casts: Annotated[dict[str, str], Field(default_factory=dict)]
    """element types that are converted to another one where an operator takes only that"""
    settings: tuple[Setting, ...] = ()
    rules: tuple[Rule, ...] = ()

    def computes_on(self, target: str) -> bool:
        return any(fnmatchcase(target, pattern) for pattern in self.gpus)

    def environment(self, target: str) -> dict[str, str]:
        """Variables to set on a target."""
        return {k: v for one in self._told(target) for k, v in one.environment.items()}

    def options(self, target: str) -> dict[str, str]:
        """Options of the provider on a target."""
        return {k: v for one in self._told(target) for k, v in one.options.items()}

    def _told(self, target: str) -> list[Setting]:
        return [s for s in self.settings if any(fnmatchcase(target, gpu) for gpu in s.gpus)]

    def takes(self, domain: str, op_type: str) -> tuple[str, ...] | None:
        """The element types of an operator; None if it is not known."""
        if op_type not in self.operators.get(domain or "ai.onnx", ()):
            return None
        return self.only.get(f"{domain}::{op_type}" if domain else op_type, self.types)


RUNTIMES: Final = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
"""of which there are tables"""


def targets() -> tuple[str, ...]:
    """Every target that a table names, without patterns."""
    named = {gpu for name in RUNTIMES for gpu in table(name).gpus if "*" not in gpu}
    return tuple(sorted(named, key=lambda one: (len(one), one)))


def known_target(name: str) -> str:
    """The name, or ValueError with those that are known."""
    known = targets()
    if name not in known:
        meant = did_you_mean(name, known)
        raise ValueError(f"target {name!r}: unknown{meant}; known: {', '.join(known)}")
    return name


def default_runtime(target: str) -> str:
    """The table that counts on a target, if no other is asked for."""
    return "cpu" if target == "cpu" else "migraphx"


@cache
def table(name: str) -> RuntimeTable:
    """The table of a runtime; read once.

    Raises:
        RecipeError: the file is not valid; every problem with its line.
    """
    own = load(RuntimeTable, _FOLDER / f"{name}.yaml")
    if own.like is None:
        return own
    other = table(own.like)
    taken = {"operators": own.operators or other.operators, "only": other.only | own.only}
    told = tuple(one for one in other.settings if not one.options)
    return own.model_copy(
        update={
            **taken,
            "rules": (*other.rules, *own.rules),
            "settings": (*told, *own.settings),
        }
    )
