"""Checks of looks and options are remembered: what a right call must not do for the next one."""

import gc
import weakref

import numpy as np
import pytest
from calls import ARRAYS, EVERY_ARRAY, WITH_CHUNKS, WITH_LAYOUT, array, call, first_of, good, refuse

import cupy_delta


def raised(function, arguments):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(function, arguments)
    return str(caught.value)


@pytest.mark.parametrize(("function", "name"), EVERY_ARRAY)
@pytest.mark.parametrize("wrong", ["dtype", "axis", "list", "longer"])
def test_a_wrong_array_after_a_right_one(function, name, wrong):
    arguments = good(function)
    call(function, arguments)
    x = arguments[name]
    changed = dict(
        dtype=x.astype(np.int32), axis=x[None], list=x.tolist(), longer=np.concatenate([x, x])
    )
    arguments[name] = changed[wrong]
    message = raised(function, arguments)
    assert ": expected" in message
    if name != first_of(function):
        assert message.startswith(f"{name}: ")


OPTIONS = {
    "scale": [(1.0, True), (0.0, False)],
    "qk_l2norm": [(True, 1), (False, 0), (True, 1.0)],
    "chunk_size": [(1, True), (2, 2.0), (1, np.True_)],
}


@pytest.mark.parametrize(
    ("function", "name", "right", "wrong"),
    [
        (function, name, *pair)
        for name, pairs in OPTIONS.items()
        for function in (WITH_CHUNKS if name == "chunk_size" else WITH_LAYOUT)
        for pair in pairs
    ],
)
def test_an_option_that_only_equals_a_right_one(function, name, right, wrong):
    arguments = good(function)
    if "chunks" in ARRAYS[function].get("states", "") and name == "chunk_size":
        arguments["states"] = array("B chunks HV K V", chunks=6 // right)
    call(function, arguments | {name: right})
    assert raised(function, arguments | {name: wrong}).startswith(f"{name}: expected")


@pytest.mark.parametrize("name", ["scale", "qk_l2norm", "chunk_size", "state_layout"])
def test_an_option_that_cannot_be_looked_up(name):
    message = raised("chunk_delta_rule", good("chunk_delta_rule") | {name: [1]})
    assert message.startswith(f"{name}: expected") and message.endswith("got list")


def test_memory_and_values_are_checked_in_every_call():
    arguments = good("delta_rule_step", slots=7) | {"state_indices": np.array([4, 2])}
    call("delta_rule_step", arguments)
    refuse(
        "delta_rule_step",
        arguments | {"state_indices": np.array([4, 4])},
        ValueError,
        "state_indices: expected each slot at most once, got slot 4 repeatedly",
    )
    shared = arguments["out"].reshape(-1)[:120].reshape(2, 6, 2, 5)[..., :3]
    message = "out: expected no memory in common with q"
    refuse("delta_rule_step", arguments | {"q": shared}, ValueError, message)
    arguments["state"].flags.writeable = False
    message = "state: expected a writable array, got a read-only one"
    refuse("delta_rule_step", arguments, ValueError, message)


@pytest.mark.slow
@pytest.mark.parametrize("function", [f for f in ARRAYS if "Transfer" not in f and "bwd" not in f])
def test_no_array_is_kept(function):
    arguments = good(function)
    alive = [weakref.ref(x) for x in arguments.values() if isinstance(x, np.ndarray)]
    result = call(function, arguments)
    del arguments, result
    gc.collect()
    assert not any(x() is not None for x in alive)


def test_the_backward_keeps_no_array():
    arguments = good("chunk_delta_rule_fwd")
    forward = cupy_delta.chunk_delta_rule_fwd(**arguments)
    do = array("B T HV V")
    alive = [weakref.ref(x) for x in (do, *forward[:2], arguments["q"])]
    gradients = cupy_delta.chunk_delta_rule_bwd(forward.residuals, do)
    del arguments, forward, do, gradients
    gc.collect()
    assert not any(x() is not None for x in alive)
