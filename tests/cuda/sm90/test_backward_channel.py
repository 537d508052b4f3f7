"""The chunk-parallel gradients with a gate per key channel on compute capability 9.0, alone."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from channels import patterns
from emulator import HOPPER, EmulatorDevice, Run, copy_in
from portable.test_backward_channel import BOUND, case, definition
from rounded import error

from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90.channel import backward_channel_hopper_launch, waiting_arrays
from cupy_delta.cuda.sm90.tiles import CHUNK
from cupy_delta.cuda.spec import DeviceFacts, Plan, gradient_arrays

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
LEGS = ["source", "ptx"]


ONE = DeviceFacts(1, 227 * 1024, (9, 0))


def computed(p, arrays, leg="source", facts=ONE, run=None):
    device = EmulatorDevice(run or Run(), leg=leg, **HOPPER)
    launch = backward_channel_hopper_launch(p, facts)
    outputs = {name: gradient_arrays(p, CHUNK)[0][name] for name in ("dq", "dk", "dv", "dbeta")}
    outputs["dg"] = ((*p.token_shape, p.K), np.dtype(np.float32))
    given = arrays | {"cu_seqlens": p.cu_seqlens}
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    results = execute(Plan((launch,), outputs, waiting_arrays(launch)), given, device)
    return {name: np.array(results[name], np.float64) for name in outputs}


def check(p, arrays, leg="source"):
    results, exact = computed(p, arrays, leg), definition(p, arrays)
    for name, x in results.items():
        assert error(x, exact[name]) < BOUND[p.dtype], name
    return results, exact


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(
    ("T", "K", "V", "dtype", "options"),
    [
        (70, 128, 72, BF16, dict(B=2)),
        (150, 40, 128, F16, dict(H=2)),
        (101, 8, 40, BF16, dict(cu_seqlens=[0, 0, 1, 64, 65, 101])),
        (64, 72, 16, F16, dict()),
        (70, 128, 72, BF16, dict(G=2)),
        (65, 72, 40, F16, dict(H=2, G=3, B=2)),
        (101, 24, 16, BF16, dict(cu_seqlens=[0, 0, 1, 64, 65, 101], G=4)),
    ],
)
def test_shapes(T, K, V, dtype, options, leg):
    check(*case(T, CHUNK, K=K, V=V, dtype=dtype, beta=(0, 2), **options), leg)


def resets_everywhere(T, K):
    """Return gates by name: of every place in a block, beside weak ones and such as add up."""
    rng = np.random.default_rng(4)
    found, channels = {}, np.arange(K)
    for reset in (-20, -88, -np.inf):
        for others in (0.01, 8):
            g = -others * rng.random((T, K))
            for first in (0, 16, 35):
                g[first + channels % 16, channels] = reset
            found[f"{reset} among {others}"] = g
    return found


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_gate_by_itself(dtype):
    """Of every token and channel, however small its gradient is; that of -inf is zero."""
    T, K = 70, 24
    found = patterns(T, K) | resets_everywhere(T, K)
    gates = np.stack([*found.values()], axis=1)[None].astype(np.float32)
    p, arrays = case(T, CHUNK, H=gates.shape[2], K=K, V=16, dtype=dtype)
    arrays["g"] = gates
    results, exact = check(p, arrays)
    for h, pattern in enumerate(found):
        for name in ("dq", "dk", "dg"):
            off = error(results[name][:, :, h], exact[name][:, :, h])
            assert off < BOUND[dtype], (name, pattern)
    dg, right = results["dg"], exact["dg"]
    assert not dg[gates <= -1000].any()
    small = (gates <= -5) & (gates > -80)
    # Sums of terms of both signs, each rounded: judged against what a term can be.
    off = np.abs(dg - right)[small] / np.exp(gates[small].astype(np.float64))
    assert np.max(off) < 100 * BOUND[dtype]


def test_nan_stays_in_its_chunk_and_channel():
    p, arrays = case(133, CHUNK, K=72, V=16, dtype=BF16)
    before = computed(p, arrays)
    arrays["g"][0, 70, 0, [3, 66]] = np.nan
    after = computed(p, arrays)
    others = np.delete(np.arange(72), [3, 66])
    for name in ("dq", "dk", "dg"):
        was, x = before[name][0, :, 0], after[name][0, :, 0]
        np.testing.assert_array_equal(x[:, others], was[:, others])
        np.testing.assert_array_equal(x[:64], was[:64])
        np.testing.assert_array_equal(x[128:], was[128:])
        assert np.isnan(x[70, [3, 66]]).all(), name


def test_value_heads_of_one_key_head_have_gates_of_their_own():
    T, K = 70, 24
    found = patterns(T, K)
    gates = np.stack([*found.values()], axis=1)[None].astype(np.float32)
    p, arrays = case(T, CHUNK, G=gates.shape[2], K=K, V=16, dtype=BF16)
    arrays["g"] = gates
    results, exact = check(p, arrays)
    for h, pattern in enumerate(found):
        assert error(results["dg"][:, :, h], exact["dg"][:, :, h]) < BOUND[BF16], pattern
    assert not results["dg"][gates <= -1000].any()


@pytest.mark.parametrize("G", [2, 3])
def test_others_of_the_group_add_nothing_but_their_own(G):
    """Where all but one value head have nothing to give, dq and dk are of that one, to the bit."""
    p, arrays = case(70, CHUNK, H=2, G=G, K=72, V=24, dtype=BF16)
    for one in range(G):
        mine = dict(arrays)
        for name in ("do", "dy", "dstates"):
            mine[name] = np.zeros_like(arrays[name])
            mine[name][:, :, one::G] = arrays[name][:, :, one::G]
        heads = {n: x if n in ("q", "k") else x[:, :, one::G] for n, x in arrays.items()}
        alone = computed(replace(p, HV=p.H), heads)
        grouped = computed(p, mine)
        for name in ("dq", "dk"):
            np.testing.assert_array_equal(grouped[name], alone[name], name)
        for name in ("dv", "dbeta", "dg"):
            np.testing.assert_array_equal(grouped[name][:, :, one::G], alone[name], name)


def test_how_many_blocks_take_turns_changes_no_bit():
    p, arrays = case(200, CHUNK, B=2, G=2, K=72, V=24, dtype=F16)
    few = computed(p, arrays, run=Run(schedule="random", preempt=30, seed=1))
    many = computed(p, arrays, facts=DeviceFacts(132, 227 * 1024, (9, 0)))
    for name, x in few.items():
        np.testing.assert_array_equal(x, many[name], name)


@pytest.mark.parametrize("name", ["g", "beta", "do", "dstates"])
def test_nan_stays_in_its_key_head_and_chunk(name):
    p, arrays = case(133, CHUNK, H=2, G=2, K=24, V=16, dtype=BF16)
    before = computed(p, arrays)
    at = (0, 1, 1) if name == "dstates" else (0, 70, 1)
    arrays[name][at] = np.nan
    after = computed(p, arrays)
    for gradient, x in after.items():
        was, key = before[gradient], gradient in ("dq", "dk")
        others = np.s_[:, :, 1:] if key else np.s_[:, :, [0, 2, 3]]
        np.testing.assert_array_equal(x[others], was[others], gradient)
        np.testing.assert_array_equal(x[:, :64], was[:, :64], gradient)
        np.testing.assert_array_equal(x[:, 128:], was[:, 128:], gradient)
    assert np.isnan(after["dq" if name != "dstates" else "dk"][0, 64:128, 0]).any()
