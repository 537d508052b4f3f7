"""Long sequences of few heads are cut into segments: the same numbers, in several walks."""

import ml_dtypes
import numpy as np
import pytest
from emulator import Run
from helpers import definition, make_inputs
from rounded import error, rounded_products, twice, wide

import cupy_delta as cd
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.portable import choice
from cupy_delta.cuda.spec import DeviceFacts

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
FACTS = dict(sm_count=132)
# Sequences that end in the middle of a segment, have fewer chunks than segments, or no token.
UNEVEN = [0, 0, 3, 500, 501, 901]


@pytest.fixture
def short_segments(monkeypatch):
    """Cut sequences that are short enough for the emulator."""
    monkeypatch.setattr(choice, "SEGMENT_CHUNKS", 1)
    monkeypatch.setattr(plans, "plan", plans.made)


def assert_cut(emulated):
    """The last walk went through eight segments; on a GPU its own facts decide."""
    if emulated.devices is None:
        return
    walks = [dict(x.defines) for d in emulated.devices for x in d.launches if x.entry == "forward"]
    cut = [(walk["SEGMENTS"], walk["TRANSFER"], walk["ZERO_V"]) for walk in walks]
    assert cut[-3:] == [(8, 1, 0), (8, 1, 1), (8, 0, 0)]


@pytest.mark.ptx_leg(T=[160], dtype=[F32])
@pytest.mark.parametrize("T", [128, 129, 160, 330])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_lengths(emulated, short_segments, T, dtype):
    args, kw = make_inputs(T, B=2, K=40, V=33, G=2, dtype=dtype, initial=True, beta=(0, 2))
    emulated(**FACTS)
    result = cd.chunk_delta_rule(*args, **kw, chunk_size=16)
    assert_cut(emulated)
    wide_args, wide_kw = wide(args, kw)
    exact = definition(*wide_args, **wide_kw)
    for x, y, plain in zip(result, exact, rounded_products(args, kw, 16), strict=True):
        assert error(x, y) < (5e-6 if dtype == F32 else twice(plain, y))


@pytest.mark.ptx_leg(beta=[(1.99, 1.99)])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("beta", [(0, 1), (1, 1), (1.99, 1.99)])
def test_hard_keys(emulated, short_segments, correlation, beta):
    args, kw = make_inputs(
        400, K=32, V=32, dtype=BF16, correlation=correlation, beta=beta, initial=True
    )
    emulated(**FACTS)
    result = cd.chunk_delta_rule(*args, **kw)
    assert_cut(emulated)
    wide_args, wide_kw = wide(args, kw)
    exact = definition(*wide_args, **wide_kw)
    for x, y, plain in zip(result, exact, rounded_products(args, kw, 32), strict=True):
        assert error(x, y) < twice(plain, y)


@pytest.mark.ptx_leg(gate=["scalar"], layout=["vk"], initial=[True])
@pytest.mark.parametrize("gate", [None, "scalar"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("initial", [False, True])
def test_options_and_uneven_sequences(
    emulated, on_reference, short_segments, gate, layout, initial
):
    options = dict(gate=gate, layout=layout, initial=initial, cu_seqlens=UNEVEN)
    args, kw = make_inputs(901, K=24, V=40, dtype=F32, **options)
    emulated(**FACTS)
    result = cd.chunk_delta_rule(*args, **kw, chunk_size=16)
    assert_cut(emulated)
    for x, y in zip(result, on_reference(cd.chunk_delta_rule, *args, **kw), strict=True):
        assert error(x, y) < 5e-6


def test_a_gate_per_key_channel(emulated, on_reference, short_segments):
    options = dict(gate="channel", layout="vk", initial=True, cu_seqlens=UNEVEN)
    args, kw = make_inputs(901, K=24, V=40, G=2, dtype=F32, **options)
    args[4][:, 200, :, ::3] = -np.inf
    emulated(**FACTS)
    result = cd.chunk_delta_rule(*args, **kw, chunk_size=16)
    assert_cut(emulated)
    for x, y in zip(result, on_reference(cd.chunk_delta_rule, *args, **kw), strict=True):
        assert error(x, y) < 5e-6


@pytest.mark.ptx_leg(gate=["channel"])
@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_gradients_from_residuals_of_segments(emulated, on_reference, short_segments, gate):
    args, kw = make_inputs(200, K=32, V=16, dtype=F32, initial=True, gate=gate)
    emulated(**FACTS)

    def gradients():
        forward = cd.chunk_delta_rule_fwd(*args, **kw, chunk_size=16)
        return [x for x in cd.chunk_delta_rule_bwd(forward.residuals, args[2]) if x is not None]

    for x, y in zip(gradients(), on_reference(gradients), strict=True):
        assert error(x, y) < 5e-6
    assert_cut(emulated)


def test_the_same_bits_in_any_schedule(emulated, short_segments):
    args, kw = make_inputs(150, K=24, V=20, dtype=BF16, gate="scalar", initial=True)
    results = []
    for run in (Run(), Run("descending", "early"), Run("random", "either", preempt=30, seed=1)):
        emulated(run, **FACTS)
        results.append(cd.chunk_delta_rule(*args, **kw, chunk_size=16))
    for other in results[1:]:
        assert np.array_equal(other.o, results[0].o)
        assert np.array_equal(other.final_state, results[0].final_state)


def test_nan_does_not_reach_earlier_chunks_or_other_heads(emulated, short_segments):
    args, kw = make_inputs(256, H=2, K=16, V=16, dtype=BF16)
    emulated(**FACTS)
    clean = cd.chunk_delta_rule(*args, **kw, chunk_size=16).o
    args[2][0, 100, 1] = np.nan
    dirty = cd.chunk_delta_rule(*args, **kw, chunk_size=16).o
    assert np.array_equal(dirty[:, :96], clean[:, :96])
    assert np.array_equal(dirty[:, :, 0], clean[:, :, 0])
    assert np.isnan(dirty[:, 100:, 1].astype(np.float32)).all()


def test_only_long_sequences_of_few_heads_are_cut():
    from cupy_delta.cuda.variants import launches_of

    def segments(T, H, **sizes):
        facts = DeviceFacts(sm_count=132, shared_bytes=227 * 1024)
        sizes = dict(dtype="bfloat16", K=128, V=128) | sizes
        names = launches_of(facts, ("forward",), T=T, H=H, **sizes)
        return max(dict(x.defines).get("SEGMENTS", 1) for x in names)

    assert segments(32768, 4) == 8
    assert segments(32768, 16) == 8
    assert segments(32768, 32) == 1
    assert segments(8192, 8) == 4
    assert segments(2048, 8) == 1
    assert segments(32768, 1, varlen=True, B=4) == 4
    assert segments(8192, 1, varlen=True, B=8) == 1
