"""The walks with a gate per key channel on compute capability 9.0, with factors made by NumPy."""

import ml_dtypes
import numpy as np
import pytest
from channel_walks import Walk
from channels import chunks, factors_of
from emulator import HOPPER, EmulatorDevice, Run, copy_in
from helpers import make_inputs
from rounded import error, twice

from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90 import backward, channel, cost
from cupy_delta.cuda.sm90.segments import segment_arrays
from cupy_delta.cuda.sm90.tiles import CHUNK
from cupy_delta.cuda.spec import Plan, gradient_arrays
from cupy_delta.problem import Problem

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# Empty and one-token sequences, ends within, at and right after a chunk.
VARLEN = [0, 0, 1, 64, 128, 193, 200]
KEPT = "states", "corrections"


def make_case(T, *, B=1, H=1, G=1, K=64, V=64, dtype=BF16, layout="kv", **options):
    """Return a problem, its arrays, and factors exact and rounded as the walks read them."""
    options = dict(gate="channel", decay=0.05, beta=(0, 2), layout=layout) | options
    args, kw = make_inputs(T, B=B, H=H, G=G, K=K, V=V, dtype=dtype, initial=True, **options)
    cu = kw["cu_seqlens"]
    p = Problem(
        kind="numpy",
        dtype=dtype,
        **dict(B=B, T=T, N=B if cu is None else len(cu) - 1, H=H, HV=H * G, K=K, V=V),
        cu_seqlens=None if cu is None else np.asarray(cu, np.int64),
        varlen=cu is not None,
        gate="channel",
        scale=K**-0.5,
        state_layout=layout,
        chunk_size=CHUNK,
    )
    arrays = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True))
    arrays |= dict(initial_state=kw["initial_state"], cu_seqlens=p.cu_seqlens)
    rng = np.random.default_rng(7)
    arrays["do"] = rng.standard_normal(arrays["v"].shape).astype(dtype)
    arrays["dfinal_state"] = rng.standard_normal(p.state_shape).astype(np.float32)
    exact = factors_of(p, arrays)
    rounded = {n: x.astype(dtype) for n, x in exact.items() if n != "channel_decays"}
    return p, arrays, exact, rounded | dict(channel_decays=exact["channel_decays"])


def computed(p, arrays, rounded, launches, outputs, workspace, leg, run=None):
    given = {n: x.astype(np.float32) if n == "beta" else x for n, x in (arrays | rounded).items()}
    given["channel_decays"] = given["channel_decays"].astype(np.float32)
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    device = EmulatorDevice(run or Run(), leg=leg, **HOPPER)
    return execute(Plan(tuple(launches), outputs, workspace), given, device)


def turned(p, states):
    return states if p.state_layout == "kv" else states.swapaxes(-1, -2)


def compare(results, exact, plain):
    for x, y, other in zip(results, exact, plain, strict=True):
        assert error(x, y) < twice(other, y)


def check_forward(case, choice, leg, kept=KEPT):
    p, arrays, exact, rounded = case
    outputs = {"o": (p.value_shape, p.dtype), "final_state": (p.state_shape, p.state_dtype)}
    if kept:
        outputs |= {"states": (p.states_shape(CHUNK), p.dtype)}
        outputs |= {"corrections": (p.value_shape, p.dtype)}
    between = segment_arrays(p, choice.segments - 1) if choice.segments > 1 else {}
    launches = channel.channel_walk_launches(p, choice, *kept)
    results = computed(p, arrays, rounded, launches, outputs, between, leg)
    results = [np.asarray(results[name], np.float64) for name in outputs]
    results[1] = turned(p, results[1])
    v, S = arrays["v"].astype(np.float64), turned(p, arrays["initial_state"])
    walks = [Walk(p, exact, arrays["beta"]), Walk(p, rounded, arrays["beta"], p.dtype)]
    expected, plain = ([*walk.forward(v, S)] for walk in walks)
    used = written(p)
    for some in (results, expected, plain):
        some[0] = some[0][used["rows"]]
        if kept:
            some[2] = some[2].reshape(-1, p.HV, p.V, p.K)[used["slots"]]
            some[3] = some[3][used["rows"]]
    compare(results, expected[: len(results)], plain[: len(results)])


def written(p):
    """Tokens and slots that chunks have."""
    rows, slots = np.zeros((p.B, p.T), bool), []
    for slot, b, tokens in chunks(p):
        rows[b, tokens] = True
        slots.append(slot)
    return dict(rows=rows, slots=slots)


