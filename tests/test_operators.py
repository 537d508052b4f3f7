"""The operators on NumPy arrays against the definition: every option, every boundary."""

import itertools
import os
import subprocess
import sys
import textwrap
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers import definition, deviation, make_inputs

import cupy_delta as cd
from cupy_delta.problem import _check_gates

EXACT = 1e-12
LENGTHS = (0, 1, 2, 63, 64, 65, 130, 1000)
GATES = (None, "scalar", "channel")
VARLEN = [0, 0, 1, 70, 70, 134, 199, 200]


def worst(result, expected):
    return max(deviation(x, y) for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("varlen", [False, True])
def test_token_loop_is_the_definition(gate, layout, varlen):
    cu = [0, 3, 3, 9] if varlen else None
    args, kw = make_inputs(
        9, B=1 if varlen else 2, H=2, G=2, gate=gate, initial=True, layout=layout, cu_seqlens=cu
    )
    assert worst(cd.recurrent_delta_rule(*args, **kw), definition(*args, **kw)) < 1e-14
    assert (
        worst(cd.recurrent_delta_rule(*args, scale=0.0, **kw), definition(*args, scale=0, **kw))
        < 1e-14
    )


@pytest.mark.parametrize("gate", GATES)
def test_token_loop_with_beta_per_value(gate):
    args, kw = make_inputs(9, B=2, H=2, G=2, gate=gate, beta_per_value=True, initial=True)
    assert worst(cd.recurrent_delta_rule(*args, **kw), definition(*args, **kw)) < 1e-14


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk", [None, 16, 32, 17])
def test_chunkwise_equals_token_loop(T, gate, chunk):
    args, kw = make_inputs(T, B=2, H=2, G=2, gate=gate, initial=True, beta=(0, 2))
    expected = cd.recurrent_delta_rule(*args, **kw)
    assert worst(cd.chunk_delta_rule(*args, chunk_size=chunk, **kw), expected) < EXACT


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_sequences_end_to_end(gate, index):
    cu = np.array(VARLEN, index)
    args, kw = make_inputs(200, H=1, G=3, gate=gate, initial=True, cu_seqlens=cu, layout="vk")
    assert worst(cd.recurrent_delta_rule(*args, **kw), definition(*args, **kw)) < EXACT
    assert worst(cd.chunk_delta_rule(*args, **kw), definition(*args, **kw)) < EXACT
    result = cd.chunk_delta_rule(*args, **kw)
    assert np.array_equal(result.final_state[0], kw["initial_state"][0])


@pytest.mark.parametrize(
    ("beta", "correlation"),
    list(itertools.product([(0, 0), (1, 1), (2, 2), (1.99, 1.99)], [0, 0.9, 1])),
)
def test_hard_keys(beta, correlation):
    args, kw = make_inputs(200, K=16, V=8, beta=beta, correlation=correlation, initial=True)
    assert worst(cd.chunk_delta_rule(*args, **kw), cd.recurrent_delta_rule(*args, **kw)) < EXACT


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("decay", [20.0, 1000.0])
def test_strong_decay(gate, decay):
    args, kw = make_inputs(200, K=16, V=8, gate=gate, beta=(2, 2), initial=True)
    args[4] = np.full_like(args[4], -decay)
    expected = cd.recurrent_delta_rule(*args, **kw)
    assert np.isfinite(expected.o).all()
    assert worst(cd.chunk_delta_rule(*args, **kw), expected) < EXACT


def test_one_strong_gate_leaves_its_neighbours_exact():
    args, kw = make_inputs(64, gate="scalar", initial=True, dtype=np.float32)
    args[4][:] = -1e-3
    args[4][0, 3] = -3000.0
    wide = [x.astype(np.float64) for x in args]
    kw64 = kw | {"initial_state": kw["initial_state"].astype(np.float64)}
    assert worst(cd.chunk_delta_rule(*args, **kw), definition(*wide, **kw64)) < 1e-6


@pytest.mark.parametrize("K", [1, 3, 64])
@pytest.mark.parametrize("V", [1, 300])
def test_any_head_size(K, V):
    args, kw = make_inputs(70, B=2, K=K, V=V)
    assert worst(cd.chunk_delta_rule(*args, **kw), definition(*args, **kw)) < EXACT


def test_l2norm_is_done_with_the_stated_eps():
    args, kw = make_inputs(70, H=2, K=8)
    args[0], args[1] = 3 * args[0], 1e-3 * args[1]
    normal = [x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6) for x in args[:2]]
    expected = definition(*normal, *args[2:], **kw)
    for operator in (cd.chunk_delta_rule, cd.recurrent_delta_rule):
        assert worst(operator(*args, qk_l2norm=True, **kw), expected) < EXACT


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("operator", [cd.chunk_delta_rule, cd.recurrent_delta_rule])
def test_narrow_inputs_compute_in_float32(name, operator):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    args, kw = make_inputs(130, H=2, K=16, V=8, gate="scalar", dtype=dtype, initial=True)
    result = operator(*args, **kw)
    assert result.o.dtype == dtype
    assert result.final_state.dtype == np.float32
    wide = operator(*(x.astype(np.float32) for x in args), **kw)
    assert np.array_equal(result.o, wide.o.astype(dtype))
    assert np.array_equal(result.final_state, wide.final_state)
    kw64 = kw | {"initial_state": kw["initial_state"].astype(np.float64)}
    exact = definition(*(x.astype(np.float64) for x in args), **kw64)
    bound = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}[name]
    assert worst(result, exact) < bound


