"""One problem, on one rank and cut into shares: what all communicators are tested with."""

import numpy as np
from helpers import deviation, make_inputs

import cupy_delta
from cupy_delta import parallel

ARRAYS = ("q", "k", "v", "beta", "g")
GRADIENTS = (*ARRAYS, "initial_state")


def problem(tokens, *, cu_seqlens=None, B=1, seed=0, **options):
    """Return arguments of an operator, and gradients of its outputs."""
    args, kwargs = make_inputs(sum(tokens), B=B, cu_seqlens=cu_seqlens, seed=seed, **options)
    rng = np.random.default_rng(seed + 1)
    v = args[2]
    o, final_state = cupy_delta.chunk_delta_rule(*args, **kwargs)
    do = rng.standard_normal(o.shape).astype(v.dtype)
    dfinal_state = rng.standard_normal(final_state.shape).astype(final_state.dtype)
    return args, kwargs, do, dfinal_state


def on_one_rank(args, kwargs, do, dfinal_state):
    """Return what one call gives: outputs, final states, gradients."""
    o, final_state, residuals = cupy_delta.chunk_delta_rule_fwd(*args, **kwargs)
    gradients = cupy_delta.chunk_delta_rule_bwd(residuals, do, dfinal_state)
    return o, final_state, gradients


def on_rank(communicator, tokens, args, kwargs, do, dfinal_state, array=np.asarray, **more):
    """Make this rank's calls: forward alone, forward with residuals, backward."""
    start = sum(tokens[: communicator.rank])
    own = slice(start, start + tokens[communicator.rank])
    args = [None if x is None else array(x[:, own]) for x in args]
    kwargs = kwargs | more
    if kwargs["initial_state"] is not None:
        kwargs["initial_state"] = array(kwargs["initial_state"])
    alone = parallel.chunk_delta_rule(communicator, *args, **kwargs)
    o, final_state, residuals = parallel.chunk_delta_rule_fwd(communicator, *args, **kwargs)
    dfinal_state = None if dfinal_state is None else array(dfinal_state)
    gradients = parallel.chunk_delta_rule_bwd(residuals, array(do[:, own]), dfinal_state)
    return alone, o, final_state, gradients


def together(shares):
    """Put the shares' outputs and gradients together as one call would have them."""
    o = np.concatenate([x[1] for x in shares], axis=1)
    alone = np.concatenate([x[0].o for x in shares], axis=1)
    gradients = {}
    for name in ARRAYS:
        parts = [getattr(x[3], name) for x in shares]
        gradients[name] = None if parts[0] is None else np.concatenate(parts, axis=1)
    gradients["initial_state"] = shares[0][3].initial_state
    return alone, shares[-1][0].final_state, o, shares[-1][2], gradients


def worst(shares, expected):
    """Return the largest deviation of the shares from one call."""
    alone, alone_final, o, final_state, gradients = together(shares)
    found = [deviation(x, expected[0]) for x in (alone, o)]
    found += [deviation(x, expected[1]) for x in (alone_final, final_state)]
    for name in GRADIENTS:
        wanted = getattr(expected[2], name)
        assert (wanted is None) == (gradients[name] is None), name
        if wanted is not None:
            found.append(deviation(gradients[name], wanted))
    return max(found)
