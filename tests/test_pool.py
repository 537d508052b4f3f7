"""Whole sequences on a pool of states, in place; and the states that they leave on the way."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from helpers import definition, deviation, make_inputs

import cupy_delta as cd

GATES = [None, "scalar", "channel"]
ENDS = np.array([0, 0, 1, 130, 198])  # lengths 0, 1, 129, 68


def pages(slots, shape, dtype, layers=3):
    """The layer in the middle of pages full of NaN, and the pages."""
    whole = np.full((slots, layers, *shape), np.nan, dtype)
    return whole[:, 1], whole


def on_pool(args, kw, **more):
    return cd.chunk_delta_rule(
        *args, cu_seqlens=kw["cu_seqlens"], state_layout=kw["state_layout"], **more
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_slots_are_read_and_written_in_place(gate, layout):
    args, kw = make_inputs(198, H=2, G=2, gate=gate, layout=layout, cu_seqlens=ENDS, initial=True)
    initial = kw["initial_state"]
    pool, whole = pages(7, initial.shape[1:], np.float64)
    read, written = np.array([3, 0, 3, 6]), np.array([5, 0, 1, -1])
    pool[read[:2]], pool[6] = initial[:2], initial[3]
    initial[2] = initial[0]
    before = whole.copy()
    result = on_pool(args, kw, state=pool, state_indices=read, output_state_indices=written)
    expected = cd.chunk_delta_rule(*args, **kw)
    exact = definition(*args, **kw)
    assert result.final_state is pool
    assert np.array_equal(result.o, expected.o)
    assert deviation(result.o, exact[0]) < 1e-12
    assert np.array_equal(pool[[5, 0, 1]], expected.final_state[:3])
    before[[5, 0, 1], 1] = expected.final_state[:3]
    assert np.array_equal(whole, before, equal_nan=True)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_a_pool_is_rounded_to_nearest_once_a_call(name, index):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    args, kw = make_inputs(130, B=3, H=2, dtype=np.float32, gate="scalar", initial=True)
    pool, whole = pages(4, kw["initial_state"].shape[1:], dtype)
    slots = np.array([2, 0, 3], index)
    pool[slots] = kw["initial_state"].astype(dtype)
    kw["initial_state"] = pool[slots].astype(np.float32)
    expected = cd.chunk_delta_rule(*args, **kw)
    o, _ = on_pool(args, kw, state=pool, state_indices=slots)
    assert np.array_equal(o, expected.o)
    assert np.array_equal(pool[slots], expected.final_state.astype(dtype))
    assert (
        np.isnan(whole[:, ::2].astype(np.float32)).all()
        and np.isnan(pool[1].astype(np.float32)).all()
    )


@pytest.mark.parametrize("indexed", [False, True])
def test_what_starts_from_zero_reads_no_slot(indexed):
    args, kw = make_inputs(70, B=3, H=2, initial=True)
    kw["initial_state"][[0, 2]] = 0
    expected = cd.chunk_delta_rule(*args, **kw)
    pool = np.full_like(kw["initial_state"], np.nan)
    pool[1] = kw["initial_state"][1]
    where = dict(fresh=np.array([True, False, True]))
    if indexed:
        where["state_indices"], where["output_state_indices"] = (
            np.array([-1, 1, 0]),
            np.array([2, 1, 0]),
        )
    o, _ = on_pool(args, kw, state=pool, **where)
    assert np.array_equal(o, expected.o)
    order = [2, 1, 0] if indexed else [0, 1, 2]
    assert np.array_equal(pool[order], expected.final_state)


def test_a_negative_index_starts_from_zero_and_leaves_nothing():
    args, kw = make_inputs(70, B=2)
    pool = np.full((3, 1, 5, 7), np.nan)
    o, _ = on_pool(args, kw, state=pool, state_indices=np.array([-1, -7]))
    assert np.array_equal(o, cd.chunk_delta_rule(*args).o)
    assert np.isnan(pool).all()


@pytest.mark.parametrize("T", [0, 1])
def test_without_tokens_a_state_moves(T):
    args, kw = make_inputs(T, B=2)
    pool = np.full((5, 1, 5, 7), np.nan)
    pool[[4, 0]] = np.arange(70.0).reshape(2, 1, 5, 7)
    before = pool.copy()
    indices = dict(state_indices=np.array([4, 0]), output_state_indices=np.array([1, 0]))
    on_pool(args, kw, state=pool, **indices, fresh=np.array([False, T == 0]))
    if T == 0:
        assert np.array_equal(pool[1], before[4]) and not pool[0].any()
    assert np.array_equal(pool[2:], before[2:], equal_nan=True)


def test_nan_stays_in_its_slot():
    args, kw = make_inputs(70, B=3, H=2, initial=True)
    pool = kw["initial_state"].copy()
    pool[1] = np.nan
    o, _ = on_pool(args, kw, state=pool)
    assert np.isnan(o[1]).all() and np.isfinite(o[[0, 2]]).all()
    assert np.isfinite(pool[[0, 2]]).all()


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize(("every", "chunk"), [(64, None), (320, None), (16, 16), (48, 16)])
def test_checkpoints_are_the_states_on_the_way(gate, layout, every, chunk):
    T, ends = 700, np.array([0, 0, 13, 400, 480, 700])
    args, kw = make_inputs(T, H=2, G=2, gate=gate, layout=layout, cu_seqlens=ends, initial=True)
    result = cd.chunk_delta_rule(*args, **kw, chunk_size=chunk, checkpoint_every=every)
    expected = np.zeros((1, T // every, *kw["initial_state"].shape[1:]))
    for n, start in enumerate(ends[:-1]):
        for i in range((ends[n + 1] - start) // every):
            part = [None if x is None else x[:, start : start + (i + 1) * every] for x in args]
            one = kw | dict(cu_seqlens=None, initial_state=kw["initial_state"][n : n + 1])
            state = cd.chunk_delta_rule(*part, **one, chunk_size=chunk).final_state
            expected[0, start // every + i] = state[0]
    assert np.array_equal(result.checkpoints, expected)
    assert np.array_equal(result.o, cd.chunk_delta_rule(*args, **kw, chunk_size=chunk).o)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_taken_up_from_a_checkpoint_every_bit_is_the_same(gate, dtype):
    args, kw = make_inputs(500, B=2, H=2, G=2, K=16, V=8, gate=gate, dtype=dtype)
    whole = cd.chunk_delta_rule(*args, **kw, checkpoint_every=64)
    assert whole.checkpoints.shape == (2, 7, 4, 16, 8) and whole.checkpoints.dtype == np.float32
    for i in (0, 2, 6):
        rest = [None if x is None else x[:, 64 * (i + 1) :] for x in args]
        kw["initial_state"] = whole.checkpoints[:, i]
        again = cd.chunk_delta_rule(*rest, **kw, checkpoint_every=128)
        assert np.array_equal(again.o, whole.o[:, 64 * (i + 1) :])
        assert np.array_equal(again.final_state, whole.final_state)
        assert np.array_equal(
            again.checkpoints, whole.checkpoints[:, i + 2 :: 2][:, : again.checkpoints.shape[1]]
        )


def test_sequences_shorter_than_a_checkpoint_have_none():
    args, _ = make_inputs(63, B=2)
    assert cd.chunk_delta_rule(*args, checkpoint_every=64).checkpoints.shape == (2, 0, 1, 5, 7)
    assert cd.chunk_delta_rule(*args).checkpoints is None


def test_results_unpack_alike_and_survive_pickling():
    args, _ = make_inputs(64)
    result = cd.chunk_delta_rule(*args, checkpoint_every=64)
    o, final_state = result
    again = pickle.loads(pickle.dumps(result))
    assert np.array_equal(again.checkpoints, final_state[None])
    assert np.array_equal(again.o, o)


def test_checkpoints_of_a_call_on_a_pool():
    args, kw = make_inputs(130, B=2, initial=True)
    pool = np.full((4, 1, 5, 7), np.nan)
    pool[[3, 1]] = kw["initial_state"]
    result = on_pool(args, kw, state=pool, state_indices=np.array([3, 1]), checkpoint_every=64)
    expected = cd.chunk_delta_rule(*args, **kw, checkpoint_every=64)
    assert np.array_equal(result.checkpoints, expected.checkpoints)
    assert np.array_equal(pool[[3, 1]], expected.final_state)


# ---- wrong arguments -----------------------------------------------------------------------------

TURNED = np.zeros((4, 2, 3, 5)).swapaxes(1, 2).copy().swapaxes(1, 2)
WRONG = {
    "initial_state": (
        dict(initial_state=np.zeros((3, 2, 3, 5))),
        "initial_state: expected None with a state, whose slots are read",
    ),
    "indices without a pool": (
        dict(state=None),
        "state_indices: expected None without a state, a pool of slots",
    ),
    "a mask without a pool": (
        dict(state=None, state_indices=None, fresh=np.zeros(3, bool)),
        "fresh: expected None without a state, a pool of slots",
    ),
    "past the pool": (
        dict(state_indices=np.array([0, 4, 1])),
        "state_indices: expected indices below slots = 4 (negative: padding), got 4",
    ),
    "written past the pool": (
        dict(output_state_indices=np.array([0, 5, 1])),
        "output_state_indices: expected indices below slots = 4 (negative: padding), got 5",
    ),
    "twice": (
        dict(state_indices=np.array([1, -1, 1])),
        "state_indices: expected each slot at most once, got slot 1 repeatedly",
    ),
    "written twice": (
        dict(output_state_indices=np.array([3, -1, 3])),
        "output_state_indices: expected each slot at most once, got slot 3 repeatedly",
    ),
    "read by another": (
        dict(output_state_indices=np.array([3, 1, -1])),
        "output_state_indices: expected no slot that another sequence reads, got slot 1",
    ),
    "two indices": (
        dict(state_indices=np.array([0, 1])),
        "state_indices: expected (N,) = (3,) like q, got (2,)",
    ),
    "two indices written": (
        dict(output_state_indices=np.array([[0, 1, 2]])),
        "output_state_indices: expected (N,) = (3,) like q, got (1, 3)",
    ),
    "no indices": (
        dict(state_indices=None),
        "state: expected one slot per sequence, slots = N = 3, or state_indices, got slots = 4",
    ),
    "indices that are no integers": (
        dict(state_indices=np.array([0.0, 1.0, 2.0])),
        "state_indices: expected dtype int32 or int64, got float64",
    ),
    "a mask of integers": (
        dict(fresh=np.array([0, 1, 0])),
        "fresh: expected dtype bool, got int64",
    ),
    "a mask that is a list": (
        dict(fresh=[False] * 3),
        "fresh: expected an array of bool, got list",
    ),
    "a mask of two": (
        dict(fresh=np.zeros(2, bool)),
        "fresh: expected (N,) = (3,) like q, got (2,)",
    ),
    "a pool of integers": (
        dict(state=np.zeros((4, 2, 3, 5), np.int32)),
        "state: expected dtype float64 like q, got int32",
    ),
    "a narrow pool of wide inputs": (
        dict(state=np.zeros((4, 2, 3, 5), np.float32)),
        "state: expected dtype float64 like q, got float32",
    ),
    "heads apart": (
        dict(state=TURNED),
        "state: expected slots that are C-contiguous, one after the other,"
        f" got strides {TURNED.strides}",
    ),
    "slots on each other": (
        dict(state=np.broadcast_to(np.zeros((1, 2, 3, 5)), (4, 2, 3, 5))),
        "state: expected slots that are C-contiguous, one after the other,"
        " got strides (0, 120, 40, 8)",
    ),
    "checkpoints of no chunk": (
        dict(checkpoint_every=96),
        "checkpoint_every: expected a multiple of chunk_size = 64, got 96",
    ),
    "checkpoints of no chunk of 16": (
        dict(checkpoint_every=24, chunk_size=16),
        "checkpoint_every: expected a multiple of chunk_size = 16, got 24",
    ),
    "checkpoints of no token": (
        dict(checkpoint_every=0),
        "checkpoint_every: expected at least 1, got 0",
    ),
    "checkpoints by a float": (
        dict(checkpoint_every=64.0),
        "checkpoint_every: expected an integer or None, got float",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_before_anything_is_written(name):
    changes, message = WRONG[name]
    args, _ = make_inputs(6, B=3, H=2, K=3, V=5)
    out, pool = np.full_like(args[2], 7.0), np.full((4, 2, 3, 5), 7.0)
    good = dict(out=out, state=pool, state_indices=np.array([2, 0, 1]))
    with pytest.raises((TypeError, ValueError)) as caught:
        cd.chunk_delta_rule(*args, **good | changes)
    assert str(caught.value) == message
    assert (out == 7).all() and (pool == 7).all()


def test_written_memory_is_the_pools_alone():
    args, _ = make_inputs(6, B=3, H=2, K=3, V=5)
    pool = np.zeros((4, 2, 3, 5))
    pool.flags.writeable = False
    with pytest.raises(ValueError, match=r"^state: expected a writable array"):
        cd.chunk_delta_rule(*args, state=pool[:3])
    pool = np.zeros((400, 2, 3, 5))
    indices = pool.reshape(-1).view(np.int64)[-3:]
    indices[...] = 0, 1, 2
    for name in ("state_indices", "output_state_indices"):
        others = {} if name == "state_indices" else dict(state_indices=np.array([0, 1, 2]))
        with pytest.raises(ValueError, match=f"^state: expected no memory in common with {name}$"):
            cd.chunk_delta_rule(*args, state=pool, **others, **{name: indices})
