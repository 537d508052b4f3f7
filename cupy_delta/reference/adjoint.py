"""The exact gradients of the token loop: the oracle that every backward is tested against.

It keeps every state, so it is for small problems. With S~ = exp(g) S the decayed state::

    dS += scale q do^T       m = dS^T k        dbeta = sum_v m r      dv = dr = beta m
    dk = dS (beta r) - S~ dr     dS~ = dS - k dr^T     dg = sum dS~ * S~     dS = exp(g) dS~
"""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .tiles import l2norm, l2norm_gradient
from .token_loop import advance, batches, initial_states, token_inputs


def recurrent_delta_rule_bwd(problem: Problem, do, dfinal_state=None):
    """Return the gradients of (q, k, v, beta, g, initial_state), all in the compute dtype.

    Takes what `recurrent_delta_rule` takes, beta per value channel included.
    """
    dtype = problem.compute_dtype
    dq, dk, dv, dbeta = (
        np.zeros(x.shape, dtype) for x in (problem.q, problem.k, problem.v, problem.beta)
    )
    dg = None if problem.g is None else np.zeros(problem.g.shape, dtype)
    dinitial = np.zeros(problem.state_shape, dtype)
    view = dinitial if problem.state_layout == "kv" else dinitial.swapaxes(-1, -2)
    for rows, tokens, index in batches(problem):
        inputs = token_inputs(problem, rows, tokens)
        steps = [inputs.at(t) for t in range(tokens.stop - tokens.start)]
        S, history = initial_states(problem, problem.initial_state, index), []
        for x in steps:
            decayed = S if x.g is None else np.exp(x.g) * S
            S = S.copy()
            r = advance(S, x)
            history.append((decayed, r, S))
        dS = initial_states(problem, dfinal_state, index)
        for t in reversed(range(len(steps))):
            x, at = steps[t], (rows, tokens.start + t)
            decayed, r, after = history[t]
            d = np.asarray(do[at], dtype).reshape(r.shape)
            dq[at] = _rows(d @ after.swapaxes(-1, -2))
            dS = dS + x.q.swapaxes(-1, -2) * d
            m = x.k @ dS
            db = m * r
            if not problem.beta_per_value:
                db = db.sum(axis=-1)
            dbeta[at] = db.reshape(dbeta[at].shape)
            dr = x.beta * m
            dv[at] = dr.reshape(dv[at].shape)
            written = (x.beta * r) @ dS.swapaxes(-1, -2)
            dk[at] = _rows(written - dr @ decayed.swapaxes(-1, -2))
            dS = dS - x.k.swapaxes(-1, -2) * dr
            if x.g is not None and dg is not None:
                flow = np.sum(dS * decayed, axis=-1)
                if problem.gate == "scalar":
                    flow = flow.sum(axis=-1)
                dg[at] = flow.reshape(dg[at].shape)
                dS = np.exp(x.g) * dS
        view[index] = dS.reshape(-1, problem.HV, *dS.shape[3:])
    dq *= dtype.type(problem.scale)
    if problem.qk_l2norm:
        dq, dk = (
            l2norm_gradient(d, *l2norm(np.asarray(x, dtype)))
            for d, x in ((dq, problem.q), (dk, problem.k))
        )
    return dq, dk, dv, dbeta, dg, None if problem.initial_state is None else dinitial


def _rows(x):
    """(B, H, G, 1, K) summed over the value heads of a key head: (B, H, K)."""
    return x[..., 0, :].sum(axis=2)
