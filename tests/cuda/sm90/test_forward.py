"""The kernels for compute capability 9.0 under the race-checking emulator."""

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, Run
from helpers import definition, make_inputs
from rounded import error, rounded_products, twice, wide

import cupy_delta as cd
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.sm90 import cost
from cupy_delta.cuda.sm90.segments import Part
from cupy_delta.cuda.sm90.tiles import CHUNK
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.cuda.variants import launches_of

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# Empty and one-token sequences, ends within, at and right after a chunk.
VARLEN = [0, 0, 1, 64, 128, 193, 200]


@pytest.fixture
def divided(monkeypatch, emulated):
    """Return a function that fixes how a walk is divided, on a Hopper device.

    With `first` the first of the segments is walked beside transfers, and has so many percent.
    With `last` X is kept for all but the last segment, which has so many percent. Transfers have
    slices of their own width with `transfer`.
    """

    def use(math, segments=1, first=None, last=None, run=None, transfer=None):
        fixed = cost.Choice(math, segments, transfer or math)
        if first is not None:
            fixed = fixed._replace(concurrent=math, first_percent=first)
        if last is not None:
            fixed = fixed._replace(reuse_x=True, last_percent=last)
        monkeypatch.setattr(cost, "choose_forward", lambda *args: fixed)
        monkeypatch.setattr(plans, "plan", plans.made)
        emulated(run, **HOPPER)

    use.emulated = emulated
    return use


def launched(facts, **call):
    """The launches of a forward call."""
    return launches_of(facts, ("forward",), **(dict(K=128, V=128) | call))


def part(launch):
    """The segments that a launch walks."""
    return Part(*(int(x) for x in launch.arguments[-len(Part._fields) :]))


H200 = DeviceFacts(132, 227 * 1024, (9, 0))


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        (dict(dtype="float32"), H200),
        (dict(dtype="bfloat16", K=256), H200),
        (dict(dtype="bfloat16", V=100), H200),
        (dict(dtype="bfloat16", chunk_size=32), H200),
        (dict(dtype="bfloat16"), DeviceFacts(148, 227 * 1024, (10, 0))),
        (dict(dtype="bfloat16"), DeviceFacts(108, 163 * 1024, (8, 0))),
    ],
)
def test_what_does_not_fit_goes_to_the_portable_kernels(call, facts):
    assert "forward_hopper" not in {x.entry for x in launched(facts, **call)}


@pytest.mark.parametrize(
    ("B", "T", "H", "math", "segments"),
    [
        (1, 32768, 8, 1, 9),
        (1, 32768, 64, 1, 1),
        (4, 8192, 64, 2, 1),
        (1, 32768, 24, 2, 6),
        (1, 2048, 8, 1, 7),
        (1, 512, 8, 1, 1),
    ],
)
def test_division_fills_the_multiprocessors(B, T, H, math, segments):
    walk = launched(H200, dtype="bfloat16", B=B, T=T, H=H)[-1]
    assert (dict(walk.defines)["MATH"], part(walk).segments) == (math, segments)


def test_the_first_segment_is_walked_beside_the_transfers_of_others():
    """In pairs of blocks like theirs, and both end before the walk that reads what they leave."""
    first, transfers, rest = launched(H200, dtype="bfloat16", T=32768, H=8)
    assert (first.concurrent, transfers.concurrent, rest.concurrent) == (True, False, False)
    assert dict(first.defines)["PLACED"] == dict(transfers.defines)["CLUSTER"] == 2
    walked = [(part(x).first, part(x).walked) for x in (first, transfers, rest)]
    assert walked == [(0, 1), (1, 7), (1, 8)]


def test_lengths_of_sequences_make_no_other_kernels():
    """However sequences are cut: what is compiled for one length serves the others."""
    lengths = range(2048, 131073, 2048)
    launches = [x for T in lengths for x in launched(H200, dtype="bfloat16", T=T, H=8)]
    assert len({part(x) for x in launches}) > 5
    assert len({x.defines for x in launches}) == 3


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("V", [64, 128, 192])
def test_x_is_kept_by_clusters_for_walks_of_one_slice(K, V):
    launches = launched(H200, dtype="bfloat16", K=K, V=V, T=32768, H=8)
    macros = [dict(x.defines) for x in launches]
    keep = [x for x in macros if x["TRANSFER"] and x["KEPT"]]
    take = [x for x in macros if x["JOINS"] and x["KEPT"]]
    assert len(keep) == len(take) >= (K == V == 128)
    assert all(x["CLUSTER"] == 2 for x in keep) and all(x["MATH"] == 1 for x in take)


