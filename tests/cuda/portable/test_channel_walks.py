"""The walks with a gate per key channel, alone, with factors that NumPy makes and rounds once."""

import ml_dtypes
import numpy as np
import pytest
from channels import GIVEN, factors_of, patterns
from emulator import EmulatorDevice, Run, copy_in
from helpers import definition, make_inputs
from rounded import error, rounded_gradients, rounded_products, twice, wide

from cupy_delta.cuda.portable.backward import backward_state_launch
from cupy_delta.cuda.portable.forward import forward_launch
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.spec import C_TYPES, Plan, gradient_arrays
from cupy_delta.problem import operator_problem

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)

# Empty and one-token sequences, ends within, at and right after a chunk.
RAGGED = [0, 0, 1, 16, 33, 65, 70]


def gradients_given(args, kw):
    """Gradients of outputs and final states, to start from."""
    rng = np.random.default_rng(6)
    do = rng.standard_normal(args[2].shape).astype(args[2].dtype)
    return do, rng.standard_normal(kw["initial_state"].shape).astype(np.float32)


def walks(args, kw, chunk, do, dfinal, run=None, leg="source"):
    """Return what both walks leave, by name."""
    p = operator_problem(*args, scale=None, qk_l2norm=False, out=None, chunk_size=chunk, **kw)
    arrays = dict(zip(GIVEN, args, strict=True)) | dict(beta=args[3].astype(np.float32))
    for name, x in factors_of(p, arrays).items():
        single = name == "channel_decays"
        arrays[name] = x.astype(np.float32 if single else p.dtype)
    arrays |= dict(do=do, dfinal_state=dfinal, initial_state=p.initial_state)
    arrays["cu_seqlens"] = None if p.cu_seqlens is None else p.cu_seqlens.astype(np.int64)
    given = {name: None if x is None else copy_in(x, name) for name, x in arrays.items()}
    device = EmulatorDevice(run or Run(), leg=leg)
    outputs = dict(
        o=(p.value_shape, p.dtype),
        final_state=(p.state_shape, p.state_dtype),
        states=(p.states_shape(chunk), p.dtype),
        corrections=(p.value_shape, p.dtype),
    )
    forward = forward_launch(p, chunk, device.facts, states=C_TYPES[p.dtype.name])
    results = execute(Plan((forward,), outputs), given, device)
    backward = backward_state_launch(p, chunk, device.facts)
    made = gradient_arrays(p, chunk)
    outputs = made[1] | {"dinitial_state": made[0]["dinitial_state"]}
    return results | execute(Plan((backward,), outputs), given, device)


def plain(args, kw, chunk, do, dfinal):
    """Return the same from plain products of operands rounded to the dtype of the inputs."""
    o, final_state = rounded_products(args, kw, chunk)
    _, _, dv, _, _, dinitial_state = rounded_gradients(args, kw, do, dfinal, chunk)
    return dict(o=o, final_state=final_state, dv=dv, dinitial_state=dinitial_state)


def check(args, kw, chunk):
    """Compare outputs, states and the gradients that a reverse walk leaves with float64."""
    do, dfinal = gradients_given(args, kw)
    found = walks(args, kw, chunk, do, dfinal)
    found["dv"] = np.asarray(args[3], np.float64)[..., None] * found["dy"].astype(np.float64)
    exact = plain(*wide(args, kw), chunk, do, dfinal)
    wide_args, wide_kw = wide(args, kw)
    for name, x in zip(("o", "final_state"), definition(*wide_args, **wide_kw), strict=True):
        assert error(exact[name], x) < 1e-12
    for name, beside in plain(args, kw, chunk, do, dfinal).items():
        bound = 4e-6 if args[0].dtype == F32 else twice(beside, exact[name])
        assert error(found[name], exact[name]) < bound, name
    return found


# K, V, T, chunk, dtype and options: each K and V, T and dtype once or more.
CASES = [
    (16, 16, 70, 16, F32, dict(cu_seqlens=RAGGED, layout="vk")),
    (24, 40, 70, 32, BF16, dict(cu_seqlens=RAGGED, G=2)),
    (17, 1, 65, 64, F16, dict()),
    (64, 64, 65, 64, BF16, dict(H=2)),
    (100, 96, 33, 32, F16, dict(layout="vk")),
    (128, 128, 33, 16, F32, dict(G=2)),
    (192, 128, 40, 32, BF16, dict()),
    (256, 64, 17, 16, F32, dict()),
    (256, 256, 33, 16, BF16, dict()),
]


@pytest.mark.parametrize(("K", "V", "T", "chunk", "dtype", "options"), CASES)
def test_shapes(K, V, T, chunk, dtype, options):
    options = dict(gate="channel", initial=True, beta=(0, 2)) | options
    args, kw = make_inputs(T, K=K, V=V, dtype=dtype, **options)
    check(args, kw, chunk)


@pytest.mark.parametrize(("dtype", "chunk"), [(BF16, 32), (F16, 32), (F32, 16)])
def test_decays_of_every_strength(dtype, chunk):
    """Resets in single channels among long memory: each pattern has a head of its own."""
    T, K = 70, 20
    gates = np.stack([*patterns(T, K).values()], axis=1)[None]
    args, kw = make_inputs(
        T, H=gates.shape[2], K=K, V=16, dtype=dtype, initial=True, gate="channel"
    )
    args[4] = gates.astype(np.float32)
    found = check(args, kw, chunk)
    for name in ("o", "final_state", "dy", "dinitial_state", "states", "dstates"):
        assert np.isfinite(np.asarray(found[name], np.float32)).all(), name
    # The last head forgets all of what entered.
    assert not found["dinitial_state"][0, -1].any()


def test_any_schedule_and_what_nvrtc_makes_of_it():
    """What comes late is there when it is read, and no longer read when the next is loaded."""
    args, kw = make_inputs(70, G=2, K=24, V=40, dtype=BF16, initial=True, gate="channel")
    do, dfinal = gradients_given(args, kw)
    first = walks(args, kw, 16, do, dfinal)
    others = [
        dict(run=Run("descending", "early")),
        dict(run=Run("random", "either", preempt=30, seed=1)),
        dict(leg="ptx"),
    ]
    for other in others:
        for name, x in walks(args, kw, 16, do, dfinal, **other).items():
            assert np.array_equal(x, first[name]), (name, other)


def test_nan_stays_in_its_sequence():
    options = dict(cu_seqlens=[0, 19, 40], initial=True, gate="channel")
    args, kw = make_inputs(40, K=32, V=32, dtype=BF16, **options)
    do, dfinal = gradients_given(args, kw)
    clean = walks(args, kw, 16, do, dfinal)
    for x in (*args, do):
        x[:, 19:] = np.nan
    spoilt = walks(args, kw, 16, do, dfinal)
    for name in ("o", "corrections", "dy"):
        assert np.array_equal(clean[name][:, :19], spoilt[name][:, :19]), name
    for name in ("final_state", "dinitial_state"):
        assert np.array_equal(clean[name][0], spoilt[name][0]), name
