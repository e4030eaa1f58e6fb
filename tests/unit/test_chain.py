"""Chain: a model run in pieces is the model, and looking at it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hbxt_compress import chain as chain_module
from hbxt_compress.chain import Chain, layer_at, watch
from hbxt_compress.models import family_of
from tests.observed import source_of

_COMPONENTS = ["transformer", "text_encoder"]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(component: str) -> tuple[Tensor, ...]:
    if component == "transformer":
        return _normal(2, 4, 2, 4, 4), torch.tensor([999.0, 250.0]), _normal(2, 16, 128, seed=1)
    ids = torch.tensor([[4, 21, 9, 1, 0, 0], [5, 6, 7, 8, 9, 1]])
    return ids, (ids != 0).long()


def _hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


@pytest.fixture(scope="module")
def chains(micro_wan: Path) -> dict[str, Chain]:
    source = source_of(micro_wan)
    family = family_of(source)
    return {name: family.chain(source, name, family.load(source, name)) for name in _COMPONENTS}


@pytest.mark.parametrize("component", _COMPONENTS)
def test_pieces_make_the_whole_forward_bit_for_bit(
    chains: dict[str, Chain], component: str
) -> None:
    chain, inputs = chains[component], _inputs(component)
    before = {name: id(module) for name, module in chain.module.named_modules()}
    with torch.no_grad():
        expected = chain.whole(*inputs)
    carry = chain.head(*inputs)
    for k in range(len(chain.blocks)):
        kept = carry.hidden.clone()
        passed = chain.block(k, carry)
        assert torch.equal(carry.hidden, kept)  # what a block was given can be given again
        assert not torch.equal(passed.hidden, kept)
        carry = passed
    assert len(chain.blocks) == 2
    assert torch.equal(chain.tail(carry, *inputs), expected)
    assert {name: id(module) for name, module in chain.module.named_modules()} == before
    assert torch.equal(chain.whole(*inputs), expected)
    assert _hooks(chain.module) == 0


@pytest.mark.parametrize("component", _COMPONENTS)
def test_the_tail_depends_on_what_it_is_given(chains: dict[str, Chain], component: str) -> None:
    chain, inputs = chains[component], _inputs(component)
    first = chain.head(*inputs)
    skipped = chain.tail(first, *inputs)
    with torch.no_grad():
        assert not torch.equal(skipped, chain.whole(*inputs))


class _Toy(nn.Module):
    """Three blocks that note their calls; the mapping of a watcher may list them in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.end = nn.Linear(4, 4)
        self.called: list[int] = []

    def forward(self, x: Tensor, *, fail_at: int = -1, skip: bool = False) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i == fail_at:
                raise ValueError("block fails")
            if not skip:
                self.called.append(i)
                x = block(x)
        return self.end(x)


def _toy() -> tuple[_Toy, Chain]:
    torch.manual_seed(0)
    toy = _Toy()
    return toy, Chain(toy, "blocks", lambda module, x: module(x))


def test_the_head_ends_before_the_first_block_runs() -> None:
    toy, chain = _toy()
    x = _normal(2, 4)
    weight = toy.blocks[0].weight.data.clone()
    toy.blocks[0].weight.data.fill_(torch.nan)
    carry = chain.head(x)
    toy.blocks[0].weight.data = weight
    assert carry.hidden is x
    assert _hooks(toy) == 0


def test_a_module_that_skips_its_blocks_is_an_error() -> None:
    toy, _ = _toy()
    chain = Chain(toy, "blocks", lambda module, x: module(x, skip=True))
    with pytest.raises(RuntimeError, match="_Toy did not run its blocks"):
        chain.head(_normal(2, 4))
    assert _hooks(toy) == 0


def test_an_error_leaves_the_module_as_it_was() -> None:
    toy, good = _toy()
    x, blocks = _normal(2, 4), toy.blocks
    expected = good.whole(x)
    carry = good.head(x)
    for fail_at in (0, 1):
        bad = Chain(toy, "blocks", lambda module, x, at=fail_at: module(x, fail_at=at))
        if fail_at == 0:
            with pytest.raises(ValueError, match="block fails"):
                bad.head(x)
            with pytest.raises(ValueError, match="block fails"):
                bad.tail(carry, x)
        with pytest.raises(ValueError, match="block fails"):
            watch({"last": toy.end}, lambda bad=bad: bad.whole(x))
        assert toy.blocks is blocks
        assert _hooks(toy) == 0
    assert torch.equal(good.whole(x), expected)


def test_watch_sees_inputs_in_the_order_of_the_calls_and_stops_early() -> None:
    toy, chain = _toy()
    x = _normal(2, 4)
    named: dict[str, nn.Module] = {"second": toy.blocks[1], "first": toy.blocks[0]}
    seen = watch(named, lambda: chain.whole(x))
    assert list(seen) == ["first", "second"]
    assert seen["first"] is x
    assert torch.equal(seen["second"], toy.blocks[0](x))
    assert toy.called == [0, 1]  # noted before its block runs, which it then does not
    toy.called.clear()
    assert list(watch(named, lambda: chain.whole(x), stop=False)) == ["first", "second"]
    assert toy.called == [0, 1, 2]
    assert _hooks(toy) == 0


def test_a_module_that_is_not_called_is_not_seen() -> None:
    toy, chain = _toy()
    named = {"idle": nn.Linear(4, 4), "end": toy.end}
    assert list(watch(named, lambda: chain.whole(_normal(2, 4)))) == ["end"]
    assert toy.called == [0, 1, 2]
    assert watch({}, lambda: chain.whole(_normal(2, 4))) == {}


def test_a_layer_is_found_by_its_path() -> None:
    toy, _ = _toy()
    assert layer_at(toy, "blocks.1") is toy.blocks[1]
    with pytest.raises(AttributeError):
        layer_at(toy, "blocks.7")


def test_blocks_of_a_large_model_multiply_in_bfloat16(
    micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(micro_wan)
    family = family_of(source)
    inputs = _inputs("transformer")
    found = []
    for exact_to in (10**12, 0):
        monkeypatch.setattr(chain_module, "LARGE", exact_to)
        chain = family.streamed(source, "transformer", torch.device("cpu"))
        carry = chain.head(*inputs)
        for k in range(len(chain.blocks)):
            chain.enter(k)
            carry = chain.block(k, carry)
            chain.leave(k)
        assert carry.hidden.dtype == torch.float32
        found.append(chain.tail(carry, *inputs))
    exact, coarse = found
    noise = (coarse - exact).square().mean() / exact.square().mean()
    assert 0 < noise < 1e-3
