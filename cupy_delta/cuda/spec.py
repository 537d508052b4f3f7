"""What plans are made of: launches, arrays, and how kernels carve shared memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from ..call import Call
from ..problem import check_checkpoints
from ..raw import RawGate

# The dtype in which the chunked kernels read beta and g.
SUMS = np.dtype(np.float32)
# Arrays that kernels read as integers of 64 bits, one at a time.
INTEGERS = ("cu_seqlens", "state_indices", "output_state_indices", "accepted")
# What HAS_GATE says of a gate, by its place.
GATES = (None, "scalar", "channel")
# A gate's formula and its bias, as `tiles/raw.cuh` numbers them.
FORMULAS = {"softplus": 1, "sigmoid": 2}
BIASES = {None: 0, "head": 1, "channel": 2}
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


# Of a kernel: a scalar, the name of an array, the map of one, or null.
Argument = np.generic | str | TensorBox | None
# Arrays to make: their shapes and dtypes by name.
ArraySpecs = dict[str, tuple[tuple[int, ...], np.dtype]]


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch. Arguments are NumPy scalars, names of arrays, boxes, or None for null.

    Compared by identity: plans are kept, and so is what was compiled for their launches. `arch` is
    the one architecture that a kernel is for, if its instructions exist on no other. One that is
    `concurrent` may run at the same time as the next one; both end before the one after begins.
    """

    file: str
    entry: str
    defines: tuple[tuple[str, Any], ...]
    grid: int
    block: int
    shared: int
    arguments: tuple[Argument, ...]
    arch: str = ""
    concurrent: bool = False

    @property
    def macros(self) -> tuple:
        """What the file is compiled with: `defines`, and how much shared memory it is given."""
        return (*self.defines, ("SHARED_BYTES", self.shared))

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


@dataclass(frozen=True, eq=False)
class Plan:
    """Launches in order, and the arrays to make for them: name -> (shape, dtype).

    `sums` is the dtype in which kernels read beta and g, and the parameters of a gate, but for
    what they read `as_given`.
    """

    launches: tuple[Launch, ...]
    outputs: ArraySpecs
    workspace: ArraySpecs = field(default_factory=dict)
    zeroed: tuple[str, ...] = ()
    sums: np.dtype = SUMS
    as_given: tuple[str, ...] = ()

    @cached_property
    def working(self) -> tuple[Launch, ...]:
        """The launches that have work: a grid of zero would still run one block."""
        return tuple(launch for launch in self.launches if launch.grid)

    @cached_property
    def made(self) -> tuple[tuple[str, tuple, np.dtype], ...]:
        """The arrays to make: name, shape and dtype."""
        return tuple((name, *like) for name, like in (self.workspace | self.outputs).items())

    @cached_property
    def made_names(self) -> frozenset[str]:
        return frozenset(name for name, *_ in self.made)

    @cached_property
    def read(self) -> tuple[tuple[str, np.dtype | None], ...]:
        """The arrays that have to be there: name, and dtype to read it in if not its own."""
        names = set().union(*(launch.arrays() for launch in self.launches))
        dtypes: dict[str, np.dtype | None] = dict.fromkeys(INTEGERS, np.dtype(np.int64))
        dtypes |= dict.fromkeys(("beta", "g", "A_log", "dt_bias", "initial_state"), self.sums)
        dtypes |= dict.fromkeys(self.as_given)
        made = self.workspace.keys() | self.outputs.keys()
        return tuple((name, dtypes.get(name)) for name in sorted(names - made))


# What of a sequence that goes on elsewhere is told there: nothing, the state that leaves, or what
# its tokens do to any state.
Tells = Literal["nothing", "state", "transfer"]


class Halves(NamedTuple):
    """The plan of an operation, up to what is told elsewhere and from what enters on.

    The second half reads what the first has left.
    """

    first: Plan
    second: Plan


AnyCompiler = TypeVar("AnyCompiler", bound="Compiler")


class Compiler(Protocol):
    """What compiles kernels: a device, or an architecture in its place."""

    @property
    def facts(self) -> DeviceFacts: ...
    def __enter__(self: AnyCompiler) -> AnyCompiler: ...
    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...
    def prepare(self, launches: tuple[Launch, ...], /) -> None: ...


class Device(Compiler, Protocol):
    """Where plans are executed: a GPU by way of CuPy, or the tests' emulator."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, name: str, /) -> Any: ...
    def zeros(self, shape: tuple[int, ...], dtype: np.dtype, name: str, /) -> Any: ...
    def bring(self, x: Any, name: str, dtype: np.dtype | None, /) -> Any: ...
    def apart(self, x: Any, name: str, /) -> Any: ...
    def target(self, x: Any, name: str, /) -> Any: ...
    def launch(self, launch: Launch, arrays: dict[str, Any], /) -> None: ...


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
        HAS_GATE=GATES.index(call.gate),
        VARLEN=int(call.varlen),
    )
    return tuple((common | more).items())


def gate_type(call: Call) -> str:
    """Return the C type of g where kernels read it `as_given`."""
    return C_TYPES[call.dtype.name] if call.narrow_gate else "float"


def gates_as_given(call: Call) -> tuple[str, ...]:
    """Return what such kernels read so: g of 16 bits; any other becomes float32."""
    return ("g",) if call.narrow_gate else ()


def raw_macros(raw: RawGate | None) -> dict[str, Any]:
    """Return the macros of `tiles/raw.cuh`: how g is formed, if it is."""
    if raw is None:
        return dict(RAW_GATE=0, BIAS=0)
    return dict(RAW_GATE=FORMULAS[raw.formula], BIAS=BIASES[raw.bias])


def normal(call: Call, name: str) -> str:
    """Name of the array that the chunked kernels read for q or k."""
    return f"{name}_normal" if call.qk_l2norm else name


def forward_arrays(call: Call, chunk: int) -> ArraySpecs:
    """Return the results of `chunk_delta_rule` in chunks of so many tokens."""
    check_checkpoints(call, chunk)
    outputs = {"o": (call.value_shape, call.dtype)}
    if call.pool_dtype is None:
        outputs["final_state"] = (call.state_shape, call.state_dtype)
    if call.checkpoint_every is not None:
        outputs["checkpoints"] = (call.checkpoint_shape, call.state_dtype)
    return outputs


def gradient_arrays(call: Call, chunk: int) -> tuple[dict, dict]:
    """Return the results of `chunk_delta_rule_bwd`, and what its two kernels hand over."""
    outputs = {
        "dq": (call.key_shape, call.dtype),
        "dk": (call.key_shape, call.dtype),
        "dv": (call.value_shape, call.dtype),
        "dbeta": (call.token_shape, SUMS),
        "dinitial_state": (call.state_shape, call.state_dtype),
    }
    if call.gate is not None:
        outputs["dg"] = (call.gate_shape, SUMS)
    between = {
        "dstates": (call.states_shape(chunk), call.dtype),
        "dy": (call.value_shape, call.dtype),
    }
    return outputs, between


def gradient_arguments(call: Call, *more: Argument) -> tuple[Argument, ...]:
    """Return what kernels of chunk-parallel gradients are given, up to the number of key heads.

    One that is given `more` has it after the gradients.
    """
    return (
        normal(call, "q"),
        normal(call, "k"),
        "beta",
        "g",
        "corrections",
        "dy",
        "do",
        "states",
        "dstates",
        "cu_seqlens",
        "dq",
        "dk",
        "dv",
        "dbeta",
        None if call.gate is None else "dg",
        *more,
        np.float32(call.scale),
        i32(call.N),
        i32(call.T),
        i32(call.H),
    )
