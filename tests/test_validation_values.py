"""Wrong values of one argument: shapes, cu_seqlens, options, gates; one row, one mistake."""

from fractions import Fraction

import numpy as np
import pytest
from calls import (
    ARRAYS,
    OPERATORS,
    WITH_CHUNKS,
    WITH_LAYOUT,
    WITH_SCALE,
    WITH_SEQUENCES,
    array,
    call,
    good,
    integers,
    refuse,
)

import cupy_delta
from cupy_delta.problem import MAX_STEP_TOKENS


def row(function, error, message, *, sizes=None, **changes):
    """One table row; a change may be a function of the good argument."""
    return function, sizes or {}, changes, error, message


SHAPES = {
    "K = 0": row(
        "chunk_delta_rule",
        ValueError,
        "q: expected K of at least 1, got K = 0",
        sizes={"K": 0},
    ),
    "V = 0": row(
        "wy_factors", ValueError, "v: expected V of at least 1, got V = 0", sizes={"V": 0}
    ),
    "H = 0": row(
        "state_pass", ValueError, "k: expected H of at least 1, got H = 0", sizes={"H": 0}
    ),
    "HV = 0": row(
        "delta_rule_step",
        ValueError,
        "v: expected HV of at least 1, got HV = 0",
        sizes={"HV": 0},
    ),
    "value heads no multiple of key heads": row(
        "recurrent_delta_rule",
        ValueError,
        "v: expected HV to be a multiple of H = 2, since value head hv uses key head"
        " hv // (HV / H), got HV = 3",
        sizes={"HV": 3},
    ),
    "fewer value heads than key heads": row(
        "chunk_output",
        ValueError,
        "v_new: expected HV to be a multiple of H = 2, since value head hv uses key head"
        " hv // (HV / H), got HV = 1",
        sizes={"HV": 1},
    ),
    "w with the key heads": row(
        "state_pass",
        ValueError,
        "u: expected (B, T, HV, V) = (2, 6, 2, V) like w, got (2, 6, 4, 5)",
        w=lambda w: w[:, :, :2],
    ),
    "state in the other layout": row(
        "chunk_delta_rule",
        ValueError,
        "initial_state: expected (N, HV, K, V) = (2, 4, 3, 5) like q, got (2, 4, 5, 3):"
        " its last two axes are swapped",
        initial_state=lambda s: s.swapaxes(2, 3),
    ),
    "state not in the layout asked for": row(
        "recurrent_delta_rule",
        ValueError,
        "initial_state: expected (N, HV, V, K) = (2, 4, 5, 3) like v, got (2, 4, 3, 5):"
        " its last two axes are swapped",
        state_layout="vk",
    ),
    "pool in the other layout": row(
        "delta_rule_step",
        ValueError,
        "state: expected (slots, HV, K, V) = (slots, 4, 3, 5) like q, got (2, 4, 5, 3):"
        " its last two axes are swapped",
        state=lambda s: np.ascontiguousarray(s.swapaxes(2, 3)),
    ),
    "states between chunks in the other layout": row(
        "chunk_output",
        ValueError,
        "states: expected (B, chunks, HV, K, V) = (2, chunks, 4, 3, 5) like q,"
        " got (2, 2, 4, 5, 3): its last two axes are swapped",
        states=lambda s: s.swapaxes(3, 4),
    ),
    "gate per value channel": row(
        "chunk_delta_rule",
        ValueError,
        "g: expected (B, T, HV, K) = (2, 6, 4, 3) like q, got (2, 6, 4, 5)",
        g=lambda g: np.zeros((2, 6, 4, 5), np.float32),
    ),
    "gate per key head": row(
        "chunk_delta_rule",
        ValueError,
        "g: expected (B, T, HV) = (2, 6, 4) like v, got (2, 6, 2)",
        g=lambda g: np.zeros((2, 6, 2), np.float32),
    ),
    "gate per key channel, without heads": row(
        "delta_rule_step",
        ValueError,
        "g: expected (B, T, HV) = (2, 6, 4) like v, got (2, 6, 3)",
        g=lambda g: np.zeros((2, 6, 3), np.float32),
    ),
    "strength per value channel, in chunks": row(
        "chunk_delta_rule",
        ValueError,
        "beta: expected (B, T, HV), 3 dimensions, got shape (2, 6, 4, 5)",
        beta=lambda b: np.zeros((2, 6, 4, 5), np.float32),
    ),
    "strength per key channel": row(
        "recurrent_delta_rule",
        ValueError,
        "beta: expected (B, T, HV, V) = (2, 6, 4, 5) like v, got (2, 6, 4, 3)",
        beta=lambda b: np.zeros((2, 6, 4, 3), np.float32),
    ),
    "strength with a trailing axis of one": row(
        "wy_factors",
        ValueError,
        "beta: expected (B, T, HV), 3 dimensions, got shape (2, 6, 4, 1)",
        beta=lambda b: b[..., None],
    ),
    "heads before time": row(
        "chunk_delta_rule",
        ValueError,
        "v: expected (B, T, HV, V) = (2, 2, HV, V) like q, got (2, 6, 4, 5)",
        q=lambda q: q.swapaxes(1, 2),
        k=lambda k: k.swapaxes(1, 2),
    ),
    "no batch axis": row(
        "chunk_delta_rule",
        ValueError,
        "q: expected (B, T, H, K), 4 dimensions, got shape (6, 2, 3)",
        q=lambda q: q[0],
    ),
    "too many tokens for a step": row(
        "delta_rule_step",
        ValueError,
        "q: expected T of at most 32 new tokens, got T = 33; chunk_delta_rule takes any number",
        sizes={"T": MAX_STEP_TOKENS + 1},
    ),
    "too few states between chunks": row(
        "chunk_output",
        ValueError,
        "states: expected 2 chunks of chunk_size = 4 along axis 1, got shape (2, 1, 4, 3, 5)",
        states=lambda s: s[:, :1],
    ),
    "states of another chunk size": row(
        "chunk_output",
        ValueError,
        "states: expected 6 chunks of chunk_size = 1 along axis 1, got shape (2, 2, 4, 3, 5)",
        chunk_size=1,
    ),
    "more states than sequences": row(
        "chunk_delta_rule",
        ValueError,
        "initial_state: expected (N, HV, K, V) = (2, 4, 3, 5) like q, got (3, 4, 3, 5)",
        initial_state=lambda s: np.concatenate([s, s[:1]]),
    ),
    "one state for all sequences": row(
        "state_pass",
        ValueError,
        "initial_state: expected (N, HV, K, V) = (2, 4, 3, 5) like k, got (1, 4, 3, 5)",
        initial_state=lambda s: s[:1],
    ),
}