@pytest.mark.parametrize(("heads", "math"), [(64, 2), (16, 1)])
def test_gates_take_as_many_slices_as_fill_the_multiprocessors(heads, math):
    launches = launched(H200, dtype="bfloat16", B=4, T=8192, H=heads, gate=True)
    walks = [dict(x.defines) for x in launches if x.file == "sm90/forward.cu"]
    # That of sequences which gates do not make forget.
    (walk,) = (x for x in walks if x.get("STARTS", 0) < 2)
    assert walk["MATH"] == math


def check(divided, args, kw):
    """Compare with float64: within 2x of plain rounded products of chunks of 64."""
    result = cd.chunk_delta_rule(*args, **kw)
    if divided.emulated.devices is not None:
        entries = [x.entry for x in divided.emulated.devices[-1].launches]
        assert "forward_hopper" in entries
        assert "forward" not in entries
    wide_args, wide_kw = wide(args, kw)
    exact = definition(*wide_args, **wide_kw)
    plain = rounded_products(args, kw, CHUNK)
    for x, y, other in zip(result, exact, plain, strict=True):
        assert x.shape == y.shape
        assert error(x, y) < twice(other, y)
    return result


@pytest.mark.ptx_leg(T=[65, 200])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("math", [1, 2])
def test_lengths(divided, math, T):
    divided(math)
    args, kw = make_inputs(T, B=2, G=2, K=128, V=128, dtype=BF16, initial=True, beta=(0, 2))
    check(divided, args, kw)


@pytest.mark.parametrize("math", [1, 2])
@pytest.mark.parametrize(("K", "V", "dtype"), [(64, 64, F16), (8, 200, BF16), (96, 72, BF16)])
def test_head_sizes(divided, math, K, V, dtype):
    divided(math)
    args, kw = make_inputs(130, G=2, K=K, V=V, dtype=dtype, initial=True)
    check(divided, args, kw)


@pytest.mark.parametrize("decay", [None, 0.3, 30])
@pytest.mark.parametrize("math", [1, 2])
def test_sequences_of_any_lengths(divided, math, decay):
    divided(math)
    gate = None if decay is None else "scalar"
    options = dict(K=64, V=64, dtype=BF16, cu_seqlens=VARLEN, initial=True)
    args, kw = make_inputs(200, G=2, gate=gate, decay=decay, **options)
    check(divided, args, kw)


@pytest.mark.parametrize("gate", [None, "scalar"])
def test_neighbours_do_not_matter(divided, gate):
    """NaN after a ragged chunk leaves the bits of the other sequences as they are."""
    divided(2)
    options = dict(gate=gate, dtype=BF16, cu_seqlens=VARLEN, initial=True)
    args, kw = make_inputs(200, K=64, V=64, **options)
    clean = cd.chunk_delta_rule(*args, **kw)
    spoilt = [None if x is None else x.copy() for x in args]
    for x in spoilt:
        if x is not None:
            x[:, 64:128] = np.nan
    result = cd.chunk_delta_rule(*spoilt, **kw)
    others = np.r_[0:64, 128:200]
    assert np.array_equal(result.o[:, others].view("u2"), clean.o[:, others].view("u2"))
    sequences = [0, 1, 2, 4, 5]
    assert np.array_equal(result.final_state[sequences], clean.final_state[sequences])
    assert np.isnan(result.final_state[3].astype(float)).any()


