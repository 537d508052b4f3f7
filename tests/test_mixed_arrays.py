"""NumPy and CuPy arrays in one call, and two devices: a stand-in for CuPy, so no GPU is needed."""

import copy

import numpy as np
import pytest
from calls import ARRAYS, EVERY_ARRAY, call, first_of, good, integers, refuse
from standins import FakeArray, FakeDevice, Launcher, on_device, stand_in_for_cupy

import cupy_delta
from cupy_delta import operators
from cupy_delta.cuda import operators as cuda_operators


@pytest.fixture
def cupy(monkeypatch):
    return stand_in_for_cupy(monkeypatch)


def device_residuals():
    forward = on_device(good("chunk_delta_rule_fwd"))
    return {"residuals": cupy_delta.chunk_delta_rule_fwd(**forward).residuals}


ON_DEVICE = [(f, n) for f, n in EVERY_ARRAY if "Transfer" not in f and n != first_of(f)]


@pytest.mark.parametrize("function", [f for f in ARRAYS if "Transfer" not in f and "bwd" not in f])
def test_cupy_arrays_reach_their_backend(cupy, function):
    call(function, on_device(good(function)))
    (problem,) = cupy.problems
    assert problem.kind == "cupy"
    assert (problem.B, problem.T, problem.N, problem.HV) == (2, 6, 2, 4)


def test_no_sequence_for_some_tokens_on_a_device(cupy):
    arguments = on_device(good("chunk_delta_rule", B=1, N=1))
    arguments["cu_seqlens"] = FakeArray(np.zeros(1, np.int64))
    message = "cu_seqlens: expected at least one sequence for T = 6, got shape (1,), N = 0"
    refuse("chunk_delta_rule", arguments, ValueError, message)


@pytest.mark.parametrize(("function", "name"), ON_DEVICE)
def test_a_numpy_array_among_cupy_arrays(cupy, function, name):
    arguments = good(function)
    mixed = on_device(arguments) | {name: arguments[name]}
    if function == "chunk_delta_rule_bwd":
        mixed = device_residuals() | mixed
    cupy.problems.clear()
    message = (
        f"{name}: expected a cupy array like {first_of(function)}, got numpy.ndarray;"
        " NumPy and CuPy arrays do not mix in one call"
    )
    refuse(function, mixed, TypeError, message)
    assert not cupy.problems


@pytest.mark.parametrize(("function", "name"), EVERY_ARRAY)
def test_a_cupy_array_among_numpy_arrays(cupy, function, name):
    arguments = good(function)
    kinds = "numpy array", "cupy.ndarray"
    wrong = name
    if name == first_of(function):  # then the next argument is the one that differs
        kinds = "cupy array", "numpy.ndarray"
        wrong = list(ARRAYS[function])[1]
    message = (
        f"{wrong}: expected a {kinds[0]} like {first_of(function)}, got {kinds[1]};"
        " NumPy and CuPy arrays do not mix in one call"
    )
    refuse(function, arguments | {name: FakeArray(arguments[name])}, TypeError, message)
    assert not cupy.problems


@pytest.mark.parametrize(("function", "name"), ON_DEVICE)
def test_two_devices(cupy, function, name):
    arguments = on_device(good(function))
    arguments[name].device = FakeDevice(1)
    if function == "chunk_delta_rule_bwd":
        arguments = device_residuals() | arguments
    cupy.problems.clear()
    message = (
        f"{name}: expected an array on device 0 like {first_of(function)}, got one on device 1"
    )
    refuse(function, arguments, ValueError, message)
    assert not cupy.problems


@pytest.mark.parametrize("name", ["cu_seqlens", "state_indices"])
def test_integers_on_the_device_do_not_go_with_numpy_arrays(cupy, name):
    function = "delta_rule_step" if name == "state_indices" else "chunk_delta_rule"
    sizes = {} if name == "state_indices" else {"B": 1, "N": 1}
    arguments = good(function, **sizes) | {name: FakeArray(integers(0, 1))}
    message = (
        f"{name}: expected a numpy array like q, got cupy.ndarray;"
        " NumPy and CuPy arrays do not mix in one call"
    )
    refuse(function, arguments, TypeError, message)


