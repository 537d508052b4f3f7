"""beta and g as the arithmetic has them: arrays as they came, or formed of logits and parameters.

With x = a + dt_bias, A = exp(A_log) and e = exp(-|x|), which neither overflows nor cancels::

    g = -A softplus(x)       softplus(x) = max(x, 0) + log(1 + e)     softplus' = sigmoid
    g = bound sigmoid(A x)   sigmoid(x) = (e if x < 0 else 1) / (1 + e)
    beta = scale sigmoid(x)  sigmoid'(x) = e / (1 + e)^2

They are formed in the compute dtype, block by block, and so are their gradients. A gradient of 0
stays 0 where x is infinite: what forgets all depends on nothing that it forgets by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..problem import Problem
from ..raw import BetaGradients, GateGradients, RawGate
from .tiles import Span


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def sigmoid_slope(x):
    """The derivative of `sigmoid`."""
    e = np.exp(-np.abs(x))
    return e / np.square(1 + e)


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


class Raw(NamedTuple):
    """The logits and parameters of a gate, which broadcast against each other, in one dtype."""

    formula: RawGate
    a: np.ndarray
    A_log: np.ndarray
    dt_bias: np.ndarray | None

    def gate(self):
        """Return g."""
        x, A = self._arguments()
        if self.formula.formula == "softplus":
            return -A * softplus(x)
        return x.dtype.type(self.formula.bound) * sigmoid(A * x)

    def gradients(self, dg):
        """Return what every element of dg adds to the gradients of a, and of A_log."""
        x, A = self._arguments()
        if self.formula.formula == "softplus":
            dx, dA_log = dg * (-A * sigmoid(x)), dg * (-A * softplus(x))
        else:
            slope = x.dtype.type(self.formula.bound) * sigmoid_slope(A * x)
            dx, dA_log = dg * slope * A, dg * slope * (A * x)
        return np.where(dx == 0, 0, dx), np.where(dx == 0, 0, dA_log)

    def _arguments(self):
        x = self.a if self.dt_bias is None else self.a + self.dt_bias
        return x, np.exp(self.A_log)


def load_gate(problem: Problem, load: Callable, load_heads: Callable):
    """Return g of some tokens in the compute dtype, from what loads arrays and parameters."""
    return _raw(problem, load, load_heads).gate() if problem.raw_gate else load(problem.g)


def load_beta(problem: Problem, load: Callable):
    """Return beta of some tokens in the compute dtype, from what loads arrays."""
    if problem.raw_beta is None:
        return load(problem.beta)
    logits = load(problem.logits)
    return logits.dtype.type(problem.raw_beta.scale) * sigmoid(logits)


def _raw(problem: Problem, load: Callable, load_heads: Callable) -> Raw:
    assert problem.raw_gate is not None
    channels = problem.gate == "channel"

    def along(x, per_head: bool):
        x = load_heads(x)
        return x[..., None] if channels and per_head else x

    bias = problem.raw_gate.bias
    return Raw(
        problem.raw_gate,
        load(problem.a),
        along(problem.A_log, True),
        None if bias is None else along(problem.dt_bias, bias == "head"),
    )


# ---- gradients, block by block -------------------------------------------------------------------


class ArrayGradient:
    """Of an array: stored in its dtype."""

    def __init__(self, x):
        self.result = np.empty(x.shape, native(x))

    def store(self, span: Span, block: int, dx) -> None:
        span.store_value_heads(self.result, dx)


class BetaGradient:
    """Of the logits of beta."""

    def __init__(self, problem: Problem):
        assert problem.raw_beta is not None
        self._problem, self._scale = problem, problem.compute_dtype.type(problem.raw_beta.scale)
        self.result = BetaGradients(np.empty(problem.logits.shape, native(problem.logits)))

    def store(self, span: Span, block: int, dbeta) -> None:
        p, dtype = self._problem, self._problem.compute_dtype
        slope = sigmoid_slope(span.value_heads(p.logits, dtype))
        span.store_value_heads(self.result.logits, dbeta * (self._scale * slope))


class GateGradient:
    """Of the logits of a gate, and of its parameters: a sum per block, added in their order."""

    def __init__(self, problem: Problem, blocks: int):
        self._problem = problem
        self._da = np.empty(problem.a.shape, native(problem.a))
        self._dA_log = np.zeros((blocks, problem.HV))
        bias = () if problem.dt_bias is None else problem.dt_bias.shape
        self._ddt_bias = np.zeros((blocks, *bias))

    def store(self, span: Span, block: int, dg) -> None:
        p, dtype, heads = self._problem, self._problem.compute_dtype, span.value_slice
        raw = _raw(p, lambda x: span.value_heads(x, dtype), lambda x: span.parameters(x, dtype))
        dx, dA_log = raw.gradients(dg)
        span.store_value_heads(self._da, dx)
        self._dA_log[block, heads] = _over_tokens(dA_log, 0)
        if p.dt_bias is not None:
            self._ddt_bias[block, heads] = _over_tokens(dx, p.dt_bias.ndim - 1)

    @property
    def result(self) -> GateGradients:
        p = self._problem
        sums = ((p.A_log, self._dA_log), (p.dt_bias, self._ddt_bias))
        parameters = (None if x is None else d.sum(axis=0).astype(native(x)) for x, d in sums)
        return GateGradients(self._da, *parameters)


def _over_tokens(x, kept: int):
    """Sum (h, G, n, C, ...) to (h G, ...), of which the last `kept` axes of channels stay."""
    x = x.sum(axis=tuple(range(2, x.ndim - kept)), dtype=np.float64)
    return x.reshape(-1, *x.shape[2:])


def gate_gradient(problem: Problem, blocks: int) -> Any:
    """Return what stores the gradient of g, or of what it is formed of; None without a gate."""
    if problem.gate is None:
        return None
    return GateGradient(problem, blocks) if problem.raw_gate else ArrayGradient(problem.g)


def beta_gradient(problem: Problem) -> Any:
    """Return what stores the gradient of beta, or of what it is formed of."""
    return BetaGradient(problem) if problem.raw_beta else ArrayGradient(problem.beta)


def native(x) -> np.dtype:
    return x.dtype.newbyteorder("=")
