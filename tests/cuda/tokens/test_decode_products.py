"""Steps of few tokens on states of bfloat16: products on the tensor cores, beside float64."""

import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs
from raw import raw_gate

import cupy_delta as cd
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.cuda.variants import launches_of

# The second with sums fused as on a GPU, since bits of two programs are compared.
LEGS = ["source", "fused"]
FACTS = DeviceFacts(132, 227 * 1024, (9, 0))
BF16 = np.dtype(ml_dtypes.bfloat16)
F64 = np.float64


def wide(args):
    return [None if x is None else x.astype(F64) for x in args]


def inputs(T, layout, gate, K=128, V=64, B=2, **more):
    """Arrays and a pool of bfloat16, of which every second slot is a sequence's."""
    args, kw = make_inputs(
        T, B=B, H=1, G=2, K=K, V=V, gate=gate, dtype=BF16, layout=layout, initial=True, **more
    )
    pool = np.zeros((2 * B + 1, *kw["initial_state"].shape[1:]), BF16)
    pool[1::2] = kw["initial_state"].astype(BF16)
    return args, pool


def exact_step(args, states, kept, **options):
    """Outputs of all tokens and states after the first `kept`, in float64."""
    all_of = cd.recurrent_delta_rule(*wide(args), initial_state=states.astype(F64), **options)
    few = [None if x is None else x[:, :kept] for x in wide(args)]
    after = cd.recurrent_delta_rule(*few, initial_state=states.astype(F64), **options)
    return all_of.o, after.final_state


def off(x, y):
    return float(np.abs(x.astype(F64) - y).max() / np.abs(y).max())


@pytest.mark.ptx_leg(T=[1, 2, 4])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize(
    ("T", "gate", "sizes"),
    [
        (1, "scalar", dict(K=128, V=64)),
        (2, None, dict(K=64, V=96)),
        (3, "scalar", dict(K=256, V=32)),
        (4, "scalar", dict(K=128, V=128)),
        (1, "channel", dict(K=128, V=64)),
        (2, "channel", dict(K=96, V=16)),
        (3, "channel", dict(K=256, V=32)),
        (4, "channel", dict(K=64, V=64)),
    ],
)
def test_few_tokens_on_states_of_16_bits(emulated, layout, T, gate, sizes):
    """Outputs and states to one rounding to 16 bits, slots that nobody has untouched."""
    args, pool = inputs(T, layout, gate, **sizes)
    options, before = dict(qk_l2norm=True, state_layout=layout), pool.copy()
    o = cd.delta_rule_step(*args, state=pool, state_indices=np.array([1, 3]), **options)
    if emulated.devices is not None:
        by_products = T > 1
        entry = "decode_products" if by_products else "decode"
        assert [x.entry for x in emulated.devices[-1].launches] == [entry]
    expected, after = exact_step(args, before[1:4:2], T, **options)
    assert off(o, expected) < 4e-3
    assert off(pool[1:4:2], after) < 4e-3
    assert np.array_equal(pool[::2], before[::2])


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_what_is_accepted_is_what_states_take_up(emulated, layout, gate):
    """The same outputs whatever is accepted, states of so many tokens, padding, other slots."""
    args, pool = inputs(4, layout, gate, B=5)
    options, before = dict(qk_l2norm=True, state_layout=layout), pool.copy()
    args[4][1, 1] = -np.inf  # forgets what came before
    slots = np.array([1, 3, -1, 7, 9])
    to, accepted = np.array([1, 2, 4, 8, 9]), np.array([0, 3, 2, 0, 4])
    where = dict(state_indices=slots, output_state_indices=to, accepted=accepted)
    o = cd.delta_rule_step(*args, state=pool, **where, **options)
    for n, m in enumerate(accepted):
        one = [x[n : n + 1] for x in args]
        if slots[n] < 0:
            assert not o[n].any()
            continue
        expected, after = exact_step(one, before[slots[n] : slots[n] + 1], m, **options)
        assert off(o[n], expected[0]) < 4e-3
        assert off(pool[to[n]], after[0]) < 4e-3
        alone = before[slots[n] : slots[n] + 1].copy()
        if m:  # to the bit what fewer tokens leave
            few = cd.delta_rule_step(*(x[:, :m] for x in one), state=alone, **options)
            assert np.array_equal(few[0], o[n, :m])
            assert np.array_equal(alone[0], pool[to[n]])
        else:
            assert np.array_equal(alone[0], pool[to[n]])
    touched = {*to[accepted > 0], 8}
    rest = [i for i in range(len(pool)) if i not in touched]
    assert np.array_equal(pool[rest], before[rest])


