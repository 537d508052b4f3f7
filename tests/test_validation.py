"""Wrong arguments: what is raised, what the message says, and that nothing was written.

Every row is a call that is right but for one thing.
"""

import ml_dtypes
import numpy as np
import pytest
from calls import (
    ARRAYS,
    EVERY_ARRAY,
    OPERATORS,
    OPTIONAL,
    SIZES,
    STATES,
    call,
    first_of,
    good,
    refuse,
    source_of,
)

import cupy_delta


def expected_shape(function, name):
    """Symbols, then the numbers known by then: what an argument settles itself stays a letter."""
    symbols = ARRAYS[function][name].split()
    numbers = [str(s if source_of(function, s) == name else SIZES[s]) for s in symbols]
    return f"({', '.join(symbols)}) = ({', '.join(numbers)})"


@pytest.mark.parametrize("function", ARRAYS)
def test_the_call_without_a_mistake_is_accepted(function):
    """Otherwise a row below could pass for a mistake it does not mean."""
    call(function, good(function))


# --- every array argument of every function: kind, dtype, rank, each dimension -------------------


class Tensor:
    """An array of a framework that the library does not know."""

    dtype, shape, ndim = np.dtype(np.float32), (2, 6, 2, 3), 4


WRONG_KINDS = {
    "list": (lambda x: x.tolist(), "list"),
    "tuple": (tuple, "tuple"),
    "float": (lambda x: 0.5, "float"),
    "NumPy scalar": (lambda x: np.float32(0.5), "numpy.float32"),
    "None": (lambda x: None, "NoneType"),
    "string": (lambda x: "q", "str"),
    "masked array": (np.ma.masked_array, "numpy.ma.MaskedArray"),
    "matrix": (lambda x: np.asmatrix(x.reshape(-1, 1)), "numpy.matrix"),
    "other framework": (lambda x: Tensor(), f"{__name__}.Tensor"),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("wrong", WRONG_KINDS)
@pytest.mark.parametrize(("function", "name"), EVERY_ARRAY)
def test_wrong_kind(function, name, wrong):
    if wrong == "None" and name in OPTIONAL:
        arguments = good(function) | {name: None}
        call(function, arguments)
        return
    make, described = WRONG_KINDS[wrong]
    arguments = good(function)
    arguments[name] = make(arguments[name])
    message = f"{name}: expected a NumPy or CuPy array, got {described}"
    refuse(function, arguments, TypeError, message)


# States that may be kept in 16 bits.
HALF_STATES = {("state", "delta_rule_step")} | {("initial_state", f) for f in OPERATORS}


def expected_dtype(function, name):
    """What a message wants of an argument when all the others are float32."""
    if name == first_of(function):
        return "float64, float32, float16 or bfloat16"
    if (name, function) in HALF_STATES:
        return "float32, float16 or bfloat16"
    return "float32" if name in ("beta", "g") else f"float32 like {first_of(function)}"


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "object", "complex64", "longdouble"])
@pytest.mark.parametrize(("function", "name"), EVERY_ARRAY)
def test_wrong_dtype(function, name, dtype):
    arguments = good(function)
    arguments[name] = arguments[name].astype(dtype)
    message = f"{name}: expected dtype {expected_dtype(function, name)}, got {np.dtype(dtype).name}"
    refuse(function, arguments, TypeError, message)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("function", "name"), EVERY_ARRAY)
def test_dtypes_do_not_mix(function, name, dtype):
    arguments = good(function)
    arguments[name] = arguments[name].astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if (name, function) in HALF_STATES and dtype != "float64":
        call(function, arguments)
        return
    if name == first_of(function):  # then the next argument is the one that differs
        name = list(ARRAYS[function])[1]
        message = f"{name}: expected dtype {dtype} like {first_of(function)}, got float32"
    else:
        message = f"{name}: expected dtype {expected_dtype(function, name)}, got {dtype}"
    refuse(function, arguments, TypeError, message)