def wrong_sequences(values, got=None):
    got = got or np.array2string(values)
    return (
        values,
        ValueError,
        f"cu_seqlens: expected nondecreasing values from 0 to T = 6, got {got}",
    )


INT32_MAX = 2**31 - 1

CU_SEQLENS = {
    "list": ([0, 6], TypeError, "cu_seqlens: expected an integer array, got list"),
    "number": (6, TypeError, "cu_seqlens: expected an integer array, got int"),
    "masked": (
        np.ma.masked_array([0, 6]),
        TypeError,
        "cu_seqlens: expected an integer array, got numpy.ma.MaskedArray",
    ),
    "float": (
        np.array([0.0, 6.0]),
        TypeError,
        "cu_seqlens: expected dtype int32 or int64, got float64",
    ),
    "unsigned": (
        integers(0, 6, dtype=np.uint32),
        TypeError,
        "cu_seqlens: expected dtype int32 or int64, got uint32",
    ),
    "short": (
        integers(0, 6, dtype=np.int16),
        TypeError,
        "cu_seqlens: expected dtype int32 or int64, got int16",
    ),
    "bool": (
        np.array([False, True]),
        TypeError,
        "cu_seqlens: expected dtype int32 or int64, got bool",
    ),
    "object": (
        np.array([0, 6], object),
        TypeError,
        "cu_seqlens: expected dtype int32 or int64, got object",
    ),
    "0-d": (
        np.array(6),
        ValueError,
        "cu_seqlens: expected shape (N + 1,) with N >= 0, got ()",
    ),
    "2-d": (
        integers([0, 6]),
        ValueError,
        "cu_seqlens: expected shape (N + 1,) with N >= 0, got (1, 2)",
    ),
    "empty": (
        integers(),
        ValueError,
        "cu_seqlens: expected shape (N + 1,) with N >= 0, got (0,)",
    ),
    "decreasing": wrong_sequences(integers(0, 4, 2, 6)),
    "decreasing, int32": wrong_sequences(integers(0, 4, 2, 6, dtype=np.int32)),
    "decreasing by more than int32 holds": wrong_sequences(
        integers(0, INT32_MAX, -INT32_MAX - 1, -10, 6, dtype=np.int32),
        "[          0  2147483647 -2147483648         -10           6]",
    ),
    "past the end": wrong_sequences(integers(0, 3, 7)),
    "past the end in the middle": wrong_sequences(integers(0, 9, 6)),
    "short of the end": wrong_sequences(integers(0, 3, 5)),
    "late start": wrong_sequences(integers(1, 6)),
    "negative start": wrong_sequences(integers(-1, 6)),
    "negative": wrong_sequences(integers(0, -2, 6)),
    "lengths, not ends": wrong_sequences(integers(2, 4)),
    "no sequence for the tokens": wrong_sequences(integers(0)),
    "long, abbreviated": wrong_sequences(integers(*range(20)), "[ 0  1  2 ... 17 18 19]"),
}

