"""What every plan is made of: facts of a device, launches, and how kernels carve shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..call import Call

C_TYPES = {"float64": "double", "float32": "float", "float16": "f16", "bfloat16": "bf16"}


class DeviceFacts(NamedTuple):
    """What a plan depends on: multiprocessors, shared memory of a block, compute capability."""

    sm_count: int
    shared_bytes: int
    capability: tuple[int, int] = (8, 0)


@dataclass(frozen=True)
class TensorBox:
    """A kernel argument: the TMA map of an array of 16-bit elements in four axes, and a box."""

    name: str
    shape: tuple[int, int, int, int]
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch. Arguments are NumPy scalars, names of arrays, boxes, or None for null.

    Compared by identity: plans are kept, and so is what was compiled for their launches. `arch` is
    the one architecture that a kernel is for, if its instructions exist on no other. One that is
    `beside` may run at the same time as the next one; both end before the one after that begins.
    """

    file: str
    entry: str
    defines: tuple
    grid: int
    block: int
    shared: int
    arguments: tuple
    arch: str = ""
    beside: bool = False

    @cached_property
    def pointers(self) -> tuple[tuple[int, str], ...]:
        """Which arguments are arrays: position and name."""
        return tuple((i, a) for i, a in enumerate(self.arguments) if isinstance(a, str))

    @cached_property
    def boxes(self) -> tuple[tuple[int, TensorBox], ...]:
        """Which arguments are maps of arrays: position and box."""
        return tuple((i, a) for i, a in enumerate(self.arguments) if isinstance(a, TensorBox))

    def arrays(self) -> set[str]:
        """Return the names of the arrays that the kernel is given."""
        return {name for _, name in self.pointers} | {box.name for _, box in self.boxes}


def i32(x: int) -> np.int32:
    return np.int32(x)


def padded(size: int) -> int:
    return -(-size // 16) * 16


def pitch(columns: int, itemsize: int) -> int:
    return columns + 16 // itemsize


def carve(*arrays: tuple[int, int], align: int = 16, start: int = 0) -> int:
    """Return where arrays (count, itemsize) end that begin at `start`, each aligned."""
    end = start
    for count, itemsize in arrays:
        end = -(-end // align) * align + count * itemsize
    return end


def slots(call: Call, chunk: int) -> int:
    """Chunk slots of all batch rows: the upper bound that needs no value of cu_seqlens."""
    return call.chunk_slots(chunk) * call.B


def variant(call: Call, chunk: int, **more) -> tuple:
    """Return the macros that every chunked kernel has, and some of its own."""
    common = dict(
        DTYPE=C_TYPES[call.dtype.name],
        HEAD_K=call.K,
        HEAD_V=call.V,
        CHUNK=chunk,
        HAS_GATE=int(call.gate is not None),
        VARLEN=int(call.varlen),
    )
    return tuple((common | more).items())


def normal(call: Call, name: str) -> str:
    """Name of the array that the chunked kernels read for q or k."""
    return f"{name}_normal" if call.qk_l2norm else name


def running_sum(call: Call) -> str | None:
    """Name of the array of the running sums of g in each chunk; None without a gate."""
    return None if call.gate is None else "G"


def fits(what: str, chunk: int, shared: int, facts: DeviceFacts) -> None:
    if shared > facts.shared_bytes:
        raise NotImplementedError(
            f"chunk_size = {chunk}: {what} would need {shared} bytes of shared memory per block,"
            f" this GPU has {facts.shared_bytes}; a smaller chunk_size works"
        )
