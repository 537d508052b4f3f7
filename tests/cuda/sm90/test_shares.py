"""Transfers of sequences, and shares of ranks in halves, on compute capability 9.0."""

import threading

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER
from helpers import make_inputs
from raw import GATES, raw_gate
from rounded import error

import cupy_delta as cd
from cupy_delta import parallel
from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.sm90 import cost, shares
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.raw import tokens_of

LEGS = ["source"]
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
UNEVEN = [0, 0, 3, 260, 261, 390]
H200 = DeviceFacts(132, 227 * 1024, (9, 0))


@pytest.fixture
def divided(monkeypatch, emulated):
    """Return a function that fixes how shares are divided, on a Hopper device."""

    def use(math, segments, transfer=None, reuse_x=False):
        fixed = cost.Choice(math, segments, transfer or math, reuse_x=reuse_x)
        monkeypatch.setattr(shares, "divide", lambda *args, **kw: fixed)
        emulated(**HOPPER)

    use.emulated = emulated
    return use


def in_turns(size, function):
    """Call a function on every rank, one at a time but where they meet: there is one emulator."""
    turn = threading.Lock()

    class Waiting:
        def __init__(self, communicator):
            self.inner, self.rank, self.size = communicator, communicator.rank, communicator.size

        def all_gather(self, x):
            return self.meet(self.inner.all_gather, x)

        def shift(self, x, by):
            return self.meet(self.inner.shift, x, by)

        def meet(self, exchange, *arguments):
            turn.release()
            try:
                return exchange(*arguments)
            finally:
                turn.acquire()

    def call(communicator):
        with turn:
            return function(Waiting(communicator))

    return parallel.in_threads(size, call, timeout=500)


def launched(divided):
    return [x for device in divided.emulated.devices for x in device.launches]


def wide(arrays):
    return [None if x is None else x.astype(np.float64) for x in arrays]


@pytest.mark.parametrize(
    ("math", "segments", "K", "gate", "cu_seqlens"),
    [(2, 3, 128, None, None), (1, 2, 72, None, UNEVEN), (1, 3, 64, "scalar", UNEVEN)],
)
def test_transfers_of_sequences(divided, on_reference, math, segments, K, gate, cu_seqlens):
    divided(math, segments)
    B = 2 if cu_seqlens is None else 1
    options = dict(K=K, V=72, gate=gate, dtype=BF16, cu_seqlens=cu_seqlens)
    (_, k, v, beta, g), kw = make_inputs(390, B=B, G=2, **options)
    found = cd.sequence_transfer(k, v, beta, g, cu_seqlens=kw["cu_seqlens"])
    assert "joined_transfer_hopper" in {x.entry for x in launched(divided)}
    exact = on_reference(cd.sequence_transfer, *wide((k, v, beta, g)), cu_seqlens=kw["cu_seqlens"])
    for x, y in zip(found, exact, strict=True):
        assert (x.shape, x.dtype) == (y.shape, np.float32)
        assert error(x, y) < 8e-3


def whole(args, kw, do, dfinal):
    o, final, residuals = cd.chunk_delta_rule_fwd(*args, **kw)
    return o, final, cd.chunk_delta_rule_bwd(residuals, do, dfinal)


@pytest.mark.parametrize(
    ("math", "segments", "gate", "dtype", "tokens"),
    [
        (2, 3, None, BF16, [130, 200]),
        (1, 2, "scalar", BF16, [100, 70, 129]),
        (1, 1, None, BF16, [65, 0, 64]),
        (1, 2, None, F16, [130, 70]),
    ],
)
@pytest.mark.parametrize("initial", [True, False])
def test_shares(divided, on_reference, math, segments, gate, dtype, tokens, initial):
    """Outputs, states and gradients of all ranks against float64 on one."""
    divided(math, segments, reuse_x=math == 1 and segments > 1)
    options = dict(K=64, V=64, gate=gate, dtype=dtype, beta=(0, 2), initial=initial)
    args, kw = make_inputs(sum(tokens), B=2, G=2, **options)
    rng = np.random.default_rng(1)
    do = rng.standard_normal(args[2].shape).astype(dtype)
    dfinal = rng.standard_normal((2, 2, 64, 64)).astype(np.float32) if initial else None

    def share(communicator):
        start = sum(tokens[: communicator.rank])
        own = slice(start, start + tokens[communicator.rank])
        given = [None if x is None else np.ascontiguousarray(x[:, own]) for x in args]
        o, final, residuals = parallel.chunk_delta_rule_fwd(communicator, *given, **kw)
        assert residuals.in_halves == (dtype == BF16 and own.stop > own.start)
        again = parallel.chunk_delta_rule(communicator, *given, **kw)
        d = np.ascontiguousarray(do[:, own])
        return o, final, parallel.chunk_delta_rule_bwd(residuals, d, dfinal), again

    found = in_turns(len(tokens), share)
    entries = {x.entry for x in launched(divided)}
    assert {"joined_transfer_hopper", "forward_hopper"} <= entries
    wide_kw = kw | dict(initial_state=None if not initial else kw["initial_state"].astype(float))
    exact = on_reference(whole, wide(args), wide_kw, *wide((do, dfinal)))
    bound = 1.5e-2 if dtype == BF16 else 3e-3
    for x in (0, 3):
        o = [s[0] if x == 0 else s[3].o for s in found]
        assert error(np.concatenate(o, axis=1), exact[0]) < bound
        final = found[-1][1] if x == 0 else found[-1][3].final_state
        assert error(final, exact[1]) < bound
    for name in ("q", "k", "v", "beta", "g"):
        wanted = getattr(exact[2], name)
        if wanted is not None:
            parts = [getattr(s[2], name) for s in found]
            assert error(np.concatenate(parts, axis=1), wanted) < bound, name
    assert (found[0][2].initial_state is None) == (not initial)
    if initial:
        assert error(found[0][2].initial_state, exact[2].initial_state) < bound