@pytest.mark.parametrize(("layout", "gate"), [("kv", "scalar"), ("vk", "channel")])
def test_gates_and_strengths_of_parameters(emulated, on_reference, layout, gate):
    args, pool = inputs(3, layout, gate)
    rng = np.random.default_rng(0)
    args[3] = cd.SigmoidBeta(rng.standard_normal((2, 3, 2)).astype(BF16), scale=2)
    args[4] = raw_gate(
        rng, "softplus", gate, "channel" if gate == "channel" else "head", 2, 3, 2, 128, BF16
    )
    states, other = pool[1:4:2].copy(), pool[1:4:2].copy()
    options = dict(qk_l2norm=True, state_layout=layout)
    o = cd.delta_rule_step(*args, state=states, **options)
    expected = on_reference(cd.delta_rule_step, *args, state=other, **options)
    assert off(o, expected.astype(F64)) < 8e-3
    assert off(states, other.astype(F64)) < 8e-3


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("gate", [None, "channel"])
def test_hard_rows(emulated, layout, gate):
    """Nearly the same keys with beta of 2, one whose squares overflow, and a NaN to come."""
    args, pool = inputs(4, layout, gate)
    q, k, v, beta, g = args
    if gate:
        g[..., ::7], g[..., 3::7], g[..., 5] = -np.inf, -20, 0
    k[:] = (k[:, :1].astype(F64) + 0.01 * k.astype(F64)).astype(BF16)
    beta[:] = 2
    k[0, 2] = (k[0, 2].astype(F64) * 1e30).astype(BF16)
    q[1, 1] = (q[1, 1].astype(F64) * 1e37).astype(BF16)
    options, before = dict(qk_l2norm=True, state_layout=layout), pool[1:4:2].copy()
    states = before.copy()
    o = cd.delta_rule_step(*args, state=states, **options)
    expected, after = exact_step(args, before, 4, **options)
    assert off(o, expected) < 4e-3
    assert off(states, after) < 4e-3
    k[0, 3, :, 5], v[1, 3] = np.inf, np.nan
    spoilt = before.copy()
    accepted = np.array([3, 3])
    later = cd.delta_rule_step(*args, state=spoilt, accepted=accepted, **options)
    assert np.array_equal(later[:, :3], o[:, :3])
    assert np.isfinite(spoilt.astype(F64)).all()
    assert np.isnan(later[:, 3].astype(F64)).all()


@pytest.mark.parametrize(
    ("differs", "by_products"),
    [
        (dict(), False),
        (dict(gate="channel"), False),
        (dict(gate="channel", raw="softplus"), False),
        (dict(raw="softplus"), False),
        (dict(state_layout="vk"), False),
        (dict(T=2, state_layout="vk"), True),
        (dict(T=4, raw="softplus"), True),
        (dict(T=5), False),
        (dict(T=4, V=100), False),
        (dict(T=4, K=80), False),
        (dict(T=4, pool_dtype="float32"), False),
        (dict(T=4, dtype="float16", pool_dtype="float16"), False),
    ],
)
def test_which_steps_are_products(differs, by_products):
    sizes = dict(dtype="bfloat16", pool_dtype="bfloat16", K=128, V=128, T=1, gate="scalar")
    (launch,) = launches_of(FACTS, ("step",), **sizes | differs)
    assert launch.entry == ("decode_products" if by_products else "decode")
