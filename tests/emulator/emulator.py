"""Build CUDA kernels with g++ and run them on the CPU, every access checked.

`Kernel` is one compiled entry; `EmulatorDevice` offers what
`cupy_delta.cuda.runtime.device.CupyDevice` offers, so that the CUDA backend runs on it unchanged.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import ptx
from compile_cache import shared_library
from tensor_map import tensor_map

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"

COMMON = ["-std=c++17", "-fPIC", "-fno-strict-aliasing"]
# What makes the check: every access calls back, and undefined behaviour traps. Nothing is
# optimised: most kernels run for a shorter time than optimising them would take.
CHECK = [
    "-O0",
    "-g1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds-strict,shift,integer-divide-by-zero,signed-integer-overflow,alignment",
    "-fsanitize-undefined-trap-on-error",
    "-ftrivial-auto-var-init=pattern",
]
SCHEDULES = {"ascending": 0, "descending": 1, "random": 2}
# What an H200 is to an `EmulatorDevice`.
HOPPER = dict(sm=90, sm_count=132, shared_bytes=227 * 1024)
COMPLETIONS = {"late": 0, "early": 1, "either": 2}


class EmulatorFault(RuntimeError):
    """What a kernel did wrong: ``kind: text at file:line by thread``."""

    @property
    def kind(self) -> str:
        return str(self).split(":", 1)[0]


class _Options(ctypes.Structure):
    _fields_ = (
        ("schedule", ctypes.c_int),
        ("completion", ctypes.c_int),
        ("check", ctypes.c_int),
        ("preempt", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("max_steps", ctypes.c_uint64),
        ("last", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Run:
    """How a launch is run.

    schedule : which thread goes next; completion : when cp.async and TMA copy; preempt : switch
    threads at one access in so many (0: only where the kernel waits); last : run so many blocks at
    the end of the grid alone (0: all).
    """

    schedule: str = "ascending"
    completion: str = "late"
    preempt: int = 0
    seed: int = 0
    check: bool = True
    max_steps: int = 50_000_000
    last: int = 0

    def options(self) -> _Options:
        return _Options(
            SCHEDULES[self.schedule],
            COMPLETIONS[self.completion],
            self.check,
            self.preempt,
            self.seed,
            self.max_steps,
            self.last,
        )


# ---- kernels -------------------------------------------------------------------------------------


@cache
def runtime() -> ctypes.CDLL:
    """The emulator's runtime, loaded so that kernels find its symbols."""
    folders = [HERE / "runtime", HERE / "interpreter"]
    # One unit each, so that what every access goes through is inlined.
    units = [
        "".join(f'#include "{path.name}"\n' for path in sorted(folder.glob("*.cpp")))
        for folder in folders
    ]
    flags = [*COMMON, "-O3", "-fno-semantic-interposition", "-march=x86-64-v2", "-Wall", "-ldl"]
    flags += ["-DCUEMU", "-DKSM=800"]  # for what the interpreter shares with kernels
    path = shared_library("runtime", units, flags, [*folders, HERE / "include", KERNELS])
    library = ctypes.CDLL(str(path), os.RTLD_GLOBAL)
    library.emulator_fault.restype = ctypes.c_char_p
    library.emulator_unknown.restype = ctypes.c_char_p
    library.emulator_program.restype = ctypes.c_void_p
    library.emulator_allocate.restype = ctypes.c_void_p
    library.emulator_allocate.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    library.emulator_free.argtypes = [ctypes.c_void_p]
    library.emulator_launch.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    return library


