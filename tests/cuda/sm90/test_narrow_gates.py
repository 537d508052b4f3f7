"""Gates per key channel of 16 bits, which kernels for compute capability 9.0 read as they are.

Results are those of the same gates in float32, to the bit, also where the compiler has fused what
it may: of one expression in two programs it may fuse one alone.
"""

import ml_dtypes
import numpy as np
import pytest
from channel_calls import BF16, make_case, same
from channels import patterns
from emulator import HOPPER
from helpers import make_inputs
from sm90 import test_channel_cut as cut
from sm90 import test_channel_forward as whole
from strengths import output_gradients, results

import cupy_delta as cd
from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda.plan import made
from cupy_delta.cuda.spec import DeviceFacts

F16 = np.dtype(np.float16)
LEGS = ["source", "fused"]
H200 = DeviceFacts(132, 227 * 1024, (9, 0))


def gates_of(T, HV, K, dtype):
    """Return a pattern of gates for each value head."""
    found = [g[:T] for g in patterns(max(T, 64), K).values()]
    return np.stack([found[h % len(found)] for h in range(HV)], axis=1)[None].astype(dtype)


@pytest.mark.parametrize(
    ("T", "K", "V", "dtype", "options"),
    [
        (70, 128, 40, BF16, dict(H=12)),
        (1, 8, 8, F16, dict(H=1)),
        (130, 40, 24, F16, dict(H=12)),
        (101, 72, 16, BF16, dict(H=2, G=6, cu_seqlens=[0, 0, 1, 64, 65, 101])),
        (66, 96, 72, F16, dict(H=1, G=12)),
    ],
)
def test_outputs_and_gradients(emulated, T, K, V, dtype, options):
    emulated(**HOPPER)
    args, kw = make_inputs(
        T, K=K, V=V, dtype=dtype, gate="channel", initial=True, beta=(0, 2), **options
    )
    args[3] = args[3].astype(np.float32)
    args[4] = gates_of(T, args[2].shape[2], K, dtype)
    last = output_gradients(args, kw)
    narrow, forward = results(args, kw, *last), cd.chunk_delta_rule(*args, **kw)
    args[4] = args[4].astype(np.float32)
    wide, other = results(args, kw, *last), cd.chunk_delta_rule(*args, **kw)
    wide["g"] = wide["g"].astype(dtype)
    for name, x in narrow.items():
        assert same(x, wide[name]), name
    assert same(forward.o, other.o)
    assert same(forward.final_state, other.final_state)


def narrow(args):
    """Return the inputs with gates of 16 bits, and with these in float32."""
    g = args[4].astype(args[0].dtype)
    return [*args[:4], g], [*args[:4], g.astype(np.float32)]


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(T=1),
        dict(T=130, K=72, V=104),
        dict(T=200, H=12, decay="patterns"),
        dict(T=200, H=12, decay="patterns", dtype=F16),
    ],
)
def test_one_kernel(sizes, leg):
    by_patterns = sizes.get("decay") == "patterns"
    args, kw = make_case(**sizes | dict(decay=0.3))
    if by_patterns:
        args[4] = gates_of(200, 12, 128, np.float32)
    few, many = narrow(args)
    found = whole.computed(few, kw, leg, narrow_gate=True)
    for x, y in zip(found, whole.computed(many, kw, leg), strict=True):
        assert same(x, y)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("slow", [False, True])
def test_segments(slow, leg):
    args, kw = cut.forgetting(10, tokens=7, G=2)
    if slow:
        args[4][..., 1, 100] = -0.1
    few, many = narrow(args)
    found, leads, declined = cut.computed(few, kw, leg=leg, narrow_gate=True)
    wide, *others = cut.computed(many, kw, leg=leg)
    assert declined == slow == others[1]
    assert (leads == others[0]).all()
    for x, y in zip(found, wide, strict=True):
        assert same(x, y)


@pytest.mark.parametrize("operation", ["forward", "training", "backward"])
def test_who_reads_them_so(operation):
    """Not the portable kernels, and no others than gates per key channel."""
    sizes = dict(B=1, T=8192, N=1, H=32, HV=32, K=128, V=128)
    bf16, channel = FLOAT_DTYPES["bfloat16"], dict(gate="channel", narrow_gate=True)

    def dtype(facts=H200, **options):
        plan = made(operation, Call(dtype=bf16, **sizes, **channel | options), facts)
        return dict(plan.read)["g"]

    assert dtype() is None
    for options in (
        dict(facts=DeviceFacts(108, 163 * 1024)),
        dict(narrow_gate=False),
        dict(chunk_size=32),
    ):
        assert dtype(**options) == np.float32, options


def test_what_is_narrow():
    """A gate per key channel of 16 bits, given as an array."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 1, 2, 1, 8))).astype(ml_dtypes.bfloat16)
    beta, g = np.ones((1, 2, 1), BF16), -np.ones((1, 2, 1, 8), BF16)

    def narrow(g):
        found = cd.chunk_delta_rule_fwd(q, k, v, beta, g).residuals
        return found.problem.narrow_gate

    assert narrow(g)
    assert not narrow(g.astype(np.float32))
    assert not narrow(g[..., 0])
    assert not narrow(None)
    logits = cd.SigmoidGate(g, np.zeros(1, np.float32), None)
    assert not narrow(logits)