@pytest.mark.parametrize("formula", GATES)
def test_raw_gates_in_halves(emulated, on_reference, formula):
    """They are formed before the first half's walks, and what comes back to them after all."""
    emulated(**HOPPER)
    tokens, (B, H, HV, K, V) = [70, 65, 64], (1, 1, 2, 16, 16)
    (q, k, v, *_), _ = make_inputs(sum(tokens), B=B, H=H, G=HV // H, K=K, V=V, dtype=BF16)
    rng = np.random.default_rng(4)
    gate = raw_gate(rng, formula, "scalar", "head", B, sum(tokens), HV, K, BF16)
    args = q, k, v, cd.SigmoidBeta(rng.standard_normal(v.shape[:3]).astype(BF16)), gate
    do = rng.standard_normal(v.shape).astype(BF16)
    exact = on_reference(whole, args, {}, do, None)

    def share(communicator):
        start = sum(tokens[: communicator.rank])
        own = slice(start, start + tokens[communicator.rank])
        o, _, residuals = parallel.chunk_delta_rule_fwd(
            communicator, *(tokens_of(x, own) for x in args)
        )
        assert residuals.in_halves
        return o, parallel.chunk_delta_rule_bwd(residuals, do[:, own])

    shares = in_turns(len(tokens), share)
    found, wanted = [x[1] for x in shares], exact[2]
    for pieces, whole_one in (
        ([x[0] for x in shares], exact[0]),
        ([x.k for x in found], wanted.k),
        ([x.g.a for x in found], wanted.g.a),
        ([x.beta.logits for x in found], wanted.beta.logits),
    ):
        assert error(np.concatenate(pieces, axis=1), whole_one) < 2e-2
    for name in ("A_log", "dt_bias"):
        total = sum(getattr(x.g, name).astype(np.float64) for x in found)
        assert error(total, getattr(wanted.g, name)) < 2e-2, name


def divided_as(HV, tells):
    call = Call(
        dtype=FLOAT_DTYPES["bfloat16"], B=1, T=65536, N=1, H=16, HV=HV, K=128, V=128, scale=1.0
    )
    least, factors = cost.traffic(call, written_rows=2), shares.FACTORS * HV * 1024
    return shares.divide(call, H200, shares.TRAINING, tells, least, factors)


def test_who_tells_nothing_transfers_no_more_than_one_device_would():
    assert divided_as(32, "transfer").segments == 4
    assert divided_as(32, "nothing").segments == 3


@pytest.mark.parametrize("tells", ["nothing", "transfer"])
def test_where_heads_fill_the_multiprocessors_a_transfer_is_of_the_whole_share(tells):
    choice = divided_as(128, tells)
    assert choice.segments == 1
    assert shares.part_of(choice, tells).transferred == (tells == "transfer")


def test_factors_are_made_while_others_wait():
    call = Call(dtype=FLOAT_DTYPES["bfloat16"], B=1, T=65536, N=1, H=16, HV=32, K=128, V=128)
    for tells in ("nothing", "state", "transfer"):
        first, second = plans.halves("training", call, H200, tells)
        names = [[x.entry for x in half.launches] for half in (first, second)]
        assert ("wy_factors_hopper" in names[0]) == (tells == "nothing")
        assert sum(x.count("wy_factors_hopper") for x in names) == 1
        assert (names[0][-1] == "joined_transfer_hopper") == (tells != "nothing")
        assert not {*first.outputs, *first.workspace} & {*second.outputs, *second.workspace}
