"""Whole sequences on slots of a pool, through the kernels of both architectures."""

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER
from helpers import make_inputs

import cupy_delta as cd
from cupy_delta.cuda import operators
from cupy_delta.cuda.plan import plan
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.problem import operator_problem

BF16, F32 = ml_dtypes.bfloat16, np.float32
ENDS = np.array([0, 0, 70, 71, 140])  # lengths 0, 70, 1, 69
ON = pytest.mark.parametrize("facts", [{}, HOPPER], ids=["portable", "hopper"])


def pages(shape, dtype, layers=2, slots=6):
    """A layer of pages full of NaN, and the pages."""
    whole = np.full((slots, layers, *shape), np.nan, dtype)
    return whole[:, 1], whole


# Accesses of four elements and of one; slots end to end and apart; what is in a slot, and nothing.
@ON
@pytest.mark.parametrize(
    ("K", "V", "pool_dtype", "layout", "apart", "gate"),
    [
        (16, 8, "float32", "kv", True, "scalar"),
        (16, 8, "bfloat16", "vk", False, None),
        (8, 24, "float16", "kv", True, "channel"),
        (7, 3, "bfloat16", "vk", True, "scalar"),
    ],
)
def test_slots_are_read_and_written_in_place(
    emulated, facts, K, V, pool_dtype, layout, apart, gate
):
    emulated(**facts)
    dtype = np.dtype(getattr(ml_dtypes, pool_dtype, pool_dtype))
    args, kw = make_inputs(
        140, H=1, G=3, K=K, V=V, gate=gate, layout=layout, cu_seqlens=ENDS, initial=True,
        dtype=BF16,
    )  # fmt: skip
    initial = kw["initial_state"]
    pool, whole = pages(initial.shape[1:], dtype)
    if not apart:
        pool = whole = np.ascontiguousarray(pool)
    read, written = np.array([3, 3, -1, 5], np.int32), np.array([4, 0, 1, -9], np.int32)
    pool[3], pool[5] = initial[0], initial[3]
    before = whole.copy()
    fresh = np.array([False, False, False, True])
    initial[:2], initial[2:] = pool[3].astype(F32), 0
    expected = cd.chunk_delta_rule(*args, **kw)
    result = cd.chunk_delta_rule(
        *args,
        cu_seqlens=ENDS,
        state_layout=layout,
        state=pool,
        state_indices=read,
        output_state_indices=written,
        fresh=fresh,
    )
    assert result.final_state is pool
    assert np.array_equal(result.o, expected.o)
    (before[:, 1] if apart else before)[[4, 0, 1]] = expected.final_state[:3].astype(dtype)
    assert whole.tobytes() == before.tobytes()


def test_a_slot_for_every_sequence(emulated):
    args, kw = make_inputs(20, B=3, K=16, V=8, dtype=F32, initial=True)
    pool = kw["initial_state"].copy()
    expected = cd.chunk_delta_rule(*args, **kw)
    o, _ = cd.chunk_delta_rule(*args, state=pool)
    assert np.array_equal(o, expected.o)
    assert np.array_equal(pool, expected.final_state)


@ON
def test_segments_of_long_sequences_start_from_slots(emulated, facts):
    """A last segment leaves its state in the slot that the first one has read."""
    emulated(**facts | dict(sm_count=132))
    T = 64 * 4 * 32 if not facts else 64 * 24
    args, kw = make_inputs(T, K=16, V=16, dtype=BF16, initial=True)
    dtype = F32 if facts else BF16
    pool, whole = pages(kw["initial_state"].shape[1:], dtype)
    pool[2] = kw["initial_state"][0]
    kw["initial_state"][0] = pool[2]
    expected = cd.chunk_delta_rule(*args, **kw)
    o, _ = cd.chunk_delta_rule(*args, state=pool, state_indices=np.array([2]))
    if emulated.devices is not None:
        walks = [x for x in emulated.devices[-1].launches if x.entry.startswith("forward")]
        assert len(walks) > 1
    assert np.array_equal(o, expected.o)
    assert np.array_equal(pool[2], expected.final_state[0].astype(dtype))
    others = np.isnan(whole.astype(F32))
    assert others[[0, 1, 3, 4, 5]].all() and others[:, 0].all() and not others[2, 1].any()


def test_wrong_indices_in_device_memory_touch_nothing(emulated, request):
    """Beyond the pool, also where its lower half alone would be inside: they count as negative."""
    if request.config.getoption("--on-gpu"):
        pytest.skip("only the emulator tells what is outside")
    args, _ = make_inputs(3, B=5, K=16, V=8, dtype=BF16)
    pool, whole = pages((1, 16, 8), BF16)
    pool[3] = 1
    before = whole.copy()
    indices = np.arange(5)
    problem = operator_problem(
        *args, scale=None, initial_state=None, cu_seqlens=None, qk_l2norm=False, out=None,
        state_layout="kv", state=pool, state_indices=indices, output_state_indices=None, fresh=None,
    )  # fmt: skip
    with operators.device_of(args[0]) as device:
        wrong = np.array([6, 7, 2**32 + 1, -(2**40), 3])
        ready = {"state_indices": device.bring(wrong, "state_indices", np.int64)}
        execute(
            plan("forward", problem, device.facts),
            vars(problem),
            device,
            {"state": pool},
            ready,
        )
    assert not np.array_equal(pool[3], before[3, 1])
    before[3, 1] = pool[3]
    assert whole.tobytes() == before.tobytes()