NUMBER = "scale: expected a number or None (K ** -0.5), got "
OPTIONS = {
    **{
        f"scale = {value!r}": ("scale", value, error, message)
        for value, error, message in [
            ("x", TypeError, NUMBER + "str"),
            ("0.5", TypeError, NUMBER + "str"),
            (True, TypeError, NUMBER + "bool"),
            (np.True_, TypeError, NUMBER + "numpy.bool"),
            (1j, TypeError, NUMBER + "complex"),
            (np.complex64(1), TypeError, NUMBER + "numpy.complex64"),
            ([1.0], TypeError, NUMBER + "list"),
            (np.array(1.0), TypeError, NUMBER + "numpy.ndarray"),
            (float("nan"), ValueError, "scale: expected a finite number, got nan"),
            (np.float32("inf"), ValueError, "scale: expected a finite number, got inf"),
            (-float("inf"), ValueError, "scale: expected a finite number, got -inf"),
        ]
    },
    "scale too large": (
        "scale",
        10**400,
        ValueError,
        "scale: expected a finite number, got inf",
    ),
    **{
        f"chunk_size = {value!r}": ("chunk_size", value, error, message)
        for value, error, message in [
            (0, ValueError, "chunk_size: expected at least 1, got 0"),
            (-16, ValueError, "chunk_size: expected at least 1, got -16"),
            (True, TypeError, "chunk_size: expected an integer or None, got bool"),
            (1.5, TypeError, "chunk_size: expected an integer or None, got float"),
            (16.0, TypeError, "chunk_size: expected an integer or None, got float"),
            ("16", TypeError, "chunk_size: expected an integer or None, got str"),
            (float("nan"), TypeError, "chunk_size: expected an integer or None, got float"),
            (
                np.array(16),
                TypeError,
                "chunk_size: expected an integer or None, got numpy.ndarray",
            ),
            ((16,), TypeError, "chunk_size: expected an integer or None, got tuple"),
        ]
    },
    **{
        f"qk_l2norm = {value!r}": (
            "qk_l2norm",
            value,
            TypeError,
            f"qk_l2norm: expected True or False, got {described}",
        )
        for value, described in [
            (1, "int"),
            (None, "NoneType"),
            ("no", "str"),
            (1e-6, "float"),
            (np.array(True), "numpy.ndarray"),
        ]
    },
    **{
        f"state_layout = {value!r}": ("state_layout", value, error, message)
        for value, error, message in [
            ("KV", ValueError, 'state_layout: expected "kv" or "vk", got \'KV\''),
            ("", ValueError, 'state_layout: expected "kv" or "vk", got \'\''),
            (None, TypeError, 'state_layout: expected "kv" or "vk", got NoneType'),
            (True, TypeError, 'state_layout: expected "kv" or "vk", got bool'),
            (("k", "v"), TypeError, 'state_layout: expected "kv" or "vk", got tuple'),
            (
                np.array(["kv", "vk"]),
                TypeError,
                'state_layout: expected "kv" or "vk", got numpy.ndarray',
            ),
        ]
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_shape(name):
    function, sizes, changes, error, message = SHAPES[name]
    arguments = good(function, **sizes)
    for changed, change in changes.items():
        arguments[changed] = change(arguments[changed]) if callable(change) else change
    refuse(function, arguments, error, message)


@pytest.mark.parametrize("name", CU_SEQLENS)
@pytest.mark.parametrize("function", WITH_SEQUENCES)
def test_wrong_cu_seqlens(function, name):
    cu_seqlens, error, message = CU_SEQLENS[name]
    packed = isinstance(cu_seqlens, np.ndarray) and cu_seqlens.ndim == 1
    N = max(0, len(cu_seqlens) - 1) if packed else 1
    arguments = good(function, B=1, N=N) | {"cu_seqlens": cu_seqlens}
    refuse(function, arguments, error, message)


@pytest.mark.parametrize("function", WITH_SEQUENCES)
def test_cu_seqlens_and_several_batch_rows(function):
    arguments = good(function) | {"cu_seqlens": integers(0, 6)}
    message = "cu_seqlens: expected B = 1, since sequences then lie end to end along T, got B = 2"
    refuse(function, arguments, ValueError, message)


@pytest.mark.parametrize("function", [f for f in WITH_SEQUENCES if "initial_state" in ARRAYS[f]])
def test_one_state_for_several_packed_sequences(function):
    arguments = good(function, B=1, N=1) | {"cu_seqlens": integers(0, 2, 2, 6)}
    message = (
        "initial_state: expected (N, HV, K, V) = (3, 4, 3, 5) like cu_seqlens, got (1, 4, 3, 5)"
    )
    refuse(function, arguments, ValueError, message)


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_option(name):
    option, value, error, message = OPTIONS[name]
    takes = {"scale": WITH_SCALE, "chunk_size": WITH_CHUNKS}.get(option, WITH_LAYOUT)
    for function in takes:
        refuse(function, good(function) | {option: value}, error, message)


@pytest.mark.parametrize("value", [0, 0.0, -2, np.float32(0.5), np.int64(3), Fraction(1, 3)])
def test_any_finite_real_number_is_a_scale(value):
    arguments = good("chunk_delta_rule")
    o = cupy_delta.chunk_delta_rule(**arguments, scale=value).o.copy()
    expected = cupy_delta.chunk_delta_rule(**arguments, scale=float(value)).o
    assert o.tobytes() == expected.tobytes()
    assert bool(value) == bool(np.any(o))


@pytest.mark.parametrize("function", [*OPERATORS, "delta_rule_step"])
def test_options_are_keywords(function):
    arguments = list(good(function).values())[:5]
    with pytest.raises(TypeError, match="positional"):
        getattr(cupy_delta, function)(*arguments, 1.0)


@pytest.mark.parametrize("function", [*OPERATORS, "delta_rule_step", "wy_factors"])
def test_an_unknown_option_is_refused(function):
    with pytest.raises(TypeError, match="head_first"):
        call(function, good(function) | {"head_first": True})


@pytest.mark.parametrize(
    ("residuals", "described"),
    [(None, "NoneType"), ({}, "dict"), ((1, 2, 3), "tuple"), (np.zeros(3), "numpy.ndarray")],
)
def test_residuals_of_something_else(residuals, described):
    arguments = {"residuals": residuals, **good("chunk_delta_rule_bwd")}
    message = f"residuals: expected those of chunk_delta_rule_fwd, got {described}"
    refuse("chunk_delta_rule_bwd", arguments, TypeError, message)


def test_the_whole_forward_result_is_no_residuals():
    forward = cupy_delta.chunk_delta_rule_fwd(**good("chunk_delta_rule_fwd"))
    message = (
        "residuals: expected those of chunk_delta_rule_fwd, got cupy_delta.results.DeltaRuleForward"
    )
    arguments = {"residuals": forward, "do": forward.o}
    refuse("chunk_delta_rule_bwd", arguments, TypeError, message)


def test_gradient_of_a_state_in_the_other_layout():
    forward = good("chunk_delta_rule_fwd") | {"state_layout": "vk", "initial_state": None}
    residuals = cupy_delta.chunk_delta_rule_fwd(**forward).residuals
    arguments = {"residuals": residuals, **good("chunk_delta_rule_bwd")}
    message = (
        "dfinal_state: expected (N, HV, V, K) = (2, 4, 5, 3) like the forward, got (2, 4, 3, 5):"
        " its last two axes are swapped"
    )
    refuse("chunk_delta_rule_bwd", arguments, ValueError, message)


@pytest.mark.parametrize(
    ("later", "described"),
    [(None, "NoneType"), (np.eye(3, dtype=np.float32), "numpy.ndarray"), ((1, 2), "tuple")],
)
def test_then_takes_a_transfer(later, described):
    transfer = cupy_delta.Transfer(array("N HV K K"), array("N HV K V"))
    with pytest.raises(TypeError) as caught:
        transfer.then(later)
    assert str(caught.value) == f"later: expected a Transfer, got {described}"


def test_a_transfer_made_by_hand_of_unequal_parts():
    transfer = cupy_delta.Transfer(array("N HV K V"), array("N HV K V"))
    with pytest.raises(ValueError) as caught:
        transfer.apply(array("N HV K V"))
    assert str(caught.value) == "p: expected (N, HV, K, K) = (2, 4, 3, 3) like h, got (2, 4, 3, 5)"


WITH_GATE = [function for function, arrays in ARRAYS.items() if "g" in arrays]
DECAYS = "g: expected log decays of at most 0, got {}; of a linear decay alpha it is g = log(alpha)"


def gates(function, dtype, channels, value):
    arguments = good(function)
    g = arguments["g"].astype(dtype)
    arguments["g"] = g if channels else np.ascontiguousarray(g[..., 0])
    arguments["g"].reshape(-1)[7] = value
    if dtype == np.float64:
        arguments = {
            n: x.astype(dtype) if isinstance(x, np.ndarray) else x for n, x in arguments.items()
        }
    return arguments


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", WITH_GATE)
def test_a_gate_above_zero(function, dtype, channels):
    for value, shown in ((0.5, "0.5"), (0.00390625, "0.00390625"), (np.inf, "inf")):
        arguments = gates(function, dtype, channels, value)
        refuse(function, arguments, ValueError, DECAYS.format(shown))


@pytest.mark.parametrize("function", WITH_GATE)
def test_a_gate_above_zero_by_rounding_or_unknown(function):
    for value in 5e-4, 1e-3, np.nan, -np.inf:
        call(function, gates(function, np.float32, True, value))


def test_a_linear_gate_is_found_beside_unknown_ones():
    arguments = gates("chunk_delta_rule", np.float32, False, 0.5)
    arguments["g"].reshape(-1)[3] = np.nan
    refuse("chunk_delta_rule", arguments, ValueError, DECAYS.format("0.5"))