@pytest.mark.parametrize("math", [1, 2])
def test_nan_in_a_gate_reaches_no_chunk_before_it_and_no_other_head(divided, math):
    divided(math)
    args, kw = make_inputs(200, H=2, K=64, V=128, gate="scalar", dtype=BF16, initial=True)
    clean = cd.chunk_delta_rule(*args, **kw)
    args[4] = args[4].copy()
    args[4][0, 100, 0] = np.nan
    result = cd.chunk_delta_rule(*args, **kw)
    assert np.array_equal(result.o[:, :64].view("u2"), clean.o[:, :64].view("u2"))
    assert np.array_equal(result.o[:, :, 1].view("u2"), clean.o[:, :, 1].view("u2"))
    assert np.array_equal(result.final_state[:, 1], clean.final_state[:, 1])
    assert np.isnan(result.o[:, 100:, 0].astype(float)).all()
    assert np.isnan(result.final_state[:, 0]).all()


UNEVEN = [0, 0, 3, 260, 261, 390]


# Every pair of slices per block, lengths of segments and sequences; of slices and K.
@pytest.mark.ptx_leg(cu_seqlens=[UNEVEN], first=[60, 130])
@pytest.mark.parametrize(
    ("math", "K", "first", "last", "cu_seqlens"),
    [
        (1, 64, None, None, None),
        (2, 128, None, None, UNEVEN),
        (1, 64, 60, None, UNEVEN),
        (2, 64, 60, None, None),
        (1, 128, 130, 60, None),
        (2, 128, 130, 60, UNEVEN),
        (1, 128, None, 130, UNEVEN),
        (2, 64, None, 130, None),
    ],
)
def test_segments(divided, math, K, first, last, cu_seqlens):
    divided(math, 4, first, last)
    B = 2 if cu_seqlens is None else 1
    options = dict(K=K, V=72, dtype=BF16, cu_seqlens=cu_seqlens, initial=True)
    args, kw = make_inputs(390, B=B, G=3 - B, **options)
    check(divided, args, kw)


@pytest.mark.parametrize(("cu_seqlens", "gate"), [(None, None), ([0, 3, 290, 390], "scalar")])
def test_segments_of_one_slice_after_transfers_of_two(divided, cu_seqlens, gate):
    """As few heads are divided: X that a cluster of wide blocks keeps, in narrow ones."""
    divided(1, 4, first=95, last=77, transfer=2)
    options = dict(K=128, V=128, gate=gate, dtype=BF16, cu_seqlens=cu_seqlens, initial=True)
    args, kw = make_inputs(390, G=2, **options)
    check(divided, args, kw)


@pytest.mark.parametrize("gate", [None, "scalar"])
def test_states_that_hardly_change_over_segments(divided, gate):
    """With small beta what a segment does to a state is nearly the identity, times its decay."""
    divided(1, 5, first=95, last=77)
    options = dict(gate=gate, decay=0.001, beta=(0, 0.05), dtype=BF16, initial=True)
    args, kw = make_inputs(640, K=128, V=128, **options)
    check(divided, args, kw)


@pytest.mark.parametrize(("gate", "first"), [(None, None), (None, 95), ("scalar", None)])
def test_nine_segments(divided, gate, first):
    """Eight transfers in a row: each buffer of a join is used four times."""
    divided(1, 9, first)
    options = dict(gate=gate, decay=0.002, beta=(0, 0.5), dtype=BF16, initial=True)
    args, kw = make_inputs(9 * 64, K=64, V=64, **options)
    check(divided, args, kw)


@pytest.mark.ptx_leg(gate=["scalar"])
@pytest.mark.parametrize("gate", [None, "scalar"])
def test_x_that_is_given_has_the_bits_of_x_that_is_solved(divided, gate):
    args, kw = make_inputs(300, K=128, V=72, gate=gate, dtype=BF16, initial=True, beta=(0, 2))
    results = []
    for last in (None, 100):
        divided(1, 4, last=last)
        results.append(cd.chunk_delta_rule(*args, **kw))
    solved, given = results
    assert np.array_equal(solved.o.view("u2"), given.o.view("u2"))
    assert np.array_equal(solved.final_state, given.final_state)


