"""What each runtime makes of every node of a graph, by its table and without running it.

It looks at what is on the disk, so it also judges graphs that others made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import onnx
import onnx_ir as ir

from hbxt_compress.errors import ArtifactError
from hbxt_compress.external_data import external_data_problems
from hbxt_compress.graph.table import MODEL, VERDICTS, Condition, RuntimeTable, Verdict
from hbxt_compress.graph.traits import TRAITS, Seen

__all__ = ["BAD", "Graph", "Judgement", "NodeVerdict", "judge", "read_graph"]

BAD = frozenset({"misparsed", "fails"})
"""verdicts that no release ships with"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A model's structure. name: how messages call the file; keys: see traits.Seen."""

    name: str
    model: ir.Model
    keys: Mapping[str, tuple[str, ...]]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeVerdict:
    """What becomes of a node, and why; node and op are `model` where the model itself is meant."""

    file: str
    node: str
    op: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a runtime makes of all nodes of some graphs.

    runs_there: it can compute on the target at all. cliff: files of which it takes no node.
    """

    runtime: RuntimeTable
    runs_there: bool
    nodes: tuple[NodeVerdict, ...]
    cliff: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether nothing is misparsed, nothing fails and no whole graph is left to the CPU."""
        return not self.cliff and not any(one.verdict in BAD for one in self.nodes)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "title": self.runtime.title,
            "provider": self.runtime.provider,
            "version": self.runtime.version,
            "source": self.runtime.source,
            "verified": self.runtime.verified,
            "passes": self.passes,
            "summary": {**self.counts(), "cliff": list(self.cliff)},
            "nodes": [asdict(one) for one in self.nodes],
        }

    def counts(self) -> dict[str, int]:
        """How many nodes each verdict has."""
        found = Counter(one.verdict for one in self.nodes if one.op != MODEL)
        return {verdict: found[verdict] for verdict in VERDICTS}


