"""Right calls of every public function, to be spoilt in one place by the tests of arguments.

Sizes differ from each other (B 2, T 6, H 2, HV 4, K 3, V 5), so that a message with a wrong number
in it cannot pass by chance.
"""

import numpy as np
import pytest

import cupy_delta

SIZES = {"B": 2, "T": 6, "N": 2, "H": 2, "HV": 4, "K": 3, "V": 5, "slots": 2, "chunks": 2}
GATE = {"g": "B T HV K"}
KVBG = {"k": "B T H K", "v": "B T HV V", "beta": "B T HV"} | GATE
QKVBG = {"q": "B T H K"} | KVBG
STATE, OUT = {"initial_state": "N HV K V"}, {"out": "B T HV V"}

# The array arguments of each public function, in their order; the first names the dtype.
ARRAYS = {
    "chunk_delta_rule": QKVBG | STATE | OUT,
    "recurrent_delta_rule": QKVBG | STATE | OUT,
    "chunk_delta_rule_fwd": QKVBG | STATE | OUT,
    "delta_rule_step": QKVBG | {"state": "slots HV K V"} | OUT,
    "chunk_delta_rule_bwd": {"do": "B T HV V", "dfinal_state": "N HV K V"},
    "wy_factors": KVBG,
    "sequence_transfer": KVBG,
    "state_pass": {"k": "B T H K", "w": "B T HV K", "u": "B T HV V"} | GATE | STATE,
    "chunk_output": {
        "q": "B T H K",
        "k": "B T H K",
        "v_new": "B T HV V",
        "states": "B chunks HV K V",
    }
    | GATE,
    "Transfer.apply": {"state": "N HV K V"},
    "Transfer.then": {"later.p": "N HV K K", "later.h": "N HV K V"},
}
OPERATORS = ["chunk_delta_rule", "recurrent_delta_rule", "chunk_delta_rule_fwd"]
WITH_CHUNKS = ["chunk_delta_rule", "chunk_delta_rule_fwd", "wy_factors", "state_pass"]
WITH_CHUNKS += ["chunk_output"]
WITH_SEQUENCES = [*OPERATORS, "wy_factors", "sequence_transfer", "state_pass", "chunk_output"]
WITH_SCALE = [*OPERATORS, "delta_rule_step", "chunk_output"]
WITH_LAYOUT = [*OPERATORS, "delta_rule_step"]
OPTIONAL = {"g", "initial_state", "out", "dfinal_state"}
STATES = {"initial_state", "dfinal_state", "state", "states", "later.p", "later.h"}


def array(symbols, dtype=np.float32, **sizes):
    shape = [(SIZES | sizes)[s] for s in symbols.split()]
    x = np.random.default_rng(len(symbols)).uniform(-0.5, 0.5, shape)
    return x.astype(dtype)


def good(function, **sizes):
    """Arguments of a right call; `out` and `state` hold values that nothing computes."""
    arguments = {name: array(symbols, **sizes) for name, symbols in ARRAYS[function].items()}
    for name in ("out", "state"):
        if name in arguments:
            arguments[name][...] = 12345.0
    if function in WITH_CHUNKS:
        arguments["chunk_size"] = 4 if (SIZES | sizes)["T"] else 16
    if "g" in arguments:
        arguments["g"] = -np.abs(arguments["g"])
    return arguments


def call(function, arguments):
    if function == "chunk_delta_rule_bwd" and "residuals" not in arguments:
        forward = good("chunk_delta_rule_fwd")
        del forward["out"]
        arguments = {"residuals": cupy_delta.chunk_delta_rule_fwd(**forward)[2], **arguments}
    if function.startswith("Transfer."):
        transfer = cupy_delta.Transfer(array("N HV K K"), array("N HV K V"))
        if "later.p" in arguments:
            later = cupy_delta.Transfer(arguments["later.p"], arguments["later.h"])
            return transfer.then(later)
        return getattr(transfer, function.split(".")[1])(**arguments)
    return getattr(cupy_delta, function)(**arguments)


def refuse(function, arguments, error, message):
    """Make the call; check the error to the letter, and that no array has changed."""
    arrays = {n: x for n, x in arguments.items() if isinstance(x, np.ndarray) and x.dtype != object}
    before = {name: x.tobytes() for name, x in arrays.items()}
    with pytest.raises((TypeError, ValueError)) as caught:
        call(function, arguments)
    assert caught.type is error
    assert str(caught.value) == message
    assert {name: x.tobytes() for name, x in arrays.items()} == before


def first_of(function):
    """The argument that settles kind and dtype, as messages name it."""
    if function == "chunk_delta_rule_bwd":
        return "v"
    return "h" if function.startswith("Transfer.") else next(iter(ARRAYS[function]))


def source_of(function, symbol):
    """The argument that settles a dimension, as messages name it."""
    if function == "chunk_delta_rule_bwd":
        return "the forward"
    if function.startswith("Transfer."):
        return "h"
    symbol = "B" if symbol == "N" else symbol
    return next(name for name, symbols in ARRAYS[function].items() if symbol in symbols.split())


EVERY_ARRAY = [(function, name) for function, arrays in ARRAYS.items() for name in arrays]


def integers(*values, dtype=np.int64):
    return np.array(values, dtype)