@pytest.mark.ptx_leg(beta=[(1.99, 1.99)])
@pytest.mark.parametrize("correlation", [0.5, 0.9])
@pytest.mark.parametrize("beta", [(0, 1), (1.99, 1.99)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_segments_of_hard_keys(divided, dtype, correlation, beta):
    divided(1, 5, 88)
    options = dict(dtype=dtype, correlation=correlation, beta=beta, initial=True)
    args, kw = make_inputs(330, K=64, V=64, **options)
    check(divided, args, kw)


# The slices of a transfer make clusters of two; or, as there are three of them, none.
@pytest.mark.ptx_leg(decay=[0.3])
@pytest.mark.parametrize(("math", "V"), [(1, 72), (1, 64), (2, 136)])
@pytest.mark.parametrize("decay", [0.3, 30])
def test_segments_with_a_gate(divided, math, V, decay):
    divided(math, 3, last=80 if (math, V) == (1, 72) else None)
    options = dict(gate="scalar", decay=decay, beta=(0, 2), dtype=BF16, initial=True)
    args, kw = make_inputs(300, K=128, V=V, **options)
    check(divided, args, kw)


@pytest.mark.ptx_leg(math=[2])
@pytest.mark.parametrize(
    ("gate", "math", "segments", "first", "last"),
    [
        (None, 1, 1, None, None),
        (None, 2, 1, None, None),
        (None, 1, 2, None, 70),
        (None, 2, 4, 100, 100),
        ("scalar", 2, 1, None, None),
        ("scalar", 1, 2, None, 70),
    ],
)
def test_any_order_of_events_gives_the_same_bits(divided, gate, math, segments, first, last):
    options = dict(gate=gate, dtype=BF16, cu_seqlens=VARLEN, initial=True)
    args, kw = make_inputs(200, K=64, V=64, **options)
    runs = [Run(), Run(schedule="descending", completion="early")]
    runs += [Run(schedule="random", completion="either", preempt=30, seed=s) for s in range(2)]
    results = []
    for run in runs:
        divided(math, segments, first, last, run=run)
        results.append(cd.chunk_delta_rule(*args, **kw))
    for result in results[1:]:
        assert np.array_equal(result.o.view("u2"), results[0].o.view("u2"))
        assert np.array_equal(result.final_state, results[0].final_state)


@pytest.mark.ptx_leg(beta=[(1.99, 1.99)])
@pytest.mark.parametrize("correlation", [0.5, 0.9])
@pytest.mark.parametrize("beta", [(0, 1), (1, 1), (1.99, 1.99)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_hard_keys(divided, dtype, correlation, beta):
    divided(2)
    args, kw = make_inputs(
        200, K=64, V=64, dtype=dtype, correlation=correlation, beta=beta, initial=True
    )
    check(divided, args, kw)


@pytest.mark.parametrize("beta", [1.7, 1.9])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_keys_that_are_nearly_the_same(divided, dtype, beta):
    """Rows of X are alike, and so are errors of them; four heads, lest a plain one be lucky."""
    divided(2)
    options = dict(correlation=0.9999, beta=(beta, beta), initial=True)
    args, kw = make_inputs(128, H=4, K=64, V=64, dtype=dtype, **options)
    check(divided, args, kw)


def test_the_inverse_is_rounded_row_after_row(divided):
    """Within once plain rounded products, where one that is rounded at its end is not."""
    divided(2)
    options = dict(correlation=0.999, beta=(1.99, 1.99), initial=True, seed=2)
    args, kw = make_inputs(128, H=4, K=64, V=64, dtype=BF16, **options)
    result = check(divided, args, kw)
    exact = definition(*wide(args, kw)[0], **wide(args, kw)[1])
    for x, y, plain in zip(result, exact, rounded_products(args, kw, CHUNK), strict=True):
        assert error(x, y) < error(plain, y)


@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_state_layouts_and_normalised_rows(divided, layout):
    divided(1)
    args, kw = make_inputs(70, K=72, V=128, dtype=BF16, initial=True, layout=layout)
    check(divided, args, kw)
    long = [(3 * x.astype(np.float32)).astype(BF16) for x in args[:2]]
    normalised = cd.chunk_delta_rule(*long, *args[2:], **kw, qk_l2norm=True)
    assert error(normalised.o, cd.chunk_delta_rule(*args, **kw).o) < 0.02
