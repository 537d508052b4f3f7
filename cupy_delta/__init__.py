"""cupy_delta: the delta rule of DeltaNet for NumPy and CuPy arrays.

>>> import numpy as np
>>> import cupy_delta
>>> q = k = np.eye(4)[None, :, None, :]
>>> v = np.arange(8.0).reshape(1, 4, 1, 2)
>>> o, state = cupy_delta.chunk_delta_rule(q, k, v, np.ones((1, 4, 1)), scale=1.0)
>>> bool(np.array_equal(o, v))
True
"""

from . import starting  # noqa: F401  first: what follows takes its time
from .building_blocks import chunk_output, sequence_transfer, state_pass, wy_factors
from .operators import (
    chunk_delta_rule,
    chunk_delta_rule_bwd,
    chunk_delta_rule_fwd,
    delta_rule_step,
    recurrent_delta_rule,
)
from .raw import BetaGradients, GateGradients, SigmoidBeta, SigmoidGate, SoftplusGate
from .results import (
    DeltaRuleForward,
    DeltaRuleGradients,
    DeltaRuleOutput,
    StatePass,
    Transfer,
    WYFactors,
)
from .version import __version__
from .workspace import Workspace

__all__ = [
    "BetaGradients",
    "DeltaRuleForward",
    "DeltaRuleGradients",
    "DeltaRuleOutput",
    "GateGradients",
    "SigmoidBeta",
    "SigmoidGate",
    "SoftplusGate",
    "StatePass",
    "Transfer",
    "WYFactors",
    "Workspace",
    "__version__",
    "chunk_delta_rule",
    "chunk_delta_rule_bwd",
    "chunk_delta_rule_fwd",
    "chunk_output",
    "delta_rule_step",
    "recurrent_delta_rule",
    "sequence_transfer",
    "state_pass",
    "wy_factors",
]
