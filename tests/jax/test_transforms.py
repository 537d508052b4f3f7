"""Gradients, batches and meshes of cupy_delta.jax, against the definition in jax.lax.scan."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs
from jax.sharding import Mesh, PartitionSpec

from cupy_delta import jax as cdj

CASES = {
    "scalar gate, groups, normalised": (dict(T=70, B=2, H=2, G=2, gate="scalar"), True),
    "channel gate, initial state by value": (
        dict(T=40, gate="channel", initial=True, layout="vk"),
        False,
    ),
    "ragged": (dict(T=90, H=2, cu_seqlens=[0, 0, 1, 66, 90], initial=True), False),
}


def definition(q, k, v, beta, g=None, initial_state=None, *, qk_l2norm=False, state_layout="kv"):
    """The token loop in jax.lax.scan, in the dtype of its inputs."""
    if qk_l2norm:
        q, k = (x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    groups = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(x, groups, axis=2) for x in (q, k))
    if g is None:
        g = jnp.zeros_like(beta)
    if g.ndim == 3:
        g = jnp.broadcast_to(g[..., None], k.shape)

    def token(S, x):
        q, k, v, beta, g = x
        S = jnp.exp(g)[..., None] * S
        r = v - jnp.einsum("bhkv,bhk->bhv", S, k)
        S = S + jnp.einsum("bhk,bhv->bhkv", k, beta[..., None] * r)
        return S, jnp.einsum("bhkv,bhk->bhv", S, q) * q.shape[-1] ** -0.5

    S = initial_state
    if S is None:
        S = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), v.dtype)
    elif state_layout == "vk":
        S = S.swapaxes(-1, -2)
    S, o = jax.lax.scan(token, S, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta, g)))
    return jnp.moveaxis(o, 0, 1), S.swapaxes(-1, -2) if state_layout == "vk" else S


def ragged(call, ends):
    """Apply `call` to each of the sequences that lie end to end."""

    def apply(q, k, v, beta, g=None, initial_state=None, **options):
        spans = [slice(a, b) for a, b in itertools.pairwise(ends)]
        each = [
            call(
                *(None if x is None else x[:, span] for x in (q, k, v, beta, g)),
                None if initial_state is None else initial_state[n : n + 1],
                **options,
            )
            for n, span in enumerate(spans)
        ]
        o, state = zip(*each, strict=True)
        return jnp.concatenate(o, axis=1), jnp.concatenate(state)

    return apply


def problem(case, dtype):
    """Return arrays by name, the operator and its definition as functions of them."""
    case, norm = CASES[case]
    args, kwargs = make_inputs(dtype=dtype, **case)
    arrays = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True))
    arrays["initial_state"] = kwargs.pop("initial_state")
    arrays = {name: x for name, x in arrays.items() if x is not None}
    ends = kwargs.pop("cu_seqlens")
    exact = definition if ends is None else ragged(definition, ends)
    operator = partial(cdj.chunk_delta_rule, cu_seqlens=ends, qk_l2norm=norm, **kwargs)
    return arrays, lambda x: operator(**x), lambda x: exact(**x, qk_l2norm=norm, **kwargs)


def loss(call, seed=0):
    """A function of arrays by name that depends on all of what a call returns."""

    def value(arrays):
        rng = np.random.default_rng(seed)
        return sum(
            (x * jnp.asarray(rng.standard_normal(x.shape), x.dtype)).sum().astype(jnp.float32)
            for x in call(arrays)
        )

    return value


def off(found, expected):
    """The relative error of the worst of some arrays by name."""
    assert found.keys() == expected.keys()
    errors = []
    for name, x in found.items():
        x, y = (np.asarray(a, np.float64) for a in (x, expected[name]))
        errors.append(np.linalg.norm(x - y) / np.linalg.norm(y))
    return max(errors)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-6), (ml_dtypes.bfloat16, 1e-2)]
)
def test_gradients_in_jit_are_those_of_the_float64_scan(x64, case, dtype, tolerance):
    arrays, operator, exact = problem(case, dtype)
    doubles = {name: jnp.asarray(x, np.float64) for name, x in arrays.items()}
    gradients = jax.jit(jax.grad(loss(operator)))(arrays)
    assert {name: x.dtype for name, x in gradients.items()} == {
        n: x.dtype for n, x in arrays.items()
    }
    assert off(gradients, jax.jit(jax.grad(loss(exact)))(doubles)) < tolerance


@pytest.mark.parametrize("per_value", [False, True])
def test_gradients_of_the_recurrent_operator(x64, per_value):
    args, _ = make_inputs(20, gate="scalar", beta_per_value=per_value)
    arrays = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True))
    gradient = jax.jit(jax.grad(loss(lambda x: cdj.recurrent_delta_rule(**x))))
    if per_value:
        with pytest.raises(NotImplementedError, match="beta: gradients with one strength per"):
            gradient(arrays)
        return
    expected = jax.jit(jax.grad(loss(lambda x: definition(**x))))(arrays)
    assert off(gradient(arrays), expected) < 1e-12


def test_a_step_has_no_gradient():
    args, _ = make_inputs(1, dtype=np.float32)
    step = partial(cdj.delta_rule_step, state=jnp.zeros((1, 1, 5, 7)))
    with pytest.raises(NotImplementedError, match="a decoding step has no gradients"):
        jax.grad(lambda v: step(*args[:2], v, args[3])[0].sum())(jnp.asarray(args[2]))


def test_gradients_recomputed_under_checkpoint():
    arrays, operator, _ = problem("scalar gate, groups, normalised", np.float32)
    kept = jax.jit(jax.grad(loss(operator)))(arrays)
    again = jax.jit(jax.grad(jax.checkpoint(loss(operator))))(arrays)
    for name, x in kept.items():
        np.testing.assert_array_equal(again[name], x)


def test_a_jacobian_row_by_row():
    """The backward of one forward, over a batch of directions."""
    arrays, operator, _ = problem("scalar gate, groups, normalised", np.float32)

    def some(v):
        return operator(arrays | {"v": v}).o[1, 60:62, 3, :2].ravel()

    jacobian = jax.jit(jax.jacrev(some))(jnp.asarray(arrays["v"]))
    for i, row in enumerate(jacobian):
        expected = jax.grad(lambda v, i=i: some(v)[i])(jnp.asarray(arrays["v"]))
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-6)


# ---- vmap ----------------------------------------------------------------------------------------


def stacked(case):
    arrays, operator, _ = problem(case, np.float32)
    shared = {"k"}
    axes = {name: None if name in shared else 0 for name in arrays}
    many = {n: x if n in shared else np.stack([x, 0.5 * x, -x]) for n, x in arrays.items()}
    if "g" in many:
        many["g"] = -abs(many["g"])
    rows = [{n: x if n in shared else x[i] for n, x in many.items()} for i in range(3)]
    return operator, many, axes, rows


@pytest.mark.parametrize("case", CASES)
def test_vmap_of_outputs_and_gradients(case):
    operator, many, axes, rows = stacked(case)

    def both(arrays):
        return operator(arrays), jax.grad(loss(operator))(arrays)

    found = jax.jit(jax.vmap(both, in_axes=(axes,)))(many)
    for i, row in enumerate(rows):
        of_row = jax.tree_util.tree_map(lambda x, i=i: x[i], found)
        for x, y in zip(*map(jax.tree_util.tree_leaves, (of_row, both(row))), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_vmap_makes_one_call_of_a_larger_batch():
    operator, many, axes, _ = stacked("scalar gate, groups, normalised")
    text = jax.jit(jax.vmap(operator, in_axes=(axes,))).lower(many).as_text()
    assert text.count("custom_call @cupy_delta") == 1 and "while" not in text


def test_nested_vmap():
    operator, many, axes, rows = stacked("scalar gate, groups, normalised")
    twice = {n: x if axes[n] is None else np.stack([x, x[::-1]]) for n, x in many.items()}
    found = jax.vmap(jax.vmap(operator, in_axes=(axes,)), in_axes=(axes,))(twice)
    np.testing.assert_allclose(found.o[1, 0], operator(rows[2]).o, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 0), (0, 2, 20), (3, 0, 20)])
def test_vmap_of_nothing(shape):
    k, beta = jnp.zeros((*shape, 1, 4)), jnp.zeros((*shape, 1))
    found = jax.vmap(cdj.chunk_delta_rule)(k, k, k, beta)
    assert found.o.shape == k.shape
    assert found.final_state.shape == (*shape[:2], 1, 4, 4)
    gradient = jax.grad(
        lambda k: sum(x.sum() for x in jax.vmap(cdj.chunk_delta_rule)(k, k, k, beta))
    )
    assert gradient(k).shape == k.shape


# ---- several devices -----------------------------------------------------------------------------


def mapped(function, mesh, in_specs, out_specs):
    """shard_map of any version of JAX; the older ones cannot check replication of custom calls."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    from jax.experimental.shard_map import shard_map

    return shard_map(function, mesh, in_specs, out_specs, check_rep=False)


