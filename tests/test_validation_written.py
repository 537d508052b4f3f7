"""Arrays that are written: writable, contiguous, and with no memory in common with inputs."""

import numpy as np
import pytest
from calls import (
    ARRAYS,
    WITH_LAYOUT,
    good,
    refuse,
)

import cupy_delta
from cupy_delta import arrays

WRITERS = [(f, "out") for f in WITH_LAYOUT] + [("delta_rule_step", "state")]


@pytest.mark.parametrize(("function", "name"), WRITERS)
def test_read_only_memory_is_not_written(function, name):
    arguments = good(function)
    arguments[name].flags.writeable = False
    message = f"{name}: expected a writable array, got a read-only one"
    refuse(function, arguments, ValueError, message)


def test_what_is_wrong_of_written_memory_is_told_in_one_order():
    """Whatever calls were before."""
    arguments = good("delta_rule_step")
    foreign = arguments["state"].astype(arguments["state"].dtype.newbyteorder())
    for writable, error in ((True, TypeError), (False, ValueError), (True, TypeError)):
        foreign.flags.writeable = writable
        message = "expected native byte order" if writable else "expected a writable array"
        with pytest.raises(error, match=message):
            cupy_delta.delta_rule_step(**arguments | {"state": foreign})


STRIDED = {
    "last axes swapped": lambda x: np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3),
    "Fortran order": np.asfortranarray,
    "every other": lambda x: np.repeat(x, 2, 1)[:, ::2],
    "reversed": lambda x: x[::-1],
    "part of a wider array": lambda x: np.concatenate([x, x], -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("how", STRIDED)
@pytest.mark.parametrize(("function", "name"), WRITERS)
def test_strided_memory_is_not_written(function, name, how):
    arguments = good(function)
    arguments[name] = STRIDED[how](arguments[name])
    wanted = {
        "out": "a C-contiguous array",
        "state": "slots that are C-contiguous, one after the other",
    }
    message = f"{name}: expected {wanted[name]}, got strides {arguments[name].strides}"
    refuse(function, arguments, ValueError, message)


def test_one_element_seen_many_times_is_not_written():
    arguments = good("chunk_delta_rule")
    base = np.zeros((1, 6, 4, 5), np.float32)
    stretched = np.lib.stride_tricks.as_strided(base, (2, 6, 4, 5), (0, *base.strides[1:]))
    message = f"out: expected a C-contiguous array, got strides {stretched.strides}"
    refuse("chunk_delta_rule", arguments | {"out": stretched}, ValueError, message)


OVERLAPS = [
    (f, w, o) for f, w in WRITERS for o in ARRAYS[f] if o != w and {w, o} != {"out", "state"}
]


@pytest.mark.parametrize(("function", "written", "other"), OVERLAPS)
def test_written_memory_overlaps_an_input(function, written, other):
    """The two share one element: the last of one is the first of the other."""
    arguments = good(function)
    sizes = arguments[written].size, arguments[other].size
    memory = np.full(sum(sizes) - 1, -0.25, np.float32)
    arguments[written] = memory[: sizes[0]].reshape(arguments[written].shape)
    arguments[other] = memory[sizes[0] - 1 :].reshape(arguments[other].shape)
    message = f"{written}: expected no memory in common with {other}"
    refuse(function, arguments, ValueError, message)


def test_out_overlaps_the_pool():
    arguments = good("delta_rule_step", T=1)
    arguments["out"] = arguments["state"].reshape(-1)[-40:].reshape(2, 1, 4, 5)
    message = "out: expected no memory in common with state"
    refuse("delta_rule_step", arguments, ValueError, message)


def test_out_overlaps_cu_seqlens():
    arguments = good("chunk_delta_rule", B=1, N=1)
    arguments["cu_seqlens"] = arguments["out"].reshape(-1)[:2].view(np.int32)
    arguments["cu_seqlens"][...] = 0, 6
    message = "out: expected no memory in common with cu_seqlens"
    refuse("chunk_delta_rule", arguments, ValueError, message)


@pytest.mark.parametrize("name", ["out", "state"])
def test_written_memory_overlaps_the_indices(name):
    arguments = good("delta_rule_step", slots=7)
    indices = arguments[name].reshape(-1)[:2].view(np.int32)
    indices[...] = 4, 2
    message = f"{name}: expected no memory in common with state_indices"
    arguments["state_indices"] = indices
    refuse("delta_rule_step", arguments, ValueError, message)


def test_arrays_side_by_side_in_one_buffer_are_accepted():
    arguments = good("chunk_delta_rule")
    size = arguments["v"].size
    memory = np.zeros(2 * size, np.float32)
    arguments["v"] = memory[:size].reshape(2, 6, 4, 5)
    arguments["out"] = memory[size:].reshape(2, 6, 4, 5)
    assert cupy_delta.chunk_delta_rule(**arguments).o is arguments["out"]


def test_interleaved_arrays_share_no_memory_and_what_is_too_hard_to_tell_may():
    share, view = arrays.shares_memory, np.lib.stride_tricks.as_strided
    memory = np.zeros(1_000_000, np.int8)
    assert not share(memory[::2], memory[1::2])
    assert share(memory[::2], memory[::3])
    some = view(memory, (7,) * 8, (1, 21, 187, 1009, 2003, 5003, 7919, 10007))
    others = view(memory[3:], (7,) * 8, (2, 23, 191, 1013, 2011, 5009, 7927, 10009))
    assert share(some, others)
