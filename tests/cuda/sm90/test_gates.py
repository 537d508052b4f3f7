"""Gates on compute capability 9.0: within the range of tokens' units, at its border, beyond."""

from contextlib import nullcontext
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, EmulatorDevice, EmulatorFault, Run
from helpers import definition, make_inputs
from rounded import error, rounded_products, twice, wide

import cupy_delta as cd
from cupy_delta.call import Call
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90 import cost
from cupy_delta.cuda.sm90.tiles import CHUNK
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.cuda.variants import launches_of

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
H200 = DeviceFacts(132, 227 * 1024, (9, 0))
T = 200
# Of RANGE powers of two per chunk: natural logarithms per token on either side of it.
WITHIN, BEYOND = -1.36, -1.37


@pytest.fixture
def divided(monkeypatch, emulated):
    """Return a function that fixes how a walk is divided, on a Hopper device."""

    def use(*choice, run=None, **more):
        monkeypatch.setattr(cost, "choose_forward", lambda *_: cost.Choice(*choice, **more))
        monkeypatch.setattr(plans, "plan", plans.made)  # a plan that is kept has another division
        emulated(run, **HOPPER)

    return use


def gated(gates, dtype=BF16, **options):
    """Inputs with these gates, one per token or the same for all."""
    options = dict(K=64, V=64, G=2, dtype=dtype, initial=True, beta=(0, 2)) | options
    args, kw = make_inputs(T, gate="scalar", **options)
    args[4] = np.broadcast_to(np.reshape(gates, (1, -1, 1)), args[4].shape).astype(np.float32)
    return args, kw


def check(args, kw):
    """Compare with float64: within 2x of plain rounded products, token by token where it counts."""
    result = cd.chunk_delta_rule(*args, **kw)
    exact = definition(*wide(args, kw)[0], **wide(args, kw)[1])
    for x, y, other in zip(result, exact, rounded_products(args, kw, CHUNK), strict=True):
        assert error(x, y) < twice(other, y)
    return result


def at(tokens, gate, others=-0.01):
    gates = np.full(T, others)
    gates[tokens] = gate
    return gates


@pytest.mark.ptx_leg(gate=[WITHIN, BEYOND])
@pytest.mark.parametrize("gate", [-0.5, -1.2, -1.3, WITHIN, BEYOND, -2.4, -5.0, -20.0])
def test_constant_gates(divided, gate):
    divided(1)
    check(*gated(gate))


@pytest.mark.ptx_leg(gate=[-np.inf])
@pytest.mark.parametrize("gate", [-20.0, -88.0, -1000.0, -np.inf])
@pytest.mark.parametrize("token", [0, 1, 31, 32, 63, 64, 127, T - 1])
def test_a_single_reset(divided, gate, token):
    divided(1)
    check(*gated(at([token], gate)))


@pytest.mark.parametrize("gate", [-40.0, -60.0, -np.inf])
def test_a_state_leaves_with_what_the_true_gates_leave_of_it(divided, gate):
    """Beyond the floor that a single gate has inside its chunk."""
    divided(1)
    args, kw = gated(at([5], gate, 0.0))
    args[3][...] = 0  # nothing is written
    final = cd.chunk_delta_rule(*args, **kw).final_state
    exact = np.exp(gate) * kw["initial_state"].astype(np.float64)
    assert np.all(np.abs(final - exact) <= 1e-4 * np.abs(exact))


@pytest.mark.ptx_leg(count=[3, 9])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_resets_among_long_memory(divided, dtype, count):
    """Three fit into the range of a chunk, four do not."""
    divided(2)
    tokens = np.linspace(66, 126, count).astype(int)
    check(*gated(at(tokens, -np.inf, -0.001), dtype))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_any_decay(divided, dtype):
    divided(1)
    rng = np.random.default_rng(3)
    check(*gated(-rng.exponential(size=T) * rng.choice([0.01, 1.0, 5.0, 30.0], T), dtype))


@pytest.mark.ptx_leg(segments=[3])
@pytest.mark.parametrize("gates", [-0.001, -0.3, -5.0, at([70, 71, 72, 73, 74], -200.0)])
@pytest.mark.parametrize("segments", [1, 3])
def test_the_division_of_value_channels_changes_no_bit(divided, gates, segments):
    args, kw = gated(gates, V=128, K=128)
    results = []
    for tiles in (1, 2):
        divided(tiles, segments, tiles)
        results.append(cd.chunk_delta_rule(*args, **kw))
    for x, y in zip(*results, strict=True):
        assert np.array_equal(x.view("u1"), y.view("u1"))


