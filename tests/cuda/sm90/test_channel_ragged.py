"""Ragged sequences with a gate per key channel in one kernel, on compute capability 9.0."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from channel_calls import BF16, F16, call_of, check, make_case, same
from channels import patterns
from emulator import HOPPER, EmulatorDevice, Run, copy_in

from cupy_delta.call import Call
from cupy_delta.cuda.plan import made
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90 import channel_cut, cost
from cupy_delta.cuda.sm90.channel import channel_walked
from cupy_delta.cuda.sm90.channel_ragged import plan_ragged
from cupy_delta.cuda.spec import DeviceFacts

LEGS = ["source", "ptx"]
H200 = DeviceFacts(132, 227 * 1024, (9, 0))
ENDS = [0, 0, 1, 65, 65, 193, 200, 360, 361, 361]  # with no token, with one, of whole chunks


def ragged_case(ends=ENDS, **options):
    return make_case(ends[-1], cu_seqlens=np.array(ends), **options)


def computed(args, kw, leg="source", run=None, most=3, **options):
    """Return outputs and states, and whether the call was declined."""
    cu = kw["cu_seqlens"]
    call = replace(call_of(args, kw, **options), N=len(cu) - 1, varlen=True)
    otherwise = channel_walked(call, cost.Choice(2, 2))
    plan = plan_ragged(call, most, otherwise, int(call.qk_l2norm))
    given = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True))
    given |= dict(initial_state=kw["initial_state"], cu_seqlens=cu.astype(np.int64))
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    found = execute(plan, given, EmulatorDevice(run or Run(), leg=leg, **HOPPER))
    declined = bool(found["declined"][0])
    if not declined:
        assert (np.array(found["core"]).view(np.uint16) == 0xFFFF).all()  # as no kernel has left it
    return (np.array(found["o"]), np.array(found["final_state"])), declined


@pytest.mark.parametrize(
    ("options", "leg"),
    [
        (dict(), "source"),
        (dict(K=72, V=104, layout="vk", G=2), "source"),
        (dict(initial=False, H=2), "source"),
        (dict(layout="vk"), "ptx"),
        (dict(dtype=F16), "source"),
        (dict(dtype=F16, K=72, V=104, initial=False), "ptx"),
        (dict(K=72, V=104, initial=False), "ptx"),
    ],
)
def test_sequences(options, leg):
    args, kw = ragged_case(**options)
    results, declined = computed(args, kw, leg)
    assert not declined
    check(args, kw, results)


@pytest.mark.parametrize("end", range(1, 65, 7))
def test_every_length(end):
    args, kw = ragged_case([0, end, end + 64, 2 * end + 64])
    results, declined = computed(args, kw)
    assert not declined
    check(args, kw, results)


def test_gates_of_every_strength():
    found = patterns(150, 128)
    args, kw = ragged_case([0, 37, 150], H=len(found))
    args[4] = np.stack([*found.values()], axis=1)[None].astype(np.float32)
    results, _ = computed(args, kw)
    check(args, kw, results)


@pytest.mark.parametrize("leg", LEGS)
def test_each_sequence_is_as_if_it_were_alone(leg):
    args, kw = ragged_case(G=2)
    (o, state), _ = computed(args, kw, leg)
    for n, (start, stop) in enumerate(pairwise(ENDS)):
        alone = [x[:, start:stop] for x in args]
        its = kw | dict(initial_state=kw["initial_state"][n : n + 1])
        its |= dict(cu_seqlens=np.array([0, stop - start]))
        if start == stop:
            assert same(state[n], kw["initial_state"][n])
            continue
        (one, left), _ = computed(alone, its, leg)
        assert same(one, o[:, start:stop])
        assert same(left[0], state[n])


@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "g"])
@pytest.mark.parametrize("leg", LEGS)
def test_nan_stays_in_its_sequence(name, leg):
    args, kw = ragged_case([0, 40, 41, 110, 170])
    (o, state), _ = computed(args, kw, leg)
    x = args[["q", "k", "v", "beta", "g"].index(name)]
    x[0, 41:110] = np.nan
    (found, left), _ = computed(args, kw, leg)
    for n, (start, stop) in enumerate([(0, 40), (40, 41), (41, 110), (110, 170)]):
        if n == 2:
            assert np.isnan(found[0, start:stop].astype(np.float32)).all()
        else:
            assert same(found[0, start:stop], o[0, start:stop])
            assert same(left[n], state[n])


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order(seed):
    args, kw = ragged_case()
    run = Run(schedule="random", completion="either", preempt=30, seed=seed)
    (found, plain) = (computed(args, kw, run=x)[0] for x in (run, None))
    for x, y in zip(found, plain, strict=True):
        assert same(x, y)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(
    ("ends", "chunks"),
    [([0, 20, 149, 149, 160], 3), ([0, 20, 20 + 128], 2), ([*range(36), 110, 111, 112], 2)],
)
@pytest.mark.parametrize("shorter", [False, True])
def test_a_long_sequence_declines_the_call(ends, chunks, shorter, leg):
    """One that is the last, and one of many."""
    args, kw = ragged_case(ends)
    results, declined = computed(args, kw, leg, most=chunks - shorter)
    assert declined == shorter
    check(args, kw, results)


@pytest.mark.parametrize("blocks", [1, 4])
def test_blocks_of_factors_take_turns(blocks, monkeypatch):
    """Some of which have no chunk."""
    monkeypatch.setattr(channel_cut, "LEAVE_AT_ONCE", blocks)
    args, kw = ragged_case([0, 20, 149, 149, 160])
    results, declined = computed(args, kw, most=2)
    assert declined
    check(args, kw, results)


def test_normalised_rows():
    args, kw = ragged_case([0, 70, 100])
    longer = [(3 * x.astype(np.float32)).astype(BF16) for x in args[:2]]
    results, _ = computed([*longer, *args[2:]], kw, qk_l2norm=True)
    check(args, kw, results)


@pytest.mark.parametrize("leg", ["source", "fused"])
def test_narrow_gates(leg):
    args, kw = ragged_case()
    few = args[4].astype(BF16)
    found, _ = computed([*args[:4], few], kw, leg, narrow_gate=True)
    wide, _ = computed([*args[:4], few.astype(np.float32)], kw, leg)
    for x, y in zip(found, wide, strict=True):
        assert same(x, y)


def test_which_calls_take_it():
    """Where sequences and heads fill the multiprocessors, if all are of one length."""
    call = Call(dtype=BF16, B=1, T=32768, N=4, H=32, HV=32, K=128, V=128, gate="channel")
    call = replace(call, varlen=True)

    def files(call):
        return [x.file.split("/")[-1] for x in made("forward", call, H200).launches]

    one = ["channel_forward.cu", "channel_factors.cu", "training.cu"]
    assert files(call) == one
    assert files(replace(call, qk_l2norm=True))[1:] == one
    for options in (dict(N=1), dict(T=2048), dict(K=64), dict(V=64)):
        assert "channel_forward.cu" not in files(replace(call, **options)), options


def test_how_long_a_sequence_may_be():
    """Not so long that others take less time, beside the load where blocks are many."""
    call = Call(dtype=BF16, B=1, T=32768, N=4, H=32, HV=32, K=128, V=128, gate="channel")
    call = replace(call, varlen=True)

    def most(**options):
        one = replace(call, **options)
        budget = cost.walked_cost(one, H200) / (1.1 * 5.3)
        return cost.longest_whole(one, H200), budget, one.N * one.HV / 132

    longest, budget, _ = most()
    assert 128 < longest < budget
    longest, budget, turns = most(N=64, T=65536)
    assert 16 < longest < 2 * (budget - turns * 16)
    # The few that begin when others are done would take as long again.
    assert most(N=5)[0] == 0
