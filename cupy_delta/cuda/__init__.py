"""The CuPy backend: a problem becomes a plan, a plan becomes kernel launches."""

from .operators import (
    affine,
    begin_backward,
    begin_forward,
    chunk_delta_rule,
    chunk_delta_rule_bwd,
    chunk_delta_rule_fwd,
    chunk_output,
    delta_rule_step,
    finish_backward,
    finish_forward,
    joined,
    recurrent_delta_rule,
    sequence_transfer,
    state_pass,
    wy_factors,
)
from .runtime.environment import environment
from .variants import compile_variants, launches_of

__all__ = [
    "affine",
    "begin_backward",
    "begin_forward",
    "chunk_delta_rule",
    "chunk_delta_rule_bwd",
    "chunk_delta_rule_fwd",
    "chunk_output",
    "compile_variants",
    "delta_rule_step",
    "environment",
    "finish_backward",
    "finish_forward",
    "joined",
    "launches_of",
    "recurrent_delta_rule",
    "sequence_transfer",
    "state_pass",
    "wy_factors",
]
