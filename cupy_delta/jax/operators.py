"""The operators on JAX arrays: documentation and one check, no arithmetic."""

from __future__ import annotations

from typing import Any

import jax

from ..raw import SigmoidBeta, SigmoidGate, SoftplusGate
from ..results import DeltaRuleOutput
from ..typing import Integer, Real, StateLayout
from . import transforms
from .raw import as_jax, formed
from .work import RECURRENT, STEP, WHOLE, Options, described

Arrays = dict[str, Any]


def chunk_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | SigmoidBeta,
    g: jax.Array | SoftplusGate | SigmoidGate | None = None,
    *,
    scale: Real | None = None,
    initial_state: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    state_layout: StateLayout = "kv",
) -> DeltaRuleOutput:
    """Apply the delta rule to whole sequences; `cupy_delta.chunk_delta_rule` on JAX arrays.

    Parameters
    ----------
    q, k : jax.Array, (B, T, H, K)
    v : jax.Array, (B, T, HV, V)
    beta : jax.Array, (B, T, HV), or SigmoidBeta
    g : jax.Array, (B, T, HV) or (B, T, HV, K), or SoftplusGate or SigmoidGate, optional
    initial_state : jax.Array, (N, HV, K, V), optional
    cu_seqlens : jax.Array, (N + 1,), optional
        Arrays as in `cupy_delta.chunk_delta_rule`, traced or not. NumPy arrays are taken as JAX
        takes them: 64-bit ones only with ``jax_enable_x64``. Raw gates and strengths are pytrees of
        such arrays, and formed in the program.
    scale, qk_l2norm, chunk_size, state_layout
        As there; they must be static under `jax.jit`.

    Returns
    -------
    DeltaRuleOutput
        ``o`` (B, T, HV, V) in the dtype of `v`, and ``final_state`` (N, HV, K, V).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        While tracing, by shapes, dtypes and options. Values are known only when a program runs: on
        the CPU an error about them (`cu_seqlens`, `g`, `state_indices`) is a
        `jax.errors.JaxRuntimeError`, or a `ValueError` once the program has run, with the text.

    Notes
    -----
    Works under `jax.jit`, `jax.grad` (reverse mode, with respect to every array of floats),
    `jax.vmap` (which makes one call of a larger batch), `jax.lax.scan` and `jax.shard_map` over
    batch and heads. On the CPU platform the NumPy backend runs, on CUDA the kernels of CuPy arrays,
    on XLA's stream.

    References
    ----------
    arXiv:2406.06484; docs/jax.md of the project.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from cupy_delta.jax import chunk_delta_rule
    >>> k = jnp.ones((1, 2, 1, 1))
    >>> v = jnp.array([3.0, 5.0]).reshape(1, 2, 1, 1)
    >>> beta = jnp.ones((1, 2, 1))
    >>> jax.jit(chunk_delta_rule)(k, k, v, beta).o.ravel()
    Array([3., 5.], dtype=float32)
    >>> jax.grad(lambda v: chunk_delta_rule(k, k, v, beta).o.sum())(v).ravel()
    Array([1., 1.], dtype=float32)
    """
    return _whole(
        WHOLE,
        dict(q=q, k=k, v=v, beta=beta),
        dict(g=g, initial_state=initial_state, cu_seqlens=cu_seqlens),
        Options(scale, qk_l2norm, chunk_size, state_layout),
    )


