"""One sequence over the devices of a mesh's axis, in `jax.shard_map`: docs/parallel.md in JAX.

Every device has consecutive tokens of all sequences. With the maps of a device's tokens,
``S -> P S + H`` for states and ``D -> P^T D + sum_t r_t do_t^T`` for their gradients, all of them
evaluated by the operator, an exchange of K (K + V) numbers per head tells each what the others do.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ..arrays import describe
from ..results import DeltaRuleOutput
from ..typing import Real, StateLayout
from . import transforms
from .operators import checked_call
from .work import WHOLE, Options

GATHERED = 16  # devices up to which all tell all; beyond, a scan


def chunk_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None = None,
    *,
    axis_name: str,
    scale: Real | None = None,
    initial_state: jax.Array | None = None,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
    state_layout: StateLayout = "kv",
) -> DeltaRuleOutput:
    """Apply the delta rule to sequences cut along T over a mesh's axis, inside `jax.shard_map`.

    Parameters
    ----------
    q, k, v, beta, g, scale, qk_l2norm, chunk_size, state_layout
        As in `cupy_delta.jax.chunk_delta_rule`, of this device's tokens: devices have them in
        their order along the axis.
    axis_name : str
        The axis of the mesh.
    initial_state : jax.Array, (B, HV, K, V), optional
        State before the first token of the first device, the same on all.

    Returns
    -------
    DeltaRuleOutput
        ``o`` (B, T, HV, V) of this device's tokens, and ``final_state`` (B, HV, K, V) after the
        last token of the last device, the same on all.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `cupy_delta.jax.chunk_delta_rule`.

    Notes
    -----
    Under `jax.jit` and `jax.grad`, reverse mode. Products are in an order that depends on the
    number of devices alone.

    References
    ----------
    docs/parallel.md of the project.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax.sharding import Mesh, PartitionSpec
    >>> from cupy_delta.jax import parallel
    >>> mesh = Mesh(jax.devices()[:1], ("time",))
    >>> along = PartitionSpec(None, "time")
    >>> rule = lambda *x: parallel.chunk_delta_rule(*x, axis_name="time").o
    >>> k, beta = jnp.ones((1, 2, 1, 1)), jnp.ones((1, 2, 1))
    >>> cut = jax.shard_map(rule, mesh=mesh, in_specs=(along,) * 4, out_specs=along)
    >>> jax.jit(cut)(k, k, 3 * k, beta).ravel()
    Array([3., 3.], dtype=float32)
    """
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name: expected a str, got {describe(type(axis_name))}")
    arrays, options = checked_call(
        WHOLE,
        dict(q=q, k=k, v=v, beta=beta),
        dict(g=g, initial_state=initial_state),
        Options(scale, qk_l2norm, chunk_size, state_layout),
    )
    if initial_state is not None:
        arrays["initial_state"] = _laid_out(arrays["initial_state"], options)
    arrays = _along(axis_name, arrays)
    o, own = _cut(axis_name, options._replace(state_layout="kv"), arrays)
    last = jax.lax.axis_index(axis_name) == _size(axis_name) - 1
    final_state = jax.lax.psum(jnp.where(last, own, 0), axis_name)
    return DeltaRuleOutput(o, _laid_out(final_state, options))


def _along(axis: str, arrays: dict) -> dict:
    """Let all arrays vary over an axis, which must be one of the mesh."""
    try:
        jax.lax.axis_index(axis)  # A NameError where there is no such axis.
        # A ValueError where the axis is one of another transformation, such as jax.vmap.
        return transforms.varying(arrays, (axis,))
    except (NameError, ValueError):
        raise ValueError(
            f"axis_name: expected an axis of the mesh, inside jax.shard_map, got {axis!r}"
        ) from None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cut(axis: str, options: Options, arrays: dict):
    """Return the outputs and final states of every device's tokens."""
    p, h = _transfer(options, arrays)[1:]
    return tuple(transforms.whole(WHOLE, options, _entered(axis, arrays, p, h)))


