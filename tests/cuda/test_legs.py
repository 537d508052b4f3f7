"""The two legs of the emulator agree: the kernels' source, and what NVRTC makes of it."""

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, EmulatorDevice, EmulatorFault, Run
from helpers import make_inputs

import cupy_delta as cd
from cupy_delta.cuda import plan as plans

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
F64 = np.dtype(np.float64)
SIZES = dict(H=1, G=2, K=40, V=24, initial=True)


def chunk(T, dtype, **more):
    options = {n: more.pop(n) for n in ("chunk_size", "qk_l2norm") if n in more}
    args, kw = make_inputs(T, dtype=dtype, **(SIZES | more))
    return lambda: list(cd.chunk_delta_rule(*args, **kw, **options))


def gradients(T, dtype, **more):
    options = {n: more.pop(n) for n in ("chunk_size", "qk_l2norm") if n in more}
    args, kw = make_inputs(T, dtype=dtype, **(SIZES | more))
    do = np.random.default_rng(0).standard_normal(args[2].shape).astype(dtype)

    def call():
        forward = cd.chunk_delta_rule_fwd(*args, **kw, **options)
        return [x for x in cd.chunk_delta_rule_bwd(forward.residuals, do) if x is not None]

    return call


def recurrent(T, dtype, **more):
    args, kw = make_inputs(T, dtype=dtype, **(SIZES | more))
    return lambda: list(cd.recurrent_delta_rule(*args, **kw))


def step(T, dtype, layout):
    args, kw = make_inputs(T, B=2, dtype=dtype, layout=layout, **SIZES)

    def call():
        state = kw["initial_state"].copy()
        options = dict(state_layout=layout, qk_l2norm=True)
        return [cd.delta_rule_step(*args, state=state, **options), state]

    return call


def blocks(T, dtype):
    (q, k, v, beta, _), kw = make_inputs(T, dtype=dtype, **SIZES)

    def call():
        factors = cd.wy_factors(k, v, beta)
        passed = cd.state_pass(k, factors.w, factors.u, initial_state=kw["initial_state"])
        o = cd.chunk_output(q, k, passed.v_new, passed.states)
        transfer = cd.sequence_transfer(k, v, beta)
        composed = transfer.then(transfer)
        state = transfer.apply(kw["initial_state"])
        return [*factors, *passed, o, *transfer, *composed, state]

    return call


CASES = {
    "chunk bfloat16": chunk(70, BF16),
    "chunk float16, chunks of 16, vk": chunk(40, F16, chunk_size=16, layout="vk"),
    "chunk float32": chunk(40, F32),
    "chunk, chunks of 64": chunk(130, BF16, chunk_size=64, K=64, V=64),
    "chunk, sequences, l2norm": chunk(70, BF16, cu_seqlens=[0, 0, 1, 40, 70], qk_l2norm=True),
    "gradients bfloat16": gradients(70, BF16),
    "gradients float32, l2norm, vk": gradients(40, F32, qk_l2norm=True, layout="vk"),
    "gradients, sequences": gradients(70, F16, cu_seqlens=[0, 0, 1, 40, 70]),
    "gradients, K = 160": gradients(40, BF16, K=160, V=144),
    "recurrent float32": recurrent(5, F32),
    "recurrent float64": recurrent(5, F64),
    "step kv": step(3, BF16, "kv"),
    "step vk": step(3, F32, "vk"),
    "building blocks bfloat16": blocks(70, BF16),
    "building blocks float32": blocks(40, F32),
}
GATED = {
    "chunk bfloat16, gate": chunk(70, BF16, gate="scalar"),
    "chunk float32, gate": chunk(40, F32, gate="scalar"),
    "gradients bfloat16, gate": gradients(70, BF16, gate="scalar"),
    "gradients float32, gate": gradients(40, F32, gate="scalar"),
    "recurrent float32, gate": recurrent(5, F32, gate="scalar"),
    "recurrent float64, gate": recurrent(5, F64, gate="scalar"),
}


# Other architectures get other instructions for the same source.
ELSEWHERE = ["chunk bfloat16", "gradients float32, l2norm, vk", "step kv"]


@pytest.mark.parametrize(
    ("sm", "name"),
    [*((80, name) for name in CASES), *((sm, name) for sm in (90, 120) for name in ELSEWHERE)],
)
def test_both_legs_give_the_same_bits(both_legs, sm, name):
    source, ptx = both_legs(CASES[name], sm=sm)
    assert len(source) == len(ptx)
    for x, y in zip(source, ptx, strict=True):
        assert x.any() and np.array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize("name", GATED)
def test_both_legs_agree_up_to_the_exponential(both_legs, name):
    source, ptx = both_legs(GATED[name])
    for x, y in zip(source, ptx, strict=True):
        wide = y.astype(np.float64)
        bound = 2 * float(ml_dtypes.finfo(y.dtype).eps) * np.abs(wide).max()
        assert x.any() and np.abs(x.astype(np.float64) - wide).max() <= bound


def test_more_shared_memory_than_the_device_has_is_refused(emulated, monkeypatch):
    """By the plan; and what was planned for another device, by the emulator."""
    small = HOPPER | dict(shared_bytes=64 << 10)
    emulated(**small)
    with pytest.raises(NotImplementedError, match=r"would need .* bytes of shared memory"):
        chunk(70, BF16, K=64, V=64)()
    whole = EmulatorDevice(Run(), **HOPPER).facts
    # Not through the plans that are kept for calls alike.
    monkeypatch.setattr(plans, "plan", lambda *asked: plans.made(*asked[:2], whole))
    with pytest.raises(EmulatorFault, match=r"asks for .* bytes of shared memory, of 65536"):
        chunk(70, BF16, K=64, V=64)()
