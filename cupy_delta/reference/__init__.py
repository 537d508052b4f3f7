"""The NumPy/SciPy backend: the default without a GPU, and the oracle for every kernel."""

from .blocks import affine, chunk_output, joined, sequence_transfer, state_pass, wy_factors
from .chunkwise import chunk_delta_rule, chunk_delta_rule_bwd, chunk_delta_rule_fwd
from .step import delta_rule_step
from .token_loop import recurrent_delta_rule

__all__ = [
    "affine",
    "chunk_delta_rule",
    "chunk_delta_rule_bwd",
    "chunk_delta_rule_fwd",
    "chunk_output",
    "delta_rule_step",
    "joined",
    "recurrent_delta_rule",
    "sequence_transfer",
    "state_pass",
    "wy_factors",
]
