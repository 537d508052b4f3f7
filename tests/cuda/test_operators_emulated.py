"""The operators of the CUDA backend, every launch under the race-checking emulator.

The whole way of a CuPy call is taken: Problem, plan, arguments, workspace, launches, outputs.
"""

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, Run
from helpers import definition, deviation, make_inputs
from rounded import error, rounded_products, twice, wide

import cupy_delta as cd
from cupy_delta.cuda import operators
from cupy_delta.cuda.plan import plan
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.problem import operator_problem, step_problem

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
CHUNK = {BF16: 32, F16: 32, F32: 16}
VARLEN = [0, 0, 1, 40, 40, 73, 74]


def check(args, kw, chunk=None, slack=1.0):
    """Compare with float64: 16-bit within 2x of plain rounded products, float within 4x of 1e-6."""
    dtype = args[0].dtype
    result = cd.chunk_delta_rule(*args, **kw, chunk_size=chunk)
    wide_args, wide_kw = wide(args, kw)
    exact = definition(*wide_args, **wide_kw)
    assert result.o.dtype == dtype
    assert result.final_state.dtype == np.float32
    if dtype == F32:
        bounds = (1e-6 * slack, 1e-6 * slack)
    else:
        plain = rounded_products(args, kw, chunk or CHUNK[dtype])
        bounds = [twice(x, y) for x, y in zip(plain, exact, strict=True)]
    for x, y, bound in zip(result, exact, bounds, strict=True):
        assert x.shape == y.shape
        if y.size:
            assert error(x, y) < bound
    return result


# (K, V, dtype): each size of either and each dtype with odd, even and 16-byte rows.
SHAPES = [
    (1, 17, BF16),
    (17, 1, F32),
    (40, 60, F16),
    (60, 40, BF16),
    (64, 64, BF16),
    (96, 100, F32),
    (100, 96, F16),
    (128, 128, BF16),
    (128, 64, F32),
    (192, 33, BF16),
    (256, 128, F16),
    (64, 256, BF16),
]


@pytest.mark.ptx_leg(K=[17, 60, 100])
@pytest.mark.parametrize(("K", "V", "dtype"), SHAPES)
def test_head_sizes(emulated, K, V, dtype):
    args, kw = make_inputs(50, G=2, K=K, V=V, dtype=dtype, initial=True)
    check(args, kw)


