"""Tiles of the kernels for compute capability 9.0, and the calls that they are for."""

from __future__ import annotations

from ...call import Call
from ..spec import DeviceFacts, TensorBox

CHUNK = 64
BOX = 64  # elements of 16 bits in a row of a swizzled tile
TILE = (CHUNK * BOX, 2)
INVERSE = CHUNK * 36
BARRIER, JOIN_BARRIERS = 8, 5
# As sm90/tokens.cuh: the record of a chunk and value head, and in shared memory with gaps between
# rows of factors.
RECORD_WORDS = 6 * CHUNK + 8
TOKEN_WORDS = RECORD_WORDS + 5 * 4
# Value heads of a warp of sm90/gates.cu, and of a word of what it says of paired chunks.
FACTOR_HEADS = 8
# Blocks of a transfer that solve chunks for each other, where their number allows.
CLUSTER = 2


def supports(operation: str, call: Call, facts: DeviceFacts) -> bool:
    """Whether these kernels compute an operation that the family has."""
    return call.gate != "channel" and _fits(call, facts)


def supports_channels(operation: str, call: Call, facts: DeviceFacts) -> bool:
    """Whether they do with a gate per key channel; their walks keep no checkpoints in float."""
    return call.gate == "channel" and call.checkpoint_every is None and _fits(call, facts)


def _fits(call: Call, facts: DeviceFacts) -> bool:
    return (
        facts.capability == (9, 0)
        and call.dtype.itemsize == 2
        and call.chunk_size in (None, CHUNK)
        and call.K % 8 == 0
        and call.V % 8 == 0
        and call.K <= 128
        and call.B * call.T > 0
    )


def box(name: str, shape: tuple, channels: int = BOX) -> TensorBox:
    """64 tokens of one head and some of its channels."""
    return TensorBox(name, tuple(shape), (1, CHUNK, 1, channels))


def slices_of(size: int, tiles: int) -> int:
    """Return how many blocks so many channels take, `tiles` of 64 each."""
    return -(-size // (BOX * tiles))


def transfer_slices(call: Call, tiles: int) -> int:
    """Return the blocks per segment and head of a transfer: of H, and of P."""
    return slices_of(call.V, tiles) + slices_of(call.K, tiles)


def transfer_cluster(call: Call, tiles: int) -> int:
    """Return how many blocks of a transfer solve chunks for each other."""
    return CLUSTER if transfer_slices(call, tiles) % CLUSTER == 0 else 1