def check_backward(case, choice, leg):
    p, arrays, exact, rounded = case
    outputs, between = gradient_arrays(p, CHUNK)
    outputs = {"dinitial_state": outputs["dinitial_state"]} | between
    workspace = segment_arrays(p, choice.segments - 1) if choice.segments > 1 else {}
    launches = backward.walk_launches(p, choice)
    results = computed(p, arrays, rounded, launches, outputs, workspace, leg)
    used, do = written(p), arrays["do"].astype(np.float64)
    dstates = np.asarray(results["dstates"], np.float64)
    results = [
        np.asarray(results["dy"], np.float64)[used["rows"]],
        turned(p, np.asarray(results["dinitial_state"])),
        dstates.reshape(-1, p.HV, p.V, p.K)[used["slots"]],
    ]
    walks = [Walk(p, exact, arrays["beta"]), Walk(p, rounded, arrays["beta"], p.dtype)]
    expected, plain = (
        (dy[used["rows"]], S, dstates[used["slots"]])
        for dy, S, dstates in (x.backward(do, turned(p, arrays["dfinal_state"])) for x in walks)
    )
    compare(results, expected, plain)


WALKS = [
    (dict(T=130, B=2, K=128, V=128, G=2), cost.Choice(2)),
    (dict(T=64, K=72, V=200, dtype=F16, layout="vk"), cost.Choice(1)),
    (dict(T=200, cu_seqlens=VARLEN, G=2), cost.Choice(2)),
    (dict(T=330, K=128, V=128), cost.Choice(1, 3, 1)),
    (dict(T=330, K=40, V=72, H=2, decay=1e-3), cost.Choice(2, 4, 2)),
    (dict(T=193, cu_seqlens=VARLEN[:-1], decay=5), cost.Choice(1, 2, 2)),
]
# What NVRTC makes of the source is run where segments are joined and where sequences are ragged.
CASES = [(*walk, "source") for walk in WALKS] + [(*WALKS[i], "ptx") for i in (2, 3)]


@pytest.mark.parametrize(("sizes", "choice", "leg"), CASES)
def test_forward(sizes, choice, leg):
    check_forward(make_case(**sizes), choice, leg)


@pytest.mark.parametrize(("sizes", "choice", "leg"), CASES[1:4] + CASES[-1:])
def test_outputs_alone(sizes, choice, leg):
    check_forward(make_case(**sizes), choice, leg, kept=())


@pytest.mark.parametrize(("sizes", "choice", "leg"), CASES)
def test_backward(sizes, choice, leg):
    check_backward(make_case(**sizes), choice, leg)


def poisoned(case):
    """The case with NaN in the second of three sequences, in all that walks read of its tokens."""
    p, arrays, exact, rounded = case
    second = slice(*p.cu_seqlens[1:3])
    arrays = {name: None if x is None else x.copy() for name, x in arrays.items()}
    rounded = {name: x.copy() for name, x in rounded.items()}
    for name in ("v", "do", "beta"):
        arrays[name][:, second] = np.nan
    for name in ("k_read", "q_read", "k_write", "core", "p"):
        rounded[name][:, second] = np.nan
    return p, arrays, exact, rounded


def test_nan_stays_in_its_sequence():
    """Neither the rows before nor those after a ragged chunk are read."""
    case = make_case(200, cu_seqlens=[0, 40, 110, 200])
    choice = cost.Choice(1)
    launches = channel.channel_walk_launches(case[0], choice, *KEPT)
    launches += backward.walk_launches(case[0], choice)
    outputs = {name: gradient_arrays(case[0], CHUNK)[0][name] for name in ("dinitial_state",)}
    outputs |= gradient_arrays(case[0], CHUNK)[1]
    outputs |= {"o": (case[0].value_shape, BF16), "corrections": (case[0].value_shape, BF16)}
    outputs |= {"final_state": (case[0].state_shape, np.dtype(np.float32))}
    outputs |= {"states": (case[0].states_shape(CHUNK), BF16)}
    found = []
    for p, arrays, _, rounded in (case, poisoned(case)):
        found.append(computed(p, arrays, rounded, launches, outputs, {}, "source"))
    for name in ("o", "dy"):
        for rows in (slice(40), slice(110, 200)):
            x, y = (np.asarray(results[name])[:, rows].view(np.uint16) for results in found)
            assert np.array_equal(x, y), name
    for name in ("final_state", "dinitial_state"):
        x, y = (np.asarray(results[name])[[0, 2]] for results in found)
        assert np.array_equal(x, y), name
