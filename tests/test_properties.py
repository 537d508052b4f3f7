"""What must hold for every problem, on problems that hypothesis makes up.

Shapes are small but awkward: lengths about the chunk size, key and value dimensions that differ,
several value heads per key head, empty sequences. Everything is float64 unless said otherwise, so
that a tolerance of 1e-12 leaves room for rounding and for nothing else.
"""

from itertools import pairwise

import numpy as np
import pytest
from helpers import deviation, make_inputs
from hypothesis import example, given
from hypothesis import strategies as st

import cupy_delta as cd

ROUNDING = 1e-12
OPERATORS = [cd.chunk_delta_rule, cd.recurrent_delta_rule]
both_operators = pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)


def inputs(**options):
    """`make_inputs` as one dict of keyword arguments."""
    args, kwargs = make_inputs(**options)
    arrays = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True))
    return arrays | {"initial_state": kwargs["initial_state"]}


def tokens(arrays, start, stop):
    """The same inputs, tokens [start, stop) only; the initial state stays."""
    return {
        name: x[:, start:stop] if x is not None and name != "initial_state" else x
        for name, x in arrays.items()
    }


def same_bits(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


@st.composite
def problems(draw, gates=(None, "scalar", "channel"), batches=(0, 3), lengths=(0, 40), **fixed):
    """Inputs of an operator as keyword arguments."""
    sizes = dict(
        B=draw(st.integers(*batches)),
        T=draw(st.integers(*lengths)),
        H=draw(st.integers(1, 3)),
        G=draw(st.integers(1, 3)),
        K=draw(st.integers(1, 6)),
        V=draw(st.integers(1, 6)),
    )
    options = dict(
        gate=draw(st.sampled_from(gates)),
        correlation=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        beta=draw(st.sampled_from([(0.0, 1.0), (1.0, 1.0), (0.0, 2.0), (1.99, 1.99)])),
        decay=draw(st.sampled_from([0.0, 0.1, 1.0, 30.0])),
        initial=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return inputs(**sizes | options | fixed)


chunks = st.sampled_from([1, 2, 3, 5, 8, 16, 64, None])


def ends(draw, total):
    """A cu_seqlens over `total` tokens, empty sequences among them."""
    cuts = draw(st.lists(st.integers(0, total), max_size=4))
    return np.array([0, *sorted(cuts), total], draw(st.sampled_from([np.int32, np.int64])))


@st.composite
def packed(draw, **options):
    """Inputs with B = 1 and several sequences end to end, each with a state to start from."""
    arrays = draw(problems(batches=(1, 1), **options))
    cu_seqlens = ends(draw, arrays["q"].shape[1])
    _, _, HV, V = arrays["v"].shape
    states = np.random.default_rng(1).standard_normal(
        (len(cu_seqlens) - 1, HV, arrays["k"].shape[-1], V)
    )
    arrays["initial_state"] = draw(st.sampled_from([None, states]))
    return arrays, cu_seqlens


def close(got, expected, tolerance=ROUNDING):
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert deviation(x, y) <= tolerance


# --- the same operator, said differently --------------------------------------------------------


@given(problems(), chunks, st.booleans())
def test_chunks_equal_the_token_loop(arrays, chunk_size, norm):
    expected = cd.recurrent_delta_rule(**arrays, qk_l2norm=norm)
    close(cd.chunk_delta_rule(**arrays, chunk_size=chunk_size, qk_l2norm=norm), expected)


@given(problems(dtype=np.float32, beta=(0.0, 1.0)), chunks)
def test_chunks_equal_the_token_loop_in_float32(arrays, chunk_size):
    expected = cd.recurrent_delta_rule(**arrays)
    got = cd.chunk_delta_rule(**arrays, chunk_size=chunk_size)
    assert {x.dtype for x in (*got, *expected)} == {np.dtype(np.float32)}
    close(got, expected, 2e-5)


@both_operators
@given(st.data())
def test_a_sequence_may_be_split_anywhere(operator, data):
    arrays = data.draw(problems(lengths=(1, 40)))
    T = arrays["q"].shape[1]
    cut = data.draw(st.integers(0, T))
    whole = operator(**arrays)
    first = operator(**tokens(arrays, 0, cut))
    rest = operator(**tokens(arrays, cut, T) | {"initial_state": first.final_state})
    close((np.concatenate([first.o, rest.o], 1), rest.final_state), whole)


@both_operators
@given(packed())
def test_packed_sequences_equal_separate_calls(operator, problem):
    arrays, cu_seqlens = problem
    got = operator(**arrays, cu_seqlens=cu_seqlens)
    for n, (start, stop) in enumerate(pairwise(cu_seqlens)):
        part = tokens(arrays, start, stop)
        if part["initial_state"] is not None:
            part["initial_state"] = part["initial_state"][n : n + 1]
        o, final_state = operator(**part)
        close((got.o[:, start:stop], got.final_state[n : n + 1]), (o, final_state))


@both_operators
@given(problems())
def test_grouped_value_heads_equal_repeated_key_heads(operator, arrays):
    groups = arrays["v"].shape[2] // arrays["k"].shape[2]
    repeated = {name: np.repeat(arrays[name], groups, axis=2) for name in ("q", "k")}
    close(operator(**arrays | repeated), operator(**arrays))


@both_operators
@given(problems())
def test_the_other_state_layout_is_the_transpose(operator, arrays):
    expected = operator(**arrays)
    state = arrays["initial_state"]
    turned = None if state is None else np.ascontiguousarray(state.swapaxes(-1, -2))
    got = operator(**arrays | {"initial_state": turned}, state_layout="vk")
    assert same_bits(got.o, expected.o)
    assert same_bits(got.final_state.swapaxes(-1, -2), expected.final_state)


@both_operators
@given(problems(), st.sampled_from([0.0, 1.0, -3.0, 0.125, 1e3]))
def test_outputs_are_linear_in_the_scale(operator, arrays, scale):
    unit = operator(**arrays, scale=1.0)
    scaled = operator(**arrays, scale=scale)
    close((scaled.o / max(1.0, abs(scale)),), (unit.o * scale / max(1.0, abs(scale)),))
    assert same_bits(scaled.final_state, unit.final_state)


@both_operators
@given(problems())
def test_the_default_scale(operator, arrays):
    K = arrays["k"].shape[-1]
    assert same_bits(operator(**arrays).o, operator(**arrays, scale=K**-0.5).o)


@both_operators
@given(problems(), st.sampled_from([-2.0, 0.5]))
def test_values_and_states_enter_linearly(operator, arrays, factor):
    """With q, k, beta and g held, the map from values and state to outputs is linear."""
    whole = operator(**arrays)
    state = arrays["initial_state"]
    values = {"v": factor * arrays["v"]}
    values["initial_state"] = None if state is None else factor * state
    close(operator(**arrays | values), [factor * x for x in whole])
    if state is not None:
        no_values = operator(**arrays | {"v": np.zeros_like(arrays["v"])})
        no_state = operator(**arrays | {"initial_state": None})
        close([x + y for x, y in zip(no_values, no_state, strict=True)], whole)


@both_operators
@given(st.data())
def test_heads_are_independent_and_unordered(operator, data):
    arrays = data.draw(problems())
    H, HV = arrays["k"].shape[2], arrays["v"].shape[2]
    order = np.array(data.draw(st.permutations(range(H))))
    value_order = (order[:, None] * (HV // H) + np.arange(HV // H)).ravel()
    permuted = {
        name: None if x is None else x[:, :, order if name in "qk" else value_order]
        for name, x in arrays.items()
        if name != "initial_state"
    }
    state = arrays["initial_state"]
    permuted["initial_state"] = None if state is None else state[:, value_order]
    expected = operator(**arrays)
    close(
        operator(**permuted), (expected.o[:, :, value_order], expected.final_state[:, value_order])
    )


@both_operators
@given(problems())
def test_normalised_inputs_equal_the_option(operator, arrays):
    def normalise(x):
        return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)

    by_hand = arrays | {name: normalise(3 * arrays[name]) for name in "qk"}
    tripled = arrays | {name: 3 * arrays[name] for name in "qk"}
    close(operator(**tripled, qk_l2norm=True), operator(**by_hand))


@given(problems(), chunks)
def test_no_gate_equals_a_gate_that_keeps_everything(arrays, chunk_size):
    H, K = arrays["v"].shape[2], arrays["k"].shape[-1]
    shape = (*arrays["v"].shape[:2], H)
    ungated = cd.chunk_delta_rule(**arrays | {"g": None}, chunk_size=chunk_size)
    for gate in (np.zeros(shape), np.zeros((*shape, K))):
        close(cd.chunk_delta_rule(**arrays | {"g": gate}, chunk_size=chunk_size), ungated)


@given(problems(gates=("scalar",)), chunks)
def test_a_scalar_gate_equals_one_per_channel_with_equal_channels(arrays, chunk_size):
    channels = np.repeat(arrays["g"][..., None], arrays["k"].shape[-1], -1)
    got = cd.chunk_delta_rule(**arrays | {"g": channels}, chunk_size=chunk_size)
    close(got, cd.chunk_delta_rule(**arrays, chunk_size=chunk_size))


@given(problems())
def test_strength_per_value_channel_with_equal_channels(arrays):
    channels = np.repeat(arrays["beta"][..., None], arrays["v"].shape[-1], -1)
    got = cd.recurrent_delta_rule(**arrays | {"beta": channels})
    close(got, cd.recurrent_delta_rule(**arrays))


@given(problems(), st.integers(0, 2**32 - 1))
def test_value_channels_are_independent(arrays, seed):
    """One strength per value channel: each channel is its own problem with V = 1."""
    shape = arrays["v"].shape
    beta = np.random.default_rng(seed).uniform(0, 2, shape)
    got = cd.recurrent_delta_rule(**arrays | {"beta": beta})
    for c in range(shape[-1]):
        one = arrays | {"v": arrays["v"][..., c : c + 1], "beta": beta[..., c]}
        if one["initial_state"] is not None:
            one["initial_state"] = one["initial_state"][..., c : c + 1]
        expected = cd.recurrent_delta_rule(**one)
        close((got.o[..., c : c + 1], got.final_state[..., c : c + 1]), expected)


# --- to the bit ---------------------------------------------------------------------------------


@both_operators
@given(st.data())
def test_later_tokens_never_change_earlier_outputs(operator, data):
    arrays = data.draw(problems(batches=(1, 2), lengths=(1, 80)))
    T = arrays["q"].shape[1]
    cut = data.draw(st.integers(0, T - 1))
    changed = {name: None if x is None else x.copy() for name, x in arrays.items()}
    rng = np.random.default_rng(cut)
    for name in ("q", "k", "v", "beta", "g"):
        if changed[name] is not None:
            tail = changed[name][:, cut:]
            tail[...] = -np.abs(rng.standard_normal(tail.shape)) * 5
    before, after = operator(**arrays).o, operator(**changed).o
    assert same_bits(before[:, :cut], after[:, :cut])
    assert not same_bits(before[:, cut:], after[:, cut:])


@both_operators
@given(problems(lengths=(0, 80)))
def test_the_same_call_gives_the_same_bits(operator, arrays):
    first, second = operator(**arrays), operator(**arrays)
    assert all(map(same_bits, first, second))


@given(problems(lengths=(1, 80)))
def test_the_gradients_of_the_same_call_have_the_same_bits(arrays):
    def gradients():
        forward = cd.chunk_delta_rule_fwd(**arrays)
        return cd.chunk_delta_rule_bwd(forward.residuals, forward.o, forward.final_state)

    for first, second in zip(gradients(), gradients(), strict=True):
        assert (first is None and second is None) or same_bits(first, second)


@given(problems(), chunks)
def test_the_forward_that_keeps_residuals_gives_the_same_bits(arrays, chunk_size):
    forward = cd.chunk_delta_rule_fwd(**arrays, chunk_size=chunk_size)
    plain = cd.chunk_delta_rule(**arrays, chunk_size=chunk_size)
    assert all(map(same_bits, forward[:2], plain))


@both_operators
@given(problems(lengths=(1, 80)))
def test_threads_never_change_a_bit(operator, arrays):
    results = []
    for count in "1", "3":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUPY_DELTA_NUM_THREADS", count)
            patch.setattr("cupy_delta.reference.parallel.PRODUCTS_FOR_THREADS", 0)
            results.append(operator(**arrays))
    assert all(map(same_bits, *results))


@both_operators
@given(problems())
def test_inputs_are_left_alone(operator, arrays):
    before = {n: None if x is None else x.copy() for n, x in arrays.items()}
    for x in arrays.values():
        if x is not None:
            x.flags.writeable = False
    operator(**arrays, qk_l2norm=True)
    assert all(x is None or same_bits(x, before[n]) for n, x in arrays.items())


@both_operators
@given(problems())
def test_out_holds_the_outputs(operator, arrays):
    out = np.full(arrays["v"].shape, np.nan)
    expected = operator(**arrays)
    got = operator(**arrays, out=out)
    assert got.o is out
    assert all(map(same_bits, got, expected))


@both_operators
@given(problems(), st.sampled_from(["F", "reversed", "every other"]))
def test_strided_inputs_give_the_same_bits(operator, arrays, how):
    def strided(x):
        if x is None:
            return None
        if how == "F":
            return np.asfortranarray(x)
        return (
            x[::-1, ..., ::-1].copy()[::-1, ..., ::-1]
            if how == "reversed"
            else (np.repeat(x, 2, -1)[..., ::2])
        )

    expected = operator(**arrays)
    got = operator(**{name: strided(x) for name, x in arrays.items()})
    assert all(map(same_bits, got, expected))


@both_operators
@given(st.data())
def test_nan_stays_in_its_sequence_and_head(operator, data):
    arrays = data.draw(problems(batches=(1, 3), lengths=(1, 40)))
    expected = operator(**arrays)
    B, T, HV, _ = arrays["v"].shape
    groups = HV // arrays["k"].shape[2]
    b, t, h = (data.draw(st.integers(0, n - 1)) for n in (B, T, HV))
    name = data.draw(st.sampled_from(["q", "k", "v", "beta"]))
    arrays[name] = arrays[name].copy()
    arrays[name][b, t, h // groups if name in "qk" else h] = np.nan
    got = operator(**arrays)
    touched = np.zeros((B, HV), bool)
    touched[b, h] = True
    if name in "qk":
        touched[b, h // groups * groups : (h // groups + 1) * groups] = True
    clean = ~touched
    assert same_bits(got.o.swapaxes(1, 2)[clean], expected.o.swapaxes(1, 2)[clean])
    assert same_bits(got.final_state[clean], expected.final_state[clean])
    assert np.isnan(got.o[b, t, h]).any()


# --- building blocks ----------------------------------------------------------------------------


@given(packed(), chunks, st.booleans(), st.booleans())
def test_the_building_blocks_make_up_the_operator(problem, chunk_size, pack, norm):
    arrays, cu_seqlens = problem
    q, k, v, beta, g, state = arrays.values()
    if not pack:
        cu_seqlens, state = None, state if state is None else state[:1]
    options = dict(chunk_size=chunk_size, cu_seqlens=cu_seqlens, qk_l2norm=norm)
    w, u, t = cd.wy_factors(k, v, beta, g, **options)
    states, v_new, final_state = cd.state_pass(k, w, u, g, initial_state=state, **options)
    o = cd.chunk_output(q, k, v_new, states, g, **options)
    expected = cd.chunk_delta_rule(q, k, v, beta, g, initial_state=state, **options)
    close((o, final_state), expected)
    assert t.shape == (*beta.shape, chunk_size or t.shape[-1])


@given(problems(gates=(None,), lengths=(1, 20)))
def test_wy_factors_solve_their_equation(arrays):
    """One chunk: (I + A) T = diag(beta), W = T K, U = T V."""
    k, v, beta = arrays["k"], arrays["v"], arrays["beta"]
    T = k.shape[1]
    w, u, t = cd.wy_factors(k, v, beta, chunk_size=T)
    k = np.repeat(k, v.shape[2] // k.shape[2], 2)
    A = np.tril(np.einsum("bth,bthk,bshk->bhts", beta, k, k), -1)
    left = np.einsum("bhts,bshc->bthc", A + np.eye(T), t)
    close((left,), (beta[..., None] * np.eye(T)[:, None],), 1e-11)
    close((w,), (np.einsum("bthc,bchk->bthk", t, k),))
    close((u,), (np.einsum("bthc,bchv->bthv", t, v),))


@pytest.mark.slow
@given(packed(), st.integers(0, 2**32 - 1))
def test_a_transfer_does_what_the_sequence_does(problem, seed):
    arrays, cu_seqlens = problem
    args = (arrays[name] for name in ("k", "v", "beta", "g"))
    transfer = cd.sequence_transfer(*args, cu_seqlens=cu_seqlens)
    state = np.random.default_rng(seed).standard_normal(transfer.h.shape)
    expected = cd.recurrent_delta_rule(**arrays | {"initial_state": state}, cu_seqlens=cu_seqlens)
    close((transfer.apply(state),), (expected.final_state,))


@pytest.mark.slow
@given(st.data())
def test_transfers_compose(data):
    arrays = data.draw(problems())
    args = [arrays[name] for name in ("k", "v", "beta", "g")]
    T = args[0].shape[1]
    i, j = sorted(data.draw(st.tuples(st.integers(0, T), st.integers(0, T))))

    def transfer(a, b):
        return cd.sequence_transfer(*(None if x is None else x[:, a:b] for x in args))

    first, second, third = transfer(0, i), transfer(i, j), transfer(j, T)
    close(first.then(second).then(third), transfer(0, T))
    close(first.then(second.then(third)), first.then(second).then(third))


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.data())
@example(data=None)
def test_gradients_are_adjoint_to_the_directional_derivative(data):
    """<do, dO[d]> + <dS, dS'[d]> = sum of <gradient, d> over the inputs, for a random direction d.

    The left side by central differences of the token loop: an operator that shares no line of
    algebra with the gradients.
    """
    if data is None:
        arrays, norm, chunk_size = inputs(T=70, B=2, G=2, K=5, V=3, gate="channel"), True, None
    else:
        arrays = data.draw(problems(batches=(1, 2), lengths=(1, 20), decay=1.0))
        norm, chunk_size = data.draw(st.booleans()), data.draw(chunks)
    rng = np.random.default_rng(5)
    forward = cd.chunk_delta_rule_fwd(**arrays, qk_l2norm=norm, chunk_size=chunk_size)
    do, dstate = (rng.standard_normal(x.shape) for x in forward[:2])
    gradients = cd.chunk_delta_rule_bwd(forward.residuals, do, dstate)._asdict()
    direction = {n: rng.standard_normal(x.shape) for n, x in arrays.items() if x is not None}
    assert {n for n, x in gradients.items() if x is not None} == set(direction)

    def loss(step):
        moved = {n: x + step * direction[n] if n in direction else x for n, x in arrays.items()}
        o, state = cd.recurrent_delta_rule(**moved, qk_l2norm=norm)
        return np.sum(o * do) + np.sum(state * dstate)

    h = 1e-4
    # Richardson: the error of the central difference is then of order h^4.
    difference = (8 * (loss(h / 2) - loss(-h / 2)) - (loss(h) - loss(-h))) / (6 * h)
    parts = [np.sum(gradients[n] * direction[n]) for n in direction]
    size = sum(np.linalg.norm(gradients[n]) * np.linalg.norm(direction[n]) for n in direction)
    assert abs(difference - sum(parts)) <= 1e-7 * (1.0 + size)


@pytest.mark.slow
@given(packed(lengths=(0, 30)), chunks)
def test_gradients_of_packed_sequences_equal_separate_calls(problem, chunk_size):
    arrays, cu_seqlens = problem
    rng = np.random.default_rng(3)
    forward = cd.chunk_delta_rule_fwd(**arrays, cu_seqlens=cu_seqlens, chunk_size=chunk_size)
    do, dstate = (rng.standard_normal(x.shape) for x in forward[:2])
    got = cd.chunk_delta_rule_bwd(forward.residuals, do, dstate)
    for n, (start, stop) in enumerate(pairwise(cu_seqlens)):
        part = tokens(arrays, start, stop)
        if part["initial_state"] is not None:
            part["initial_state"] = part["initial_state"][n : n + 1]
        residuals = cd.chunk_delta_rule_fwd(**part, chunk_size=chunk_size).residuals
        expected = cd.chunk_delta_rule_bwd(residuals, do[:, start:stop], dstate[n : n + 1])
        inputs = [None if x is None else x[:, start:stop] for x in got[:5]]
        state = None if got.initial_state is None else got.initial_state[n : n + 1]
        close((*inputs, state), expected)


@pytest.mark.slow
@given(problems(lengths=(1, 30)), chunks)
def test_the_gradients_do_not_depend_on_the_chunk_size(arrays, chunk_size):
    def gradients(size):
        forward = cd.chunk_delta_rule_fwd(**arrays, chunk_size=size)
        return cd.chunk_delta_rule_bwd(forward.residuals, forward.o, forward.final_state)

    close(gradients(chunk_size), gradients(7), 1e-11)


@pytest.mark.slow
@given(problems(lengths=(1, 30)))
def test_no_gradient_of_the_final_state_means_zero(arrays):
    residuals = cd.chunk_delta_rule_fwd(**arrays).residuals
    do = np.ones(arrays["v"].shape)
    B, _, HV, V = do.shape
    zero = np.zeros((B, HV, arrays["k"].shape[-1], V))
    absent = cd.chunk_delta_rule_bwd(residuals, do)
    present = cd.chunk_delta_rule_bwd(residuals, do, zero)
    for x, y in zip(absent, present, strict=True):
        assert (x is None and y is None) or same_bits(x, y)


# --- decoding -----------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.data())
def test_steps_equal_the_token_loop(data):
    """Steps of one to eight tokens, in slots of a larger pool, some rows of it padding."""
    arrays = data.draw(problems(batches=(0, 4), lengths=(0, 12), initial=False))
    norm, layout = data.draw(st.booleans()), data.draw(st.sampled_from(["kv", "vk"]))
    B, T, HV, V = arrays["v"].shape
    K = arrays["k"].shape[-1]
    slots = B + data.draw(st.integers(0, 3))
    order = data.draw(st.permutations(range(slots)))[:B]
    padding = np.array(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)), bool)
    indices = np.where(padding, -1 - np.arange(B), np.array(order, int))
    shape = (slots, HV, K, V) if layout == "kv" else (slots, HV, V, K)
    pool = np.random.default_rng(2).standard_normal(shape)
    before = pool.copy()
    start = before[np.where(padding, 0, indices)] if slots else np.zeros((0, *shape[1:]))
    expected = cd.recurrent_delta_rule(
        **arrays | {"initial_state": start}, qk_l2norm=norm, state_layout=layout
    )
    del arrays["initial_state"]
    outputs, t = [np.zeros((B, 0, HV, V))], 0
    while t < T:
        n = data.draw(st.integers(1, min(8, T - t)))
        step = tokens(arrays, t, t + n)
        outputs.append(
            cd.delta_rule_step(
                **step, state=pool, state_indices=indices, qk_l2norm=norm, state_layout=layout
            )
        )
        t += n
    o = np.concatenate(outputs, 1)
    assert not o[padding].any()
    used = ~padding
    close((o[used], pool[indices[used]]), (expected.o[used], expected.final_state[used]))
    rest = np.setdiff1d(np.arange(slots), indices)
    assert same_bits(pool[rest], before[rest])


@given(problems(batches=(1, 3), lengths=(1, 8), initial=False))
def test_a_pool_without_indices_is_one_state_per_sequence(arrays):
    B, _, HV, V = arrays["v"].shape
    state = np.random.default_rng(2).standard_normal((B, HV, arrays["k"].shape[-1], V))
    expected = cd.recurrent_delta_rule(**arrays | {"initial_state": state})
    del arrays["initial_state"]
    o = cd.delta_rule_step(**arrays, state=state)
    close((o, state), expected)