@pytest.mark.parametrize("tiles", [1, 2])
def test_transfers_that_are_joined_have_decays_of_their_own(divided, tiles):
    """Of states that little but gates changes, four segments of a chunk each."""
    divided(tiles, 4, tiles)
    gates = np.repeat([-0.001, -0.05, -0.02, -0.001], CHUNK)[:T]
    args, kw = gated(gates, V=128, K=128, H=2, beta=(0, 0.1))
    args[4] *= np.array([1.0, 0.3, 0.7, 0.1], np.float32)
    check(args, kw)


# Later gates change the chunk's reference, make tokens leave its range, or another chunk do so.
@pytest.mark.ptx_leg(later=[-3.0, -np.inf])
@pytest.mark.parametrize("later", [-0.01, -1.0, -3.0, -40.0, -np.inf])
@pytest.mark.parametrize("first", [100, 128])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_outputs_do_not_depend_on_later_gates_by_a_bit(divided, later, first, dtype):
    divided(1)
    gates = -np.random.default_rng(1).exponential(0.4, T)
    changed = gates.copy()
    changed[first:] = later
    calls = (gated(g, dtype) for g in (gates, changed))
    both = [cd.chunk_delta_rule(*args, **kw).o for args, kw in calls]
    assert np.array_equal(both[0][:, :first].view("u2"), both[1][:, :first].view("u2"))
    assert not np.array_equal(both[0][:, first:].view("u2"), both[1][:, first:].view("u2"))


@pytest.mark.parametrize("choice", [(2,), (2, 2, 1), (2, 3, 1), (1, 2, 2, 0, 100, True, 50)])
def test_nor_where_a_later_gate_moves_the_block_to_another_walk(divided, choice):
    """Float16 has one walk, whatever its gates are.

    Sums in another order would be off by more than outputs are rounded by: the first token
    overwrites much of a channel that only it writes, and two others cancel in all that is read.
    """
    divided(*choice)
    first = 180  # of which many in a chunk are beyond its range
    gates = np.zeros(T)
    changed = gates.copy()
    changed[first:] = -60.0
    both = []
    for g in (gates, changed):
        (q, k, v, beta, g), kw = gated(g, V=128, G=1)
        for channel, x in ((0, 2.0**20), (1, 2.0**12), (40, -(2.0**12))):
            kw["initial_state"][:, :, channel] = x
        for x in (q, k):
            x[..., 40] = x[..., 1]
        k[..., 0] = 0
        k[:, 0] = np.eye(64)[0]
        beta[:, 0] = 1
        both.append(cd.chunk_delta_rule(q, k, v, beta, g, **kw).o[:, :first])
    assert np.array_equal(both[0].view("u2"), both[1].view("u2"))


@pytest.mark.parametrize("padding", [0, 14])
def test_a_running_sum_may_round_below_the_last_one(divided, padding):
    """Chunks of -126 powers of two to the rounding, which gates of zero or no tokens follow."""
    divided(1)
    rng = np.random.default_rng(0)
    chunk = CHUNK - padding
    args, kw = make_inputs(
        chunk * 40, K=16, V=16, dtype=BF16, gate="scalar", cu_seqlens=chunk * np.arange(41)
    )
    gates = np.zeros((40, chunk))
    gates[:, :50] = -rng.random((40, 50))
    gates *= 126 * np.log(2) / -gates.sum(1, keepdims=True)
    args[4] = np.broadcast_to(gates.reshape(1, -1, 1), args[4].shape).astype(np.float32)
    check(args, kw)


@pytest.mark.parametrize("gates", [-0.2, -6.0])
def test_any_order_of_events_gives_the_same_bits(divided, gates):
    args, kw = gated(gates)
    runs = [Run(), Run(schedule="descending", completion="early")]
    runs.append(Run(schedule="random", completion="either", preempt=30, seed=1))
    results = []
    for run in runs:
        divided(1, 3, 1, run=run)
        results.append(cd.chunk_delta_rule(*args, **kw))
    for result in results[1:]:
        assert np.array_equal(result.o.view("u2"), results[0].o.view("u2"))
        assert np.array_equal(result.final_state, results[0].final_state)