@pytest.mark.parametrize("T", [0, 1, 2, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_lengths(emulated, T, dtype):
    args, kw = make_inputs(T, B=2, H=2, K=32, V=32, dtype=dtype, initial=True, beta=(0, 2))
    check(args, kw)


@pytest.mark.ptx_leg(chunk=[64])
@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_chunk_sizes(emulated, chunk, dtype):
    args, kw = make_inputs(130, K=32, V=32, dtype=dtype, initial=True)
    check(args, kw, chunk)


@pytest.mark.ptx_leg(gate=["scalar"], varlen=[True])
@pytest.mark.parametrize("gate", [None, "scalar"])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_options(emulated, gate, varlen, layout):
    options = dict(gate=gate, layout=layout, cu_seqlens=VARLEN if varlen else None)
    args, kw = make_inputs(74, H=2, G=2, K=32, V=48, dtype=BF16, initial=True, **options)
    check(args, kw)


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_sequences_end_to_end(emulated, index, dtype):
    cu = np.array(VARLEN, index)
    args, kw = make_inputs(74, G=2, K=32, V=32, dtype=dtype, initial=True, cu_seqlens=cu)
    result = check(args, kw)
    assert np.array_equal(result.final_state[0], kw["initial_state"][0])


@pytest.mark.ptx_leg(beta=[(1.99, 1.99)])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("beta", [(0, 1), (1, 1), (0, 2), (1.99, 1.99), (0, 0)])
def test_hard_keys(emulated, dtype, correlation, beta):
    args, kw = make_inputs(130, K=32, V=32, dtype=dtype, correlation=correlation, beta=beta)
    if beta == (0, 0):
        assert not cd.chunk_delta_rule(*args, **kw).o.any()
        return
    # In float the keys' own rounding is amplified where beta is near 2.
    check(args, kw, slack=20 if beta[1] > 1 else 2)


@pytest.mark.parametrize(
    ("chunk", "beta", "times"),
    [
        (None, (0, 1), 4),
        (None, (0, 2), 4),
        (None, (1.99, 1.99), 4),
        (32, (0, 1), 4),
        (32, (1.99, 1.99), 16),
        (64, (0, 1), 4),
        (64, (1.99, 1.99), 40),
    ],
)
def test_float32_beside_that_of_numpy(emulated, on_reference, chunk, beta, times):
    """With correlated keys; whoever chooses the chunks may lose digits that the default keeps."""
    for seed in range(4):
        args, kw = make_inputs(130, K=32, V=32, dtype=F32, correlation=0.9, beta=beta, seed=seed)
        exact = definition(*wide(args, kw)[0], **kw)
        single = on_reference(cd.chunk_delta_rule, *args, **kw)
        found = cd.chunk_delta_rule(*args, **kw, chunk_size=chunk)
        for x, y, z in zip(found, single, exact, strict=True):
            assert error(x, z) < times * error(y, z)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_strong_decay(emulated, dtype):
    args, kw = make_inputs(70, K=32, V=32, gate="scalar", dtype=dtype, beta=(2, 2), initial=True)
    args[4][:] = -20
    check(args, kw)


@pytest.mark.ptx_leg(reset=[-np.inf])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("reset", [-100, -1e4, -np.inf])
def test_strong_resets_among_mild_gates(emulated, dtype, reset):
    args, kw = make_inputs(70, K=16, V=16, gate="scalar", decay=0.05, dtype=dtype, initial=True)
    args[4] = args[4].astype(np.float32)
    args[4][:, ::8] = reset
    check(args, kw)


@pytest.mark.parametrize("slope", [0.0009, 0.0019])
@pytest.mark.parametrize(("dtype", "facts"), [(F32, {}), (F16, {}), (F16, HOPPER)])
def test_gates_after_resets_of_the_same_chunk(emulated, dtype, facts, slope):
    """Running sums of tens of thousands, of which differences of thousandths are what counts."""
    emulated(**facts)
    options = dict(K=64, V=64, gate="scalar", dtype=dtype, beta=(0.1, 0.3), initial=True)
    args, kw = make_inputs(128, **options)
    args[4] = np.where(np.arange(128) % 64 < 40, -np.inf, -slope).astype(np.float32)
    args[4] = args[4].reshape(1, 128, 1)
    result = cd.chunk_delta_rule(*args, **kw, chunk_size=64)
    wide_args, wide_kw = wide(args, kw)
    exact = definition(*wide_args, **wide_kw)
    plain = rounded_products(args, kw, 64)
    late = np.arange(128) % 64 >= 56
    for x, y, other in zip(result, exact, plain, strict=True):
        x, y, other = (a[:, late] if a.shape[1] == 128 else a for a in (x, y, other))
        assert error(x, y) < (2e-6 if dtype == F32 else twice(other, y))


@pytest.mark.ptx_leg(scale=[-2.5])
@pytest.mark.parametrize("scale", [-2.5, 0.0])
@pytest.mark.parametrize("facts", [{}, HOPPER], ids=["portable", "hopper"])
def test_negative_and_zero_scale(emulated, on_reference, facts, scale):
    emulated(**facts)
    args, kw = make_inputs(66, G=2, K=64, V=64, dtype=BF16, initial=True)
    do = np.random.default_rng(1).standard_normal(args[2].shape).astype(BF16)

    def results(args, kw, do):
        forward = cd.chunk_delta_rule_fwd(*args, **kw, scale=scale)
        gradients = cd.chunk_delta_rule_bwd(forward.residuals, do)
        first = [None if x is None else x[:, :1] for x in args]
        step = cd.delta_rule_step(*first, state=kw["initial_state"].copy(), scale=scale)
        tokens = [None if x is None else x[:, :3] for x in args]
        return dict(
            whole=cd.chunk_delta_rule(*args, **kw, scale=scale).o,
            kept=forward.o,
            tokens=cd.recurrent_delta_rule(*tokens, **kw, scale=scale).o,
            step=step,
            **{name: x for name, x in gradients._asdict().items() if x is not None},
        )

    wide_args, wide_kw = wide(args, kw)
    expected = on_reference(results, wide_args, wide_kw, do.astype(np.float64))
    for name, x in results(args, kw, do).items():
        assert error(x, expected[name]) < 2e-2, name
        assert x.any() == (scale != 0), name


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_normalised_keys(emulated, on_reference, dtype):
    args, kw = make_inputs(50, H=2, K=40, V=32, dtype=dtype)
    args[0], args[1] = 3 * args[0], (0.5 * args[1].astype(np.float32)).astype(dtype)
    result = cd.chunk_delta_rule(*args, **kw, qk_l2norm=True)
    expected = on_reference(cd.chunk_delta_rule, *args, **kw, qk_l2norm=True)
    assert error(result.o, expected.o) < (1e-6 if dtype == F32 else 1e-2)


@pytest.mark.ptx_leg(dtype=[F64, F16])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
@pytest.mark.parametrize("per_value", [False, True])
def test_recurrent(emulated, on_reference, dtype, gate, per_value):
    varlen = per_value == (gate is None)
    cu = [0, 0, 1, 9, 9] if varlen else None
    options = dict(gate=gate, beta_per_value=per_value, cu_seqlens=cu, initial=True)
    layout = "vk" if gate else "kv"
    args, kw = make_inputs(9, H=2, G=2, K=40, V=33, dtype=dtype, layout=layout, **options)
    result = cd.recurrent_delta_rule(*args, **kw, qk_l2norm=per_value)
    expected = on_reference(cd.recurrent_delta_rule, *args, **kw, qk_l2norm=per_value)
    bound = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}[dtype.name]
    assert deviation(result.o, expected.o) < bound
    assert deviation(result.final_state, expected.final_state) < min(bound, 1e-6)


@pytest.mark.ptx_leg(K=[33])
@pytest.mark.parametrize("K", [1, 33, 100, 256])
@pytest.mark.parametrize("V", [1, 130])
def test_recurrent_head_sizes(emulated, on_reference, K, V):
    args, kw = make_inputs(3, K=K, V=V, initial=True)
    expected = on_reference(cd.recurrent_delta_rule, *args, **kw)
    result = cd.recurrent_delta_rule(*args, **kw)
    assert max(deviation(x, y) for x, y in zip(result, expected, strict=True)) < 1e-14


@pytest.mark.ptx_leg(T=[0, 8])
@pytest.mark.parametrize("T", [0, 1, 8])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("pool", ["float32", "bfloat16", "float16"])
def test_step(emulated, on_reference, T, layout, pool):
    args, kw = make_inputs(T, B=3, H=2, G=2, K=40, V=24, dtype=BF16, layout=layout, initial=True)
    shape = (5, *kw["initial_state"].shape[1:])
    start = np.random.default_rng(1).standard_normal(shape).astype(getattr(ml_dtypes, pool, pool))
    indices = np.array([4, -1, 0], np.int32)
    states = [start.copy(), start.copy()]
    options = dict(state_layout=layout, state_indices=indices, qk_l2norm=True)
    o = cd.delta_rule_step(*args, state=states[0], **options)
    expected = on_reference(cd.delta_rule_step, *args, state=states[1], **options)
    assert deviation(o, expected) < 1e-2
    assert not o[1].any()
    assert error(states[0], states[1]) < (1e-6 if pool == "float32" else 1e-3)
    assert np.array_equal(states[0][[1, 2, 3]], start[[1, 2, 3]])


# Vectors of 1, 2, 4 and 8 elements; whole warps and parts of them; more threads than values; keys
# per thread that are no power of two; warps side by side that share no keys.
@pytest.mark.ptx_leg(sizes=[(100, 7), (256, 40)])
@pytest.mark.parametrize(
    "sizes", [(1, 8), (3, 6), (33, 4), (128, 128), (256, 40), (100, 7), (129, 24), (3, 200)]
)
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize(("pool", "T"), [("float64", 1), ("float32", 2), ("bfloat16", 1)])
def test_step_head_sizes(emulated, on_reference, sizes, T, layout, pool):
    dtype = F64 if pool == "float64" else F32
    sizes = dict(zip("KV", sizes, strict=True))
    args, kw = make_inputs(T, B=2, H=2, **sizes, dtype=dtype, layout=layout, initial=True)
    start = kw["initial_state"].astype(getattr(ml_dtypes, pool, pool))
    states = [start.copy(), start.copy()]
    o = cd.delta_rule_step(*args, state=states[0], state_layout=layout)
    expected = on_reference(cd.delta_rule_step, *args, state=states[1], state_layout=layout)
    bound = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 1e-2}[pool]
    assert deviation(o, expected) < bound
    assert deviation(*states) < bound