def test_beta_and_g_may_be_float32_beside_narrow_inputs():
    args, kw = make_inputs(20, gate="scalar", dtype=ml_dtypes.bfloat16)
    mixed = [*args[:3], args[3].astype(np.float32), args[4].astype(np.float32)]
    assert np.array_equal(cd.chunk_delta_rule(*mixed, **kw).o, cd.chunk_delta_rule(*args, **kw).o)


def test_out_is_the_object_returned():
    args, kw = make_inputs(70, B=2, H=2, G=2)
    for operator in (cd.chunk_delta_rule, cd.recurrent_delta_rule):
        out = np.full_like(args[2], np.nan)
        result = operator(*args, out=out, **kw)
        assert result.o is out
        assert np.array_equal(out, operator(*args, **kw).o)


def test_strided_read_only_and_foreign_endian_inputs():
    args, kw = make_inputs(70, B=2, H=2, G=2, gate="scalar", initial=True)
    expected = cd.chunk_delta_rule(*args, **kw)
    for change in (
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2] if x.ndim < 5 else x,
        lambda x: x.astype(x.dtype.newbyteorder()),
    ):
        changed = [change(x) for x in args]
        before = [x.copy() for x in changed]
        for x in changed:
            x.flags.writeable = False
        result = cd.chunk_delta_rule(*changed, **kw)
        assert worst(result, expected) == 0
        assert all(np.array_equal(x, y) for x, y in zip(changed, before, strict=True))


@pytest.mark.parametrize("operator", [cd.chunk_delta_rule, cd.recurrent_delta_rule])
def test_nothing_to_do(operator):
    args, kw = make_inputs(0, B=3, H=2, initial=True)
    result = operator(*args, **kw)
    assert result.o.shape == args[2].shape
    assert np.array_equal(result.final_state, kw["initial_state"])
    assert not np.shares_memory(result.final_state, kw["initial_state"])
    args, kw = make_inputs(5, B=0, H=2, initial=True)
    assert operator(*args, **kw).final_state.shape == (0, 2, 5, 7)
    args, kw = make_inputs(0, cu_seqlens=[0])
    assert operator(*args, **kw).final_state.shape == (0, 1, 5, 7)
    args, kw = make_inputs(0, cu_seqlens=[0, 0, 0])
    assert np.array_equal(operator(*args, **kw).final_state, np.zeros((2, 1, 5, 7)))


@pytest.mark.parametrize("operator", [cd.chunk_delta_rule, cd.recurrent_delta_rule])
def test_nan_stays_in_its_head_and_sequence(operator):
    args, kw = make_inputs(200, H=2, G=2, gate="scalar", cu_seqlens=[0, 70, 75, 200])
    clean = operator(*args, **kw)
    args[2][0, 72, 1] = np.nan
    dirty = operator(*args, **kw)
    touched = np.zeros(clean.o.shape, bool)
    touched[0, 70:75, 1] = True
    assert np.isnan(dirty.o[0, 72:75, 1]).all()
    assert np.array_equal(dirty.o[~touched], clean.o[~touched])
    assert np.array_equal(dirty.final_state[[0, 2]], clean.final_state[[0, 2]])
    assert np.array_equal(dirty.final_state[1, [0, 2, 3]], clean.final_state[1, [0, 2, 3]])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("t", [1, 40, 64, 100])
def test_causal_to_the_bit(gate, t):
    args, kw = make_inputs(130, H=2, K=16, V=8, gate=gate, dtype=np.float32)
    before = cd.chunk_delta_rule(*args, **kw).o[:, :t].copy()
    other, _ = make_inputs(130, H=2, K=16, V=8, gate=gate, dtype=np.float32, seed=1)
    for x, y in zip(args, other, strict=True):
        if x is not None:
            x[:, t:] = y[:, t:]
    assert np.array_equal(cd.chunk_delta_rule(*args, **kw).o[:, :t], before)


