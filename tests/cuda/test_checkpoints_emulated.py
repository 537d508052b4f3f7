"""States on the way of sequences, through the kernels of both architectures."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER
from helpers import make_inputs

import cupy_delta as cd
from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda.plan import made
from cupy_delta.cuda.spec import DeviceFacts

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
# The second with sums fused as on a GPU, since bits of two programs are compared.
LEGS = ["source", "fused"]
ENDS = np.array(
    [0, 0, 200, 265, 328]
)  # lengths 0, 200, 65, 63: three, one and no whole chunk of 64


def part(args, first, end):
    return [None if x is None else x[:, first:end] for x in args]


# With a gate that resets the state now and then, so that some chunks of compute capability 9.0 are
# paired.
@pytest.mark.ptx_leg(dtype=[BF16, F16])
@pytest.mark.parametrize(
    ("facts", "dtype", "every", "chunk"),
    [({}, BF16, 32, 32), ({}, F32, 64, 16), (HOPPER, BF16, 64, None), (HOPPER, F16, 128, None)],
    ids=["portable", "portable-float32", "hopper", "hopper-float16"],
)
@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_checkpoints_and_what_follows_them(emulated, facts, dtype, every, chunk, gate):
    emulated(**facts)
    sizes = dict(H=1, G=2, K=16, V=24, gate=gate, decay=0.3, dtype=dtype, layout="vk")
    args, kw = make_inputs(328, **sizes, cu_seqlens=ENDS, initial=True)
    if gate:
        args[4][:, [70, 75, 80, 90]] = -200
    kw["chunk_size"] = chunk
    whole = cd.chunk_delta_rule(*args, **kw, checkpoint_every=every)
    if not (facts and gate):  # whose walks without checkpoints round in other places
        plain = cd.chunk_delta_rule(*args, **kw)
        assert np.array_equal(whole.o, plain.o)
        assert np.array_equal(whole.final_state, plain.final_state)
    assert whole.checkpoints.shape == (1, 328 // every, 2, 24, 16)
    assert whole.checkpoints.dtype == F32
    used = np.zeros(len(whole.checkpoints[0]), bool)
    for n, start in enumerate(ENDS[:-1]):
        for i in range((ENDS[n + 1] - start) // every):
            place, border = start // every + i, start + (i + 1) * every
            used[place] = True
            one = kw | dict(cu_seqlens=None)
            one["initial_state"] = kw["initial_state"][n : n + 1]
            before = cd.chunk_delta_rule(*part(args, start, border), **one, checkpoint_every=every)
            assert np.array_equal(whole.checkpoints[0, place], before.final_state[0])
            one["initial_state"] = whole.checkpoints[:, place]
            after = cd.chunk_delta_rule(
                *part(args, border, ENDS[n + 1]), **one, checkpoint_every=every
            )
            assert np.array_equal(after.o, whole.o[:, border : ENDS[n + 1]])
            assert np.array_equal(after.final_state[0], whole.final_state[n])
    assert not whole.checkpoints[0, ~used].any()


@pytest.mark.parametrize("facts", [{}, HOPPER], ids=["portable", "hopper"])
def test_how_channels_are_divided_changes_no_bit(emulated, facts):
    """By another number of multiprocessors: what is taken up may run in another batch."""
    gate = None if facts else "scalar"  # with which 9.0 has but one way
    args, kw = make_inputs(130, K=16, V=72, dtype=BF16, gate=gate, initial=True)
    results, kernels = [], []
    for sm_count in (1, 132):
        emulated(**facts | dict(sm_count=sm_count))
        results.append(cd.chunk_delta_rule(*args, **kw, checkpoint_every=64))
        if emulated.devices is not None:
            kernels.append({launch.defines for launch in emulated.devices[-1].launches})
    assert not kernels or kernels[0] != kernels[1]
    for name in ("o", "final_state", "checkpoints"):
        assert np.array_equal(*(getattr(result, name) for result in results))


@pytest.mark.parametrize("facts", [{}, HOPPER], ids=["portable", "hopper"])
def test_rows_of_a_batch_and_a_pool(emulated, facts):
    emulated(**facts)
    args, kw = make_inputs(130, B=2, K=16, V=8, dtype=BF16, initial=True)
    expected = cd.chunk_delta_rule(*args, **kw, checkpoint_every=64)
    pool = np.full((3, *kw["initial_state"].shape[1:]), np.nan, F32)
    pool[[2, 0]] = kw["initial_state"]
    found = cd.chunk_delta_rule(
        *args, state=pool, state_indices=np.array([2, 0]), checkpoint_every=64
    )
    assert expected.checkpoints.shape == (2, 2, 1, 16, 8)
    for i in range(2):
        before = cd.chunk_delta_rule(*part(args, 0, 64 * (i + 1)), **kw).final_state
        assert np.array_equal(expected.checkpoints[:, i], before)
    assert np.array_equal(found.checkpoints, expected.checkpoints)
    assert np.array_equal(pool[[2, 0]], expected.final_state)


@pytest.mark.parametrize(("facts", "chunk"), [({}, 32), (HOPPER, 64)], ids=["portable", "hopper"])
def test_no_multiple_of_the_chunk(emulated, facts, chunk):
    emulated(**facts)
    args, _ = make_inputs(130, K=16, V=8, dtype=BF16)
    asked = chunk if chunk == 32 else None
    message = f"^checkpoint_every: expected a multiple of chunk_size = {chunk}, got 80$"
    out = np.full_like(args[2], 7)
    with pytest.raises(ValueError, match=message):
        cd.chunk_delta_rule(*args, checkpoint_every=80, chunk_size=asked, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_long_sequences_are_not_cut(capability, gate):
    """Segments would end elsewhere in what is left of a sequence after a checkpoint."""
    facts = DeviceFacts(132, 227 * 1024, capability)
    call = Call(
        dtype=FLOAT_DTYPES["bfloat16"],
        **dict(B=1, T=2**16, N=1, H=1, HV=1, K=64, V=64, gate=gate),
    )

    def walks(call):
        entries = [x.entry for x in made("forward", call, facts).launches]
        return sum("forward" in entry for entry in entries)

    assert walks(call) > 1
    assert walks(replace(call, checkpoint_every=64)) == 1
