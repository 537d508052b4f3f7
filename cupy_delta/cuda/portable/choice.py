"""How the portable kernels divide a call: chosen by its sizes and the device's alone."""

from __future__ import annotations

from typing import NamedTuple

from ...call import Call
from ..spec import DeviceFacts, padded

DEFAULT_CHUNK = {"float32": 16, "float16": 32, "bfloat16": 32}
# Key channels up to which the scaled rows of 32 tokens fit every GPU's shared memory.
LONGEST_ROWS = 192
# Chunks per segment for which cutting a sequence pays its extra launches (measured on an H200).
SEGMENT_CHUNKS = 64


class Choice(NamedTuple):
    """Tokens per chunk, and segments that a sequence is cut into for the forward walk."""

    chunk: int
    segments: int = 1


def choose(call: Call, facts: DeviceFacts) -> Choice:
    """Return the choice for a call that `families` has not refused."""
    chunk = call.chunk_size or default_chunk(call)
    return Choice(chunk, segment_count(call, chunk, facts))


def default_chunk(call: Call) -> int:
    """Return the tokens of a chunk where the caller leaves the choice."""
    if call.gate == "channel" and call.K > LONGEST_ROWS:
        return 16
    return DEFAULT_CHUNK[call.dtype.name]


def segment_count(call: Call, chunk: int, facts: DeviceFacts) -> int:
    """Segments to cut every sequence into: 1, or 4 or 8 for long sequences of few heads.

    Cutting costs a walk of [P | H], about 4/3 of the walk itself: two segments gain nothing, and
    nothing is gained where one walk takes half of the multiprocessors. Where checkpoints are kept,
    the bits after one do not depend on what came before.
    """
    if call.checkpoint_every is not None:
        return 1
    blocks = call.N * call.HV * -(-padded(call.V) // 32)
    chunks = call.B * call.T // (chunk * max(1, call.N))
    for segments in (8, 4):
        if blocks and 2 * blocks <= facts.sm_count and chunks >= segments * SEGMENT_CHUNKS:
            return segments
    return 1


def walk_shape(
    call: Call, V: int, chunk: int, facts: DeviceFacts, row_tiles: int, walked: int = 1
) -> tuple[int, int]:
    """Return (16-row tiles of value channels per warp, warps per block) for a walk.

    `walked` is the number of segments of each sequence that are walked.

    Up to four warps share the keys of a block; fewer where the blocks would leave more than a
    quarter of the multiprocessors idle, down to two.
    """
    rows = padded(V) // 16
    row_tiles = 1 if call.dtype.itemsize == 4 or chunk > 32 else min(row_tiles, rows)
    warps = min(4, -(-rows // row_tiles))
    sequences = call.N * call.HV * walked
    # Measured on an H200: wide blocks once they fill three quarters of it, but at least two warps.
    while warps > 2 and sequences * -(-rows // (row_tiles * warps)) < 0.75 * facts.sm_count:
        warps = -(-warps // 2)
    return row_tiles, warps
