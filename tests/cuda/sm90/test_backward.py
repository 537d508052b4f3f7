"""The walks of training on compute capability 9.0 under the race-checking emulator."""

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, Run
from helpers import definition, make_inputs
from rounded import error, rounded_gradients, rounded_products, twice, wide
from signatures import argument

import cupy_delta as cd
from cupy_delta.cuda import operators
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.sm90 import cost, training
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.cuda.variants import launches_of

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# Empty and one-token sequences, ends within, at and right after a chunk.
VARLEN = [0, 0, 1, 64, 128, 193, 200]
H200 = DeviceFacts(132, 227 * 1024, (9, 0))


@pytest.fixture
def divided(monkeypatch, emulated):
    """Return a function that fixes the slices per block and the segments, on a Hopper device."""

    def use(math, segments=1, run=None):
        fixed = cost.Choice(math, segments, math)
        for name in ("choose_training", "choose_backward"):
            monkeypatch.setattr(cost, name, lambda *args: fixed)
        monkeypatch.setattr(plans, "plan", plans.made)
        emulated(run, **HOPPER)

    use.emulated = emulated
    return use


@pytest.fixture
def looks_anywhere(monkeypatch):
    """Have segments begin early where they are so short that it would not pay to look."""
    monkeypatch.setattr(training, "FEW", 1)


def gradients_of(args, kw, do, dfinal, **options):
    """Return o, final_state and the gradients that there are."""
    forward = cd.chunk_delta_rule_fwd(*args, **kw, **options)
    gradients = cd.chunk_delta_rule_bwd(forward.residuals, do, dfinal)
    return forward.o, forward.final_state, [x for x in gradients if x is not None]


def upstream(args, kw, seed=1):
    rng = np.random.default_rng(seed)
    do = rng.standard_normal(args[2].shape).astype(args[2].dtype)
    N = len(args[2]) if kw["cu_seqlens"] is None else len(kw["cu_seqlens"]) - 1
    K, V = args[0].shape[3], args[2].shape[3]
    shape = (K, V) if kw["state_layout"] == "kv" else (V, K)
    return do, rng.standard_normal((N, args[2].shape[2], *shape)).astype(np.float32)


def check(divided, on_reference, args, kw, final=True):
    """Outputs within 2x of plain rounded products; gradients within the bounds of other kernels."""
    do, dfinal = upstream(args, kw)
    dfinal = dfinal if final else None
    o, final_state, gradients = gradients_of(args, kw, do, dfinal)
    if divided.emulated.devices is not None:
        entries = [x.entry for device in divided.emulated.devices[-2:] for x in device.launches]
        assert "forward_residuals_hopper" in entries
        assert "backward_state_hopper" in entries
    wide_args, wide_kw = wide(args, kw)
    exact = definition(*wide_args, **wide_kw)
    plain = rounded_products(args, kw, 64)
    for x, y, other in zip((o, final_state), exact, plain, strict=True):
        assert error(x, y) < twice(other, y)
    wide_dfinal = None if dfinal is None else dfinal.astype(np.float64)
    expected = on_reference(gradients_of, wide_args, wide_kw, do.astype(np.float64), wide_dfinal)[2]
    if args[4] is None:
        bound = {BF16: 1.5e-2, F16: 2e-3}[args[0].dtype]
        for x, y in zip(gradients, expected, strict=True):
            assert error(x, y) < bound
        return
    plain = rounded_gradients(args, kw, do, dfinal, 64)
    if kw["initial_state"] is None:
        plain = plain[:5]
    for x, y, other in zip(gradients, expected, plain, strict=True):
        # Where gates leave next to nothing; float16 has no number between 0 and 2^-24.
        floor = 2.0**-24 * np.sqrt(y.size) if args[0].dtype == F16 else 1e-36
        assert np.linalg.norm(x - y) <= 3 * np.linalg.norm(other - y) + floor


@pytest.mark.ptx_leg(T=[129])
@pytest.mark.parametrize("T", [1, 64, 129])
@pytest.mark.parametrize("math", [1, 2])
def test_lengths(divided, on_reference, math, T):
    divided(math)
    args, kw = make_inputs(T, B=2, K=128, V=128, dtype=BF16, initial=True, beta=(0, 2))
    check(divided, on_reference, args, kw)


@pytest.mark.parametrize(
    ("T", "K", "V", "dtype", "layout", "division"),
    [(130, 8, 200, BF16, "kv", (2, 1)), (330, 96, 72, F16, "vk", (1, 3))],
)
def test_head_sizes_and_segments(divided, on_reference, T, K, V, dtype, layout, division):
    divided(*division)
    args, kw = make_inputs(T, G=2, K=K, V=V, dtype=dtype, initial=True, layout=layout)
    check(divided, on_reference, args, kw)