@pytest.mark.parametrize("gate", GATES)
def test_what_overflows_inside_reaches_no_earlier_chunk(gate):
    """Zero times infinity is NaN: inside its chunk a product with a triangle can spread it."""
    args, kw = make_inputs(150, K=16, V=9, G=2, gate=gate, dtype=np.float32)
    expected = cd.chunk_delta_rule(*args, **kw, chunk_size=32).o[:, :64].copy()
    later = args[2][:, 70:]
    later *= np.float32(3e38) / np.abs(later).max()
    args[1][:, 70:] *= 1e3
    with np.errstate(all="ignore"):
        o = cd.chunk_delta_rule(*args, **kw, chunk_size=32).o
    assert np.isfinite(args[2]).all() and not np.isfinite(o[:, 70:]).all()
    assert np.array_equal(o[:, :64], expected)


def test_same_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr("cupy_delta.reference.parallel.PRODUCTS_FOR_THREADS", 0)
    args, kw = make_inputs(300, B=2, H=6, K=32, V=32, gate="scalar", dtype=np.float32)
    bits = []
    for threads in ("1", "2", "3", "2"):
        monkeypatch.setenv("CUPY_DELTA_NUM_THREADS", threads)
        forward = cd.chunk_delta_rule_fwd(*args, **kw)
        gradients = cd.chunk_delta_rule_bwd(forward.residuals, np.ones_like(forward.o))
        bits.append([forward.o, forward.final_state, *(x for x in gradients if x is not None)])
    for other in bits[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(bits[0], other, strict=True))


def test_small_calls_start_no_thread(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a thread was started")

    monkeypatch.setenv("CUPY_DELTA_NUM_THREADS", "4")
    monkeypatch.setattr("cupy_delta.reference.parallel.side_by_side", refused)
    args, kw = make_inputs(4, B=8, H=8, K=16, V=16)
    forward = cd.chunk_delta_rule_fwd(*args, **kw)
    cd.chunk_delta_rule_bwd(forward.residuals, forward.o)
    cd.recurrent_delta_rule(*args, **kw)
    cd.delta_rule_step(*args, state=np.zeros((8, 8, 16, 16)))
    cd.sequence_transfer(*args[1:4])
    args, kw = make_inputs(300, B=2, H=6, K=32, V=32)
    with pytest.raises(AssertionError, match="a thread was started"):
        cd.chunk_delta_rule(*args, **kw)


@pytest.mark.parametrize("text", ["0", "-1", "two", ""])
def test_bad_thread_count_is_named(monkeypatch, text):
    monkeypatch.setenv("CUPY_DELTA_NUM_THREADS", text)
    args, kw = make_inputs(3)
    with pytest.raises(ValueError, match="CUPY_DELTA_NUM_THREADS: expected a positive integer"):
        cd.chunk_delta_rule(*args, **kw)


def test_blas_threads_are_restored():
    from threadpoolctl import ThreadpoolController

    blas = ThreadpoolController().select(user_api="blas")
    before = [library["num_threads"] for library in blas.info()]
    args, kw = make_inputs(70)
    cd.chunk_delta_rule(*args, **kw)
    assert [library["num_threads"] for library in blas.info()] == before


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("reset", [-100, -1e4, -np.inf])
def test_resets_of_the_state_among_mild_gates(gate, reset):
    args, kw = make_inputs(70, K=8, V=6, gate=gate, decay=0.05, initial=True)
    args[4][:, ::8] = reset
    results = [
        cd.chunk_delta_rule(*args, **kw, chunk_size=16),
        cd.recurrent_delta_rule(*args, **kw),
    ]
    for x, y in zip(*results, strict=True):
        assert deviation(x, y) < 1e-12
    forward = cd.chunk_delta_rule_fwd(*args, **kw, chunk_size=16)
    back = cd.chunk_delta_rule_bwd(forward.residuals, args[2])
    assert all(np.isfinite(x).all() for x in back)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource is a Unix module")
def test_a_million_tokens_fit_in_four_gib():
    code = """
        import resource
        import numpy as np
        import cupy_delta
        T = 1_000_000
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, T, 1, 64), dtype=np.float32) for _ in range(3))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        beta = np.full((1, T, 1), 0.5, np.float32)
        o, state = cupy_delta.chunk_delta_rule(q, k, v, beta)
        assert np.isfinite(o).all()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert int(result.stdout) < 4 * 2**20


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_gates_are_checked_without_an_array_of_their_size(dtype):
    g = np.full((1, 200_000, 1, 16), -0.1, np.float32).astype(dtype)[..., ::2]
    g[0, 3] = np.nan
    tracemalloc.start()
    try:
        _check_gates(g)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < g.size / 10
