"""Raw gates and strengths of a rank's share, by `parallel`: outputs, and gradients to be summed."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import deviation
from raw import raw_gate

import cupy_delta as cd
from cupy_delta import parallel
from cupy_delta.raw import tokens_of

B, H, HV, K, V = 1, 1, 2, 3, 4
TOKENS = [5, 0, 7]


def problem(formula, gate, bias):
    rng, T = np.random.default_rng(0), sum(TOKENS)
    q, k = rng.standard_normal((2, B, T, H, K))
    v = rng.standard_normal((B, T, HV, V))
    beta = cd.SigmoidBeta(rng.standard_normal((B, T, HV)), scale=2)
    return [q, k, v, beta, raw_gate(rng, formula, gate, bias, B, T, HV, K, np.float64)]


@pytest.mark.parametrize("cu_seqlens", [None, [0, 4, 12]])
@pytest.mark.parametrize(
    ("formula", "gate", "bias"), [("softplus", "channel", "channel"), ("sigmoid", "scalar", "head")]
)
def test_shares_make_up_the_whole(formula, gate, bias, cu_seqlens):
    args = problem(formula, gate, bias)
    options = dict(qk_l2norm=True, cu_seqlens=cu_seqlens and np.array(cu_seqlens))
    o, _, residuals = cd.chunk_delta_rule_fwd(*args, **options)
    whole = cd.chunk_delta_rule_bwd(residuals, o)

    def share(communicator):
        start = sum(TOKENS[: communicator.rank])
        own = slice(start, start + TOKENS[communicator.rank])
        some = [tokens_of(x, own) for x in args]
        alone = parallel.chunk_delta_rule(communicator, *some, **options).o
        o, _, residuals = parallel.chunk_delta_rule_fwd(communicator, *some, **options)
        return alone, o, parallel.chunk_delta_rule_bwd(residuals, o)

    shares = parallel.in_threads(len(TOKENS), share)
    for i in (0, 1):
        assert deviation(np.concatenate([x[i] for x in shares], axis=1), o) < 1e-12
    gradients = [x[2] for x in shares]
    for name, found, wanted in (
        ("a", [x.g.a for x in gradients], whole.g.a),
        ("logits", [x.beta.logits for x in gradients], whole.beta.logits),
    ):
        assert deviation(np.concatenate(found, axis=1), wanted) < 1e-12, name
    assert deviation(sum(x.g.A_log for x in gradients), whole.g.A_log) < 1e-12
    assert deviation(sum(x.g.dt_bias for x in gradients), whole.g.dt_bias) < 1e-12


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(bound=-4.0), ValueError, "formula of g: expected the same on every rank"),
        (dict(A_log=np.zeros(3)), ValueError, r"g\.A_log: expected \(HV,\) = \(2,\) like v"),
    ],
)
def test_an_error_is_one_on_every_rank(change, error, message):
    args = problem("sigmoid", "scalar", "head")

    def share(communicator):
        some = [tokens_of(x, slice(0, 4)) for x in args]
        if communicator.rank == 1:
            some[4] = replace(some[4], **change)
        with pytest.raises(error, match=message):
            parallel.chunk_delta_rule(communicator, *some)
        return True

    assert all(parallel.in_threads(2, share))