@pytest.mark.parametrize("final", [True, False])
def test_sequences_of_any_lengths(divided, on_reference, final):
    divided(2)
    options = dict(K=64, V=64, dtype=BF16, cu_seqlens=VARLEN, initial=True, beta=(0, 2))
    args, kw = make_inputs(200, G=2, **options)
    check(divided, on_reference, args, kw, final)


def test_hard_keys(divided, on_reference):
    """Gradients, too, within 2x of what the portable kernels make of the same chunks."""
    options = dict(dtype=BF16, correlation=0.9, beta=(1.99, 1.99), initial=True)
    args, kw = make_inputs(200, K=64, V=64, **options)
    do, dfinal = upstream(args, kw)
    divided.emulated(leg="source")
    portable = gradients_of(args, kw, do, dfinal, chunk_size=64)[2]
    divided(2)
    result = gradients_of(args, kw, do, dfinal)[2]
    wide_args, wide_kw = wide(args, kw)
    doubles = (do.astype(np.float64), dfinal.astype(np.float64))
    expected = on_reference(gradients_of, wide_args, wide_kw, *doubles)[2]
    for x, y, other in zip(result, expected, portable, strict=True):
        assert error(x, y) < twice(other, y)


RESETS = {0: -30, 3: -20.0, 17: -88.0, 40: -np.inf, 63: -1000.0, 64: -np.inf, 127: -np.inf}
GATES = {
    "weak": lambda random: 0.01 * random,
    "mean .1": lambda random: 0.1 * random,
    "mean 5": lambda random: 5 * random,
    "constant -20": lambda random: np.full_like(random, -20),
    "constant -inf": lambda random: np.full_like(random, -np.inf),
    "resets": lambda random: with_resets(0.01 * random),
}


def with_resets(g):
    for token, value in RESETS.items():
        g[:, token] = value
    return g


def gated(gates, T, **options):
    args, kw = make_inputs(T, gate="scalar", decay=1, **options)
    args[4] = GATES[gates](args[4].astype(np.float64)).astype(np.float32)
    return args, kw


