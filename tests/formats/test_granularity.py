"""Granularities: which elements share a scale, arrays as blocks, and what is rejected."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.formats.granularity import GRANULARITIES, Granularity, from_blocks
from schemes import LAYOUTS, columns, place, rows

geometries = st.sampled_from(LAYOUTS).map(lambda layout: Granularity(*layout))


@given(geometries, rows, columns)
def test_blocks_hold_elements_that_share_a_scale(pure_xp, geometry, m, n):
    x = pure_xp.reshape(pure_xp.arange(m * n, dtype=pure_xp.float64), (m, n))
    shape = geometry.scale_shape((m, n))
    scale = pure_xp.reshape(pure_xp.arange(int(np.prod(shape)), dtype=pure_xp.float64), shape)
    blocks = geometry.as_blocks(x)
    spread = from_blocks(blocks * 0.0 + geometry.expand_scale(scale, (m, n)), (m, n))
    index = np.arange(np.prod(shape)).reshape(shape)
    assert to_host(spread).tolist() == [
        [index[place(geometry, i, j)] for j in range(n)] for i in range(m)
    ]
    np.testing.assert_array_equal(to_host(from_blocks(blocks, (m, n))), to_host(x))


@given(geometries, rows, columns, st.integers(1, 40))
def test_row_tiles_cut_between_blocks(geometry, m, n, size):
    x = np.arange(m * n, dtype=np.float64).reshape(m, n)
    scale = np.arange(np.prod(geometry.scale_shape((m, n)))).reshape(geometry.scale_shape((m, n)))
    tiles = list(geometry.row_tiles(x, (m, n), (size, 0)))
    assert [row for start, stop in tiles for row in range(start, stop)] == list(range(m))
    for start, stop in tiles:
        part = geometry.rows_of(scale, start, stop)
        assert part.shape == geometry.scale_shape((stop - start, n))
        for i in range(start, stop):
            for j in range(n):
                assert part[place(geometry, i - start, j)] == scale[place(geometry, i, j)]


def test_shapes_of_scales():
    shapes = {
        ("tensor", None): (),
        ("channel", None): (6, 1),
        ("token", None): (6, 1),
        ("group", 4): (6, 3),
        ("block", 4): (2, 3),
        ("block", (4, 5)): (2, 3),
        ("block", 128): (1, 1),
    }
    assert {kind for kind, _ in shapes} == set(GRANULARITIES)
    for layout, shape in shapes.items():
        assert Granularity(*layout).scale_shape((6, 12)) == shape
    assert Granularity("token").scale_shape((2, 5, 12)) == (2, 5, 1)
    assert Granularity("group", 4).scale_shape((12,)) == (3,)


@pytest.mark.parametrize(
    ("n", "g", "message"),
    [
        (
            100,
            32,
            r"groups of 32 do not divide a row of 100: .* are 25 and 50, or pad the row with "
            r"zeros to 128",
        ),
        (7, 4, r"are 1 and 7, or .* to 8"),
        (6, 128, r"are 6, or .* to 128"),
        (13, 2, r"are 1 and 13, or .* to 14"),
    ],
)
def test_ragged_groups_are_rejected_with_the_nearest_sizes(n, g, message):
    with pytest.raises(ValueError, match=message):
        Granularity("group", g).scale_shape((3, n))


def test_arrays_that_do_not_fit_are_rejected(xp):
    with pytest.raises(ValueError, match="'channel' does not fit an array of shape"):
        Granularity("channel").scale_shape(())
    with pytest.raises(ValueError, match="'block' does not fit an array of shape"):
        Granularity("block", 4).scale_shape((2, 3, 4))
    with pytest.raises(
        ValueError, match=r"shape \(2,\): an array of shape \(2, 8\) takes \(2, 1\)"
    ):
        Granularity("channel").expand_scale(xp.asarray(np.ones(2)), (2, 8))
