"""The decays that walks read, to float's last digits."""

from itertools import pairwise

import numpy as np
import pytest
from emulator import EmulatorDevice
from helpers import make_inputs

from cupy_delta.cuda.plan import plan
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.problem import operator_problem, state_pass_problem

ENDS = [0, 0, 1, 40, 75]


def decays(chunk, varlen, g):
    """Return what the factors leave and what the kernel of decays alone makes."""
    options = dict(dtype=np.float32, gate="scalar", cu_seqlens=ENDS if varlen else None)
    (q, k, v, beta, _), kw = make_inputs(75, H=2, G=2, K=16, V=16, **options)
    common = dict(qk_l2norm=False, chunk_size=chunk, cu_seqlens=kw["cu_seqlens"])
    whole = dict(scale=None, out=None, initial_state=None, state_layout="kv")
    w = np.repeat(k, 2, axis=2)
    for operation, problem in (
        ("forward", operator_problem(q, k, v, beta, g, **whole, **common)),
        ("state_pass", state_pass_problem(k, w, v, g, initial_state=None, **common)),
    ):
        device = EmulatorDevice()
        results = execute(plan(operation, problem, device.facts), vars(problem), device)
        yield np.array(results["decays"], np.float64)


@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("varlen", [False, True])
def test_decays(chunk, varlen):
    g = -2 * np.random.default_rng(0).exponential(size=(1, 75, 4)).astype(np.float32)
    g[0, ::7, 1] = -1000
    g[0, 33, 2] = -np.inf
    g[0, :, 3] *= 0.01
    expected = np.zeros((1, 75, 4, 2))
    ends = ENDS if varlen else [0, 75]
    for start, stop in pairwise(ends):
        for first in range(start, stop, chunk):
            rows = slice(first, min(first + chunk, stop))
            G = np.cumsum(np.maximum(g[:, rows].astype(np.float64), -1000), axis=1)
            expected[:, rows] = np.exp(np.stack([G, G[:, -1:] - G], axis=-1))
    factors, alone = decays(chunk, varlen, g)
    assert np.array_equal(factors, alone)
    normal = expected > 1e-37  # the GPU knows no smaller floats
    assert normal.any() and (~normal).any() and np.all(factors[~normal] < 2e-37)
    assert np.max(np.abs(factors[normal] / expected[normal] - 1)) < 4e-7
