"""The delta rule in plain JAX, as one writes it without a library: token by token, and in chunks.

Arguments as in `cupy_delta.jax.chunk_delta_rule`, q and k normalised; gradients are JAX's own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CHUNK = 64


def token_scan(q, k, v, beta):
    """Return o and the final state, one token after the other in `jax.lax.scan`.

    In float64 it is the definition; else sums and the state are float32.
    """
    q, k, v, beta = prepared(q, k, v, beta)

    def token(S, x):
        q, k, v, beta = x
        r = v - jnp.einsum("bhkv,bhk->bhv", S, k, precision="highest")
        S = S + k[..., None] * (beta[..., None] * r)[..., None, :]
        return S, jnp.einsum("bhkv,bhk->bhv", S, q, precision="highest")

    start = jnp.zeros((*v.shape[::2], k.shape[3], v.shape[3]), v.dtype)
    xs = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta))
    S, o = jax.lax.scan(token, start, xs)
    return jnp.moveaxis(o, 0, 1) * q.shape[3] ** -0.5, S


def chunked(q, k, v, beta, operands=None):
    """Return the same chunk by chunk, in WY form; operands of products in the dtype `operands`.

    With A = tril(diag(b) K K^T, -1) and T = (I + A)^-1 diag(b): W = T K, U = T V, and from chunk to
    chunk N = U - W S, O = Q S + tril(Q K^T) N, S' = S + K^T N.
    """
    B, T, HV, V = v.shape
    arrays = prepared(q, k, v, beta)
    sums, K = arrays[2].dtype, q.shape[3]
    operands = operands or sums

    def product(equation, x, y):
        x, y = x.astype(operands), y.astype(operands)
        precise = None if jnp.dtype(operands).itemsize == 2 else "highest"
        return jnp.einsum(equation, x, y, preferred_element_type=sums, precision=precise)

    def chunks(x):
        """(chunks, B, HV, tokens, ...), the last chunk filled up with zeros."""
        x = jnp.pad(x, ((0, 0), (0, -T % CHUNK), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(B, -1, CHUNK, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    q, k, v, b = map(chunks, arrays)
    A = jnp.tril(b[..., None] * product("...ik,...jk->...ij", k, k), -1)
    inverse = jax.scipy.linalg.solve_triangular(
        A + jnp.eye(CHUNK, dtype=sums), jnp.zeros_like(A) + jnp.eye(CHUNK, dtype=sums), lower=True
    )
    factors = inverse * b[..., None, :]
    W = product("...ij,...jk->...ik", factors, k)
    U = product("...ij,...jv->...iv", factors, v)
    P = jnp.tril(product("...ik,...jk->...ij", q, k))

    def chunk(S, x):
        q, k, W, U, P = x
        N = U - product("...ik,...kv->...iv", W, S)
        o = product("...ik,...kv->...iv", q, S) + product("...ij,...jv->...iv", P, N)
        return S + product("...ik,...iv->...kv", k, N), o

    S, o = jax.lax.scan(chunk, jnp.zeros((B, HV, K, V), sums), (q, k, W, U, P))
    o = jnp.moveaxis(jnp.moveaxis(o, 2, 3), 0, 1).reshape(B, -1, HV, V)[:, :T]
    return o * K**-0.5, S


def prepared(q, k, v, beta):
    """Return q and k normalised and for every value head, all in float32 or float64."""
    sums = jnp.promote_types(v.dtype, jnp.float32)
    q, k, v, beta = (x.astype(sums) for x in (q, k, v, beta))
    q, k = (x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (jnp.repeat(x, v.shape[2] // k.shape[2], axis=2) for x in (q, k))
    return q, k, v, beta
