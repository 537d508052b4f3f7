"""Gates and strengths as models have them: logits and parameters in the place of `g` and `beta`.

What is formed of them is float32 (float64 with float64 inputs), from `exp(-abs(x))`, which neither
overflows nor cancels for any x. The rest of a call is as with the arrays themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from .typing import Array

Formula = Literal["softplus", "sigmoid"]
Bias = Literal["head", "channel"]


@dataclass(frozen=True, eq=False)
class SoftplusGate:
    """The gate ``g = -exp(A_log) softplus(a + dt_bias)``, in the place of `g`.

    Qwen3-Next and Olmo Hybrid have it per head, Kimi Linear per key channel.

    Attributes
    ----------
    a : array, (B, T, HV) or (B, T, HV, K)
        Logits: a scalar gate per head, or one per key channel. Dtype of `v` or float32.
    A_log : array, (HV,)
        Logarithm of the rate. Dtype of `v` or float32, as `dt_bias`.
    dt_bias : array, (HV,) or (HV, K), optional
        Added to the logits, zero by default; (HV, K) with a gate per key channel alone.

    Notes
    -----
    `chunk_delta_rule_bwd` returns the gradients of all three as `GateGradients`. What is formed
    is float32, or float64 with float64 inputs, rounded no further. A logit of Inf is a gate of
    -Inf: it forgets all, and adds nothing to any gradient.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 100, 2, 8))
    >>> a, b = rng.standard_normal((2, 1, 100, 2))
    >>> A_log, dt_bias = rng.standard_normal((2, 2))
    >>> gate = cupy_delta.SoftplusGate(a, A_log, dt_bias)
    >>> raw = cupy_delta.chunk_delta_rule(q, k, v, cupy_delta.SigmoidBeta(b), gate, qk_l2norm=True)
    >>> beta, g = 1 / (1 + np.exp(-b)), -np.exp(A_log) * np.log1p(np.exp(a + dt_bias))
    >>> o, state = cupy_delta.chunk_delta_rule(q, k, v, beta, g, qk_l2norm=True)
    >>> bool(np.allclose(raw.o, o, rtol=0, atol=1e-12))
    True
    """

    a: Array
    A_log: Array
    dt_bias: Array | None = None

    formula: ClassVar[Formula] = "softplus"
    bound: ClassVar[float] = 0.0


@dataclass(frozen=True, eq=False)
class SigmoidGate:
    """The gate ``g = bound sigmoid(exp(A_log) (a + dt_bias))``, in the place of `g`.

    Kimi K3, GLM-5-Next and Bailing hybrid have it per key channel: no token forgets more than
    ``exp(bound)``.

    Attributes
    ----------
    a : array, (B, T, HV) or (B, T, HV, K)
    A_log : array, (HV,)
    dt_bias : array, (HV,) or (HV, K), optional
        As in `SoftplusGate`.
    bound : float
        The strongest decay, below 0; -5 by default.

    Notes
    -----
    As in `SoftplusGate`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> k = np.ones((1, 2, 1, 1))
    >>> gate = cupy_delta.SigmoidGate(np.array([0.0, -1e9]).reshape(1, 2, 1), np.zeros(1), bound=-2)
    >>> o, state = cupy_delta.chunk_delta_rule(k, k, 0 * k, np.zeros((1, 2, 1)), gate,
    ...                                        initial_state=np.ones((1, 1, 1, 1)))
    >>> bool(np.allclose(o.ravel(), np.exp(-1)))
    True
    """

    a: Array
    A_log: Array
    dt_bias: Array | None = None
    bound: float = -5.0

    formula: ClassVar[Formula] = "sigmoid"

    def __post_init__(self):
        bound = _number("bound", self.bound)
        if not bound < 0:
            raise ValueError(f"bound: expected a finite number below 0, got {self.bound}")
        object.__setattr__(self, "bound", bound)


@dataclass(frozen=True, eq=False)
class SigmoidBeta:
    """The strength ``beta = scale sigmoid(logits)``, in the place of `beta`.

    Attributes
    ----------
    logits : array, (B, T, HV)
        Dtype of `v` or float32; `recurrent_delta_rule` takes (B, T, HV, V), too.
    scale : float
        Above 0: 1 by default, 2 in models that let a state change its sign.

    Notes
    -----
    `chunk_delta_rule_bwd` returns the gradient of `logits` as `BetaGradients`. What is formed is
    float32, or float64 with float64 inputs.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> k = np.ones((1, 1, 1, 1))
    >>> beta = cupy_delta.SigmoidBeta(np.zeros((1, 1, 1)), scale=2)
    >>> cupy_delta.chunk_delta_rule(k, k, 3 * k, beta).o.ravel()
    array([3.])
    """

    logits: Array
    scale: float = 1.0

    def __post_init__(self):
        scale = _number("scale", self.scale)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale: expected a finite number above 0, got {self.scale}")
        object.__setattr__(self, "scale", scale)


def _number(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    number = float(x)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


Gate = SoftplusGate | SigmoidGate
GATES, BETAS = (SoftplusGate, SigmoidGate), (SigmoidBeta,)


class GateGradients(NamedTuple):
    """Gradients of a `SoftplusGate` or `SigmoidGate`; that of `dt_bias` is None without one."""

    a: Any
    A_log: Any
    dt_bias: Any


class BetaGradients(NamedTuple):
    """Gradients of a `SigmoidBeta`."""

    logits: Any


# ---- as calls are described: hashable, without arrays --------------------------------------------


class RawGate(NamedTuple):
    """A gate's formula; dtype is that of the logits, bias per "head" or "channel" if there is."""

    formula: Formula
    dtype: np.dtype
    bias: Bias | None
    bound: float


class RawBeta(NamedTuple):
    """The strength's scale, and the dtype of its logits."""

    dtype: np.dtype
    scale: float


def by_name(beta: Any, g: Any, **arrays: Any) -> dict[str, Any]:
    """Return beta, g and other arrays by the names that backends know; None where absent."""
    arrays["beta"], arrays["g"] = beta, g
    if isinstance(g, GATES):
        arrays |= dict(g=None, a=g.a, A_log=g.A_log, dt_bias=g.dt_bias)
    if isinstance(beta, BETAS):
        arrays |= dict(beta=None, logits=beta.logits)
    return arrays


def as_given(call: Any) -> tuple[Any, Any]:
    """Return beta and g as a problem's caller gave them."""
    beta, g = call.beta, call.g
    if call.raw_beta is not None:
        beta = SigmoidBeta(call.logits, call.raw_beta.scale)
    if call.raw_gate is not None:
        parameters = call.a, call.A_log, call.dt_bias
        softplus = call.raw_gate.formula == "softplus"
        g = SoftplusGate(*parameters) if softplus else SigmoidGate(*parameters, call.raw_gate.bound)
    return beta, g


def tokens_of(x: Any, span: slice) -> Any:
    """Return some tokens of an array (B, T, ...), or of what is in its place."""
    if isinstance(x, GATES):
        return replace(x, a=x.a[:, span])
    return replace(x, logits=x.logits[:, span]) if isinstance(x, BETAS) else x[:, span]