@pytest.mark.ptx_leg(gates=["resets", "weak"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("math", [1, 2])
def test_gates(divided, on_reference, gates, math):
    """All gradients within 3x of plain rounded products, dg of gates that forget all zero."""
    divided(math)
    args, kw = gated(gates, 140, G=2, K=64, V=128, dtype=BF16, initial=True, beta=(0, 2))
    check(divided, on_reference, args, kw)
    do, dfinal = upstream(args, kw)
    dg = gradients_of(args, kw, do, dfinal)[2][4]
    assert dg.dtype == np.float32
    assert not dg[np.isneginf(args[4])].any()


@pytest.mark.parametrize(
    ("gates", "dtype", "layout", "division"),
    [
        ("mean .1", F16, "vk", (1, 3)),
        ("resets", F16, "kv", (2, 1)),
        ("weak", BF16, "vk", (2, 4)),
        ("mean 5", BF16, "kv", (1, 2)),
    ],
)
def test_gates_over_segments(divided, looks_anywhere, on_reference, gates, dtype, layout, division):
    """What a segment leaves of a state is its decay times what it does to it."""
    divided(*division)
    args, kw = gated(gates, 400, G=2, K=96, V=72, dtype=dtype, initial=True, layout=layout)
    check(divided, on_reference, args, kw)


def early_or_joined():
    """Return arguments, and which of their sequences need to know of another segment.

    Of six chunks in two segments. One chunk before the second is enough; nothing is forgotten; two
    chunks are needed, more than half of a segment; keys bring back what gates take away; or less
    than that; or one of the value heads forgets nothing.
    """
    options = dict(K=64, V=64, dtype=BF16, gate="scalar", initial=True)
    args, kw = make_inputs(380, B=6, G=2, **options)
    k, beta, g = args[1], args[3], args[4]
    g[:] = np.array([-2, -0.01, -0.8, -2, -2, -2])[:, None, None]
    g[5, :, 1] = -0.01
    length = np.sum(k[3:5].astype(np.float64) ** 2, axis=-1, keepdims=True)[:, :, 0]
    beta[3:5] = np.array([1 + np.e, 2.3])[:, None, None] / length
    return args, kw, [False, True, True, True, False, True]


def test_segments_begin_early_where_the_past_is_forgotten(divided, looks_anywhere):
    """A walk that does meets no NaN of the first chunk and state, and has the bits of any past."""
    divided(1, 2)
    args, kw, joined = early_or_joined()
    clean = cd.chunk_delta_rule_fwd(*args, **kw).o[:, 192:]
    assert np.isfinite(clean.astype(np.float32)).all()
    args[2][:, :64] = np.nan
    kw["initial_state"][:] = np.nan
    spoiled = cd.chunk_delta_rule_fwd(*args, **kw)
    o = spoiled.o[:, 192:]
    met = np.isnan(o.astype(np.float32)).any(axis=(1, 3))
    assert met.all(axis=1).tolist() == joined
    assert o[~met[:, 0]].tobytes() == clean[~met[:, 0]].tobytes()
    assert np.isnan(spoiled.final_state).any(axis=(2, 3)).tolist() == met.tolist()


def test_segments_begin_early_where_the_future_is_forgotten(divided, looks_anywhere):
    """The reverse walk meets no NaN of the last chunk then, nor any gradient of the state."""
    divided(1, 2)
    args, kw, joined = early_or_joined()
    do, dfinal = upstream(args, kw)
    first = slice(None, 192)
    whole = gradients_of(args, kw, do, 1e20 * dfinal)[2][2][:, first]
    assert np.isfinite(whole.astype(np.float32)).all()
    do[:, 320:] = np.nan
    spoiled = gradients_of(args, kw, do, np.nan * dfinal)[2][2][:, first]
    met = np.isnan(spoiled.astype(np.float32)).any(axis=(1, 3))
    assert met.all(axis=1).tolist() == joined
    assert spoiled[~met[:, 0]].tobytes() == whole[~met[:, 0]].tobytes()


@pytest.mark.parametrize("head", [0, 32, 39])
def test_all_of_many_value_heads_have_to_forget(divided, looks_anywhere, head):
    divided(1, 2)
    args, kw = make_inputs(4 * 64, G=40, K=8, V=8, dtype=BF16, gate="scalar")
    args[4][:] = -2
    args[4][:, :, head] = -0.01
    args[2][:, :64] = np.nan
    assert np.isnan(cd.chunk_delta_rule_fwd(*args, **kw).final_state).all()


def test_transfers_are_made_for_segments_that_join(divided, looks_anywhere, monkeypatch):
    """Both ways, for all value heads where one joins the second segment, else for those that do."""
    divided(1, 3)
    kept = []
    execute = operators.execute

    def kept_of(*args, **kw):
        kept.append(execute(*args, **kw))
        return kept[-1]

    monkeypatch.setattr(operators, "execute", kept_of)
    # Chunks of which the second value head of a sequence forgets little; who needs transfers then.
    weak = [[], [5], [2], range(9), [3], [6]]
    forward = [(0, 0), (0, 2), (2, 2), (2, 2), (0, 0), (0, 0)]
    backward = [(0, 0), (0, 0), (0, 0), (2, 2), (0, 2), (2, 2)]
    args, kw = make_inputs(9 * 64, B=6, G=2, K=64, V=64, dtype=BF16, gate="scalar")
    args[4][:] = -2
    for b, chunks in enumerate(weak):
        for c in chunks:
            args[4][b, c * 64 : (c + 1) * 64, 1] = -0.01
    gradients_of(args, kw, *upstream(args, kw))
    for arrays, needed in zip(kept, (forward, backward), strict=True):
        h = np.asarray(arrays["segment_h"]).view(np.uint8)
        made = ~(h == 255).all(axis=(3, 4))
        assert made.sum(axis=1).tolist() == [list(pair) for pair in needed]


@pytest.mark.parametrize(("dtype", "size"), [(BF16, 1e20), (BF16, 1e-20), (F16, 8), (F16, 1 / 8)])
def test_segments_that_begin_early_and_gradients_of_any_size(
    divided, looks_anywhere, on_reference, dtype, size
):
    """Tokens before, at and after a border of segments: neither size is lost in the other."""
    divided(1, 2)
    args, kw = make_inputs(380, G=2, K=64, V=64, dtype=dtype, gate="scalar")
    args[4][:] = -2
    do = upstream(args, kw)[0].astype(np.float64)
    do[:, :192] *= size
    do[:, 192:] /= size
    do = do.astype(dtype)
    dv = gradients_of(args, kw, do, None)[2][2]
    wide_args, wide_kw = wide(args, kw)
    expected = on_reference(gradients_of, wide_args, wide_kw, do.astype(np.float64), None)[2][2]
    for part in (slice(128), slice(128, 192), slice(192, None)):
        assert error(dv[:, part], expected[:, part]) < {BF16: 1.5e-2, F16: 2e-3}[dtype]


@pytest.mark.parametrize("cu_seqlens", [None, [0, 130, 200, 380]])
def test_tokens_that_write_nothing(divided, looks_anywhere, on_reference, cu_seqlens):
    """With beta 0 or nearly so dV does not tell of dY, which dbeta needs."""
    divided(1, 2)
    options = dict(K=64, V=72, dtype=BF16, gate="scalar", cu_seqlens=cu_seqlens, initial=True)
    args, kw = make_inputs(380, G=2, **options)
    args[3][:, 5::17], args[3][:, 7::17], args[3][:, 192:256] = 0, -1e-9, 0
    args[4][:] = -2
    check(divided, on_reference, args, kw)
    do, dfinal = upstream(args, kw)
    _, _, (_, _, dv, dbeta, *_) = gradients_of(args, kw, do, dfinal)
    assert not dv[:, 192:256].any()
    assert dbeta[:, 192:256].all()


def test_gates_of_sequences_of_any_lengths(divided, looks_anywhere, on_reference):
    divided(1, 3)
    options = dict(K=64, V=64, dtype=BF16, cu_seqlens=VARLEN, beta=(0, 2))
    args, kw = gated("mean .1", 200, G=2, **options)
    args[4] = args[4].astype(BF16)
    check(divided, on_reference, args, kw, final=False)


# Sequences that have fewer chunks than segments, or end in the middle of one.
UNEVEN = [0, 0, 3, 280, 281, 410]


@pytest.mark.parametrize("gate", [None, "scalar"])
def test_segments_of_uneven_sequences(divided, looks_anywhere, on_reference, gate):
    divided(2, 3)
    options = dict(dtype=BF16, cu_seqlens=UNEVEN, initial=True, gate=gate, decay=0.02)
    args, kw = make_inputs(410, K=64, V=64, **options)
    check(divided, on_reference, args, kw)


@pytest.mark.parametrize("gate", [None, "scalar"])
def test_states_that_hardly_change_over_segments(divided, on_reference, gate):
    """With small beta what a segment does to a state is nearly its decay, 1 without a gate."""
    divided(1, 4)
    options = dict(beta=(0, 0.05), initial=True, gate=gate, decay=0.005)
    args, kw = make_inputs(520, K=64, V=64, dtype=BF16, **options)
    check(divided, on_reference, args, kw)


def test_nine_segments(divided, on_reference):
    """Eight transfers in a row, both ways: each buffer of a join is used four times."""
    divided(1, 9)
    args, kw = make_inputs(9 * 64, K=64, V=64, dtype=BF16, beta=(0, 0.5), initial=True)
    check(divided, on_reference, args, kw)


@pytest.mark.parametrize("gate", [None, "scalar"])
def test_neighbours_do_not_matter(divided, gate):
    """NaN in one sequence leaves the bits of the others as they are."""
    divided(2, 3)
    options = dict(dtype=BF16, cu_seqlens=VARLEN, initial=True, gate=gate)
    args, kw = make_inputs(200, K=64, V=64, **options)
    do, dfinal = upstream(args, kw)
    o, final_state, clean = gradients_of(args, kw, do, dfinal)
    spoilt = [None if x is None else x.copy() for x in args]
    do = do.copy()
    for x in (*spoilt, do):
        if x is not None:
            x[:, 128:193] = np.nan
    o_spoilt, final_spoilt, result = gradients_of(spoilt, kw, do, dfinal)
    others, sequences = np.r_[0:128, 193:200], [0, 1, 2, 3, 5]
    for x, y in zip((o_spoilt, *result[:-1]), (o, *clean[:-1]), strict=True):
        assert np.array_equal(x[:, others], y[:, others])
    for x, y in ((final_spoilt, final_state), (result[-1], clean[-1])):
        assert np.array_equal(x[sequences], y[sequences])
    assert np.isnan(result[-1][4].astype(float)).any()


@pytest.mark.parametrize("gate", [None, "scalar"])
def test_wrong_cu_seqlens_stay_inside_the_arrays(divided, request, gate):
    """Two wrong sequences may write the same rows; what counts is that no address is outside."""
    if request.config.getoption("--on-gpu"):
        pytest.skip("only the emulator tells what is outside")
    divided(2, 3, run=Run(check=False))
    options = dict(dtype=BF16, cu_seqlens=VARLEN, initial=True, gate=gate)
    args, kw = make_inputs(200, K=64, V=64, **options)
    do, dfinal = upstream(args, kw)
    forward = cd.chunk_delta_rule_fwd(*args, **kw)
    forward.residuals.saved["cu_seqlens"][:] = [-5, 300, 20, 2**40, 0, 90, 1000]
    cd.chunk_delta_rule_bwd(forward.residuals, do, dfinal)


@pytest.mark.parametrize("gate", [None, "scalar"])
def test_any_order_of_events_gives_the_same_bits(divided, gate):
    options = dict(dtype=BF16, cu_seqlens=VARLEN, initial=True, gate=gate)
    args, kw = make_inputs(200, K=64, V=64, **options)
    do, dfinal = upstream(args, kw)
    runs = [Run(), Run("descending", "early"), Run("random", "either", preempt=30, seed=1)]
    results = []
    for run in runs:
        divided(2, 3, run=run)
        o, final_state, gradients = gradients_of(args, kw, do, dfinal)
        results.append([np.asarray(x, np.float32) for x in (o, final_state, *gradients)])
    for result in results[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.ptx_leg(t=[100])
@pytest.mark.parametrize("gate", [None, "scalar"])
@pytest.mark.parametrize("t", [64, 100])
def test_nothing_reaches_forward_in_time(divided, t, gate):
    """Tokens after the last output that counts have gradients of zero, to the bit."""
    divided(2)
    args, kw = make_inputs(140, K=64, V=64, dtype=BF16, initial=True, gate=gate)
    do, _ = upstream(args, kw)
    do[:, t:] = 0
    for x in gradients_of(args, kw, do, None)[2][:-1]:
        assert not x[:, t:].any()
        assert x[:, :t].any()


def launched(facts, **call):
    launches = launches_of(facts, ("backward",), **(dict(dtype="bfloat16", K=128, V=128) | call))
    return {x.entry: x for x in launches}


@pytest.mark.parametrize(
    "call", [dict(dtype="float32"), dict(K=256), dict(V=100), dict(chunk_size=32)]
)
def test_what_does_not_fit_goes_to_the_portable_kernels(call):
    assert {"wy_factors", "forward", "backward_state"} < set(launched(H200, **call))


@pytest.mark.parametrize("chunk_size", [None, 64])
def test_all_kernels_of_training_have_the_same_chunks(chunk_size):
    kernels = launched(H200, chunk_size=chunk_size)
    expected = {"wy_factors_hopper", "forward_residuals_hopper", "backward_state_hopper"}
    assert expected < set(kernels)
    macros = [dict(x.defines) for x in kernels.values()]
    chunked = [x["CHUNK"] for x in macros if "CHUNK" in x]
    assert chunked == [64] * len(chunked)


@pytest.mark.parametrize(
    ("B", "T", "H", "forward", "backward"),
    [
        (1, 32768, 32, (1, 1), (2, 3)),
        (1, 32768, 8, (2, 9), (2, 9)),
        (4, 8192, 32, (2, 1), (2, 1)),
        (1, 1024, 8, (1, 4), (1, 4)),
        (1, 512, 8, (1, 1), (1, 1)),
    ],
)
def test_division(B, T, H, forward, backward):
    """Wide blocks where memory is the limit, segments where multiprocessors would be idle."""
    kernels = launched(H200, B=B, T=T, H=H)
    for entry, expected in (
        ("forward_residuals_hopper", forward),
        ("backward_state_hopper", backward),
    ):
        walk = kernels[entry]
        assert (dict(walk.defines)["MATH"], argument(walk, "segments")) == expected


@pytest.mark.parametrize(
    ("B", "T", "H", "forward", "backward"),
    [
        (1, 32768, 32, (2, 3), (2, 3)),
        (1, 32768, 16, (1, 4), (2, 5)),
        (1, 32768, 8, (1, 8), (1, 8)),
        (4, 8192, 32, (2, 1), (2, 1)),
        (1, 1024, 8, (1, 4), (1, 4)),
    ],
)
def test_division_with_a_gate(B, T, H, forward, backward):
    kernels = launched(H200, B=B, T=T, H=H, gate=True)
    for entry, expected in (
        ("forward_residuals_hopper", forward),
        ("backward_state_hopper", backward),
    ):
        walk = kernels[entry]
        assert (dict(walk.defines)["MATH"], argument(walk, "segments")) == expected
    looks = T > 1024 and forward[1] > 1
    assert ("segment_starts" in kernels) == looks