def read_graph(path: Path, name: str | None = None) -> Graph:
    """The structure of an ONNX file; of external data only where it lies is read.

    Raises:
        ArtifactError: it is not a readable ONNX file.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # protobuf and onnx_ir raise a dozen unrelated classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path}: not a readable ONNX file ({reason})") from error
    if not proto.HasField("graph"):
        raise ArtifactError(f"{path}: not a readable ONNX file (it has no graph)")
    keys = {
        tensor.name: tuple(entry.key for entry in tensor.external_data)
        for tensor in proto.graph.initializer
        if tensor.external_data
    }
    return Graph(
        name=name or path.name,
        model=model,
        keys=keys,
        problems=tuple(external_data_problems(path)),
    )


def judge(
    graphs: Sequence[Graph],
    runtime: RuntimeTable,
    target: str,
    environment: Mapping[str, str] | None = None,
) -> Judgement:
    """A verdict for every node. target: a gfx name or cpu. environment: what is set for the run."""
    nodes: list[NodeVerdict] = []
    cliff: list[str] = []
    for graph in graphs:
        own = [
            *_about_model(graph, runtime, target, environment or {}),
            *_about_nodes(graph, runtime, target, environment or {}),
        ]
        if runtime.most_unsupported is not None:
            n_left = sum(one.verdict == "falls_back" for one in own)
            if n_left > runtime.most_unsupported:
                cliff.append(graph.name)
                own = [_left(one, n_left, runtime) for one in own]
        nodes += own
    return Judgement(
        runtime=runtime,
        runs_there=runtime.computes_on(target),
        nodes=tuple(nodes),
        cliff=tuple(cliff),
    )


def _left(one: NodeVerdict, n_left: int, runtime: RuntimeTable) -> NodeVerdict:
    if one.op == MODEL or one.verdict in (*BAD, "falls_back"):
        return one
    reason = (
        f"{n_left} nodes of this graph are not supported: with more than "
        f"{runtime.most_unsupported} the provider takes none"
    )
    return replace(one, verdict="falls_back", reason=reason)


def _about_model(
    graph: Graph, runtime: RuntimeTable, target: str, environment: Mapping[str, str]
) -> Iterator[NodeVerdict]:
    """What concerns a model as a whole; nothing where all is well."""
    found: list[tuple[Verdict, str]] = [("fails", problem) for problem in graph.problems]
    if not runtime.computes_on(target):
        found.append(("fails", f"{runtime.title} {runtime.version} has no code for {target}"))
    opset = graph.model.opset_imports.get("", 0)
    if opset > runtime.newest_opset:
        found.append(
            (runtime.beyond_opset, f"opset {opset}, known up to {runtime.newest_opset}: export 18")
        )
    if graph.model.ir_version > runtime.newest_ir:
        newest = f"IR version {graph.model.ir_version}, known up to {runtime.newest_ir}"
        found.append(("fails", f"{newest}: write 10"))
    seen = Seen(node=None, model=graph.model, keys=graph.keys)
    found += [
        (rule.verdict, rule.reason)
        for rule in runtime.rules
        if rule.when.about_model and _holds(rule.when, seen, target, environment)
    ]
    for verdict, reason in found:
        yield NodeVerdict(file=graph.name, node=MODEL, op=MODEL, verdict=verdict, reason=reason)


def _about_nodes(
    graph: Graph, runtime: RuntimeTable, target: str, environment: Mapping[str, str]
) -> Iterator[NodeVerdict]:
    functions = {(domain, name) for domain, name, _ in graph.model.functions}
    inside = [node for one in graph.model.functions.values() for node in one.all_nodes()]
    for i, node in enumerate([*graph.model.graph.all_nodes(), *inside]):
        verdict, reason = _of_node(node, graph, runtime, target, environment, functions)
        yield NodeVerdict(
            file=graph.name,
            node=node.name or f"{node.op_type} #{i}",
            op=_operator(node),
            verdict=verdict,
            reason=reason,
        )


def _of_node(
    node: ir.Node, graph: Graph, runtime: RuntimeTable, target: str,
    environment: Mapping[str, str], functions: set[tuple[str, str]],
) -> tuple[Verdict, str]:  # fmt: skip
    seen = Seen(node=node, model=graph.model, keys=graph.keys)
    found: list[tuple[Verdict, str]] = [("runs", "")]
    if (node.domain, node.op_type) in functions:
        if not runtime.functions:
            found.append((runtime.unsupported, "a function of the model's own: inline it"))
    else:
        found += _by_types(_operator(node), runtime.takes(node.domain, node.op_type), seen, runtime)
    found += [
        (rule.verdict, rule.reason)
        for rule in runtime.rules
        if not rule.when.about_model
        and rule.when.names(node.domain, node.op_type)
        and _holds(rule.when, seen, target, environment)
    ]
    worst = max(found, key=lambda one: VERDICTS.index(one[0]))[0]
    return worst, "; ".join(reason for verdict, reason in found if verdict == worst and reason)


def _by_types(
    operator: str, types: tuple[str, ...] | None, seen: Seen, runtime: RuntimeTable
) -> Iterator[tuple[Verdict, str]]:
    if types is None:
        yield runtime.unsupported, f"{operator} is not among its operators"
        return
    others = sorted(_types(seen) - set(types))
    cast = [one for one in others if runtime.casts.get(one) in types]
    if left := [one for one in others if one not in cast]:
        yield runtime.unsupported, f"{operator} has no kernel for {', '.join(left)}"
    for one in cast:
        yield (
            "slow",
            f"no kernel for {one}: computed in {runtime.casts[one]}, cast before and after",
        )


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _types(seen: Seen) -> set[str]:
    """ONNX names of the element types around a node."""
    return {value.dtype.name for value in seen.values() if value.dtype is not None}


def _holds(when: Condition, seen: Seen, target: str, environment: Mapping[str, str]) -> bool:
    """Whether a condition describes a node; that its operator is meant is known already."""
    n_inputs = 0
    if seen.node is not None:
        there = [i for i, one in enumerate(seen.node.inputs) if one is not None]
        n_inputs = max(there, default=-1) + 1
    opset = seen.model.opset_imports.get("", 0)
    return (
        (when.opset_from is None or opset >= when.opset_from)
        and (when.ir_from is None or seen.model.ir_version >= when.ir_from)
        and (when.inputs_from is None or n_inputs >= when.inputs_from)
        and (when.inputs_to is None or n_inputs <= when.inputs_to)
        and (not when.types or bool(_types(seen) & set(when.types)))
        and all(_attribute(seen, k) in allowed for k, allowed in when.attributes.items())
        and all(
            (found := _attribute(seen, k)) is not None and found not in others
            for k, others in when.attributes_other.items()
        )
        and (not when.not_constant or any(_computed(seen, i) for i in when.not_constant))
        and all(TRAITS[name](seen) for name in when.traits)
        and not any(TRAITS[name](seen) for name in when.without)
        and (not when.gpus or any(fnmatchcase(target, pattern) for pattern in when.gpus))
        and not (when.unless and all(_set(environment, k, v) for k, v in when.unless.items()))
    )


def _attribute(seen: Seen, name: str) -> int | str | None:
    """A whole number or text; None if it is not there or something else."""
    found = None if seen.node is None else seen.node.attributes.get(name)
    if found is None:
        return None
    if found.type == ir.AttributeType.INT:
        return found.as_int()
    return found.as_string() if found.type == ir.AttributeType.STRING else None


def _computed(seen: Seen, index: int) -> bool:
    return seen.input(index) is not None and not seen.constant(index)


def _set(environment: Mapping[str, str], name: str, value: str) -> bool:
    return value in environment.get(name, "").split(",")
