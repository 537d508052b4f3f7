"""The public operators: documentation, one check, one dispatch. No arithmetic."""

from __future__ import annotations

from typing import Any

from . import problem as checks
from . import repeated
from .dispatch import backend_for
from .raw import Gate, SigmoidBeta
from .results import DeltaRuleForward, DeltaRuleGradients, DeltaRuleOutput, Residuals
from .typing import AnyArray, Array, Integer, Real, StateLayout


def chunk_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | SigmoidBeta,
    g: Array | Gate | None = None,
    *,
    scale: Real | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    state_layout: StateLayout = "kv",
    out: Array | None = None,
    state: Array | None = None,
    state_indices: Array | None = None,
    output_state_indices: Array | None = None,
    fresh: Array | None = None,
    checkpoint_every: Integer | None = None,
) -> DeltaRuleOutput:
    """Apply the delta rule to whole sequences, chunk by chunk in WY form.

    Every head keeps a state ``S``, a K x V associative memory. Token t updates and reads it::

        S <- exp(g_t) S                  (only with a gate)
        S <- S + beta_t k_t (v_t - S^T k_t)^T
        o_t = scale S^T q_t

    Parameters
    ----------
    q, k : array, (B, T, H, K)
        Queries and keys; float64, float32, float16 or bfloat16, one dtype with `v`. The rule is
        stable for keys of unit length, see `qk_l2norm`.
    v : array, (B, T, HV, V)
        Values. HV is a multiple of H; value head hv uses key head ``hv // (HV // H)``.
    beta : array, (B, T, HV), or SigmoidBeta
        Writing strength, after any sigmoid; [0, 2] is the stable range for unit keys. Dtype of
        `v` or float32. Of its logits it is formed by a `SigmoidBeta`.
    g : array, (B, T, HV) or (B, T, HV, K), or SoftplusGate or SigmoidGate, optional
        Log decay, natural logarithm, at most 0, -inf to forget all: a scalar gate per head or one
        per key channel. Dtype of `v` or float32. Of a linear decay alpha it is ``log(alpha)``:
        on the host, gates above 1e-3 are an error. Of a model's logits and parameters it is
        formed by a `SoftplusGate` or a `SigmoidGate`.
    scale : float, optional
        Factor on the outputs, ``K ** -0.5`` by default.
    initial_state : array, (N, HV, K, V), optional
        State before the first token of each sequence, zero by default; float32, float16 or
        bfloat16, or float64 with float64 inputs.
    cu_seqlens : integer array, (N + 1,), optional
        Sequence n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]`` of the only batch row
        (B = 1); int32 or int64, nondecreasing from 0 to T. Empty sequences are legal.
    qk_l2norm : bool
        Replace q and k by ``x * rsqrt(sum(x**2) + 1e-6)`` along K first.
    chunk_size : int, optional
        Tokens per chunk; None lets the library choose. It changes the result by rounding only.
    state_layout : {"kv", "vk"}
        Layout of the states' last two axes, going in and coming out.
    out : array, (B, T, HV, V), optional
        Written and returned as ``o``; dtype of `v`, C-contiguous, no memory shared with inputs.
    state : array, (slots, HV, K, V), optional
        A pool of states in the place of `initial_state`, updated in place: every sequence reads a
        slot and writes one. float32, or bfloat16 / float16, which are rounded to nearest once a
        call; float64 with float64 inputs. Slots are C-contiguous and may lie apart, as in
        ``pages[:, layer]``; ``slots = N`` unless `state_indices` is given.
    state_indices : integer array, (N,), optional
        Slot that each sequence starts from; int32 or int64. Negative: from zero. Each slot at most
        once, unless `output_state_indices` says what is written.
    output_state_indices : integer array, (N,), optional
        Slot that each sequence's last state goes to, by default the one that it starts from, each
        at most once, and none that another sequence reads. Negative: it goes nowhere.
    fresh : array of bool, (N,), optional
        Sequences that start from zero, whatever their slot holds.
    checkpoint_every : int, optional
        Also return the states after every so many tokens of each sequence; a multiple of the chunk
        size (64 is one of any that the library chooses).

    Returns
    -------
    DeltaRuleOutput
        ``o`` (B, T, HV, V) in the dtype of `v`, and ``final_state`` (N, HV, K, V) in float32
        (float64 with float64 inputs), or `state`, where it was given. Arrays of the kind that came
        in, on the same device. With ``checkpoint_every=E`` its attribute ``checkpoints``,
        (B, T // E, HV, K, V) in the dtype of sums and the layout of states, has the state after
        (i + 1) E tokens of sequence n at place ``cu_seqlens[n] // E + i`` of row 0, or in its batch
        row at place i; the rest of it is zero.

    Raises
    ------
    TypeError
        Wrong kind or dtype of an argument, or NumPy and CuPy arrays in one call.
    ValueError
        Wrong shape, value or layout. Nothing has been written then.
    NotImplementedError
        An option that the backend of these arrays lacks; the message says what works.

    Notes
    -----
    Accumulation is in float64 for float64 inputs and in float32 otherwise; the state is never
    kept in 16 bits. The result is bitwise repeatable on one device with one library version,
    for any number of threads, and causal: tokens from t on never change outputs before t, unless
    something overflows to Inf or NaN, which may spread within its chunk. CuPy arrays run on the
    current stream without synchronising.

    Indices of slots in device memory are not read back: one past the pool counts as negative
    there, and slots that are repeated, or written by one sequence and read by another, get
    undefined numbers. No other slot is touched.

    With `checkpoint_every` a sequence has the same bits whole and taken up from a checkpoint in
    another such call, of any multiple of the chunk size: long ones are not cut over the GPU then.

    Outputs that grow from token to token, and in the end are not finite, come from keys that are
    not of unit length or from a beta beyond 2: "When it diverges" in docs/conventions.md of the
    project.

    References
    ----------
    S. Yang, B. Wang, Y. Zhang, Y. Shen, Y. Kim, "Parallelizing Linear Transformers with the
    Delta Rule over Sequence Length", NeurIPS 2024, arXiv:2406.06484.

    Examples
    --------
    Store two values under one key; the second replaces the first.

    >>> import numpy as np
    >>> import cupy_delta
    >>> k = np.ones((1, 2, 1, 1))
    >>> v = np.array([3.0, 5.0]).reshape(1, 2, 1, 1)
    >>> o, final_state = cupy_delta.chunk_delta_rule(k, k, v, np.ones((1, 2, 1)))
    >>> o.ravel(), final_state.ravel()
    (array([3., 5.]), array([5.]))

    The same in slot 2 of a pool:

    >>> pool = np.zeros((4, 1, 1, 1))
    >>> o, _ = cupy_delta.chunk_delta_rule(
    ...     k, k, v, np.ones((1, 2, 1)), state=pool, state_indices=np.array([2])
    ... )
    >>> pool.ravel()
    array([0., 0., 5., 0.])
    """
    problem = checks.operator_problem(
        q,
        k,
        v,
        beta,
        g,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        state_layout=state_layout,
        out=out,
        state=state,
        state_indices=state_indices,
        output_state_indices=output_state_indices,
        fresh=fresh,
        checkpoint_every=checkpoint_every,
    )
    return DeltaRuleOutput(*backend_for(problem.kind).chunk_delta_rule(problem))


