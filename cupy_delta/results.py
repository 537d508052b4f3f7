"""What the operators return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from . import problem as checks
from .typing import AnyArray, Backend


class _Output(NamedTuple):
    o: Any
    final_state: Any


class DeltaRuleOutput(_Output):
    """Outputs ``o`` (B, T, HV, V) and the state after the last token of each sequence.

    Attributes
    ----------
    checkpoints : array or None
        States on the way, if `chunk_delta_rule` was asked for them; no element of the tuple, so
        that it unpacks alike with and without.
    """

    checkpoints: Any = None

    def __new__(cls, o: Any, final_state: Any, checkpoints: Any = None) -> DeltaRuleOutput:
        self = super().__new__(cls, o, final_state)
        self.checkpoints = checkpoints
        return self


@dataclass(frozen=True, eq=False)
class Residuals:
    """What the forward hands to the backward; opaque to callers.

    Attributes
    ----------
    problem : Problem
        The checked call of the forward. Its arrays must not change before the backward.
    saved : dict
        Arrays the backend keeps: states between chunks and what else its backward reads.
    """

    problem: checks.Problem
    saved: dict[str, Any]


class DeltaRuleForward(NamedTuple):
    """Outputs, final states, and the residuals that `chunk_delta_rule_bwd` takes."""

    o: Any
    final_state: Any
    residuals: Residuals


class DeltaRuleGradients(NamedTuple):
    """Gradients with respect to each input; None where there was no input.

    That of a raw gate is a `GateGradients`, that of a raw strength a `BetaGradients`.
    """

    q: Any
    k: Any
    v: Any
    beta: Any
    g: Any
    initial_state: Any


class WYFactors(NamedTuple):
    """WY factors of every chunk: ``w`` = T K, ``u`` = T V and ``t`` = (I + A)^-1 diag(beta)."""

    w: Any
    u: Any
    t: Any


class StatePass(NamedTuple):
    """States entering each chunk, ``v_new`` = U - W S, and the states after the last token."""

    states: Any
    v_new: Any
    final_state: Any


class Transfer(NamedTuple):
    """The affine map ``S -> P S + H`` that a stretch of tokens applies to the state.

    Attributes
    ----------
    p : array, (N, HV, K, K)
    h : array, (N, HV, K, V)

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta as cd
    >>> rng = np.random.default_rng(0)
    >>> k = rng.standard_normal((1, 6, 1, 4)) / 2
    >>> v, beta = rng.standard_normal((1, 6, 1, 3)), rng.uniform(0, 1, (1, 6, 1))
    >>> whole = cd.sequence_transfer(k, v, beta)
    >>> first = cd.sequence_transfer(k[:, :2], v[:, :2], beta[:, :2])
    >>> rest = cd.sequence_transfer(k[:, 2:], v[:, 2:], beta[:, 2:])
    >>> bool(np.allclose(first.then(rest).h, whole.h))
    True
    """

    p: Any
    h: Any

    def apply(self, state: AnyArray) -> AnyArray:
        """Return ``P state + H``, the state after the tokens when ``state`` came before.

        Parameters
        ----------
        state : array, (N, HV, K, V)
            Same kind and dtype as `h`.

        Returns
        -------
        array, (N, HV, K, V)

        Raises
        ------
        TypeError, ValueError
            If kind, dtype or shape differ from those of `h`.
        """
        kind = checks.affine_arrays(self.p, self.h, {"state": state})
        return _backend(kind).affine(self.p, state, self.h)

    def then(self, later: Transfer) -> Transfer:
        """Return the transfer of these tokens followed by those of `later`.

        Parameters
        ----------
        later : Transfer
            Of the same kind, dtype and shapes.

        Returns
        -------
        Transfer
            ``P = P_later P`` and ``H = P_later H + H_later``.

        Raises
        ------
        TypeError, ValueError
            If `later` is not a Transfer, or kind, dtype or shape differ.
        """
        checks.instance("later", later, Transfer, "a Transfer")
        kind = checks.affine_arrays(self.p, self.h, {"later.p": later.p, "later.h": later.h})
        backend = _backend(kind)
        return Transfer(
            backend.affine(later.p, self.p, None), backend.affine(later.p, self.h, later.h)
        )


def _backend(kind: str) -> Backend:
    from .dispatch import backend_for

    return backend_for(kind)
