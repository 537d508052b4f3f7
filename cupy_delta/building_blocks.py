"""The public pieces of the chunkwise WY form: documentation, one check, one dispatch.

With a gate every piece is in the units of the operator's inputs: no factor ``exp(-G)`` is taken
out of one piece to be put back by the next. What a piece multiplies is ``exp`` of sums of ``g``
from an earlier token to a later one, so the pieces recompose for every ``g <= 0``, -inf included.
"""

from __future__ import annotations

from . import problem as checks
from .dispatch import backend_for
from .raw import Gate, SigmoidBeta
from .results import StatePass, Transfer, WYFactors
from .typing import AnyArray, Array, Integer, Real


def wy_factors(
    k: Array,
    v: Array,
    beta: Array | SigmoidBeta,
    g: Array | Gate | None = None,
    *,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    cu_seqlens: Array | None = None,
) -> WYFactors:
    """Compute the WY factors of every chunk.

    With K, V the keys and values of a chunk as rows, G the running sum of g in the chunk (0 without
    a gate) and ``A_ij = beta_i exp(G_i - G_j) <k_i, k_j>`` for i > j::

        T = (I + A)^-1 diag(beta),   W = T diag(exp(G)) K,   U = T V

    the chunk maps its state by ``S -> exp(G_C) S + sum_j exp(G_C - G_j) k_j (u_j - S^T w_j)^T``,
    without a gate ``S -> (I - K^T W) S + K^T U``.

    Parameters
    ----------
    k : array, (B, T, H, K)
    v : array, (B, T, HV, V)
    beta : array, (B, T, HV), or SigmoidBeta
    g : array, (B, T, HV) or (B, T, HV, K), or SoftplusGate or SigmoidGate, optional
    qk_l2norm : bool, default False
        All as in `chunk_delta_rule`. A gate per key channel stands inside the sum over channels,
        and `qk_l2norm` normalises k.
    chunk_size : int, optional
        Tokens per chunk C; by default the library's choice, the last dimension of ``t``.
    cu_seqlens : integer array, (N + 1,), optional
        As in `chunk_delta_rule`; chunks never straddle sequences.

    Returns
    -------
    WYFactors
        ``w`` (B, T, HV, K), ``u`` (B, T, HV, V) and ``t`` (B, T, HV, C), row t of a token against
        the tokens of its chunk, zero past the chunk's end; all in the dtype of `v`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `chunk_delta_rule`.

    Notes
    -----
    A unit lower-triangular solve, never a product of C matrices; accumulation as in
    `chunk_delta_rule`. ``t``, ``w`` and ``u`` hold their decays: ``w`` meets the state that enters
    the chunk as it is, ``u`` has the units of `v`.

    References
    ----------
    C. Bischof, C. Van Loan, "The WY representation for products of Householder matrices", SIAM J.
    Sci. Stat. Comput. 8 (1987); arXiv:2406.06484, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> k, v = np.ones((1, 2, 1, 1)), np.ones((1, 2, 1, 1))
    >>> cupy_delta.wy_factors(k, v, np.ones((1, 2, 1)), chunk_size=2).t[0, :, 0]
    array([[ 1.,  0.],
           [-1.,  1.]])
    """
    problem = checks.factors_problem(
        k, v, beta, g, qk_l2norm=qk_l2norm, cu_seqlens=cu_seqlens, chunk_size=chunk_size
    )
    return WYFactors(*backend_for(problem.kind).wy_factors(problem))


def state_pass(
    k: Array,
    w: Array,
    u: Array,
    g: Array | Gate | None = None,
    *,
    initial_state: Array | None = None,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    cu_seqlens: Array | None = None,
) -> StatePass:
    """Carry the state over the chunks: ``V_new = U - W S``, ``S <- S + K^T V_new``.

    With a gate and G its running sum in the chunk, of C tokens,
    ``S <- diag(exp(G_C)) S + sum_j (exp(G_C - G_j) k_j) v_new_j^T``.

    Parameters
    ----------
    k : array, (B, T, H, K)
    w : array, (B, T, HV, K)
    u : array, (B, T, HV, V)
        WY factors of the same chunks, all in one dtype.
    g : array, (B, T, HV) or (B, T, HV, K), or SoftplusGate or SigmoidGate, optional
    qk_l2norm : bool, default False
        Those of `wy_factors`: a gate or norm that it had is needed here again.
    initial_state : array, (N, HV, K, V), optional
        float32 (float64 with float64 inputs); zero by default.
    chunk_size : int, optional
        That of `wy_factors`.
    cu_seqlens : integer array, (N + 1,), optional
        As in `chunk_delta_rule`.

    Returns
    -------
    StatePass
        ``states`` (B, chunks, HV, K, V), the state entering each chunk; ``v_new`` (B, T, HV, V);
        ``final_state`` (N, HV, K, V). chunks is ceil(T / C); with `cu_seqlens` it is T // C + N,
        chunk i of sequence n stands at ``cu_seqlens[n] // C + n + i`` and the rest is zero.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `chunk_delta_rule`.

    Notes
    -----
    States are float32 (float64 with float64 inputs), ``v_new`` has the dtype of `u`. Both are in
    the operator's own units with a gate too: ``states`` are the states that token by token
    computation has between chunks, and ``v_new`` is ``beta (v - S^T k)`` of each token.

    References
    ----------
    arXiv:2406.06484, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> k, v = np.ones((1, 2, 1, 1)), np.array([3.0, 5.0]).reshape(1, 2, 1, 1)
    >>> w, u, t = cupy_delta.wy_factors(k, v, np.ones((1, 2, 1)))
    >>> cupy_delta.state_pass(k, w, u).final_state.ravel()
    array([5.])
    """
    problem = checks.state_pass_problem(
        k,
        w,
        u,
        g,
        initial_state=initial_state,
        qk_l2norm=qk_l2norm,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )
    return StatePass(*backend_for(problem.kind).state_pass(problem))