def recurrent_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | SigmoidBeta,
    g: Array | Gate | None = None,
    *,
    scale: Real | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    qk_l2norm: bool = False,
    state_layout: StateLayout = "kv",
    out: Array | None = None,
) -> DeltaRuleOutput:
    """Apply the delta rule token by token: the definition itself, slow for long sequences.

    Parameters
    ----------
    q, k, v, beta, g, scale, initial_state, cu_seqlens, qk_l2norm, state_layout, out
        As in `chunk_delta_rule`. `beta` may also be (B, T, HV, V), one strength per value
        channel.

    Returns
    -------
    DeltaRuleOutput
        ``o`` (B, T, HV, V) and ``final_state`` (N, HV, K, V).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `chunk_delta_rule`.

    Notes
    -----
    Accumulates in float64 for float64 inputs, otherwise in float32; one token after the other,
    in the order of the definition. Bitwise repeatable; CuPy arrays run on the current stream.

    References
    ----------
    B. Widrow, M. E. Hoff, "Adaptive switching circuits", IRE WESCON 1960; I. Schlag, K. Irie,
    J. Schmidhuber, "Linear Transformers Are Secretly Fast Weight Programmers", ICML 2021,
    arXiv:2102.11174.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 100, 2, 8))
    >>> beta = rng.uniform(0, 1, (1, 100, 2))
    >>> exact = cupy_delta.recurrent_delta_rule(q, k, v, beta, qk_l2norm=True)
    >>> chunked = cupy_delta.chunk_delta_rule(q, k, v, beta, qk_l2norm=True)
    >>> bool(np.allclose(exact.o, chunked.o, rtol=0, atol=1e-12))
    True
    """
    problem = checks.operator_problem(
        q,
        k,
        v,
        beta,
        g,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        state_layout=state_layout,
        out=out,
        beta_shapes=("B T HV", "B T HV V"),
    )
    return DeltaRuleOutput(*backend_for(problem.kind).recurrent_delta_rule(problem))