# A row in pieces, one vector per row, a head of one value, states that do not fill a warp.
@pytest.mark.parametrize("sizes", [(40, 24), (100, 1), (8, 3)])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_step_with_every_option(emulated, on_reference, sizes, layout):
    options = dict(zip("KV", sizes, strict=True)) | dict(gate="scalar")
    args, kw = make_inputs(2, B=3, H=2, G=2, dtype=BF16, layout=layout, initial=True, **options)
    start = kw["initial_state"].astype(BF16)
    states = [start.copy(), start.copy()]
    step = dict(state_indices=np.array([2, -1, 0]), state_layout=layout, qk_l2norm=True)
    o = cd.delta_rule_step(*args, state=states[0], **step)
    expected = on_reference(cd.delta_rule_step, *args, state=states[1], **step)
    assert deviation(o, expected) < 1e-2
    assert not o[1].any()
    assert error(states[0], states[1]) < 1e-3
    assert np.array_equal(states[0][1], start[1])


def test_step_in_float64_with_gate(emulated, on_reference):
    args, kw = make_inputs(2, B=3, H=2, K=33, V=5, gate="scalar", initial=True)
    states = [kw["initial_state"].copy() for _ in range(2)]
    o = cd.delta_rule_step(*args, state=states[0])
    assert deviation(o, on_reference(cd.delta_rule_step, *args, state=states[1])) < 1e-14
    assert deviation(*states) < 1e-14


