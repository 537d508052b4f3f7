"""Segments that begin from zero, with a gate per key channel on compute capability 9.0."""

import math
from dataclasses import replace

import numpy as np
import pytest
from channel_calls import BF16, call_of, check, make_case, same
from emulator import HOPPER, EmulatorDevice, Run, copy_in
from helpers import definition
from rounded import wide

from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda.plan import made
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90 import channel_cut, cost
from cupy_delta.cuda.sm90.channel import channel_walked
from cupy_delta.cuda.sm90.channel_cut import plan_cut
from cupy_delta.cuda.sm90.channel_whole import plan_whole
from cupy_delta.cuda.spec import DeviceFacts

H200 = DeviceFacts(132, 227 * 1024, (9, 0))
LOST = 170 * math.log(2)  # of every channel over a lead, as sm90/channel_leads.cu says
CUT = (2, 8, 3)


class Kept(EmulatorDevice):
    """A device whose arrays are those of the call before."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kept = {}

    def empty(self, shape, dtype, name):
        if name not in self.kept:
            self.kept[name] = super().empty(shape, dtype, name)
        return self.kept[name]


def computed(
    args, kw, cut=CUT, leg="source", run=None, device=None, whole=False, launches=None, **options
):
    """Return outputs and states, leads, and whether the call was declined."""
    call = call_of(args, kw, **options)
    otherwise = plan_whole(call) if whole else channel_walked(call, cost.Choice(2, 2))
    plan = plan_cut(call, cost.Cut(*cut), otherwise, int(call.qk_l2norm))
    plan = replace(plan, launches=plan.launches[:launches])
    given = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True))
    given |= dict(initial_state=kw["initial_state"], cu_seqlens=None)
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    found = execute(plan, given, device or EmulatorDevice(run or Run(), leg=leg, **HOPPER))
    results = np.array(found["o"]), np.array(found["final_state"])
    declined = bool(found["declined"][0])
    if not (declined or whole or device):
        assert (np.array(found["core"]).view(np.uint16) == 0xFFFF).all()  # as no kernel has left it
    return results, np.array(found["leads"]), declined


def forgetting(chunks, tokens=0, **options):
    """A case whose gates forget everything within two chunks."""
    return make_case(64 * chunks + tokens, **dict(decay=2.5) | options)


@pytest.mark.parametrize(
    ("sizes", "cut", "leg"),
    [
        (dict(chunks=11), (2, 8, 3), "source"),
        (dict(chunks=10, tokens=1, initial=False), (2, 9, 2), "source"),
        (dict(chunks=14, tokens=1, layout="vk"), (4, 8, 2), "source"),
        (dict(chunks=10, tokens=7, B=2, H=2, G=2), (3, 8, 1), "source"),
        (dict(chunks=9, tokens=63, correlation=0.5, G=3), (2, 8, 2), "source"),
        (dict(chunks=19), (2, 8, 11), "source"),
        (dict(chunks=21, tokens=9), (2, 8, 14), "source"),
        (dict(chunks=26, H=2), (2, 9, 17), "source"),
        (dict(chunks=10, tokens=30, B=2, layout="vk"), (2, 8, 3), "ptx"),
        (dict(chunks=22), (2, 8, 14), "ptx"),
    ],
)
def test_sizes(sizes, cut, leg):
    """Segments that are longer than 15 chunks are walked in two parts."""
    args, kw = forgetting(**sizes)
    results, leads, declined = computed(args, kw, cut, leg)
    assert not declined
    assert (leads == 2).all()
    check(args, kw, results)


def test_normalised_rows():
    args, kw = forgetting(10)
    longer = [(3 * x.astype(np.float32)).astype(BF16) for x in args[:2]]
    results, _, declined = computed([*longer, *args[2:]], kw, qk_l2norm=True)
    assert not declined
    check(args, kw, results)


@pytest.mark.parametrize("chunks", [1, 2, 5, 8])
@pytest.mark.parametrize("more", [True, False])
def test_a_lead_is_as_long_as_gates_need(chunks, more):
    """A channel of one head decides; two chunks are least, and beyond eight it has no end."""
    args, kw = forgetting(10, H=2, beta=(0, 0.1))
    args[4][..., 1, 77] = -LOST / (64 * chunks) * (1.01 if more else 0.99)
    _, leads, declined = computed(args, kw, (2, 9, 1))
    longer = max(2, chunks if more else chunks + 1)
    assert leads.tolist() == [2, longer if longer <= 8 else -1]
    assert declined == (longer > 8)


@pytest.mark.parametrize("lead", [2, 8])
def test_only_the_lead_is_looked_at(lead):
    """Gates that keep all elsewhere decline nothing; with the longest, parts have 24 chunks."""
    args, kw = make_case(64 * 29, gate="channel", decay=0.01)
    args[4][:, 64 * (9 - lead) : 64 * 9] = -1.02 * LOST / (64 * lead)
    results, leads, declined = computed(args, kw, (2, 9, 20))
    assert (leads.tolist(), declined) == ([lead], False)
    check(args, kw, results)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_one_slow_channel_declines_the_call(whole, leg):
    args, kw = forgetting(9, tokens=5, G=2)
    args[4][..., 1, 100] = -0.1
    results, leads, declined = computed(args, kw, (2, 8, 2), leg, whole=whole)
    assert declined
    assert leads[1] == -1 < leads[0]
    check(args, kw, results)


@pytest.mark.parametrize("most", [2, 5, 18])
def test_blocks_of_factors_take_turns(most, monkeypatch):
    """Of 18, some have one chunk less than others."""
    monkeypatch.setattr(channel_cut, "LEAVE_AT_ONCE", most)
    args, kw = make_case(64 * 9, H=2, decay=0.01)
    results, _, declined = computed(args, kw, (2, 8, 1))
    assert declined
    check(args, kw, results)


def keys_that_keep(left, chunks=10, channel=77, **options):
    """One key all over, along which 2^left is left of a state over two chunks, despite gates."""
    args, kw = make_case(64 * chunks, H=2, **options)
    args[4][:] = -6
    args[4][..., channel] = -1.5
    args[1][:, :, 1] = np.eye(128)[channel]
    args[3][:, :, 1] = 1 + 2 ** (left / 128) * math.exp(1.5)
    return args, kw


@pytest.mark.parametrize(
    ("left", "channel", "expected"), [(-60, 76, True), (-97, 1, True), (-105, 77, False)]
)
def test_keys_that_keep_what_gates_forget_decline_the_call(left, channel, expected):
    args, kw = keys_that_keep(left, channel=channel)
    results, leads, declined = computed(args, kw)
    assert (leads == 2).all()
    assert declined == expected
    check(args, kw, results)


@pytest.mark.parametrize("later", [0, 1])
def test_gates_that_forget_in_turns_decline_the_call(later):
    """Every channel forgets all in one of two chunks; keys of the second lead around that."""
    args, kw = make_case(64 * 10)
    args[3][:, 64 * 6 : 64 * 7] = 0
    halves = args[4].reshape(1, 640, 1, 2, 64)
    halves[:] = -3
    halves[:, 64 * 6 : 64 * 7, :, 1 - later] = halves[:, 64 * 7 : 64 * 8, :, later] = -0.3
    results, leads, declined = computed(args, kw)
    assert (leads.tolist(), declined) == ([2], True)
    check(args, kw, results)


@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_segments_of_a_declined_call_end_soon(leg):
    """Also those of heads whose keys keep nothing; a chunk after the longest lead they all look.

    The first segments are walked before here, where blocks run one after the other.
    """
    args, kw = keys_that_keep(-60, chunks=24)
    args = [x[:, :, ::-1] for x in args]
    device = Kept(Run(), leg=leg, **HOPPER)
    device.empty(args[2].shape, BF16, "o")[:] = untouched = 7
    (o, _), leads, declined = computed(args, kw, (2, 10, 14), device=device, launches=2)
    assert declined
    assert leads.tolist() == [2, 2]
    written = (o != untouched).any(axis=(0, 2, 3)).reshape(-1, 64).all(axis=1)
    assert written.nonzero()[0].tolist() == [*range(10 - 2 + 12)]


def test_memory_of_the_call_before():
    """What a call counts does not stay for the next one in the same memory."""
    device = Kept(Run(), **HOPPER)
    fast, kw = forgetting(10, H=2)
    slow, keeping = [x.copy() for x in fast], keys_that_keep(-60)[0]
    slow[4][..., 3] = -0.01
    for args, expected in [(slow, True), (fast, False), (keeping, True), (fast, False)]:
        results, _, declined = computed(args, kw, device=device)
        assert declined == expected
        check(args, kw, results)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slow", [False, True])
def test_in_any_order(seed, slow):
    args, kw = forgetting(21, tokens=3)
    if slow:
        args[4][..., 17] = -0.1
    run = Run(schedule="random", completion="either", preempt=30, seed=seed)
    found, plain = (computed(args, kw, (2, 8, 14), run=x) for x in (run, None))
    assert found[2] == plain[2] == slow
    for x, y in zip(found[0], plain[0], strict=True):
        assert same(x, y)


def test_resets():
    """Of single channels, and of all at once, in a lead and in the segment."""
    args, kw = forgetting(10, H=2)
    g = args[4]
    g[:, 64 * 8 - 70, 0, ::3] = -np.inf
    g[:, 64 * 8 + 5, 0, 1::3] = -np.inf
    g[..., 1, :] = -0.01
    g[:, 64 * 8 - 9, 1] = -np.inf
    results, leads, declined = computed(args, kw)
    assert (leads[1], declined) == (2, False)
    check(args, kw, results)


@pytest.mark.parametrize("name", ["k", "v", "beta", "g"])
def test_nan_in_a_lead_stays_in_its_head(name):
    args, kw = forgetting(10, H=2)
    one = (0, 64 * 8 - 3, 0) if name == "beta" else (0, 64 * 8 - 3, 0, 5)
    args[["q", "k", "v", "beta", "g"].index(name)][one] = np.nan
    (o, state), leads, declined = computed(args, kw)
    assert declined == (name != "v")
    assert leads.tolist() == [-1 if name == "g" else 2, 2]
    spoilt = np.s_[..., 5] if name == "v" else np.s_[...]
    assert np.isnan(o[0, 64 * 8 :, 0][spoilt].astype(np.float32)).all()
    assert np.isnan(state[0, 0][spoilt]).all()
    more, options = wide(args, kw)
    exact = definition(*more, **options)[0][0, :, 1]
    assert np.abs(o[0, :, 1].astype(np.float64) - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["v", "initial_state"])
def test_nan_that_is_forgotten(name):
    """What lies before a lead reaches no token of its segment."""
    args, kw = forgetting(10)
    (o, state), leads, _ = computed(args, kw)
    before = 64 * (8 - leads[0])
    if name == "v":
        args[2][0, before - 1] = np.nan
    else:
        kw["initial_state"][:] = np.nan
    (found, left), _, declined = computed(args, kw)
    assert not declined
    assert np.isnan(found[0, before - 1].astype(np.float32)).all()
    assert same(found[:, 64 * 8 :], o[:, 64 * 8 :])
    assert same(left, state)


def test_which_calls_are_cut():
    """Where sequences and heads alone do not fill the multiprocessors."""
    call = Call(dtype=BF16, B=1, T=8192, N=1, H=32, HV=32, K=128, V=128, gate="channel")

    def files(**options):
        launches = made("forward", replace(call, **options), H200).launches
        return [x.file.split("/")[-1].removesuffix(".cu") for x in launches]

    cut = ["channel_leads", "channel_forward"]
    walked = ["channel_factors", "training"]
    assert files() == [*cut, *walked]
    assert files(qk_l2norm=True) == ["l2norm", *cut, *walked]
    assert files(T=32768) == [*cut, *walked, "training"]
    assert files(H=96, HV=96) == [*cut, "channel_forward"]
    assert files(B=4, N=4) == ["channel_forward"]
    for options in (
        dict(T=512),
        dict(V=64),
        dict(dtype=FLOAT_DTYPES["float16"]),
        dict(varlen=True),
    ):
        assert not {"channel_leads", "channel_forward"} & {*files(**options)}, options


def test_segments_make_up_a_sequence():
    for chunks in range(1, 300):
        for count, first, length in cost.cuts_of(chunks):
            last = chunks - first - (count - 2) * length
            assert first >= cost.LONGEST_LEAD
            assert 0 < last <= length
