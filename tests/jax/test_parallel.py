"""One sequence over the devices of a mesh: what one device has, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import deviation, make_inputs
from jax.sharding import Mesh, PartitionSpec

import cupy_delta.jax as cdj
from cupy_delta.jax import parallel

ALONG, SHARED = PartitionSpec(None, "time"), PartitionSpec()


def mapped(function, mesh, in_specs, out_specs):
    """shard_map of any version of JAX; the older ones cannot check replication of custom calls."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    from jax.experimental.shard_map import shard_map

    return shard_map(function, mesh, in_specs, out_specs, check_rep=False)


def problem(gate, initial, layout):
    """Return arrays by name, options, and weights of a loss."""
    args, kwargs = make_inputs(
        36, B=2, H=1, G=2, K=3, V=4, gate=gate, initial=initial, layout=layout
    )
    names = ("q", "k", "v", "beta", "g")
    arrays = {n: jnp.asarray(x) for n, x in zip(names, args, strict=True) if x is not None}
    if initial:
        arrays["initial_state"] = jnp.asarray(kwargs["initial_state"])
    rng = np.random.default_rng(1)
    shape = (2, 2, 3, 4) if layout == "kv" else (2, 2, 4, 3)
    weights = rng.standard_normal(args[2].shape), rng.standard_normal(shape)
    options = dict(state_layout=layout, qk_l2norm=True, chunk_size=4)
    return arrays, options, tuple(map(jnp.asarray, weights))


@pytest.mark.parametrize(
    ("gate", "initial", "layout", "devices", "gathered"),
    [
        (None, True, "vk", 4, 16),
        ("scalar", True, "kv", 4, 1),
        ("channel", False, "kv", 3, 16),
    ],
)
def test_a_cut_sequence_is_the_whole_one(
    x64, monkeypatch, gate, initial, layout, devices, gathered
):
    monkeypatch.setattr(parallel, "GATHERED", gathered)
    arrays, options, (wo, wf) = problem(gate, initial, layout)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("time",))
    specs = {name: SHARED if name == "initial_state" else ALONG for name in arrays}

    def cut(arrays):
        return tuple(parallel.chunk_delta_rule(**arrays, **options, axis_name="time"))

    cut = mapped(cut, mesh, (specs,), (ALONG, SHARED))

    def loss(rule):
        def value(arrays):
            o, final = rule(arrays)
            return (o * wo).sum() + (final * wf).sum(), (o, final)

        return jax.jit(jax.value_and_grad(value, has_aux=True))

    (_, wanted), wanted_gradients = loss(lambda x: cdj.chunk_delta_rule(**x, **options))(arrays)
    (_, found), gradients = loss(cut)(arrays)
    for x, y in zip(found, wanted, strict=True):
        assert deviation(x, y) < 1e-12
    assert gradients.keys() == wanted_gradients.keys()
    for name, y in wanted_gradients.items():
        assert deviation(gradients[name], y) < 1e-12, name


def test_wrong_arguments_are_errors_while_tracing():
    x = jnp.ones((1, 4, 1, 2))
    with pytest.raises(ValueError, match=r"^beta: expected \(B, T, HV\)"):
        parallel.chunk_delta_rule(x, x, x, x, axis_name="time")


@pytest.mark.parametrize(
    ("axis_name", "error", "text"),
    [
        (3, TypeError, "axis_name: expected a str, got int"),
        (None, TypeError, "axis_name: expected a str, got NoneType"),
        (("time",), TypeError, "axis_name: expected a str, got tuple"),
        (
            "x",
            ValueError,
            "axis_name: expected an axis of the mesh, inside jax.shard_map, got 'x'",
        ),
    ],
)
# Before `jax.typeof` there is nothing that tells the axis of a batch from one of a mesh.
@pytest.mark.parametrize("where", ["in a mesh", "alone"] + ["in a batch"] * hasattr(jax, "typeof"))
def test_a_wrong_axis_is_named(axis_name, error, text, where):
    def call(x, beta):
        return parallel.chunk_delta_rule(x, x, x, beta, axis_name=axis_name).o

    x, beta = jnp.ones((1, 4, 1, 2)), jnp.ones((1, 4, 1))
    if where == "in a mesh":
        call = mapped(call, Mesh(np.array(jax.devices()[:1]), ("time",)), (ALONG, ALONG), ALONG)
    elif where == "in a batch":
        # An axis of that name, but none of a mesh.
        call, x, beta = jax.vmap(call, axis_name="x"), x[None], beta[None]
    with pytest.raises(error) as caught:
        call(x, beta)
    assert caught.type is error
    assert str(caught.value) == text