BLOCKS = [(dtype, varlen, None, False) for dtype in (BF16, F32) for varlen in (False, True)]
BLOCKS += [(BF16, True, "scalar", True), (F32, True, "scalar", False), (F16, True, "scalar", True)]
BLOCKS += [(BF16, True, "channel", True), (F32, False, "channel", False)]


@pytest.mark.ptx_leg(l2norm=[True])
@pytest.mark.parametrize(("dtype", "varlen", "gate", "l2norm"), BLOCKS)
def test_building_blocks(emulated, on_reference, dtype, varlen, gate, l2norm):
    sizes = dict(H=2, G=2, K=40, V=32, cu_seqlens=VARLEN if varlen else None)
    args, kw = make_inputs(74, dtype=dtype, gate=gate, initial=True, **sizes)
    if gate:
        args[4][:, 1::9], args[4][:, 5::17] = -np.inf, -20
    q, k, v, beta, g = args
    options = dict(cu_seqlens=kw["cu_seqlens"], qk_l2norm=l2norm)
    blocks = options | dict(chunk_size=16)
    bound = {F32: 2e-6, F16: 3e-3, BF16: 2e-2}[dtype]

    def pieces():
        w, u, t = cd.wy_factors(k, v, beta, g, **blocks)
        states, v_new, final = cd.state_pass(
            k, w, u, g, initial_state=kw["initial_state"], **blocks
        )
        o = cd.chunk_output(q, k, v_new, states, g, scale=-0.7, **blocks)
        return w, u, t, states, v_new, final, o

    found = pieces()
    for x, y in zip(found, on_reference(pieces), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert error(x, y) < bound
    wide_args, wide_kw = wide(args, kw)
    wide_kw |= dict(qk_l2norm=l2norm, scale=-0.7)
    whole = on_reference(cd.recurrent_delta_rule, *wide_args, **wide_kw)
    assert error(found[-1], whole.o) < bound
    assert error(found[-2], whole.final_state) < bound

    transfer = cd.sequence_transfer(k, v, beta, g, **options)
    expected = on_reference(cd.sequence_transfer, k, v, beta, g, **options)
    assert error(transfer.p, expected.p) < bound
    assert error(transfer.h, expected.h) < bound
    twice = transfer.then(transfer)
    assert error(twice.p, expected.p @ expected.p) < bound
    state = kw["initial_state"]
    assert error(transfer.apply(state), expected.p @ state + expected.h) < bound


@pytest.mark.ptx_leg(dtype=[F16])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_gradients(emulated, on_reference, dtype):
    options = dict(cu_seqlens=[0, 0, 1, 40, 74], initial=True, layout="vk", beta=(0, 2))
    args, kw = make_inputs(74, H=2, G=2, K=32, V=48, dtype=dtype, **options)
    rng = np.random.default_rng(0)
    do = rng.standard_normal(args[2].shape).astype(dtype)
    dfinal = rng.standard_normal(kw["initial_state"].shape).astype(np.float32)

    def gradients(args, kw, do, dfinal):
        forward = cd.chunk_delta_rule_fwd(*args, **kw, qk_l2norm=True)
        return cd.chunk_delta_rule_bwd(forward.residuals, do, dfinal)

    wide_args, wide_kw = wide(args, kw)
    expected = on_reference(
        gradients, wide_args, wide_kw, do.astype(np.float64), dfinal.astype(np.float64)
    )
    bound = {BF16: 2e-2, F16: 3e-3, F32: 3e-6}[dtype]
    for name, x, y in zip(expected._fields, gradients(args, kw, do, dfinal), expected, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert error(x, y) < bound, name


def test_results_are_the_same_in_any_schedule(emulated):
    args, kw = make_inputs(74, H=1, G=2, K=32, V=48, dtype=BF16, initial=True, gate="scalar")
    results = []
    for run in (
        Run(),
        Run(schedule="descending", completion="early"),
        *(Run("random", "either", preempt=30, seed=seed) for seed in range(3)),
    ):
        emulated(run)
        results.append(cd.chunk_delta_rule(*args, **kw))
    for other in results[1:]:
        assert np.array_equal(other.o, results[0].o)
        assert np.array_equal(other.final_state, results[0].final_state)


@pytest.mark.parametrize("sm_count", [1, 4, 132])
def test_block_shapes_agree(emulated, sm_count):
    args, kw = make_inputs(50, H=2, K=32, V=160, dtype=BF16)
    emulated(sm_count=1)
    wide_blocks = cd.chunk_delta_rule(*args, **kw).o
    emulated(sm_count=sm_count)
    assert np.array_equal(cd.chunk_delta_rule(*args, **kw).o, wide_blocks)


def test_nan_stays_in_its_head_and_sequence(emulated):
    args, kw = make_inputs(74, H=2, G=2, K=32, V=32, dtype=BF16, cu_seqlens=[0, 30, 35, 74])
    clean = cd.chunk_delta_rule(*args, **kw)
    args[2][0, 31, 1] = np.nan
    dirty = cd.chunk_delta_rule(*args, **kw)
    touched = np.zeros(clean.o.shape, bool)
    # In products with a triangle 0 times NaN reaches back within the chunk: to token 30.
    touched[0, 30:35, 1] = True
    assert np.isnan(dirty.o[0, 31:35, 1].astype(np.float32)).all()
    assert np.array_equal(dirty.o[~touched], clean.o[~touched])
    assert np.array_equal(dirty.final_state[[0, 2]], clean.final_state[[0, 2]])


@pytest.mark.parametrize("t", [1, 20, 32, 50])
@pytest.mark.parametrize("facts", [{}, HOPPER], ids=["portable", "hopper"])
def test_causal_to_the_bit(emulated, t, facts):
    emulated(**facts)
    args, kw = make_inputs(70, K=32, V=32, dtype=BF16, gate="scalar")
    before = cd.chunk_delta_rule(*args, **kw).o[:, :t].copy()
    other, _ = make_inputs(70, K=32, V=32, dtype=BF16, gate="scalar", seed=1)
    for x, y in zip(args, other, strict=True):
        x[:, t:] = y[:, t:]
    assert np.array_equal(cd.chunk_delta_rule(*args, **kw).o[:, :t], before)


def test_out_strided_and_read_only_inputs(emulated):
    args, kw = make_inputs(50, H=2, K=32, V=32, dtype=BF16)
    expected = cd.chunk_delta_rule(*args, **kw)
    out = np.empty_like(args[2])
    strided = [None if x is None else np.asfortranarray(x) for x in args]
    for x in strided[:4]:
        x.flags.writeable = False
    result = cd.chunk_delta_rule(*strided, **kw, out=out)
    assert result.o is out
    assert np.array_equal(out, expected.o)


@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_a_wrong_index_in_device_memory_is_padding(emulated, request, layout):
    """Beyond the pool, also where its lower half alone would be inside."""
    if request.config.getoption("--on-gpu"):
        pytest.skip("only the emulator tells what is outside")
    args, kw = make_inputs(2, B=5, K=40, V=24, dtype=BF16, layout=layout, initial=True)
    pool = kw["initial_state"]
    before = pool.copy()
    options = dict(state=pool, state_layout=layout, state_indices=np.arange(5))
    problem = step_problem(*args, **options, scale=None, qk_l2norm=False, out=None)
    with operators.device_of(args[0]) as device:
        wrong = np.array([5, 6, 2**32 + 1, -(2**40), 3])
        indices = device.bring(wrong, "state_indices", np.int64)
        ready, targets = {"state_indices": indices}, {"state": pool}
        results = execute(
            plan("step", problem, device.facts), vars(problem), device, targets, ready
        )
    assert not results["o"][:4].any()
    assert results["o"][4].any()
    assert np.array_equal(pool[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    assert not np.array_equal(pool[3], before[3])


@pytest.mark.parametrize("values", [[0, 500, -7, 74], [0, 60, 10, 74], [5, 5, 5, 5]])
@pytest.mark.parametrize("facts", [{}, HOPPER], ids=["portable", "hopper"])
def test_wrong_cu_seqlens_stay_inside_the_arrays(emulated, values, facts, request):
    """Those in device memory, whose values no check reads."""
    if request.config.getoption("--on-gpu"):
        pytest.skip("only the emulator tells what is outside")
    args, kw = make_inputs(74, K=32, V=32, dtype=BF16, cu_seqlens=[0, 10, 20, 74])
    problem = operator_problem(*args, **kw, scale=None, qk_l2norm=False, out=None)
    # Two wrong sequences may write the same rows; what counts is that no address is outside.
    emulated(Run(check=False), **facts)
    with operators.device_of(args[0]) as device:
        ends = device.bring(np.array(values), "cu_seqlens", np.int64)
        found = plan("forward", problem, device.facts)
        execute(found, vars(problem), device, ready={"cu_seqlens": ends})