def test_empty_sequences_keep_their_state(divided):
    divided(1)
    cu_seqlens = [0, 0, 70, 70, T]
    args, kw = gated(at([3, 80, 81, 82, 83], -300.0), cu_seqlens=cu_seqlens)
    result = check(args, kw)
    for n in (0, 2):
        assert np.array_equal(result.final_state[n], kw["initial_state"][n])


@pytest.mark.parametrize("H", [4, 5])
def test_value_heads_that_fill_a_warp_of_factors_or_not(divided, H):
    """Of eight and ten, a warp makes the records of eight: each has its own gates."""
    divided(1)
    args, kw = gated(-0.01, H=H)
    rng = np.random.default_rng(5)
    args[4] = -rng.exponential(np.geomspace(0.01, 5.0, 2 * H), args[4].shape).astype(np.float32)
    check(args, kw)


class Between(EmulatorDevice):
    """Changes what factors have left before a walk reads it."""

    def __init__(self, leg, change=lambda arrays: None):
        super().__init__(leg=leg, **HOPPER)
        self.change = change

    def launch(self, launch, arrays):
        super().launch(launch, arrays)
        if launch.entry == "token_factors":
            self.change(arrays)


def run(device, args, kw):
    """Return all arrays of a forward with two slices per block, whatever the number of heads."""
    (B, _, H, K), (HV, V) = args[0].shape, args[2].shape[2:]
    sizes = dict(B=B, T=T, N=B, H=H, HV=HV, K=K, V=V)
    call = Call(dtype=args[0].dtype, gate="scalar", scale=1.0, **sizes)
    given = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True)) | kw
    return execute(plans.made("forward", call, device.facts), given, device)


@pytest.mark.parametrize("leg", ["source"])
@pytest.mark.parametrize("H", [2, 5])
def test_factors_say_which_chunks_are_paired(divided, leg, H):
    divided(2)
    args, kw = gated(-0.01, H=H, V=128)
    beyond = np.random.default_rng(2).random((4, 2 * H)) < 0.4
    for chunk, head in zip(*np.nonzero(beyond), strict=True):
        args[4][:, 64 * chunk : 64 * chunk + 5, head] = -20.0
    words = run(Between(leg), args, kw)["paired_heads"]
    assert words.shape == (4, -(-2 * H // 8))
    bits = words[..., None] >> np.arange(8) & 1
    assert np.array_equal(bits.reshape(4, -1)[:, : 2 * H], beyond)
    assert not bits.reshape(4, -1)[:, 2 * H :].any()


@pytest.mark.parametrize("leg", ["source"])
@pytest.mark.parametrize(
    ("H", "strong"),
    [
        *product([4, 5], [[], [0], [1], [-1], [0, -2], [1, -1]]),
        (68, [*range(1, 10), *range(128, 136)]),  # eight of the 17th group
    ],
)
def test_a_block_takes_units_of_tokens_where_one_head_in_eight_does(divided, leg, H, strong):
    """Of eight heads one is enough, of ten two; head 0 always follows its own chunks.

    There may be more groups of heads than warps that look at them. By both walks results have the
    same bits, but one reads what was not written of a chunk that is not paired, if its record says
    that it is.
    """
    divided(2)

    def pretend(arrays):
        for head in (some % (2 * H) for some in strong):
            arrays["paired_heads"][2, head // 8] |= 1 << head % 8
        arrays["token_factors"][1, 0, 3 * CHUNK] = 1  # paired

    by_tokens = 0 in strong or len(strong) * 8 >= 2 * H
    told = pytest.raises(EmulatorFault, match="uninitialised: read of 'token_factors'")
    with told if by_tokens else nullcontext():
        run(Between(leg, pretend), *gated(-0.01, H=H, V=128))


def test_a_gated_walk_is_one_launch():
    """Or one of sequences that start late, and one of others."""
    for dtype, heads, math in (("bfloat16", 64, 2), ("bfloat16", 16, 1), ("float16", 64, 2)):
        sizes = dict(K=128, V=128, H=heads, B=4, T=8192, gate=True)
        launches = launches_of(H200, ("forward",), dtype=dtype, **sizes)
        walks = [dict(x.defines) for x in launches if x.entry == "forward_hopper"]
        assert [x["MATH"] for x in walks if x.get("STARTS") != 2] == [math]
        assert len(walks) == 1 + (heads == 16)
