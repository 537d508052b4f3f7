"""Walks of segments that start from nothing, where gates make sequences forget."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, EmulatorDevice, Run
from helpers import definition, make_inputs
from rounded import error, rounded_products, twice, wide

from cupy_delta.call import Call
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90 import cost
from cupy_delta.cuda.sm90.tiles import CHUNK, transfer_cluster
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.cuda.variants import launches_of

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
H200 = DeviceFacts(132, 227 * 1024, (9, 0))
LEGS = ["source", "ptx"]
T = CHUNK * 13 - 5
# One walk, or three segments whose walks join transfers, the first one beside them.
WHOLE, JOINED = cost.Choice(1), cost.Choice(1, 3, 2, 1, 150, True, 50)
# Segments of four, three, three and three chunks, and how they start where gates forget.
LATE, STARTS = cost.Late(2, 4, 4, 134), np.array([4, 2, 2])[:, None]
BEGINS = np.array([0, 4, 7, 10, 13]) * CHUNK
# Logarithms of gates of which four chunks forget, and two of later ones; and of such that never do.
FORGETS = np.log(2) / CHUNK * np.where(np.arange(T + 5) < BEGINS[1], 126.5 / 4, 66)[:, None]
KEEPS = 0.01


def make_case(decay, *, T=T, **options):
    options = dict(K=64, V=128, G=2, dtype=BF16, initial=True, beta=(0, 2)) | options
    args, kw = make_inputs(T, gate="scalar", **options)
    args[1] = (0.99 * args[1].astype(np.float32)).astype(args[1].dtype)  # none longer than 1
    args[3], args[4] = args[3].astype(np.float32), args[4].astype(np.float32)
    args[4][...] = -np.asarray(decay if np.ndim(decay) != 2 else decay[:T], np.float32)
    return args, kw


class AfterLate(EmulatorDevice):
    """Keeps the outputs that late walks have left."""

    def launch(self, launch, arrays):
        super().launch(launch, arrays)
        if dict(launch.defines).get("STARTS") == 2:
            self.o = np.array(arrays["o"])


def computed(monkeypatch, args, kw, choice, late, leg="source", run=None, device=None):
    """Return o and the final state, and where segments start."""
    q, _, v, _, _ = args
    (B, T, H, K), (HV, V), cu = q.shape, v.shape[2:], kw["cu_seqlens"]
    call = Call(
        dtype=q.dtype,
        gate="scalar",
        scale=K**-0.5,
        varlen=cu is not None,
        state_layout=kw["state_layout"],
        **dict(B=B, T=T, N=B if cu is None else len(cu) - 1, H=H, HV=HV, K=K, V=V),
    )
    keeps = cost.takes_x(call) and transfer_cluster(call, choice.transfer_tiles) > 1
    choice = choice._replace(reuse_x=choice.reuse_x and keeps, late=late)
    monkeypatch.setattr(cost, "choose_forward", lambda *_: choice)
    device = device or EmulatorDevice(run or Run(), leg=leg, **HOPPER)
    given = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True)) | kw
    given["cu_seqlens"] = None if cu is None else np.asarray(cu, np.int64)
    arrays = execute(plans.made("forward", call, device.facts), given, device)
    starts = arrays.get("starts")
    return np.array(arrays["o"]), np.array(arrays["final_state"]), starts


def check(results, args, kw):
    """Compare with float64: within 2x of plain rounded products."""
    exact = definition(*wide(args, kw)[0], **wide(args, kw)[1])
    for x, y, other in zip(results[:2], exact, rounded_products(args, kw, CHUNK), strict=True):
        assert error(x, y) < twice(other, y)


def same(results, others):
    """Whether outputs, and states if both have them, are equal to the bit."""
    pairs = zip(results[:2], others[:2], strict=True)
    return all(np.array_equal(x.view("u1"), y.view("u1")) for x, y in pairs)


@pytest.mark.ptx_leg(options=[dict(), dict(dtype=F16)])
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("choice", [WHOLE, JOINED])
@pytest.mark.parametrize(
    ("tiles", "options"),
    [
        (2, dict()),
        (1, dict(dtype=F16)),
        (2, dict(dtype=F16, initial=False)),
        (2, dict(K=96, V=192, layout="vk")),
        (1, dict(K=128, V=64, B=2)),
    ],
)
def test_outputs_and_states(monkeypatch, leg, choice, tiles, options):
    args, kw = make_case(FORGETS, **options)
    late = LATE._replace(value_tiles=tiles)
    *results, starts = computed(monkeypatch, args, kw, choice, late, leg)
    assert np.all(starts == STARTS)
    check(results, args, kw)
    args, kw = make_case(KEEPS, **options)
    *results, starts = computed(monkeypatch, args, kw, choice, late, leg)
    assert np.all(starts == -1)
    assert same(results, computed(monkeypatch, args, kw, choice, None, leg))


def part_of(args, rows):
    return [x[:, rows] for x in args]


@pytest.mark.ptx_leg(gaps=[[2]])
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("gaps", [[], [2], [3], [2, 3]])
@pytest.mark.parametrize("tiles", [1, 2])
def test_a_segment_is_a_walk_from_zero(monkeypatch, leg, tiles, gaps):
    """To the bit, and goes on through those that have no start."""
    args, kw = make_case(FORGETS, T=CHUNK * 13)
    for segment in gaps:
        args[4][:, BEGINS[segment - 1] : BEGINS[segment]] = -KEEPS
    late = LATE._replace(value_tiles=tiles)
    o, final, starts = computed(monkeypatch, args, kw, WHOLE, late, leg)
    assert [i for i in range(1, 4) if np.all(starts[:, i - 1] == -1)] == gaps
    for i, end in pairwise([0, *(i for i in range(1, 4) if i not in gaps), 4]):
        early = int(starts[0, i - 1, 0]) * CHUNK if i > 0 else 0
        some = part_of(args, slice(BEGINS[i] - early, BEGINS[end]))
        initial = kw | dict(initial_state=None) if i > 0 else kw
        alone, state, _ = computed(monkeypatch, some, initial, WHOLE, None, leg)
        assert same([o[:, BEGINS[i] : BEGINS[end]].copy()], [alone[:, early:].copy()])
    assert same([final], [state])


@pytest.mark.parametrize("leg", LEGS)
def test_every_head_has_a_start_of_its_own(monkeypatch, leg):
    """But at the second segment, where all have one."""
    args, kw = make_case(FORGETS, H=2)
    args[4][:, BEGINS[1] :] *= np.array([0.7, 1.0, 2.0, 3.0], np.float32)
    args[4][:, BEGINS[2] - CHUNK : BEGINS[2], 3] = -KEEPS
    *results, starts = computed(monkeypatch, args, kw, JOINED, LATE, leg)
    assert starts[0].tolist() == [[4, 4, 4, 4], [3, 2, 1, 2], [3, 2, 1, 1]]
    check(results, args, kw)


@pytest.mark.ptx_leg(segment=[2])
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("segment", [2, 3])
def test_which_chunks_before_a_segment_are_walked(monkeypatch, leg, segment):
    """Of every head its own: a NaN in the first of them spoils the segment, one before does not."""
    args, kw = make_case(FORGETS, H=2)
    args[4][:, BEGINS[1] :] *= np.array([0.7, 1.0, 2.0, 3.0], np.float32)
    m, border = [3, 2, 1, 1], BEGINS[segment]
    for early in (0, 1):
        spoiled = [*args[:2], args[2].copy(), *args[3:]]
        for head in range(4):
            spoiled[2][:, border - m[head] * CHUNK - early, head] = np.nan
        o, _, starts = computed(monkeypatch, spoiled, kw, WHOLE, LATE, leg)
        assert starts[0, segment - 1].tolist() == m
        finite = np.isfinite(o[:, border : border + CHUNK].astype(float))
        assert np.all(finite == early)


@pytest.mark.ptx_leg(choice=[JOINED])
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("choice", [WHOLE, JOINED])
def test_sequences_are_walked_either_way(monkeypatch, leg, choice):
    """Each by what it is itself, to the bit; what others hold changes nothing."""
    args, kw = make_case(FORGETS, B=3)
    args[4][1] = -KEEPS
    args[4][2, :, 1] = -KEEPS  # one head that does not forget is enough
    device = AfterLate(leg=leg, **HOPPER)
    *results, starts = computed(monkeypatch, args, kw, choice, LATE, device=device)
    assert same([device.o[:1]], [results[0][:1]]) and np.all(device.o[1:].view("u1") == 255)
    assert np.all(starts[0] == STARTS) and np.all(starts[1] == -1)
    assert np.all(starts[2] == STARTS * [1, 0] - [0, 1])
    check(results, args, kw)
    *others, _ = computed(monkeypatch, args, kw, choice, None, leg)
    for n in (1, 2):
        assert same([x[n] for x in results], [x[n] for x in others])
    args[4][1:] = args[4][0]
    args[2][1:] = np.nan
    *others, _ = computed(monkeypatch, args, kw, choice, LATE, leg)
    assert same([x[0] for x in results], [x[0] for x in others])


@pytest.mark.ptx_leg(decay=[2.5])
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("choice", [WHOLE, JOINED])
@pytest.mark.parametrize("decay", [FORGETS[0, 0], 2.5])
def test_sequences_of_any_lengths(monkeypatch, leg, choice, decay):
    """Empty ones, and such of fewer chunks than segments; tokens of none stay as they are."""
    ends = [0, 0, 1, 130, 130 + 12 * CHUNK + 30, 1187, 1200]
    args, kw = make_case(decay, T=1210, cu_seqlens=ends)
    for x in args:
        x[:, 1200:] = np.nan
    o, final, starts = computed(monkeypatch, args, kw, choice, LATE, leg)
    suits = np.all(starts[:, 0] >= 0, axis=-1)
    assert suits.tolist() == [False, True, False, True, False, True]
    args, o = part_of(args, slice(1200)), o[:, :1200]
    check((o, final), args, kw)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("choice", [WHOLE, JOINED])
def test_sequences_whose_first_segment_has_no_token(monkeypatch, leg, choice):
    """They begin with the second one, from what is given; the third decides how they are walked."""
    late = cost.Late(2, 6, 4, 134)
    ends = np.cumsum([0, 20, 1, 20]) * CHUNK - np.array([0, 5, 5, 9])
    decay = np.full((ends[-1], 1), FORGETS[0, 0])
    decay[ends[2] :] = KEEPS
    args, kw = make_case(decay, T=int(ends[-1]), cu_seqlens=ends.tolist())
    o, final, starts = computed(monkeypatch, args, kw, choice, late, leg)
    assert np.all(starts[:, 0] == np.array([[0], [0], [-1]]))
    check((o, final), args, kw)
    changed = [x.copy() for x in args]
    changed[4][:, 3 * CHUNK : 4 * CHUNK] = -KEEPS  # what the third segment starts after
    other, _, starts = computed(monkeypatch, changed, kw, choice, late, leg)
    assert np.all(starts[:, 0] == np.array([[-1], [0], [-1]]))
    assert same([o[:, : 3 * CHUNK].copy()], [other[:, : 3 * CHUNK].copy()])


CHANGES = {
    "gates": lambda args, t: args[4].__setitem__(np.s_[:, t:], -KEEPS),
    # Chunks beyond the range of units, which blocks of two slices have all of theirs taken for.
    "resets": lambda args, t: args[4].__setitem__(np.s_[:, t:], -60.0),
    "strengths": lambda args, t: args[3].__setitem__(np.s_[:, t:], 7.0),
    "keys": lambda args, t: args[1].__setitem__(np.s_[:, t:], 1.0),
    "values": lambda args, t: args[2].__setitem__(np.s_[:, t:], np.nan),
}


@pytest.mark.ptx_leg(change=["gates"])
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("choice", [WHOLE, JOINED])
def test_outputs_do_not_depend_on_later_tokens_by_a_bit(monkeypatch, leg, choice, change):
    """Whether a sequence is walked late, and where its segments start, does: of later outputs."""
    args, kw = make_case(FORGETS)
    o, _, _ = computed(monkeypatch, args, kw, choice, LATE, leg)
    kinds = set()
    for chunk in (3, 4, 8, 12):
        changed = [x.copy() for x in args]
        CHANGES[change](changed, chunk * CHUNK)
        other, _, starts = computed(monkeypatch, changed, kw, choice, LATE, leg)
        before = np.s_[:, : chunk * CHUNK]
        assert same([o[before].copy()], [other[before].copy()])
        kinds.add(bool(np.all(starts[:, 0] >= 0)))
    assert kinds == ({True} if change in ("values", "resets") else {True, False})


@pytest.mark.parametrize("leg", LEGS)
def test_what_is_forgotten_may_be_nan(monkeypatch, leg):
    """It spoils its own chunk and later ones up to where a segment starts after it."""
    args, kw = make_case(FORGETS)
    *results, _ = computed(monkeypatch, args, kw, JOINED, LATE, leg)
    first, after = BEGINS[1] + 7, BEGINS[2]
    args[2][:, first] = np.nan
    o, final, starts = computed(monkeypatch, args, kw, JOINED, LATE, leg)
    assert np.all(starts == STARTS)
    assert np.isnan(o[:, first:after].astype(float)).all()
    for rows in (slice(BEGINS[1]), slice(after, None)):
        assert same([o[:, rows].copy()], [results[0][:, rows].copy()])
    assert same([final], [results[1]])
    kw["initial_state"][...] = np.nan
    o, *_ = computed(monkeypatch, args, kw, JOINED, LATE, leg)
    assert np.isnan(o[:, : BEGINS[1]].astype(float)).all()
    assert same([o[:, after:].copy()], [results[0][:, after:].copy()])


@pytest.mark.parametrize("leg", LEGS)
def test_any_order_of_events_gives_the_same_bits(monkeypatch, leg):
    args, kw = make_case(FORGETS, B=2)
    args[4][1] = -KEEPS
    results = computed(monkeypatch, args, kw, JOINED, LATE, leg)
    for run in (
        Run(schedule="descending", completion="early"),
        Run(schedule="random", completion="either", preempt=30, seed=1),
    ):
        assert same(results, computed(monkeypatch, args, kw, JOINED, LATE, leg, run))


@pytest.mark.ptx_leg(head=[33])
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("head", [5, 33])
def test_one_head_of_many_without_a_start_is_enough(monkeypatch, leg, head):
    """A NaN tells late walks from others, which do not forget it."""
    args, kw = make_case(FORGETS, T=CHUNK * 5, H=17, K=16, V=16)
    kw["initial_state"][...] = np.nan
    late = cost.Late(1, 2, 4, 400)
    o, *_ = computed(monkeypatch, args, kw, WHOLE, late, leg)
    assert np.isfinite(o[:, 4 * CHUNK :].astype(float)).all()
    args[4][:, 3 * CHUNK : 4 * CHUNK, head] = -KEEPS
    o, _, starts = computed(monkeypatch, args, kw, WHOLE, late, leg)
    assert np.sum(starts == -1) == 1
    assert np.isnan(o.astype(float)).all()


def launched(**call):
    sizes = dict(dtype="bfloat16", K=128, V=128, gate=True, B=1, T=32768) | call
    return launches_of(H200, ("forward",), **sizes)


def test_which_calls_have_late_walks():
    def has(**call):
        return "segment_starts" in {x.entry for x in launched(**call)}

    assert has(H=8, HV=32) and has(H=16, HV=64) and has(H=2, HV=8)
    assert not has(H=8, HV=32, gate=False)
    assert not has(H=8, HV=32, gate="channel")
    assert not has(H=8, HV=32, T=512)
    assert not has(H=16, HV=64, B=4, T=8192)


def test_the_second_segment_begins_no_later_than_that_of_others():
    """Else outputs between would depend on the choice, which depends on tokens after them."""
    for T in range(1024, 70000, 1024):
        for H in (2, 8, 16, 24):
            sizes = dict(B=1, T=T, N=1, H=H, HV=H, K=128, V=128)
            call = Call(dtype=BF16, gate="scalar", scale=1.0, **sizes)
            choice = cost.choose_forward(call, H200)
            late = choice.late
            if late is None or choice.segments == 1:
                continue
            first, _ = cost.begins(T // CHUNK, late.segments, late.first_percent)
            percents = choice.first_percent, choice.last_percent
            assert first <= cost.begins(T // CHUNK, choice.segments, *percents)[0]