@pytest.mark.parametrize("name", ["cu_seqlens", "state_indices"])
def test_integers_on_another_device(cupy, name):
    function = "delta_rule_step" if name == "state_indices" else "chunk_delta_rule"
    sizes = {} if name == "state_indices" else {"B": 1, "N": 1}
    arguments = on_device(good(function, **sizes)) | {name: FakeArray(integers(0, 1), 1)}
    message = f"{name}: expected an array on device 0 like q, got one on device 1"
    refuse(function, arguments, ValueError, message)


def test_values_in_device_memory_are_not_read(cupy):
    """Reading them would synchronise; FakeArray has no values, so that a read would raise."""
    packed = on_device(good("chunk_delta_rule", B=1, N=1))
    call("chunk_delta_rule", packed | {"cu_seqlens": FakeArray(integers(9, 9))})
    pool = on_device(good("delta_rule_step", slots=7))
    call("delta_rule_step", pool | {"state_indices": FakeArray(integers(9, 9))})
    assert len(cupy.problems) == 2


def test_values_on_the_host_are_read_for_cupy_arrays_too(cupy):
    packed = on_device(good("chunk_delta_rule", B=1, N=1))
    call("chunk_delta_rule", packed | {"cu_seqlens": integers(0, 6)})
    assert len(cupy.problems) == 1
    message = "cu_seqlens: expected nondecreasing values from 0 to T = 6, got [9 9]"
    refuse("chunk_delta_rule", packed | {"cu_seqlens": integers(9, 9)}, ValueError, message)
    pool = on_device(good("delta_rule_step", slots=7)) | {"state_indices": integers(9, 9)}
    message = "state_indices: expected indices below slots = 7 (negative: padding), got 9"
    refuse("delta_rule_step", pool, ValueError, message)


@pytest.mark.parametrize("name", ["out", "state"])
def test_device_memory_in_common(cupy, name):
    arguments = on_device(good("delta_rule_step"))
    if name == "state":  # of one shape with v
        arguments = on_device(good("delta_rule_step", T=4, K=4))
    arguments["v"] = arguments[name]
    message = f"{name}: expected no memory in common with v"
    refuse("delta_rule_step", arguments, ValueError, message)


def test_strided_device_memory_is_not_written(cupy):
    arguments = on_device(good("chunk_delta_rule"))
    strided = np.zeros((6, 2, 4, 5), np.float32).swapaxes(0, 1)
    arguments["out"] = FakeArray(strided)
    message = f"out: expected a C-contiguous array, got strides {strided.strides}"
    refuse("chunk_delta_rule", arguments, ValueError, message)


@pytest.mark.parametrize("copied", [(), ("beta",)])
def test_a_step_on_the_same_memory_is_the_same_launch(cupy, monkeypatch, copied):
    """Unless it reads copies, which every call makes anew."""
    device = Launcher(copied)
    monkeypatch.setattr(operators, "backend_for", lambda kind: cuda_operators)
    monkeypatch.setattr(cuda_operators, "device_of", lambda x: device)
    arguments = on_device(good("delta_rule_step"))
    arguments["out"] = FakeArray(np.zeros(arguments["v"].shape, arguments["v"].dtype))
    alike = {n: copy.copy(x) for n, x in arguments.items()}
    for given in (arguments, alike, arguments):
        assert call("delta_rule_step", given) is given["out"]
    planned = ["prepared", "launched"]
    again = [arguments[name] for name in ("q", "state", "out")]
    assert device.asked == (planned * 3 if copied else [*planned, again, again])
    moved = arguments | on_device({"k": good("delta_rule_step")["k"]})
    call("delta_rule_step", moved)
    assert device.asked[-2:] == planned


def test_a_step_on_the_same_memory_has_passed_before(cupy):
    """It is told by where arrays lie and how; anything else is looked at as ever."""
    arguments = on_device(good("delta_rule_step"))
    for _ in range(2):
        call("delta_rule_step", arguments)
    one, other = cupy.problems[-2:]
    assert other.kept is one.kept and other.passed is one.passed is not None
    assert not any(isinstance(x, FakeArray) for x in vars(one.passed.problem).values())
    moved = arguments | on_device({"q": good("delta_rule_step")["q"]})
    call("delta_rule_step", moved)
    assert cupy.problems[-1].passed is not one.passed
    short = FakeArray(good("delta_rule_step")["q"][:1])
    short.address = arguments["q"].address
    with pytest.raises(ValueError, match="k: expected"):
        call("delta_rule_step", arguments | {"q": short})
    with pytest.raises(TypeError, match="qk_l2norm: expected"):
        call("delta_rule_step", arguments | {"qk_l2norm": 0})
