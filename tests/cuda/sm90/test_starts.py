"""Where walks of segments start from nothing, alone, under the race-checking emulator."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, EmulatorDevice, Run, copy_in
from helpers import make_inputs

from cupy_delta.call import Call
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90 import starts, training
from cupy_delta.cuda.sm90.gates import token_factors_launch
from cupy_delta.cuda.sm90.segments import WHOLE, Part, record_arrays
from cupy_delta.cuda.sm90.tiles import CHUNK
from cupy_delta.cuda.spec import Plan

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
LEGS = ["source", "ptx"]
# In the order of the walk, after which factors.
WALKS = {"forward": (False, True), "training": (False, False), "backward": (True, False)}
# Natural logarithms per token of which m chunks leave 2^-126, a hundredth more or less.
ENOUGH, SHORT = 126 * np.log(2) / CHUNK * 1.01, 126 * np.log(2) / CHUNK * 0.99


def make_case(T, decay, *, H=1, G=1, K=64, dtype=BF16, B=1, cu_seqlens=None, beta=(0, 2), seed=0):
    """Keys of unit length at most, whose rounding makes none longer."""
    args, _ = make_inputs(
        T, B=B, H=H, G=G, K=K, V=8, dtype=dtype, cu_seqlens=cu_seqlens, beta=beta, seed=seed
    )
    q, k, _, beta, _ = args
    cu = None if cu_seqlens is None else np.asarray(cu_seqlens, np.int64)
    sizes = dict(B=B, T=T, N=B if cu is None else len(cu) - 1, H=H, HV=H * G, K=K, V=8)
    call = Call(dtype=dtype, gate="scalar", varlen=cu is not None, scale=1.0, **sizes)
    g = np.broadcast_to(-np.asarray(decay, np.float32), (B, T, H * G)).copy()
    k = (0.99 * k.astype(np.float32)).astype(dtype)
    return call, dict(q=q, k=k, beta=beta.astype(np.float32), g=g, cu_seqlens=cu)


def found(call, arrays, part, most, walk="forward", other=None, leg="source", run=None):
    backward, records = WALKS[walk]
    factors = token_factors_launch(call) if records else training.wy_factors_hopper_launch(call)
    workspace = record_arrays(call) if records else training.core_arrays(call)
    launch = starts.segment_starts_launch(
        call, part, most, backward=backward, records=records, other=other
    )
    plan = Plan((factors, launch), starts.start_arrays(call, part.segments), workspace)
    given = {name: None if x is None else copy_in(x, name) for name, x in arrays.items()}
    device = EmulatorDevice(run or Run(), leg=leg, **HOPPER)
    return np.array(execute(plan, given, device)["starts"])


def borders(chunks, part):
    """Chunks at which the segments of a sequence begin, and its end, as find_segment has them."""
    if part.segments == 1:
        return [0, chunks]
    whole = 100 * (part.segments - 2) + part.first_percent + part.last_percent
    length = -(-100 * chunks // whole)
    last = part.last_percent * length // 100
    first = max(chunks - (part.segments - 2) * length - last, 0)
    inner = [min(first + i * length, chunks) for i in range(part.segments - 1)]
    return [0, *inner, chunks]


def definition(call, arrays, part, most, walk="forward", other=None):
    """The same from the gates and keys themselves, in float64."""
    backward, cu = WALKS[walk][0], arrays["cu_seqlens"]
    k, beta, g = (np.asarray(arrays[x], np.float64) for x in ("k", "beta", "g"))
    spans = [(b, 0, call.T) for b in range(call.B)]
    if cu is not None:
        spans = [(0, *map(int, ends)) for ends in pairwise(cu)]
    starts = np.full((len(spans), part.segments - 1, call.HV), -1)
    for n, (b, start, stop) in enumerate(spans):
        chunks = -(-(stop - start) // CHUNK)
        at = borders(chunks, part)
        for step in range(1, part.segments):
            segment = part.segments - 1 - step if backward else step
            if at[segment] == at[segment + 1]:
                continue
            decides = step == 1 and other is not None
            begins = decides and at[segment + backward] == (chunks if backward else 0)
            if begins:
                segment += -1 if backward else 1
                if not 0 < at[segment + backward] < chunks:
                    starts[n, 0] = 0
                    continue
            if decides and other.segments > 1:
                place = at[segment + backward]
                inner = [x for x in borders(chunks, other)[1:-1] if 0 < x < chunks] or [place]
                if place < inner[-1] if backward else place > inner[0]:
                    continue
            for hv in range(call.HV):
                for m in range(1, most + 1):
                    first = at[segment + 1] if backward else at[segment] - m
                    if first < 0 or first + m > chunks:
                        break
                    rows = slice(start + first * CHUNK, min(start + (first + m) * CHUNK, stop))
                    each = [
                        slice(i, min(i + CHUNK, rows.stop))
                        for i in range(rows.start, rows.stop, CHUNK)
                    ]
                    lost = [np.sum(g[b, i, hv]) / np.log(2) for i in each]
                    if sum(max(x, -32) if decides else x for x in lost) < -126:
                        h = hv // call.groups
                        sizes = np.sum(k[b, rows, h] ** 2, -1)
                        largest = max(1, np.abs(1 - beta[b, rows, hv] * sizes).max())
                        if np.log2(largest) * CHUNK * m <= 26:
                            starts[n, step - 1, hv] = 0 if begins else m
                        break
    return starts


def check(call, arrays, part, most, **options):
    leg, run = options.pop("leg", "source"), options.pop("run", None)
    expected = definition(call, arrays, part, most, **options)
    assert np.array_equal(found(call, arrays, part, most, **options, leg=leg, run=run), expected)
    return expected


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_gates_at_the_threshold(leg, walk, m):
    call, arrays = make_case(CHUNK * 18, ENOUGH / m)
    assert np.all(check(call, arrays, Part(3), 6, walk=walk, leg=leg) == m)
    call, arrays = make_case(CHUNK * 18, SHORT / m)
    assert np.all(check(call, arrays, Part(3), 6, walk=walk, leg=leg) == m + 1)
    assert np.all(check(call, arrays, Part(3), m, walk=walk, leg=leg) == -1)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("walk", WALKS)
def test_more_chunks_than_lanes(leg, walk):
    call, arrays = make_case(CHUNK * 100, ENOUGH / 40, K=8)
    assert np.all(check(call, arrays, Part(2), 64, walk=walk, leg=leg) == 40)
    call, arrays = make_case(CHUNK * 100, ENOUGH / 64, K=8)
    assert np.all(check(call, arrays, Part(2), 64, walk=walk, leg=leg) == -1)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize(("H", "G", "K", "dtype"), [(2, 3, 128, BF16), (1, 9, 96, F16)])
def test_every_head_has_a_start_of_its_own(leg, walk, H, G, K, dtype):
    """By its own gates, betas and keys."""
    rng = np.random.default_rng(1)
    call, arrays = make_case(CHUNK * 14, 1, H=H, G=G, K=K, dtype=dtype, B=2)
    heads = rng.choice([ENOUGH / 4, ENOUGH / 2, ENOUGH, 3 * ENOUGH, 0.01], (2, 1, H * G))
    arrays["g"] = np.float32(-heads * rng.uniform(0.9, 1.1, arrays["g"].shape))
    # One token of each row, whose write makes a state longer by a bit more than keys may.
    arrays["beta"][:, 5 * CHUNK + 3, 0] = 2.6
    arrays["beta"][:, 10 * CHUNK + 7, H * G - 1] = 2.6
    expected = check(call, arrays, Part(3), 4, walk=walk, leg=leg)
    assert len(np.unique(expected)) > 3


def longer(arrays, token, orders, m):
    """Make a token's |1 - b k k| so large that keys bring back so many binary orders in all.

    By a short key and a large beta: other keys with that beta would bring back more.
    """
    arrays["k"][:, token] = (arrays["k"][:, token].astype(np.float32) / 2).astype(BF16)
    factor = 2.0 ** (orders / (CHUNK * m))
    size = np.sum(np.asarray(arrays["k"][0, token, 0], np.float64) ** 2)
    arrays["beta"][0, token] = (1 + factor) / size


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("place", ["first", "some", "last"])
def test_keys_at_the_threshold(leg, walk, m, place):
    """At either end of the chunks that count, and between; right beyond them they do not."""
    backward = WALKS[walk][0]
    border, count = 6 * CHUNK, m * CHUNK
    token = {"first": 0, "some": 21, "last": count - 1}[place]
    token, beyond = border - count + token, border - count - 1
    if backward:
        token, beyond = (2 * border - 1 - x for x in (token, beyond))
    for at, orders, start in ((token, 25.5, m), (token, 26.5, -1), (beyond, 99, m)):
        call, arrays = make_case(CHUNK * 12, ENOUGH / m, beta=(0, 1))
        longer(arrays, at, orders, m)
        assert np.all(check(call, arrays, Part(2), 5, walk=walk, leg=leg) == start)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("walk", WALKS)
def test_keys_bring_back_as_much_as_a_head_has_chunks(leg, walk):
    """Not as those of its key head have that forgets the slowest."""
    call, arrays = make_case(CHUNK * 12, np.array([ENOUGH, ENOUGH / 4]), G=2, beta=(0, 1))
    longer(arrays, 6 * CHUNK + (1 if WALKS[walk][0] else -1), 25.5, 1)
    assert check(call, arrays, Part(2), 5, walk=walk, leg=leg).ravel().tolist() == [1, -1]


@pytest.mark.parametrize("leg", LEGS)
def test_keys_past_the_end_do_not_count(leg):
    """Backwards the chunks that count may end before their last one is full."""
    end = 7 * CHUNK + 10
    call, arrays = make_case(8 * CHUNK, ENOUGH / 3.05, cu_seqlens=[0, end])
    arrays["k"][:, end:] = 100
    assert np.all(check(call, arrays, Part(2), 5, walk="backward", leg=leg) == 4)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("walk", WALKS)
def test_sequences_of_any_lengths(leg, walk):
    """Empty ones and such of fewer chunks than segments; borders where chunks are not whole."""
    ends = [0, 0, 1, 70, 70, 70 + 9 * CHUNK, 70 + 9 * CHUNK + 300, 1300]
    call, arrays = make_case(1310, ENOUGH / 2, H=2, cu_seqlens=ends)
    expected = check(call, arrays, Part(4, 80, 50), 4, walk=walk, leg=leg)
    assert set(np.unique(expected)) >= {-1, 2}


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("walk", ["forward", "backward"])
@pytest.mark.parametrize(
    ("other", "start"), [(Part(4), -1), (Part(4, 200, 200), 4), (Part(2), 4), (WHOLE, 4), (None, 1)]
)
def test_another_division_may_begin_its_second_segment_sooner(leg, walk, other, start):
    call, arrays = make_case(CHUNK * 12, ENOUGH)
    expected = check(call, arrays, Part(3), 4, walk=walk, other=other, leg=leg)
    assert np.all(expected == [[[start], [1]]])


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("resets", "start"), [([5], -1), ([1, 3, 5], -1), ([1, 2, 3, 5], 5)])
def test_a_few_resets_do_not_decide(leg, resets, start):
    """Between two divisions: a segment is walked so all the same."""
    call, arrays = make_case(CHUNK * 12, 1e-4)
    for chunk in resets:
        arrays["g"][:, CHUNK * chunk + 9] = -np.inf
    assert np.all(check(call, arrays, Part(2), 6, other=WHOLE, leg=leg) == start)
    assert np.all(check(call, arrays, Part(2), 6, leg=leg) == 1)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("walk", WALKS)
def test_what_comes_from_elsewhere_changes_nothing(leg, walk):
    """NaN in tokens beyond those that count; a NaN among their gates is not forgotten."""
    backward = WALKS[walk][0]
    border = 6 * CHUNK
    for distance, start in ((2 * CHUNK, 2), (-1, 2), (5, -1), (2 * CHUNK - 1, -1)):
        call, arrays = make_case(CHUNK * 12, ENOUGH / 2)
        token = border + distance if backward else border - 1 - distance
        arrays["g"][:, token] = np.nan
        assert np.all(found(call, arrays, Part(2), 4, walk, leg=leg) == start)


@pytest.mark.parametrize("leg", LEGS)
def test_resets(leg):
    """Gates of -inf and -1000 forget at once, however few there are."""
    for gate in (-np.inf, -1000.0, -88.0, -60.0):
        call, arrays = make_case(CHUNK * 12, 1e-4)
        arrays["g"][:, CHUNK * 3 + 9] = gate
        expected = check(call, arrays, Part(2), 4, leg=leg)
        assert np.all(expected == (3 if gate < -87.4 else -1))


@pytest.mark.parametrize("leg", LEGS)
def test_any_order_of_events_gives_the_same_starts(leg):
    call, arrays = make_case(CHUNK * 12, ENOUGH / 3, H=2, G=2)
    for run in (Run("descending", "early"), Run("random", "either", preempt=30, seed=1)):
        check(call, arrays, Part(3), 4, leg=leg, run=run)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("other", "start"), [(WHOLE, 0), (Part(3), 0), (Part(8), -1)])
def test_a_first_segment_without_tokens_leaves_the_choice_to_the_third(leg, other, start):
    """Between two divisions; the second one begins with the sequence then, where all is known.

    Sequences of as many segments of four chunks as come after the first, of such with a first one,
    of one chunk, and one that does not forget.
    """
    chunks = [20, 0, 1, 25, 20]
    ends = np.cumsum([0, *chunks]) * CHUNK
    decay = np.full((ends[-1], 1), ENOUGH / 4)
    decay[ends[-2] :] = 0.01
    call, arrays = make_case(int(ends[-1]), decay, cu_seqlens=ends.tolist())
    expected = check(call, arrays, Part(6, 134), 4, other=other, leg=leg)[..., 0]
    assert expected[:, 0].tolist() == [start, -1, 0, 4 if start == 0 else -1, -1]