def delta_rule_step(
    q: Array,
    k: Array,
    v: AnyArray,
    beta: Array | SigmoidBeta,
    g: Array | Gate | None = None,
    *,
    state: Array,
    state_indices: Array | None = None,
    output_state_indices: Array | None = None,
    cu_seqlens: Array | None = None,
    accepted: Array | None = None,
    scale: Real | None = None,
    qk_l2norm: bool = False,
    state_layout: StateLayout = "kv",
    out: Array | None = None,
) -> AnyArray:
    """Advance a pool of states by the new tokens of every sequence, in place.

    Parameters
    ----------
    q, k, v, beta, g, scale, qk_l2norm, state_layout, out
        As in `chunk_delta_rule`, with T at most 32. Each batch row is one sequence.
    state : array, (slots, HV, K, V)
        The pool, updated in place. float32, or bfloat16 / float16, which are rounded to nearest
        once a call; float64 with float64 inputs. Slots are C-contiguous and may lie apart, as in
        ``pages[:, layer]``; there are as many as sequences unless `state_indices` is given. With
        ``state_layout="vk"`` it is (slots, HV, V, K).
    state_indices : integer array, (N,), optional
        Slot of each sequence; int32 or int64, each slot at most once unless others are written. A
        negative index is padding: nothing is read or written for that sequence and its output is
        zero.
    output_state_indices : integer array, (N,), optional
        Slot that each sequence's new state goes to, by default the one that it comes from; each at
        most once, and none that another sequence reads. Negative: it goes nowhere, while the
        outputs are as ever.
    cu_seqlens : integer array, (N + 1,), optional
        Sequence n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]`` of the only batch row, each
        of 0 to 32 tokens; without it N = B.
    accepted : integer array, (N,), optional
        How many of each sequence's tokens its new state takes up, 0 to all of them, by default
        all. All tokens have their outputs. With 0, a slot that is its own is left as it is.

    Returns
    -------
    array, (B, T, HV, V)
        Outputs in the dtype of `v`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `chunk_delta_rule`; `state` is untouched then.

    Notes
    -----
    The arithmetic is that of `recurrent_delta_rule`: float32 (float64 for float64 inputs). A token
    has the same bits whatever comes with it in the call, so several tokens equal as many calls of
    one, to the bit where the pool is float32 or float64; one of 16 bits is rounded once a call
    instead of once a token. With such a pool on CuPy arrays one token, two to four, and more, or a
    ragged number, may go through different kernels, whose results differ by rounding.

    Values of index arrays, `cu_seqlens` and `accepted` in device memory are not read back. There a
    state index past the pool is padding, an output index past it goes nowhere, lengths and
    `accepted` are clamped, and slots that are written twice, or written by one sequence and read by
    another, get undefined numbers. No other slot is touched.

    References
    ----------
    I. Schlag, K. Irie, J. Schmidhuber, arXiv:2102.11174 (the recurrence of each step).

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> state = np.zeros((3, 1, 2, 2), np.float32)
    >>> k = np.array([[[[1.0, 0.0]]]], np.float32)
    >>> v = np.array([[[[7.0, 8.0]]]], np.float32)
    >>> beta = np.ones((1, 1, 1), np.float32)
    >>> cupy_delta.delta_rule_step(
    ...     k, k, v, beta, scale=1.0, state=state, state_indices=np.array([2])
    ... ).ravel()
    array([7., 8.], dtype=float32)
    >>> state[2, 0, 0]
    array([7., 8.], dtype=float32)
    """
    arguments = (
        q,
        k,
        v,
        beta,
        g,
        out,
        state,
        state_indices,
        output_state_indices,
        cu_seqlens,
        accepted,
        scale,
        qk_l2norm,
        state_layout,
    )
    again = repeated.find(arguments)
    written: Any = out
    if again is not None:
        again()
        return written
    problem = checks.step_problem(
        q,
        k,
        v,
        beta,
        g,
        state=state,
        state_indices=state_indices,
        output_state_indices=output_state_indices,
        cu_seqlens=cu_seqlens,
        accepted=accepted,
        scale=scale,
        qk_l2norm=qk_l2norm,
        state_layout=state_layout,
        out=out,
    )
    passed = problem.passed
    if passed is not None and passed.again is not None:
        passed.again()
    else:
        o = backend_for(problem.kind).delta_rule_step(problem)
        if out is None:
            return o
    repeated.keep(passed, arguments)
    return written