class Kernel:
    """One entry of one kernel file, specialised by defines.

    Parameters
    ----------
    path : Path
        The ``.cu`` file.
    entry : str
        Name of its ``__global__``.
    defines : dict
        Macros, placed before the source.
    sm : int
        Architecture the body is specialised for, e.g. 80.
    leg : {"source", "ptx", "fused"}
        What runs: the source with the primitives' host twins, or what NVRTC makes of it, where the
        bits are to be the source's or multiplications and sums are fused as on a GPU.
    """

    def __init__(
        self,
        path: Path,
        entry: str,
        defines: dict | None = None,
        sm: int = 80,
        leg: str = "source",
    ):
        self.entry = entry
        runtime()
        # The same unit from every checkout: a file of kernels/ by its place there, others by name.
        inside = path.is_relative_to(KERNELS)
        file = path.relative_to(KERNELS).as_posix() if inside else path.name
        roots = [KERNELS, HERE / "include", *([] if inside else [path.parent])]
        unit = "".join(f"#define {name} {value}\n" for name, value in (defines or {}).items())
        unit += f'#include "{file}"\n'
        if leg == "source":
            self._load(unit, sm, roots, f"{path.stem}-source")
        else:
            self._interpret(unit, sm, roots, fused=leg == "fused")

    def _load(self, unit: str, sm: int, roots: list[Path], name: str) -> None:
        """Compile the source and look up what it exports."""
        unit += f"EMULATOR_EXPORT({self.entry})\n"
        flags = [*COMMON, "-DCUEMU", f"-DKSM={sm * 10}", *CHECK, "-nodefaultlibs", "-lc", "-lm"]
        header = "primitives/primitives.cuh"  # which every kernel includes first
        self.library = _load(shared_library(name, [unit], flags, roots, header))
        self._function = ctypes.cast(
            getattr(self.library, f"emulator_kernel_{self.entry}"), ctypes.c_void_p
        )
        sizes = (ctypes.c_int * 64)()
        count = getattr(self.library, f"emulator_sizes_{self.entry}")(sizes)
        self.sizes = list(sizes[:count])
        self.cluster = getattr(self.library, f"emulator_cluster_{self.entry}")()
        self._program: list = []

    def _interpret(self, unit: str, sm: int, roots: list[Path], fused: bool) -> None:
        """Read the program that NVRTC makes of it."""
        # What only sm_90a has, kernels for 9.0 may use.
        arch = "compute_90a" if sm == 90 else f"compute_{sm}"
        program = ptx.compiled(unit, self.entry, arch, roots, fused)
        self.sizes, self.cluster = program.sizes, program.cluster
        self._function = ctypes.cast(runtime().emulator_interpret, ctypes.c_void_p)
        self._program = [interpreted(program.text)]  # the first argument of the interpreter

    def launch(self, grid: int, block: int, shared: int, arguments: list, run: Run = Run()) -> dict:
        """Run the kernel on device arrays and NumPy scalars; return counts of what it did."""
        if len(arguments) != len(self.sizes):
            raise EmulatorFault(
                f"bad-launch: {self.entry} takes {len(self.sizes)} arguments, got {len(arguments)}"
            )
        values = []
        for i, (x, size) in enumerate(zip(arguments, self.sizes, strict=True)):
            value = np.uint64(x.ctypes.data) if isinstance(x, np.ndarray) else x
            value = np.uint64(0) if value is None else value
            if not isinstance(value, np.generic) or value.nbytes != size:
                got = f"{type(x).__name__} of {getattr(value, 'nbytes', '?')} bytes"
                raise EmulatorFault(
                    f"bad-launch: argument {i} of {self.entry} has {size} bytes, got {got}"
                )
            values.append(_aligned(value))
        addresses = [*self._program, *(v.ctypes.data for v in values)]
        pointers = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        options = run.options()
        failed = runtime().emulator_launch(
            self._function, self.cluster, grid, block, shared, pointers, ctypes.byref(options)
        )
        counts = (ctypes.c_uint64 * 6)()
        runtime().emulator_statistics(counts)
        if failed:
            raise EmulatorFault(runtime().emulator_fault().decode())
        names = ("switches", "collectives", "accesses", "barriers", "phases", "conflicts")
        return dict(zip(names, counts, strict=True))


def interpreted(text: str) -> int:
    """Return the address of a program of `ptx.translate`, which stays in memory."""
    program = runtime().emulator_program(text.encode())
    if program is None:
        raise ptx.UnknownInstruction(runtime().emulator_unknown().decode())
    return program


