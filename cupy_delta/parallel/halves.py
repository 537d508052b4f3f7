"""A rank's own call in two halves, by kernels that have what a rank tells on their way to o.

The first half computes what the rank's tokens do to a state, the second half the rest, once it is
known what enters. It is for sequences that all leave or enter: without `cu_seqlens`.
"""

from __future__ import annotations

from typing import Any

from .. import problem as checks
from ..dispatch import backend_for
from ..results import DeltaRuleGradients, Residuals, Transfer
from .borders import own_call
from .cut import Cut
from .transfers import Tokens


class Forward:
    """A forward that was begun."""

    def __init__(self, backend: Any, begun: Any):
        self._backend, self._begun = backend, begun

    @property
    def told(self) -> Transfer | None:
        """What the rank tells; None where nothing leaves."""
        return _told(self._begun)

    def finish(self, initial):
        """Return outputs, final states and residuals, from the states that enter."""
        o, final, saved = self._backend.finish_forward(self._begun, initial)
        problem = self._begun.problem.of({"initial_state": initial})
        return o, final, Residuals(problem, saved)


def begin_forward(share: Tokens, call: checks.Problem, cut: Cut, given, out, training: bool):
    """Begin a rank's forward; return None where it has to be made as a whole."""
    backend: Any = backend_for(call.kind)
    crosses = cut.cu_seqlens is None and (cut.entering or cut.leaving)
    if not crosses or not hasattr(backend, "begin_forward"):
        return None
    problem = checks.operator_problem(**own_call(share, cut, given), out=out)
    begun = backend.begin_forward(problem, _tells(cut.leaving, cut.entering), training)
    return None if begun is None else Forward(backend, begun)


class Backward:
    """A backward that was begun, of a forward in halves."""

    def __init__(self, residuals: Residuals, cut: Cut, do, dfinal):
        backend: Any = backend_for(residuals.problem.kind)
        tells = _tells(cut.entering, cut.leaving)
        self._do, self._begun = do, backend.begin_backward(residuals, do, dfinal, tells)
        self._backend, self.told = backend, _told(self._begun)

    def finish(self, dfinal) -> DeltaRuleGradients:
        """Return the gradients, from those of the states that leave."""
        return DeltaRuleGradients(*self._backend.finish_backward(self._begun, self._do, dfinal))


def _tells(told: int, dependent: int) -> str:
    """Say what is told: if it depends on what enters, what is done to any state."""
    return "nothing" if not told else "transfer" if dependent else "state"


def _told(begun) -> Transfer | None:
    p, h = begun.told
    return None if h is None else Transfer(p, h)