def recurrent_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | SigmoidBeta,
    g: jax.Array | SoftplusGate | SigmoidGate | None = None,
    *,
    scale: Real | None = None,
    initial_state: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    qk_l2norm: bool = False,
    state_layout: StateLayout = "kv",
) -> DeltaRuleOutput:
    """Apply the delta rule token by token; `cupy_delta.recurrent_delta_rule` on JAX arrays.

    Parameters
    ----------
    q, k, v, beta, g, scale, initial_state, cu_seqlens, qk_l2norm, state_layout
        As in `chunk_delta_rule`. `beta` may also be (B, T, HV, V), one strength per value channel.

    Returns
    -------
    DeltaRuleOutput
        ``o`` (B, T, HV, V) and ``final_state`` (N, HV, K, V).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `chunk_delta_rule`; also for gradients with one `beta` per value channel.

    Notes
    -----
    The gradients are those of the chunkwise form, which computes the same function.

    References
    ----------
    arXiv:2102.11174; docs/jax.md of the project.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cupy_delta.jax import recurrent_delta_rule
    >>> k = jnp.ones((1, 2, 1, 1))
    >>> recurrent_delta_rule(k, k, 3 * k, jnp.ones((1, 2, 1))).o.ravel()
    Array([3., 3.], dtype=float32)
    """
    return _whole(
        RECURRENT,
        dict(q=q, k=k, v=v, beta=beta),
        dict(g=g, initial_state=initial_state, cu_seqlens=cu_seqlens),
        Options(scale, qk_l2norm, None, state_layout),
    )


def delta_rule_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | SigmoidBeta,
    g: jax.Array | SoftplusGate | SigmoidGate | None = None,
    *,
    state: jax.Array,
    state_indices: jax.Array | None = None,
    scale: Real | None = None,
    qk_l2norm: bool = False,
    state_layout: StateLayout = "kv",
) -> tuple[jax.Array, jax.Array]:
    """Advance a pool of states by up to 32 new tokens per sequence.

    Parameters
    ----------
    q, k, v, beta, g, scale, qk_l2norm, state_layout
        As in `chunk_delta_rule`, with T at most 32. Each batch row is one sequence.
    state : jax.Array, (slots, HV, K, V)
        The pool, as in `cupy_delta.delta_rule_step`. Inside `jax.jit`, a pool that is donated
        (``donate_argnames="state"``) or used no more is updated in place; else it is copied first.
    state_indices : jax.Array, (B,), optional
        Slot of each sequence; a negative index is padding.

    Returns
    -------
    o : jax.Array, (B, T, HV, V)
    state : jax.Array, (slots, HV, K, V)
        The pool after the tokens; slots that no index names are as they were.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `chunk_delta_rule`, and if it is differentiated.

    Notes
    -----
    A repeated index is an error on the CPU; on CUDA it gives undefined numbers in its slot, and an
    index past the pool is padding.

    References
    ----------
    arXiv:2102.11174; docs/jax.md of the project.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from cupy_delta.jax import delta_rule_step
    >>> step = jax.jit(delta_rule_step, donate_argnames="state")
    >>> k, v = jnp.ones((1, 1, 1, 1)), jnp.full((1, 1, 1, 2), 7.0)
    >>> o, state = step(k, k, v, jnp.ones((1, 1, 1)), state=jnp.zeros((1, 1, 1, 2)))
    >>> state.ravel()
    Array([7., 7.], dtype=float32)
    """
    arrays, options = checked_call(
        STEP,
        dict(q=q, k=k, v=v, beta=beta, state=state),
        dict(g=g, state_indices=state_indices),
        Options(scale, qk_l2norm, None, state_layout),
    )
    return transforms.step(options, arrays)


def _whole(function: str, required: Arrays, optional: Arrays, options: Options) -> DeltaRuleOutput:
    arrays, options = checked_call(function, required, optional, options)
    return transforms.whole(function, options, arrays)


def checked_call(
    function: str, required: Arrays, optional: Arrays, options: Options
) -> tuple[Arrays, Options]:
    """Check a call; return the arrays that are there, and options as meant: scale is a number."""
    found = {name: x for name, x in optional.items() if x is not None}
    arrays = {name: as_jax(name, x) for name, x in (required | found).items()}
    call = described(function, options, arrays)
    arrays = {name: formed(x, call.compute_dtype) for name, x in arrays.items()}
    return arrays, Options(call.scale, call.qk_l2norm, call.chunk_size, call.state_layout)