def _forward(axis: str, options: Options, arrays: dict):
    r, p, h = _transfer(options, arrays)
    entered = _entered(axis, arrays, p, h)
    outputs, pull = jax.vjp(lambda x: transforms.whole(WHOLE, options, x), entered)
    return tuple(outputs), (pull, r, p, dict.fromkeys(arrays))


def _backward(axis: str, options: Options, saved, gradients):
    (pull, r, p, given), (do, dfinal) = saved, gradients
    rank, size = jax.lax.axis_index(axis), _size(axis)
    p = p.swapaxes(-1, -2)
    d = jnp.einsum("bthk,bthv->bhkv", r, do, preferred_element_type=p.dtype, precision="highest")
    d = d + jnp.where(rank == size - 1, _product(p, dfinal), 0)
    later = _carried(axis, p, d, jnp.zeros_like(d), -1)
    dfinal = jnp.where(rank == size - 1, dfinal, later)
    (found,) = pull(DeltaRuleOutput(do, dfinal))
    found["initial_state"] = jnp.where(rank == 0, found["initial_state"], 0)
    return ({name: found[name] for name in given},)


_cut.defvjp(_forward, _backward)


def _transfer(options: Options, arrays: dict):
    """Return what outputs read of an entering state, P and H."""
    tokens = {name: x for name, x in arrays.items() if name != "initial_state"}
    v, K = tokens["v"], tokens["k"].shape[3]
    (B, T, HV, _), dtype = v.shape, jnp.promote_types(v.dtype, jnp.float32)
    identity = jnp.broadcast_to(jnp.eye(K, dtype=dtype), (B, HV, K, K))
    no_values = jnp.zeros((B, T, HV, K), v.dtype)
    reading = tokens | {"v": no_values, "initial_state": identity}
    r, p = transforms.whole(WHOLE, options, reading)
    return r, p, transforms.whole(WHOLE, options, tokens).final_state


def _entered(axis: str, arrays: dict, p, h) -> dict:
    """Return the arrays with the state that enters this device."""
    start = arrays.get("initial_state", jnp.zeros_like(h))
    return arrays | {"initial_state": _carried(axis, p, h, start, 1)}


def _carried(axis: str, p, h, start, direction: int):
    """Return what the devices before this one make of `start`; those after it, with -1."""
    combine = _by_gathering if _size(axis) <= GATHERED else _by_scan
    return combine(axis, p, h, start, direction)


def _by_gathering(axis: str, p, h, start, direction: int):
    rank, size = jax.lax.axis_index(axis), _size(axis)
    every_p, every_h = (jax.lax.all_gather(x, axis) for x in (p, h))
    state = start
    for other in range(size)[::direction]:
        before = other < rank if direction > 0 else other > rank
        state = jnp.where(before, _product(every_p[other], state) + every_h[other], state)
    return state


def _by_scan(axis: str, p, h, start, direction: int):
    """Compose with devices at distances 1, 2, 4, ..., so that each has all before it and itself."""
    rank, size = jax.lax.axis_index(axis), _size(axis)
    place = rank if direction > 0 else size - 1 - rank
    h = jnp.where(place == 0, _product(p, start) + h, h)
    distance = 1
    while distance < size:
        told_p, told_h = (_shifted(axis, x, direction * distance) for x in (p, h))
        told = place >= distance
        h = jnp.where(told, _product(p, told_h) + h, h)
        p = jnp.where(told, _product(p, told_p), p)
        distance *= 2
    return jnp.where(place == 0, start, _shifted(axis, h, direction))


def _shifted(axis: str, x, by: int):
    """Return the array of the device `by` before this one; zeros where there is none."""
    size = _size(axis)
    return jax.lax.ppermute(x, axis, [(i, i + by) for i in range(size) if 0 <= i + by < size])


def _product(p, x):
    return jnp.matmul(p, x, precision="highest")


def _size(axis: str) -> int:
    # A constant summed over an axis is folded when it is traced.
    return jax.lax.axis_size(axis) if hasattr(jax.lax, "axis_size") else jax.lax.psum(1, axis)


def _laid_out(state, options: Options):
    return state if options.state_layout == "kv" else state.swapaxes(-1, -2)
