"""Decoding steps: the pool, its indices, its dtypes."""

import ml_dtypes
import numpy as np
import pytest
from helpers import deviation, make_inputs

import cupy_delta as cd


@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("T", [0, 1, 3, 8])
@pytest.mark.parametrize("l2norm", [False, True])
def test_steps_are_the_recurrence(gate, layout, T, l2norm):
    args, kw = make_inputs(T, B=3, H=2, G=2, gate=gate, layout=layout, initial=True)
    expected = cd.recurrent_delta_rule(*args, qk_l2norm=l2norm, **kw)
    state = kw["initial_state"].copy()
    o = cd.delta_rule_step(*args, state=state, state_layout=layout, qk_l2norm=l2norm)
    assert deviation(o, expected.o) < 1e-14
    assert deviation(state, expected.final_state) < 1e-14


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_pool_with_indices_and_padding(index):
    args, kw = make_inputs(2, B=3, H=2, initial=True)
    pool = np.full((5, 2, 5, 7), np.nan)
    pool[4], pool[1] = kw["initial_state"][0], kw["initial_state"][2]
    out = np.full_like(args[2], np.nan)
    indices = np.array([4, -1, 1], index)
    o = cd.delta_rule_step(*args, state=pool, state_indices=indices, out=out)
    expected = cd.recurrent_delta_rule(*args, **kw)
    assert o is out
    assert deviation(o[[0, 2]], expected.o[[0, 2]]) < 1e-14
    assert np.array_equal(o[1], np.zeros_like(o[1]))
    assert deviation(pool[[4, 1]], expected.final_state[[0, 2]]) < 1e-14
    assert np.isnan(pool[[0, 2, 3]]).all()


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_pool_is_rounded_to_nearest_once_a_call(name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    args, kw = make_inputs(8, B=2, H=2, dtype=np.float32, initial=True)
    start = kw["initial_state"].astype(dtype)
    exact = cd.recurrent_delta_rule(*args, initial_state=start.astype(np.float32))
    state = start.copy()
    o = cd.delta_rule_step(*args, state=state)
    assert np.array_equal(o, exact.o)
    assert np.array_equal(state, exact.final_state.astype(dtype))


def test_empty_batch():
    args, _ = make_inputs(1, B=0)
    pool = np.full((4, 1, 5, 7), np.nan)
    o = cd.delta_rule_step(*args, state=pool, state_indices=np.array([], np.int64))
    assert o.shape == (0, 1, 1, 7)
    assert np.isnan(pool).all()


def test_nan_stays_in_its_sequence():
    args, kw = make_inputs(2, B=3, H=2, initial=True)
    state = kw["initial_state"].copy()
    args[2][1] = np.nan
    o = cd.delta_rule_step(*args, state=state)
    assert np.isnan(o[1]).all()
    assert np.isfinite(o[[0, 2]]).all()
    assert np.isfinite(state[[0, 2]]).all()


@pytest.mark.parametrize(("K", "V"), [(5, 7), (32, 32), (64, 64), (128, 64)])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_sequence_has_the_same_bits_in_any_batch(K, V, indexed):
    """Whether its state is advanced alone, with others or in place."""
    args, _ = make_inputs(2, B=9, H=2, G=2, K=K, V=V, gate="scalar", dtype=np.float32)
    pool = np.random.default_rng(0).standard_normal((9, 4, K, V)).astype(np.float32)
    order = np.array([3, 1, 4, 0, 5, 8, 2, 6, 7])
    together = pool.copy()
    o = cd.delta_rule_step(*args, state=together, state_indices=order if indexed else None)
    for b, slot in enumerate(order if indexed else range(9)):
        alone = pool[slot : slot + 1].copy()
        one = [None if x is None else x[b : b + 1] for x in args]
        assert np.array_equal(cd.delta_rule_step(*one, state=alone)[0], o[b])
        assert np.array_equal(alone[0], together[slot])
