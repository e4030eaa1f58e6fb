"""Blocks that are alike: three of them are traced, the graph of one is put down again for the rest.

The first, the second and the last block are traced. If the second and the last are the same node
for node, but for names, and nothing but one value leads from each into the next, copies of the
second take the place of those between. Values are named as if all had been traced, so that the
files are the same to the byte.

Noticed is what a trace and the modules show: other operators, attributes, shapes or values read
from outside, blocks with other settings or buffers, and an optimizer that looked at a block's
weights. What cannot be seen is a caller that treats a block by its position: a GraphSpec that
names its blocks promises that there is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import onnx_ir as ir
import onnx_ir.passes.common as common
from torch import nn

from hbxt_compress.graph.alike import BlocksDiffer, Match, match_nodes, require_alike
from hbxt_compress.graph.builder import name_of
from hbxt_compress.graph.counted_names import CountedNames
from hbxt_compress.graph.naming import SCOPES
from hbxt_compress.graph.unread import Unread

__all__ = ["Blocks", "n_traced"]

_TRACED = 3
_FEWEST = 5  # one fewer would save a single block


def n_traced(n_blocks: int) -> int:
    """How many of so many blocks are traced if they are alike."""
    return _TRACED if n_blocks >= _FEWEST else n_blocks


class Blocks:
    """The blocks of a module that is traced: a ModuleList, at a path below the module.

    Raises:
        BlocksDiffer: they are modules of other types, settings, shapes or buffers.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self._module, self._path = module, path
        self._whole = module.get_submodule(path)
        children = dict(self._whole.named_children())
        self._first, self._second, *self._between, self._last = children
        self.unread = Unread()
        for key in (*self._between, self._last):
            rename, at = partial(self._renamed, to=key), (int(self._second), int(key))
            require_alike(children[self._second], children[key], rename, at)

    def holds(self, name: str) -> bool:
        """Whether a parameter or buffer of that name belongs to a block."""
        return name.startswith(f"{self._path}.")

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Meanwhile the module has three blocks, under their own names."""
        short = nn.ModuleList()
        for key in (self._first, self._second, self._last):
            short.add_module(key, self._whole.get_submodule(key))
        self._module.set_submodule(self._path, short)
        try:
            yield
        finally:
            self._module.set_submodule(self._path, self._whole)

    def learn_names(self, graph: ir.Graph) -> None:
        """Learns from the graph as it was traced how names are counted from block to block.

        Raises:
            BlocksDiffer: the blocks are not alike, or names are not counted evenly.
        """
        self._names = CountedNames(self._matched(list(graph)))

    def grow(self, model: ir.Model, content: Callable[[str], ir.TensorProtocol]) -> None:
        """Makes the optimized model of three blocks that of all of them, optimized.

        Parameters of blocks have been stand-ins so far. content: gives one, or a buffer, by name.

        Raises:
            BlocksDiffer: they are not alike, or might not be: what was optimized depends on what
                is in a block's weights.
        """
        graph, n_more = model.graph, len(self._between)
        if used := self.unread.used(graph):
            raise BlocksDiffer(f"the optimizer looked at {', '.join(used[:3])}")
        match = self._matched(list(graph))
        self._names.learn(match)
        known = list(graph.initializers.values())
        graph.initializers.clear()
        self._names.count_on(graph, known, n_more)
        reached, made = match.leaves, []
        for i, key in enumerate(self._between, start=1):
            names = partial(self._names.later, n_blocks=i), partial(self._renamed, to=key)
            copy = _Copy(match, *names, reached)
            graph.insert_before(match.others[0], copy.nodes)
            reached = copy.leaves
            made.append(copy.initializers)
        for node in match.others:
            for index, given in enumerate(node.inputs):
                if given is match.leaves:
                    node.replace_input_with(index, reached)
        for value in _in_order(known, match.own, made):
            if self.holds(name_of(value)):
                value.const_value = content(name_of(value))
            graph.register_initializer(value)
        for step in (  # what the optimizer ends with; it has seen three blocks only
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.OutputFixPass(),
            common.NameFixPass(),
        ):
            step(model)

    def _matched(self, nodes: Sequence[ir.Node]) -> Match:
        """The second block's nodes and the last one's.

        Both are counted from the first use of a parameter. How many nodes a block has before that
        is tried out: only where it really begins does a single value lead into it.
        """
        start, end = (self._first_use(nodes, key) for key in (self._second, self._last))
        reasons = []
        for back in range(min(start, end - start)):
            try:
                second = nodes[start - back : end - back]
                last = nodes[end - back : 2 * end - start - back]
                return match_nodes(second, last, partial(self._renamed, to=self._last))
            except BlocksDiffer as why:
                reasons.append(str(why))
        raise BlocksDiffer(reasons[0] if reasons else "they are not traced one after another")

    def _first_use(self, nodes: Sequence[ir.Node], key: str) -> int:
        prefix = f"{self._path}.{key}."
        for index, node in enumerate(nodes):
            if any(
                value is not None and name_of(value).startswith(prefix) for value in node.inputs
            ):
                return index
        raise BlocksDiffer(f"{prefix}*: no parameter is used")

    def _renamed(self, text: str, to: str) -> str:
        """A text that names the second block, about another."""
        _, _, path = self._path.partition(".")  # layers bear it without the wrapper's name
        pattern = rf"(?<!\w){re.escape(f'{path}.{self._second}')}(?!\w)"
        return re.sub(pattern, f"{path}.{to}", text)


class _Copy:
    """The second block's nodes once more. leaves: what they give.

    named: the name of what a value is copied to. rename: a text that names the block, for this one.
    """

    def __init__(
        self,
        match: Match,
        named: Callable[[str], str],
        rename: Callable[[str], str],
        enters: ir.Value,
    ) -> None:
        self._named, self._rename = named, rename
        self._values = {match.enters: enters}
        self.initializers = {value: self._initializer(value) for value in match.own}
        self.nodes = [self._node(node) for node in match.nodes]
        self.leaves = self._values[match.leaves]

    def _initializer(self, value: ir.Value) -> ir.Value:
        self._values[value] = copy = self._value(value)
        if (name := self._rename(name_of(value))) != value.name:
            copy.name = name
        copy.const_value = value.const_value
        return copy

    def _node(self, node: ir.Node) -> ir.Node:
        inputs = [
            None if value is None else self._values.get(value, value) for value in node.inputs
        ]
        for value in node.outputs:
            self._values[value] = self._value(value)
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            [self._attribute(attribute) for attribute in node.attributes.values()],
            overload=node.overload,
            outputs=[self._values[value] for value in node.outputs],
            version=node.version,
            name=node.name,
        )
        if SCOPES in node.metadata_props:
            copy.metadata_props[SCOPES] = self._rename(node.metadata_props[SCOPES])
        return copy

    def _value(self, value: ir.Value) -> ir.Value:
        shape = None if value.shape is None else value.shape.copy()
        return ir.Value(name=self._named(name_of(value)), shape=shape, type=value.type)

    def _attribute(self, attribute: ir.Attr) -> ir.Attr:
        if attribute.type != ir.AttributeType.STRING:
            return attribute
        return ir.AttrString(attribute.name, self._rename(attribute.as_string()))


def _in_order(
    known: Sequence[ir.Value],
    own: Mapping[ir.Value, ir.Value],
    made: Sequence[Mapping[ir.Value, ir.Value]],
) -> Iterator[ir.Value]:
    """The initializers in the order of a whole trace: copies before those of the last block.

    own: the second block's, with the last one's. made: its own with their copies, by block.
    """
    waiting: list[ir.Value] = []
    of_the_last = {*own.values()}
    for value in known:
        if value in own:
            waiting.append(value)
        elif value in of_the_last:
            yield from (copies[one] for copies in made for one in waiting)
            waiting = []
        yield value
    yield from (copies[one] for copies in made for one in waiting)
