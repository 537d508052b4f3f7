"""cupy_delta.jax on the CPU: what NumPy arrays give, bit by bit, in compiled programs."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta as cd
from cupy_delta import jax as cdj
from cupy_delta.problem import ON_POOL

XlaError = (
    getattr(jax.errors, "JaxRuntimeError", None)
    or __import__("jaxlib").xla_extension.XlaRuntimeError
)

CASES = {
    "plain": dict(T=70),
    "groups and a scalar gate": dict(T=70, B=2, H=2, G=2, gate="scalar"),
    "a gate per channel, states by value": dict(T=20, gate="channel", layout="vk", initial=True),
    "ragged": dict(T=90, H=2, cu_seqlens=[0, 0, 1, 66, 90], initial=True),
    "no token": dict(T=0, initial=True),
    "no batch": dict(T=5, B=0),
    "bfloat16": dict(T=40, dtype=ml_dtypes.bfloat16, gate="scalar"),
    "float16": dict(T=40, dtype=np.float16, initial=True),
}


def inputs(**case):
    args, kwargs = make_inputs(**(dict(dtype=np.float32) | case))
    return args, kwargs


def equal(x, y):
    """Whether two arrays are the same, bit by bit."""
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


@pytest.mark.parametrize("options", [{}, dict(qk_l2norm=True, scale=0.3, chunk_size=16)])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_on_numpy_arrays(case, options):
    args, kwargs = inputs(**CASES[case])
    expected = cd.chunk_delta_rule(*args, **kwargs, **options)
    arrays = {n: x for n, x in kwargs.items() if isinstance(x, np.ndarray)}
    static = {n: x for n, x in kwargs.items() if n not in arrays and x is not None} | options

    def call(args, arrays):
        return cdj.chunk_delta_rule(*args, **arrays, **static)

    for found in (call(args, arrays), jax.jit(call)(args, arrays)):
        assert isinstance(found, cd.DeltaRuleOutput)
        assert equal(found.o, expected.o) and equal(found.final_state, expected.final_state)


def test_float64(x64):
    args, kwargs = make_inputs(50, gate="channel", initial=True)
    expected = cd.chunk_delta_rule(*args, **kwargs)
    found = jax.jit(lambda *args: cdj.chunk_delta_rule(*args, **kwargs))(*args)
    assert found.o.dtype == np.float64
    assert equal(found.o, expected.o) and equal(found.final_state, expected.final_state)


def test_cu_seqlens_of_64_bits(x64):
    args, kwargs = inputs(T=20, cu_seqlens=[0, 7, 20])
    expected = cd.chunk_delta_rule(*args, **kwargs).o
    ends = jnp.asarray(kwargs["cu_seqlens"])
    assert ends.dtype == np.int64
    assert equal(cdj.chunk_delta_rule(*args, cu_seqlens=ends).o, expected)


def test_recurrent():
    args, kwargs = inputs(T=9, G=2, beta_per_value=True, gate="channel", initial=True)
    expected = cd.recurrent_delta_rule(*args, **kwargs)
    found = jax.jit(lambda *args: cdj.recurrent_delta_rule(*args, **kwargs))(*args)
    assert equal(found.o, expected.o) and equal(found.final_state, expected.final_state)


def test_inside_scan():
    args, _ = inputs(T=64, B=2, H=2)
    q, k, v, beta, _ = (None if x is None else jnp.asarray(x) for x in args)
    whole = cdj.chunk_delta_rule(q, k, v, beta)

    def segment(state, x):
        o, state = cdj.chunk_delta_rule(*x, initial_state=state)
        return state, o

    cut = [jnp.moveaxis(x.reshape(2, 4, 16, *x.shape[2:]), 1, 0) for x in (q, k, v, beta)]
    state, o = jax.jit(lambda *cut: jax.lax.scan(segment, jnp.zeros((2, 2, 5, 7)), cut))(*cut)
    o = jnp.moveaxis(o, 0, 1).reshape(whole.o.shape)
    np.testing.assert_allclose(o, whole.o, rtol=0, atol=1e-5)
    np.testing.assert_allclose(state, whole.final_state, rtol=0, atol=1e-5)


def test_a_call_runs_where_its_arrays_are():
    args, _ = inputs(T=10)
    there = jax.devices()[1]
    o = cdj.chunk_delta_rule(*(jax.device_put(x, there) for x in args[:4])).o
    assert o.devices() == {there}


# ---- steps ---------------------------------------------------------------------------------------


def pool_and_tokens(dtype=np.float32):
    args, _ = inputs(T=3, B=3, H=2, G=2, gate="scalar")
    rng = np.random.default_rng(1)
    return args, rng.standard_normal((5, 4, 5, 7)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_step_updates_its_pool(dtype):
    args, pool = pool_and_tokens(dtype)
    indices = np.array([4, -1, 0], np.int32)
    expected = pool.copy()
    o = cd.delta_rule_step(*args, state=expected, state_indices=indices, qk_l2norm=True)

    def step(args, state, indices):
        return cdj.delta_rule_step(*args, state=state, state_indices=indices, qk_l2norm=True)

    given = jnp.array(pool)
    found, state = jax.jit(step)(args, given, indices)
    assert equal(found, o) and equal(state, expected)
    assert equal(given, pool)  # it was not donated


def test_a_donated_pool_is_updated_in_place():
    args, pool = pool_and_tokens()
    state = jnp.array(pool[:3])
    before = state.unsafe_buffer_pointer()
    step = jax.jit(cdj.delta_rule_step, donate_argnames="state")
    assert "copy" not in step.lower(*args, state=state).compile().as_text().replace("copyright", "")
    for _ in range(3):
        _, state = step(*args, state=state)
        assert state.unsafe_buffer_pointer() == before


def test_a_step_under_vmap_keeps_to_its_pool():
    args, pool = pool_and_tokens()
    many = [np.stack([x, x[::-1]]) for x in args]
    pools = np.stack([pool, pool * 2])
    indices = np.array([[4, -1, 0], [2, 1, -1]], np.int32)

    def step(args, state, indices):
        return cdj.delta_rule_step(*args, state=state, state_indices=indices)

    o, state = jax.jit(jax.vmap(step))(many, pools, indices)
    for i in range(2):
        expected = pools[i].copy()
        alone = cd.delta_rule_step(*(x[i] for x in many), state=expected, state_indices=indices[i])
        assert equal(o[i], alone) and equal(state[i], expected)


def test_an_index_past_the_pool_is_refused_under_vmap_too():
    args, pool = pool_and_tokens()
    many, pools = [np.stack([x, x]) for x in args], np.stack([pool, pool])
    indices = np.array([[5, -1, 0], [2, 1, -1]], np.int32)
    step = jax.vmap(lambda args, x, at: cdj.delta_rule_step(*args, state=x, state_indices=at))
    with pytest.raises((XlaError, ValueError), match="state_indices: expected indices below"):
        jax.block_until_ready(step(many, pools, indices))


# ---- what is refused -----------------------------------------------------------------------------


def test_shapes_are_checked_while_tracing():
    args, _ = inputs(T=10)
    message = r"k: expected \(B, T, H, K\) = \(1, 10, 1, 4\) like q, got \(1, 10, 1, 5\)"
    with pytest.raises(ValueError, match=message):
        jax.jit(cdj.chunk_delta_rule)(args[0][..., :4], *args[1:4])


def test_values_are_checked_when_a_program_runs():
    args, _ = inputs(T=10)
    call = jax.jit(lambda ends: cdj.chunk_delta_rule(*args[:4], cu_seqlens=ends))
    with pytest.raises(XlaError, match=r"INVALID_ARGUMENT: ValueError: cu_seqlens: expected"):
        jax.block_until_ready(call(np.array([0, 9])))
    assert np.isfinite(call(np.array([0, 10])).o).all()  # the process is none the worse for it


@pytest.mark.parametrize("name, wrong", [("g", 0.5), ("state_indices", 5)])
def test_values_are_checked_in_a_program_that_has_run(name, wrong):
    args, pool = pool_and_tokens()
    good = dict(g=args[4], state_indices=np.array([4, -1, 0], np.int32))
    call = jax.jit(lambda x: cdj.delta_rule_step(*args[:4], state=pool, **good | {name: x}))
    assert np.isfinite(jax.block_until_ready(call(good[name]))[1]).all()
    # JAX turns a later error of a program into the exception of Python's that is like it.
    with pytest.raises((XlaError, ValueError), match=f"INVALID_ARGUMENT: ValueError: {name}: "):
        jax.block_until_ready(call(np.full_like(good[name], wrong)))


@pytest.mark.parametrize("wrong", [None, [1.0], 3.0])
def test_what_is_no_array_is_refused(wrong):
    args, _ = inputs(T=10)
    with pytest.raises(TypeError, match="beta: expected a JAX array, got"):
        cdj.chunk_delta_rule(*args[:3], wrong)


def test_options_are_static():
    args, _ = inputs(T=10)
    with pytest.raises(TypeError, match=r"scale: expected a number or None"):
        jax.jit(lambda scale: cdj.chunk_delta_rule(*args[:4], scale=scale))(0.5)


def test_integers_and_keys_are_refused():
    args, _ = inputs(T=10)
    with pytest.raises(TypeError, match="q: expected dtype"):
        cdj.chunk_delta_rule(args[0].astype(np.int32), *args[1:4])
    with pytest.raises(TypeError, match="q: expected dtype"):
        cdj.chunk_delta_rule(jax.random.key(0), *args[1:4])


@pytest.mark.parametrize("name", cdj.__all__)
def test_signatures_are_those_of_the_library_without_out(name):
    found = inspect.signature(getattr(cdj, name)).parameters
    expected = dict(inspect.signature(getattr(cd, name)).parameters)
    left_out = {"out"}
    if name == "chunk_delta_rule":
        left_out |= {*ON_POOL, "checkpoint_every"}
    if name == "delta_rule_step":
        left_out |= {"output_state_indices", "cu_seqlens", "accepted"}
    expected = {name: x for name, x in expected.items() if name not in left_out}
    assert list(found) == list(expected)
    for parameter, like in zip(found.values(), expected.values(), strict=True):
        assert (parameter.kind, parameter.default) == (like.kind, like.default)
