"""Tape: gradients as autograd finds them in the whole model, with one block's weights at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.chain import Chain
from hbxt_compress.formats import FORMATS
from hbxt_compress.models import family_of
from hbxt_compress.source import Source
from hbxt_compress.stages.side_by_side import Batch
from hbxt_compress.stages.tape import Tape
from tests.observed import source_of

_CPU = torch.device("cpu")
_LAYERS = {
    "transformer": [
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.text_embedder.linear_2",
        "condition_embedder.time_proj",
        *(f"blocks.{k}.{a}.to_{x}" for k in range(2) for a in ("attn1", "attn2") for x in "qkv"),
        "blocks.0.ffn.net.2",
        "blocks.1.ffn.net.0.proj",
        "proj_out",
    ],
    "text_encoder": [
        *(f"encoder.block.{k}.layer.0.SelfAttention.{x}" for k in range(2) for x in "qkvo"),
        "encoder.block.0.layer.1.DenseReluDense.wi_0",
        "encoder.block.1.layer.1.DenseReluDense.wo",
    ],
}
_COMPONENTS = list(_LAYERS)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(component: str) -> list[tuple[Tensor, ...]]:
    if component == "transformer":
        return [
            (_normal(n, 4, 2, 4, 4, seed=n), torch.full((n,), 700.0 - n), _normal(n, 16, 128))
            for n in (2, 3)
        ]
    ids = torch.tensor([[4, 21, 9, 1, 0, 0], [5, 6, 7, 8, 9, 1]])
    return [(one[None], (one[None] != 0).long()) for one in ids]


@pytest.fixture(scope="module")
def source(micro_wan: Path) -> Source:
    return source_of(micro_wan)


@pytest.fixture
def tape_of(source: Source, tmp_path: Path) -> Callable[[str], Tape]:
    def make(component: str) -> Tape:
        batches = [
            Batch(full=one, half=one, weight=1.0, held_out=False) for one in _inputs(component)
        ]
        chain = family_of(source).streamed(source, component, _CPU)
        return Tape(chain, batches, tmp_path / component)

    return make


def _own(component: str, piece: str) -> list[str]:
    at = {"transformer": "blocks.{}.", "text_encoder": "encoder.block.{}."}[component]
    if piece != "loose":
        return [name for name in _LAYERS[component] if name.startswith(at.format(int(piece)))]
    return [name for name in _LAYERS[component] if not name.startswith(at.split("{")[0])]


def _there_and_back(
    component: str, tape: Tape, cotangents: list[list[Tensor]]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """By layer, what it was given on the way back, and the gradients, a list over batches."""
    for piece in tape.there:
        with tape.at(piece):
            seen = [set(found) for _, found in tape.forward(piece, _own(component, piece))]
            assert seen == [set(_own(component, piece))] * len(tape.batches)
    tape.start(cotangents)
    given: dict[str, list[Tensor]] = {}
    gradients: dict[str, list[Tensor]] = {}
    for piece in tape.back:
        with tape.at(piece):
            for _, found in tape.backward(piece, _own(component, piece)):
                for name, one in found.items():
                    assert one.gradient is not None
                    given.setdefault(name, []).append(one.given.detach())
                    gradients.setdefault(name, []).append(one.gradient)
    return given, gradients


def _signs(outputs: list[Tensor], n: int = 1) -> list[list[Tensor]]:
    return [
        [_normal(*one.shape, seed=100 * i + k).sign() for k in range(n)]
        for i, one in enumerate(outputs)
    ]


def _by_autograd(
    chain: Chain, inputs: tuple[Tensor, ...], names: list[str], cotangent: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the whole model with respect to the layers' outputs and the last input."""
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            outputs[name] = output if output.requires_grad else output.requires_grad_()

        return hook

    handles = [chain.module.get_submodule(n).register_forward_hook(note(n)) for n in names]
    last = inputs[-1]
    if last.is_floating_point():
        last = last.clone().requires_grad_()
    loss = (chain.whole(*inputs[:-1], last) * cotangent).sum()
    for handle in handles:
        handle.remove()
    leaves = [outputs[name] for name in names] + ([last] if last.requires_grad else [])
    found = torch.autograd.grad(loss, leaves)
    return list(found[: len(names)]), found[-1] if last.requires_grad else None


