"""Arrays of 2^32 elements and more, of which only the end is in memory and only its blocks run.

The last sequence of a ragged batch lies behind one of 2^26 tokens. An offset in 32 bits leads out
of the arrays, which the emulator reports, or to wrong numbers.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, EmulatorDevice, EmulatorFault, empty
from helpers import definition, make_inputs
from rounded import error, wide

import cupy_delta as cd
from cupy_delta.call import Call
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.tokens.l2norm import rows_of_block

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
BEFORE, TOKENS, HEADS = 2**26, 70, 2
ENDS = np.array([0, BEFORE, BEFORE + TOKENS])
LARGE, THERE = 2**24, 2**20  # bytes: of what counts as large, and of its end, which is in memory
PORTABLE = dict(sm=80, sm_count=2)


class FarDevice(EmulatorDevice):
    """Has the last tokens of long arrays, and runs the blocks of the last sequence alone."""

    def empty(self, shape, dtype, name, initialised=False):
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        # Blocks of the first sequence, which do not run, would fill its part, which others read.
        initialised |= name in ("units", "dinitial_state")
        return empty(shape, dtype, name, initialised, THERE if size > LARGE else None)

    def zeros(self, shape, dtype, name):
        x = self.empty(shape, dtype, name, initialised=True)
        x.reshape(-1).view(np.uint8)[-THERE:] = 0
        return x

    def bring(self, x, name, dtype):
        if name not in ("q", "k", "v", "beta", "g", "do"):
            return super().bring(x, name, dtype)
        shape = (1, BEFORE + TOKENS, *x.shape[2:])
        y = self.empty(shape, dtype or x.dtype, name, initialised=True)
        y[:, -TOKENS:] = x
        return y

    def launch(self, launch, arrays):
        self.run = replace(self.run, last=blocks_of_the_last_sequence(launch))
        try:
            super().launch(launch, arrays)
        except EmulatorFault as fault:
            # No traceback: it would show the first elements of arrays, which are not there.
            pytest.fail(str(fault), pytrace=False)


def blocks_of_the_last_sequence(launch):
    if launch.entry == "l2norm":
        arrays = 1 if launch.arguments[2] is None else 2
        macros = dict(launch.defines)
        rows = rows_of_block(macros["HEAD_K"], 4 if macros["DTYPE"] == "float" else 2)
        return arrays * -(-TOKENS * HEADS // rows)
    if launch.entry == "token_factors":
        return 1  # of four slots: one that no chunk has, then those of the last sequence
    if launch.grid < 2**16:
        return launch.grid // 2  # walks, with as many for either sequence
    chunk = dict(launch.defines).get("CHUNK", 64)
    slots = (BEFORE + TOKENS) // chunk + 2
    # Behind the blocks of chunks there may be some of states, which are small.
    per_chunk, of_states = divmod(launch.grid, slots)
    assert of_states in (0, 2 * HEADS)
    return per_chunk * -(-TOKENS // chunk) + of_states


def problem(dtype, D, gate=None, **options):
    """Return the call, the arrays of its last sequence, and that sequence as a call of its own."""
    args, kw = make_inputs(TOKENS, H=HEADS, K=D, V=D, gate=gate, dtype=dtype, initial=True)
    names = ("q", "k", "v", "beta", "g")
    given = dict(zip(names, args, strict=True)) | dict(cu_seqlens=ENDS)
    given["initial_state"] = np.repeat(kw["initial_state"], 2, axis=0)
    sizes = dict(B=1, T=BEFORE + TOKENS, N=2, H=HEADS, HV=HEADS, K=D, V=D)
    call = Call(dtype=dtype, gate=gate, varlen=True, scale=D**-0.5, **sizes, **options)
    return call, given, args, kw


def ends(results):
    """What the last sequence has of results: for assertions, which show what they are about."""
    return {
        name: (x[:, -TOKENS:] if x.shape[1] > TOKENS else x[1:]).copy()
        for name, x in results.items()
        if name in ("o", "final_state", "p", "h", "dinitial_state", "dq", "dk", "dv", "dbeta")
    }


@pytest.mark.parametrize("leg", ["source"])
@pytest.mark.parametrize(
    ("dtype", "D", "facts"),
    [
        (BF16, 64, HOPPER),
        (BF16, 64, HOPPER | dict(sm_count=1)),
        (F16, 32, PORTABLE),
        (F16, 32, PORTABLE | dict(sm_count=132)),
    ],
)
def test_forward(leg, dtype, D, facts):
    call, given, args, kw = problem(dtype, D, "scalar")
    device = FarDevice(leg=leg, **facts)
    found = ends(execute(plans.plan("forward", call, device.facts), given, device))
    wide_args, wide_kw = wide(args, kw)
    o, final_state = definition(*wide_args, **wide_kw)
    assert error(found["o"], o) < 1e-2
    assert error(found["final_state"], final_state) < 1e-2


@pytest.mark.parametrize("leg", ["source"])
@pytest.mark.parametrize(
    ("dtype", "D", "facts"),
    # As many multiprocessors as chunks: no block has chunks of both sequences.
    [(BF16, 64, HOPPER | dict(sm_count=2**30)), (F16, 32, PORTABLE)],
)
def test_gradients(leg, dtype, D, facts):
    call, given, args, kw = problem(dtype, D, qk_l2norm=True)
    rng = np.random.default_rng(1)
    do = rng.standard_normal(args[2].shape).astype(dtype)
    dfinal = rng.standard_normal((2, HEADS, D, D)).astype(np.float32)
    device = FarDevice(leg=leg, **facts)
    saved = execute(plans.plan("training", call, device.facts), given, device)
    upstream = dict(do=do, dfinal_state=dfinal)
    plan = plans.plan("backward", call, device.facts)
    found = ends(saved) | ends(execute(plan, upstream, device, ready=saved))
    wide_args, wide_kw = wide(args, kw)
    forward = cd.chunk_delta_rule_fwd(*wide_args, **wide_kw, qk_l2norm=True)
    assert error(found["o"], forward.o) < 1e-2
    expected = cd.chunk_delta_rule_bwd(
        forward.residuals, do.astype(np.float64), dfinal[1:].astype(np.float64)
    )
    for name in ("q", "k", "v", "beta"):
        assert error(found[f"d{name}"], getattr(expected, name)) < 2e-2, name
    assert error(found["dinitial_state"], expected.initial_state) < 2e-2


@pytest.mark.parametrize("leg", ["source"])
def test_building_blocks(leg):
    chunk = 32
    call, given, args, kw = problem(F16, 32, "scalar", qk_l2norm=True, chunk_size=chunk)
    call = replace(call, chunks=call.chunk_slots(chunk))
    device = FarDevice(leg=leg, **PORTABLE)
    ready = {}
    for operation in ("wy_factors", "state_pass", "chunk_output"):
        plan = plans.plan(operation, call, device.facts)
        ready |= execute(plan, given, device, ready=ready)
    found = ends(ready) | ends(execute(plans.plan("transfer", call, device.facts), given, device))
    wide_args, wide_kw = wide(args, kw)
    o, final_state = cd.recurrent_delta_rule(*wide_args, **wide_kw, qk_l2norm=True)
    assert error(found["o"], o) < 1e-2
    assert error(found["final_state"], final_state) < 1e-2
    S = found["p"] @ kw["initial_state"] + found["h"]
    assert error(S, final_state) < 1e-2


@pytest.mark.parametrize("leg", ["source"])
def test_tokens(leg):
    call, given, args, kw = problem(F16, 32, "scalar", qk_l2norm=True)
    device = FarDevice(leg=leg, **PORTABLE)
    found = ends(execute(plans.plan("recurrent", call, device.facts), given, device))
    wide_args, wide_kw = wide(args, kw)
    o, final_state = cd.recurrent_delta_rule(*wide_args, **wide_kw, qk_l2norm=True)
    assert error(found["o"], o) < 1e-2
    assert error(found["final_state"], final_state) < 1e-2
