"""One sequence over many devices: each rank has consecutive tokens, and tells what they do.

What a rank's tokens do to any state, ``S -> P S + H``, takes K (K + V) floats per head, whatever
their number; nothing else travels. docs/parallel.md tells how it works and what it costs.
"""

from .communicators import Communicator, RankFailedError, ThreadCommunicator, in_threads
from .mpi import MPICommunicator
from .nccl import NCCLCommunicator
from .operators import (
    ParallelForward,
    ParallelResiduals,
    chunk_delta_rule,
    chunk_delta_rule_bwd,
    chunk_delta_rule_fwd,
)

__all__ = [
    "Communicator",
    "MPICommunicator",
    "NCCLCommunicator",
    "ParallelForward",
    "ParallelResiduals",
    "RankFailedError",
    "ThreadCommunicator",
    "chunk_delta_rule",
    "chunk_delta_rule_bwd",
    "chunk_delta_rule_fwd",
    "in_threads",
]
