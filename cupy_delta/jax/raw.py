"""Raw gates and strengths in JAX's own operations, which it differentiates and fuses itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import describe
from ..raw import BETAS, GATES, SigmoidBeta, SigmoidGate, SoftplusGate

PARAMETERS = ["a", "A_log", "dt_bias"]


def register() -> None:
    """Let raw gates and strengths, with JAX arrays in them, be arguments of transformations."""
    for cls, arrays, numbers in (
        (SoftplusGate, PARAMETERS, []),
        (SigmoidGate, PARAMETERS, ["bound"]),
        (SigmoidBeta, ["logits"], ["scale"]),
    ):
        jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=numbers)


def is_raw(x: Any) -> bool:
    return isinstance(x, GATES + BETAS)


def as_jax(name: str, x: Any) -> Any:
    """Return an array, or a raw gate or strength of arrays, as JAX takes it."""
    if is_raw(x):
        return jax.tree.map(lambda y: as_jax(name, y), x)
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{name}: expected a JAX array, got {describe(type(x))}")
    return jnp.asarray(x)


def formed(x: Any, dtype: Any) -> jax.Array:
    """Return what a checked gate or strength means, in the dtype of sums; or an array as it is."""
    if not is_raw(x):
        return x
    x = jax.tree.map(lambda y: y.astype(dtype), x)
    if isinstance(x, SigmoidBeta):
        return x.scale * jax.nn.sigmoid(x.logits)
    a, A = x.a, jnp.exp(x.A_log)
    if a.ndim == 4:
        A = A[:, None]
    if x.dt_bias is not None:
        a += x.dt_bias[:, None] if a.ndim == 4 and x.dt_bias.ndim == 1 else x.dt_bias

    def gate(a):
        if isinstance(x, SoftplusGate):
            return -A * jax.nn.softplus(a)
        return x.bound * jax.nn.sigmoid(A * a)

    # A gradient of 0 stays 0 where the logit, which multiplies that of A, is infinite.
    infinite = jnp.isinf(a)
    return jnp.where(infinite, jax.lax.stop_gradient(gate(a)), gate(jnp.where(infinite, 0, a)))