def _aligned(value: np.generic) -> np.ndarray:
    """Return the bytes of a scalar at a multiple of 64, as C++ may ask of an argument."""
    memory = np.empty(value.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    memory = memory[start : start + value.nbytes]
    memory[:] = np.frombuffer(value.tobytes(), np.uint8)
    return memory


@cache
def _load(library: Path) -> ctypes.CDLL:
    # Lazy, so that symbols come from the runtime loaded before.
    return ctypes.CDLL(str(library), os.RTLD_LOCAL | os.RTLD_LAZY)


# ---- memory --------------------------------------------------------------------------------------


def empty(
    shape, dtype, name: str = "array", initialised: bool = False, there: int | None = None
) -> np.ndarray:
    """Allocate between guard pages: all bits set (NaN) and, unless told so, uninitialised.

    With `there` only so many bytes at the end are in memory, a multiple of 16; what comes before
    has addresses alone.
    """
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    size = max(1, count * dtype.itemsize)
    there = size if there is None else there
    address = runtime().emulator_allocate(name.encode(), there, int(initialised))
    memory = (ctypes.c_uint8 * size).from_address(address + there - size)
    weakref.finalize(memory, runtime().emulator_free, address)
    flat = np.frombuffer(memory, np.uint8)[: count * dtype.itemsize]
    return flat.view(dtype).reshape(shape)


def copy_in(x: np.ndarray, name: str = "array") -> np.ndarray:
    """Copy a host array into emulated memory."""
    y = empty(x.shape, x.dtype, name, initialised=True)
    y[...] = x
    return y


def span_of(x, module=np):
    """Return the memory of an array from its first element to its last; no stride is negative."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True))
    size = x.dtype.itemsize
    return module.lib.stride_tricks.as_strided(x, (last // size + 1,), (size,))


class EmulatorDevice:
    """The device interface of the CUDA backend, over emulated memory and kernels.

    Parameters
    ----------
    run : Run
        How every launch is run.
    sm_count, shared_bytes : int
        Facts that plans depend on.
    sm, leg
        As in `Kernel`.
    """

    def __init__(
        self,
        run: Run = Run(),
        sm_count: int = 2,
        shared_bytes: int = 163 * 1024,
        sm: int = 80,
        leg: str = "source",
    ):
        from cupy_delta.cuda.spec import DeviceFacts

        self.run, self.sm, self.leg = run, sm, leg
        self.facts = DeviceFacts(sm_count, shared_bytes, capability=(sm // 10, sm % 10))
        self.launches: list = []
        self._spans: list = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for there, memory in self._spans:
            there[...] = memory

    def empty(self, shape, dtype, name):
        return empty(shape, dtype, name)

    def zeros(self, shape, dtype, name):
        return copy_in(np.zeros(shape, dtype), name)

    def bring(self, x, name, dtype):
        from cupy_delta.cuda.spec import INTEGERS

        x = np.ascontiguousarray(x, dtype)
        if name in INTEGERS:  # as they may lie, between two multiples of 16
            return copy_in(np.append(np.iinfo(x.dtype).min, x), name)[1:]
        return copy_in(x, name)

    def target(self, x, name):
        # An output of the caller starts unwritten; a state that is updated does not.
        if name != "state":
            return empty(x.shape, x.dtype, name)
        if x.flags.c_contiguous:
            return copy_in(x, name)
        # Slots apart: what lies between comes along, and goes back, so that a kernel may be seen to
        # have written there.
        there = span_of(x)
        memory = copy_in(there, name)
        self._spans.append((there, memory))
        return np.lib.stride_tricks.as_strided(memory, x.shape, x.strides)

    def prepare(self, launches):
        for launch in launches:
            self._kernel(launch)

    def launch(self, launch, arrays):
        values = list(launch.arguments)
        for i, name in launch.pointers:
            values[i] = arrays[name]
        for i, box in launch.boxes:
            values[i] = tensor_map(arrays[box.name], box.shape, box.box)
        if launch.shared > self.facts.shared_bytes:
            raise EmulatorFault(
                f"bad-launch: {launch.entry} asks for {launch.shared} bytes of shared memory, "
                f"of {self.facts.shared_bytes}"
            )
        kernel = self._kernel(launch)
        kernel.launch(launch.grid, launch.block, launch.shared, values, self.run)
        self.launches.append(launch)

    def _kernel(self, launch):
        return _kernel(launch.file, launch.entry, launch.macros, self.sm, self.leg)


@cache
def _kernel(file: str, entry: str, defines: tuple, sm: int, leg: str) -> Kernel:
    return Kernel(KERNELS / file, entry, dict(defines), sm, leg)