@pytest.mark.parametrize("axis", [0, 2])
def test_shard_map_over_batch_or_heads(axis):
    arrays, operator, _ = problem("scalar gate, groups, normalised", np.float32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    along = PartitionSpec(*[None] * axis, "x")
    specs = dict.fromkeys(arrays, along)
    state = PartitionSpec(None, "x") if axis else PartitionSpec("x")
    outputs = (along, state)
    call = mapped(lambda x: tuple(operator(x)), mesh, (specs,), outputs)
    expected = operator(arrays)
    for found, x in zip(jax.jit(call)(arrays), expected, strict=True):
        assert len(found.sharding.device_set) == 2
        np.testing.assert_array_equal(found, x)
    gradients = jax.jit(jax.grad(loss(call)))(arrays)
    assert off(gradients, jax.grad(loss(operator))(arrays)) < 1e-6


def test_shard_map_with_something_shared():
    """Keys that every device has: their gradient is the sum over devices."""
    arrays, operator, _ = problem("scalar gate, groups, normalised", np.float32)
    arrays["k"] = np.concatenate([arrays["k"][:1]] * 2)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def call(arrays, k):
        return tuple(operator(arrays | {"k": k}))

    def value(k, call):
        others = {name: x for name, x in arrays.items() if name != "k"}
        return loss(lambda x: call(x, k))(others)

    specs = {name: PartitionSpec("x") for name in arrays if name != "k"}, PartitionSpec()
    split = mapped(call, mesh, specs, (PartitionSpec("x"), PartitionSpec("x")))
    one = jnp.asarray(arrays["k"][:1])
    found = jax.jit(jax.grad(partial(value, call=split)))(one)
    expected = jax.grad(lambda k: value(jnp.concatenate([k, k]), call))(one)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