def chunk_output(
    q: Array,
    k: Array,
    v_new: AnyArray,
    states: Array,
    g: Array | Gate | None = None,
    *,
    scale: Real | None = None,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    cu_seqlens: Array | None = None,
) -> AnyArray:
    """Compute the outputs of every chunk: ``O = scale (Q S + tril(Q K^T) V_new)``.

    With a gate and G its running sum in the chunk, the product of tokens i and j gains
    ``exp(G_i - G_j)`` and the rows of ``Q S`` gain ``exp(G_i)``.

    Parameters
    ----------
    q, k : array, (B, T, H, K)
    v_new : array, (B, T, HV, V)
    states : array, (B, chunks, HV, K, V)
        Both from `state_pass`, in its chunk numbering.
    g : array, (B, T, HV) or (B, T, HV, K), or SoftplusGate or SigmoidGate, optional
        That of `state_pass`.
    qk_l2norm : bool, default False
        That of `state_pass`; normalises q too.
    scale : float, optional
        ``K ** -0.5`` by default.
    chunk_size : int, optional
        That of `state_pass`.
    cu_seqlens : integer array, (N + 1,), optional
        As in `chunk_delta_rule`.

    Returns
    -------
    array, (B, T, HV, V)
        In the dtype of `v_new`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `chunk_delta_rule`.

    Notes
    -----
    Chunks are independent here. Accumulation as in `chunk_delta_rule`.

    References
    ----------
    arXiv:2406.06484, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 100, 2, 8)) / 3
    >>> beta = rng.uniform(0, 1, (1, 100, 2))
    >>> g = -rng.exponential(size=(1, 100, 2))
    >>> w, u, t = cupy_delta.wy_factors(k, v, beta, g)
    >>> states, v_new, final_state = cupy_delta.state_pass(k, w, u, g)
    >>> o = cupy_delta.chunk_output(q, k, v_new, states, g)
    >>> bool(np.allclose(o, cupy_delta.chunk_delta_rule(q, k, v, beta, g).o))
    True
    """
    problem = checks.chunk_output_problem(
        q,
        k,
        v_new,
        states,
        g,
        scale=scale,
        qk_l2norm=qk_l2norm,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )
    return backend_for(problem.kind).chunk_output(problem)


def sequence_transfer(
    k: Array,
    v: Array,
    beta: Array | SigmoidBeta,
    g: Array | Gate | None = None,
    *,
    qk_l2norm: bool = False,
    cu_seqlens: Array | None = None,
) -> Transfer:
    """Compute what each whole sequence does to any state: ``S -> P S + H``.

    Transfers compose, so a long sequence can be split over devices or machines: each computes
    the transfer of its stretch, and the states between follow from products of small matrices.

    Parameters
    ----------
    k : array, (B, T, H, K)
    v : array, (B, T, HV, V)
    beta : array, (B, T, HV), or SigmoidBeta
    g : array, (B, T, HV) or (B, T, HV, K), or SoftplusGate or SigmoidGate, optional
    qk_l2norm : bool, default False
    cu_seqlens : integer array, (N + 1,), optional
        All as in `chunk_delta_rule`; `qk_l2norm` normalises k.

    Returns
    -------
    Transfer
        ``p`` (N, HV, K, K) and ``h`` (N, HV, K, V), float32 (float64 with float64 inputs).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `chunk_delta_rule`.

    Notes
    -----
    ``P`` is the product of the tokens' ``(I - beta k k^T) diag(exp(g))``, the latest on the left,
    ``H`` the final state from zero. A scalar gate of -inf leaves nothing of what came before it:
    there ``P`` is zero.

    References
    ----------
    arXiv:2406.06484, section 3; docs/derivation.md of the project.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> rng = np.random.default_rng(0)
    >>> k, v = rng.standard_normal((2, 1, 50, 1, 4)) / 2
    >>> beta, state = rng.uniform(0, 1, (1, 50, 1)), rng.standard_normal((1, 1, 4, 4))
    >>> transfer = cupy_delta.sequence_transfer(k, v, beta)
    >>> final = cupy_delta.chunk_delta_rule(k, k, v, beta, initial_state=state).final_state
    >>> bool(np.allclose(transfer.apply(state), final))
    True
    """
    problem = checks.factors_problem(k, v, beta, g, qk_l2norm=qk_l2norm, cu_seqlens=cu_seqlens)
    return Transfer(*backend_for(problem.kind).sequence_transfer(problem))