HALF_ROWS = {
    "bfloat16 among float16": ("chunk_delta_rule", {"v": "bfloat16"}, "float16 like q"),
    "beta may be float32 but not float64": (
        "chunk_delta_rule",
        {"beta": "float64"},
        "float16 or float32",
    ),
    "g may be float32 but not bfloat16": (
        "recurrent_delta_rule",
        {"g": "bfloat16"},
        "float16 or float32",
    ),
    "no wide state": (
        "chunk_delta_rule",
        {"initial_state": "float64"},
        "float32, float16 or bfloat16",
    ),
    "states between chunks": ("chunk_output", {"states": "float16"}, "float32"),
    "out has the dtype of v": ("chunk_delta_rule", {"out": "float32"}, "float16 like q"),
    "out of a step": ("delta_rule_step", {"out": "bfloat16"}, "float16 like q"),
}


@pytest.mark.parametrize("row", HALF_ROWS)
def test_dtypes_beside_float16_inputs(row):
    function, wrong, expected = HALF_ROWS[row]
    arguments = good(function)
    for name, x in arguments.items():
        if isinstance(x, np.ndarray) and name not in STATES:
            arguments[name] = x.astype(np.float16)
    call(function, arguments)
    (name, dtype), *_ = wrong.items()
    arguments[name] = arguments[name].astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    )
    refuse(function, arguments, TypeError, f"{name}: expected dtype {expected}, got {dtype}")


def test_a_float64_problem_keeps_float64_states():
    arguments = {n: x.astype(np.float64) for n, x in good("delta_rule_step").items()}
    arguments["state"] = arguments["state"].astype(np.float32)
    message = "state: expected dtype float64 like q, got float32"
    refuse("delta_rule_step", arguments, TypeError, message)


@pytest.mark.parametrize("name", ["out", "state"])
def test_foreign_byte_order_cannot_be_written(name):
    arguments = good("delta_rule_step")
    arguments[name] = arguments[name].astype(">f4")
    message = f"{name}: expected native byte order, got dtype >f4"
    refuse("delta_rule_step", arguments, TypeError, message)


def test_foreign_byte_order_is_read_right():
    arguments = good("chunk_delta_rule")
    del arguments["out"]
    expected = cupy_delta.chunk_delta_rule(**arguments)
    swapped = {n: x.astype(">f4") if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
    got = cupy_delta.chunk_delta_rule(**swapped, cu_seqlens=None)
    assert got.o.tobytes() == expected.o.tobytes()
    assert got.final_state.tobytes() == expected.final_state.tobytes()


@pytest.mark.parametrize("change", ["first axis dropped", "axis added", "0-d"])
@pytest.mark.parametrize(("function", "name"), EVERY_ARRAY)
def test_wrong_rank(function, name, change):
    arguments = good(function)
    x = arguments[name]
    x = {"first axis dropped": x[:1, 0], "axis added": x[..., None, None], "0-d": x.ravel()[0]}[
        change
    ]
    arguments[name] = np.array(x)
    symbols = ARRAYS[function][name].split()
    shapes = [symbols]
    if name == "g":
        shapes = [symbols[:3], symbols]
    if name == "beta" and function == "recurrent_delta_rule":
        shapes = [symbols, [*symbols, "V"]]
    wanted = " or ".join(f"({', '.join(s)})" for s in shapes)
    ranks = " or ".join(str(len(s)) for s in shapes)
    if arguments[name].ndim in map(len, shapes):  # g without its last axis is a scalar gate
        arguments[name] = arguments[name][0]
    message = f"{name}: expected {wanted}, {ranks} dimensions, got shape {arguments[name].shape}"
    refuse(function, arguments, ValueError, message)


EVERY_AXIS = [
    (function, name, axis)
    for function, arrays in ARRAYS.items()
    for name, symbols in arrays.items()
    for axis, symbol in enumerate(symbols.split())
    if symbol not in ("slots", "chunks") and source_of(function, symbol) != name
]


@pytest.mark.parametrize(("function", "name", "axis"), EVERY_AXIS)
def test_wrong_dimension(function, name, axis):
    symbols = ARRAYS[function][name].split()
    arguments = good(function)
    x = arguments[name]
    arguments[name] = wrong = np.concatenate([x, x.take([0], axis)], axis)
    source = source_of(function, symbols[axis])
    message = f"{name}: expected {expected_shape(function, name)} like {source}, got {wrong.shape}"
    refuse(function, arguments, ValueError, message)
