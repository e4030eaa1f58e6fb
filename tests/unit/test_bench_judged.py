"""Every recipe's graphs pass on every default target, and no node is left without a verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbxt_compress import library
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.table import DEFAULT_TARGETS
from hbxt_compress.source import BUILTIN, locate
from tests.bench.judged import BUILTIN_SIZES, judged, published


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", BUILTIN_SIZES.split(","))
def test_the_built_in_model_by_every_recipe(size: str) -> None:
    clips = Geometry.parse(size, 8.0)
    found = list(judged(locate(BUILTIN, hashed=False), library.names("recipes"), clips))
    assert len(found) == len(library.names("recipes")) * len(DEFAULT_TARGETS)
    assert not [one for one in found if not one.passes]
    assert all(sum(one.verdicts.values()) == one.n_nodes for one in found)


@pytest.mark.timeout(600)
def test_wan22_ti2v_5b_at_its_own_size(tmp_path: Path) -> None:
    """30 blocks, UMT5-XXL and Wan2.2's VAE without weights; the others: tests/bench/judged.py."""
    clips = Geometry.parse("704x1280x121", 24.0)
    found = list(judged(published(tmp_path), ["w4a16", "w8a8-static"], clips))
    assert not [one for one in found if not one.passes]
    assert all(sum(one.verdicts.values()) == one.n_nodes > 7000 for one in found)
