"""Decoding steps: the pool, its indices, its dtypes."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from helpers import deviation, make_inputs

import cupy_delta as cd


@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("T", [0, 1, 3, 32])
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


@pytest.mark.parametrize("ragged", [False, True])
def test_a_call_that_fails_writes_no_zeros_for_padding(monkeypatch, ragged):
    """Not even one that fails as late as where threads are counted."""
    monkeypatch.setenv("CUPY_DELTA_NUM_THREADS", "none")
    args, _ = make_inputs(6, B=1 if ragged else 3, H=2, K=64, V=64)
    pool, out = np.ones((3, 2, 64, 64)), np.full_like(args[2], 7)
    more = dict(cu_seqlens=np.array([0, 2, 4, 6])) if ragged else {}
    with pytest.raises(ValueError, match="CUPY_DELTA_NUM_THREADS"):
        cd.delta_rule_step(*args, state=pool, state_indices=np.array([2, -1, 0]), out=out, **more)
    assert (pool == 1).all() and (out == 7).all()


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


# ---- ragged steps, and what is accepted of them --------------------------------------------------

ENDS = np.array([0, 3, 3, 5, 6, 22])
READ, WRITTEN, ACCEPTED = (
    np.array(x) for x in ([3, 1, -1, 0, 6], [3, 2, 4, 0, -5], [2, 0, 1, 0, 9])
)


def one_by_one(args, pool, **options):
    """The outputs of such a step, and the states after any number of tokens, by single tokens."""
    o, states = np.zeros_like(args[2]), []
    for n, (start, stop) in enumerate(itertools.pairwise(ENDS)):
        if READ[n] < 0:
            states.append([])
            continue
        state = pool[READ[n] : READ[n] + 1].copy()
        states.append([state[0].copy()])
        for t in range(start, stop):
            one = [None if x is None else x[:, t : t + 1] for x in args]
            o[:, t : t + 1] = cd.delta_rule_step(*one, state=state, **options)
            states[n].append(state[0].copy())
    return o, states


@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize(("K", "V"), [(5, 7), (64, 128)])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_a_ragged_step_is_its_tokens_one_by_one(gate, layout, K, V, index):
    """To the bit: outputs, slots that take up what is accepted, and all others."""
    args, _ = make_inputs(22, H=2, G=2, K=K, V=V, gate=gate, dtype=np.float32)
    shape = (7, 4, K, V) if layout == "kv" else (7, 4, V, K)
    whole = np.random.default_rng(0).standard_normal((7, 3, *shape[1:])).astype(np.float32)
    pool, before = whole[:, 1], whole.copy()
    options = dict(state_layout=layout, qk_l2norm=True)
    expected, states = one_by_one(args, pool, **options)
    slots = dict(state_indices=READ.astype(index), output_state_indices=WRITTEN.astype(index))
    counts = dict(cu_seqlens=ENDS.astype(index), accepted=ACCEPTED.astype(index))
    o = cd.delta_rule_step(*args, state=pool, **slots, **counts, **options)
    assert np.array_equal(o, expected)
    for n in (0, 1, 3):
        before[WRITTEN[n], 1] = states[n][ACCEPTED[n]]
    assert np.array_equal(whole, before)


@pytest.mark.parametrize("pool", ["float32", "bfloat16"])
def test_verify_leaves_every_bit_and_commit_takes_up_what_was_accepted(pool):
    args, kw = make_inputs(5, B=3, H=2, gate="scalar", dtype=np.float32, initial=True)
    start = kw["initial_state"].astype(getattr(ml_dtypes, pool, pool))
    start[0, 0, 0, :2] = np.nan, -np.nan
    state = start.copy()
    o = cd.delta_rule_step(*args, state=state, accepted=np.zeros(3, int))
    assert state.tobytes() == start.tobytes()
    again = cd.delta_rule_step(*args, state=state, accepted=np.array([5, 2, 0]))
    assert np.array_equal(o, again, equal_nan=True)
    alone = start[1:2].copy()
    cd.delta_rule_step(*(x[1:2, :2] for x in args), state=alone)
    assert np.array_equal(state[1], alone[0])
    assert state[2].tobytes() == start[2].tobytes()


def test_a_round_is_one_call_that_replays_what_was_accepted_and_verifies_the_next():
    """Every sequence: the tokens that were accepted, which go into the slot, then new drafts."""
    args, kw = make_inputs(9, H=2, dtype=np.float32, initial=True)
    pool, fresh = kw["initial_state"].copy(), kw["initial_state"].copy()
    ends = np.array([0, 9])
    o = cd.delta_rule_step(*args, state=pool, cu_seqlens=ends, accepted=np.array([4]))
    first = cd.delta_rule_step(*(x[:, :4] for x in args[:4]), state=fresh)
    assert np.array_equal(o[:, :4], first)
    assert np.array_equal(pool, fresh)


def test_branches_of_a_tree_read_one_slot():
    """Each path from the root is a sequence; nothing of them is kept."""
    args, kw = make_inputs(7, H=2, dtype=np.float32, initial=True)
    pool = np.concatenate([np.full_like(kw["initial_state"], np.nan), kw["initial_state"]])
    before, ends = pool.copy(), np.array([0, 3, 5, 7])
    paths = dict(state_indices=np.full(3, 1), output_state_indices=np.full(3, -1), cu_seqlens=ends)
    o = cd.delta_rule_step(*args, state=pool, **paths)
    assert np.array_equal(pool, before, equal_nan=True)
    for start, stop in itertools.pairwise(ends):
        path = [None if x is None else x[:, start:stop] for x in args]
        alone = cd.delta_rule_step(*path, state=kw["initial_state"].copy())
        assert np.array_equal(o[:, start:stop], alone)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("operator", [cd.chunk_delta_rule, cd.recurrent_delta_rule])
def test_initial_states_of_16_bits(name, operator):
    args, kw = make_inputs(40, B=2, H=2, dtype=np.float32, initial=True)
    narrow = kw["initial_state"].astype(getattr(ml_dtypes, name, name))
    expected = operator(*args, initial_state=narrow.astype(np.float32))
    result = operator(*args, initial_state=narrow)
    assert result.final_state.dtype == np.float32
    for x, y in zip(result, expected, strict=True):
        assert np.array_equal(x, y)
    residuals = cd.chunk_delta_rule_fwd(*args, initial_state=narrow).residuals
    gradients = cd.chunk_delta_rule_bwd(residuals, args[2])
    assert gradients.initial_state.dtype == narrow.dtype
