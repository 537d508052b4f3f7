"""Transfers met by states, and joined over ranks: `tokens/affine.cu` and what NumPy arrays get."""

import numpy as np
import pytest

import cupy_delta as cd
from cupy_delta import dispatch

SHAPES = [(1, 2, 4, 3), (2, 1, 5, 17), (1, 1, 12, 16), (1, 2, 130, 33), (0, 2, 4, 4), (1, 1, 1, 1)]


def told_by(size: int, shape, dtype=np.float32):
    """Return rows as ranks tell them, and their P and H."""
    N, HV, K, V = shape
    rng = np.random.default_rng(0)
    p = (rng.standard_normal((size, N, HV, K, K)) / K**0.5).astype(dtype)
    h = rng.standard_normal((size, N, HV, K, V)).astype(dtype)
    rows = np.concatenate([p.reshape(size, -1), h.reshape(size, -1)], axis=1)
    return rows, p.astype(np.float64), h.astype(np.float64)


def one_after_another(p, h, ranks):
    state = h[ranks[0]]
    for rank in ranks[1:]:
        state = p[rank] @ state + h[rank]
    return state


def joined(rows, ranks, shape):
    return dispatch.backend_for("numpy").joined(rows, ranks, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "ranks", [range(1), range(1, 3), range(4), range(5), range(4, 0, -1)], ids=str
)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "NumPy"])
def test_ranks_are_joined_in_their_order(request, shape, ranks, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    rows, p, h = told_by(5, shape)
    found = joined(rows, ranks, shape)
    expected = one_after_another(p, h, ranks)
    assert found.shape == expected.shape
    assert found.dtype == rows.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_it_is_each_transfer_applied_to_the_bit(emulated):
    shape = 2, 1, 20, 18
    rows, p, h = told_by(4, shape)
    state = h[0].astype(np.float32)
    for rank in range(1, 4):
        state = cd.results.Transfer(p[rank].astype("f4"), h[rank].astype("f4")).apply(state)
    assert joined(rows, range(4), shape).tobytes() == state.tobytes()


def test_of_the_first_rank_and_of_others_nothing_else_is_read(emulated):
    shape = 1, 2, 6, 5
    rows, p, h = told_by(5, shape)
    expected = one_after_another(p, h, range(1, 4))
    rows[[0, 4]] = np.nan
    rows[1, : 2 * 6 * 6] = np.nan
    np.testing.assert_allclose(joined(rows, range(1, 4), shape), expected, rtol=1e-5, atol=1e-5)


def test_float64_and_a_product_without_a_sum(emulated):
    shape = 1, 2, 7, 19
    rows, p, h = told_by(3, shape, np.float64)
    expected = one_after_another(p, h, range(3))
    np.testing.assert_allclose(joined(rows, range(3), shape), expected, rtol=1e-13, atol=1e-13)
    first, second = (cd.results.Transfer(p[i], h[i]) for i in (0, 1))
    both = first.then(second)
    np.testing.assert_allclose(both.p, p[1] @ p[0], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(both.h, p[1] @ h[0] + h[1], rtol=1e-13, atol=1e-13)