@pytest.mark.parametrize("component", _COMPONENTS)
def test_gradients_are_those_of_the_whole_model(
    source: Source, tape_of: Callable[[str], Tape], component: str
) -> None:
    family, tape = family_of(source), tape_of(component)
    whole = family.chain(source, component, family.load(source, component))
    with torch.no_grad():
        outputs = [whole.whole(*one) for one in _inputs(component)]
    cotangents = _signs(outputs)
    _, gradients = _there_and_back(component, tape, cotangents)
    assert all(torch.equal(*pair) for pair in zip(tape.outputs, outputs, strict=True))
    assert set(gradients) == set(_LAYERS[component])
    for i, inputs in enumerate(_inputs(component)):
        expected, of_text = _by_autograd(whole, inputs, _LAYERS[component], cotangents[i][0])
        for name, one in zip(_LAYERS[component], expected, strict=True):
            scale = float(one.abs().max())
            assert scale > 1e-6, name
            torch.testing.assert_close(gradients[name][i], one, rtol=1e-4, atol=1e-5 * scale)
        if of_text is not None:
            (found,) = tape.input_gradients(2)[i]
            torch.testing.assert_close(found, of_text, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "blocks.0.attn2.to_k"),
        ("transformer", "condition_embedder.time_proj"),
        ("text_encoder", "encoder.block.0.layer.1.DenseReluDense.wi_0"),
    ],
)
def test_a_small_rounding_error_moves_the_output_as_the_gradient_says(
    source: Source, tape_of: Callable[[str], Tape], component: str, name: str
) -> None:
    """<dW, G> against the difference of two forwards; signs that do not let it cancel to noise."""
    family, tape = family_of(source), tape_of(component)
    whole = family.chain(source, component, family.load(source, component))
    layer = whole.module.get_submodule(name)
    weight_OI = layer.weight.data
    grid = search_scales(weight_OI, FORMATS["int4-g64"])
    error_OI = 0.02 * (weight_OI - grid.value(grid.levels(weight_OI)))
    reached = []
    for sign in (1, -1):
        layer.weight.data = weight_OI + sign * error_OI
        with torch.no_grad():
            reached.append([whole.whole(*one).double() for one in _inputs(component)])
    moved = [(high - low) / 2 for high, low in zip(*reached, strict=True)]
    given, gradients = _there_and_back(component, tape, [[one.sign().float()] for one in moved])
    predicted = 0.0
    for x, g in zip(given[name], gradients[name], strict=True):
        gradient_OI = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        predicted += float((error_OI * gradient_OI).double().sum())
    assert predicted == pytest.approx(sum(float(one.abs().sum()) for one in moved), rel=0.01)


def test_several_cotangents_are_followed_at_once(tape_of: Callable[[str], Tape]) -> None:
    tapes = [tape_of("transformer") for _ in range(3)]
    shapes = [one[0] for one in _inputs("transformer")]
    both = _signs(shapes, n=2)
    _, together = _there_and_back("transformer", tapes[0], both)
    for k, tape in enumerate(tapes[1:]):
        _, alone = _there_and_back("transformer", tape, [[one[k]] for one in both])
        for name, gradients in alone.items():
            pairs = zip(gradients, together[name][k::2], strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
        texts = tape.input_gradients(2), tapes[0].input_gradients(2)
        for one, other in zip(*texts, strict=True):
            assert torch.equal(one[0], other[k])


@pytest.mark.parametrize("component", _COMPONENTS)
def test_the_weights_of_one_block_are_there_at_a_time(
    tape_of: Callable[[str], Tape], component: str
) -> None:
    tape = tape_of(component)
    n_hooks = _n_hooks(tape.chain.module)  # an embedding table has its own

    def there() -> list[int]:
        return [
            k
            for k, block in enumerate(tape.chain.blocks)
            if any(not parameter.is_meta for parameter in block.parameters())
        ]

    def own(piece: str) -> list[int]:
        return [] if piece == "loose" else [int(piece)]

    for piece in tape.there:
        with tape.at(piece):
            for _ in tape.forward(piece, _own(component, piece)):
                assert there() == own(piece)
    assert there() == []
    tape.start(_signs(tape.outputs))
    for piece in tape.back:
        with tape.at(piece):
            for _ in tape.backward(piece, _own(component, piece)):
                assert there() == own(piece)
    assert there() == []
    assert _n_hooks(tape.chain.module) == n_hooks


def _n_hooks(module: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())