def chunk_delta_rule_fwd(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | SigmoidBeta,
    g: Array | Gate | None = None,
    *,
    scale: Real | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    state_layout: StateLayout = "kv",
    out: Array | None = None,
) -> DeltaRuleForward:
    """Do as `chunk_delta_rule` does, and keep what the gradients need.

    Parameters
    ----------
    q, k, v, beta, g, scale, initial_state, cu_seqlens, qk_l2norm, chunk_size, state_layout, out
        As in `chunk_delta_rule`. The arrays must not change before the backward.

    Returns
    -------
    DeltaRuleForward
        ``o``, ``final_state`` and the opaque ``residuals`` for `chunk_delta_rule_bwd`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `chunk_delta_rule`.

    Notes
    -----
    On NumPy the residuals hold the inputs and one state per 4 chunks; on CuPy per chunk one
    state, two C x C factors and a row of V numbers per token, in the dtype of v.

    References
    ----------
    arXiv:2406.06484, section 3; the backward is derived in docs/derivation.md.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> k = np.ones((1, 2, 1, 1))
    >>> v, beta = 3.0 * k, np.ones((1, 2, 1))
    >>> o, final_state, residuals = cupy_delta.chunk_delta_rule_fwd(k, k, v, beta)
    >>> cupy_delta.chunk_delta_rule_bwd(residuals, np.ones_like(o)).v.ravel()
    array([1., 1.])
    """
    problem = checks.operator_problem(
        q,
        k,
        v,
        beta,
        g,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        state_layout=state_layout,
        out=out,
    )
    o, final_state, saved = backend_for(problem.kind).chunk_delta_rule_fwd(problem)
    return DeltaRuleForward(o, final_state, Residuals(problem, saved))


def chunk_delta_rule_bwd(
    residuals: Residuals,
    do: Array,
    dfinal_state: Array | None = None,
) -> DeltaRuleGradients:
    """Return the exact gradients of `chunk_delta_rule_fwd`.

    Parameters
    ----------
    residuals : Residuals
        From `chunk_delta_rule_fwd`.
    do : array, (B, T, HV, V)
        Gradient of the loss with respect to ``o``, in the dtype of `v`.
    dfinal_state : array, (N, HV, K, V), optional
        Gradient with respect to ``final_state``, in its dtype and layout; zero by default.

    Returns
    -------
    DeltaRuleGradients
        Gradients of q, k, v, beta, g and initial_state in the shapes and dtypes of these inputs;
        None for an input that was absent. Those of a raw gate or strength are a `GateGradients` or
        `BetaGradients`, of the arrays it was given.

    Raises
    ------
    TypeError, ValueError
        Wrong kind, dtype or shape.
    NotImplementedError
        On CuPy arrays, what the forward refuses, too: float64, a gate per key channel.

    Notes
    -----
    No finite differences and no automatic differentiation: the adjoint of the chunk's algebra,
    with the accumulation of the forward. Bitwise repeatable.

    References
    ----------
    The derivation is in docs/derivation.md of the project.

    Examples
    --------
    See `chunk_delta_rule_fwd`.
    """
    checks.instance("residuals", residuals, Residuals, "those of chunk_delta_rule_fwd")
    checks.backward_arrays(residuals.problem, do, dfinal_state)
    backend = backend_for(residuals.problem.kind)
    return DeltaRuleGradients(*backend.chunk_delta_rule_bwd(residuals, do, dfinal_state))
