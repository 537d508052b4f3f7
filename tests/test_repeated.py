"""Steps on the arrays of an earlier one: the launch is found by them, and by nothing else."""

import copy
import gc
import weakref

import numpy as np
import pytest
from calls import call, good
from standins import FakeArray, Launcher, on_device, stand_in_for_cupy

import cupy_delta
from cupy_delta import operators, repeated
from cupy_delta.cuda import operators as cuda_operators

pytestmark = pytest.mark.fast
AGAIN = "again"


@pytest.fixture
def device(monkeypatch):
    """A device that notes what is asked of it, for steps on the stand-ins of CuPy's arrays."""
    stand_in_for_cupy(monkeypatch)
    found = Launcher()
    monkeypatch.setattr(found, "repeated", lambda *which: lambda: found.asked.append(AGAIN))
    monkeypatch.setattr(operators, "backend_for", lambda kind: cuda_operators)
    monkeypatch.setattr(cuda_operators, "device_of", lambda x: found)
    return found


def step(**more):
    """Return arguments of a step on the device, all arrays the caller's own."""
    arguments = on_device(good("delta_rule_step") | more)
    arguments["out"] = FakeArray(np.zeros(arguments["v"].shape, arguments["v"].dtype))
    return arguments


def raw_step():
    """Return the same with the gate and the strength of logits."""
    arguments = step()
    logits, per_head = arguments["beta"], FakeArray(np.zeros(4, np.float32))
    gate = cupy_delta.SoftplusGate(arguments["g"], per_head, copy.copy(per_head))
    return arguments | dict(beta=cupy_delta.SigmoidBeta(logits), g=gate)


def place(given):
    """Return by what a step is kept."""
    return tuple(id(given.get(name)) for name in ("state", "out", "accepted"))


def unlooked(monkeypatch):
    """Let nothing but `find` look at a call."""
    monkeypatch.setattr(operators.checks, "step_problem", None)


@pytest.mark.parametrize("arguments", [step, raw_step])
def test_the_same_arrays_are_the_same_launch(device, monkeypatch, arguments):
    given = arguments()
    call("delta_rule_step", given)
    device.asked.clear()
    unlooked(monkeypatch)
    for _ in range(3):
        assert call("delta_rule_step", given) is given["out"]
    assert device.asked == [AGAIN] * 3


@pytest.mark.parametrize("name", ["accepted", "out"])
def test_steps_that_take_turns_on_a_pool_are_each_found(device, monkeypatch, name):
    """As those that verify drafts and commit them do, and those with two arrays for outputs."""
    given = step() | dict(accepted=FakeArray(np.zeros(2, np.int64)))
    turns = [given, given | {name: copy.copy(given[name])}]
    turns[1][name].address += 1 << 10
    for one in turns:
        call("delta_rule_step", one)
    unlooked(monkeypatch)
    device.asked.clear()
    for one in turns * 3:
        call("delta_rule_step", one)
    assert device.asked == [AGAIN] * 6


@pytest.mark.parametrize("arguments", [step, raw_step])
def test_other_arrays_are_looked_at(device, monkeypatch, arguments):
    given = arguments()
    call("delta_rule_step", given)
    unlooked(monkeypatch)
    for name in ("q", "k", "v", "beta", "g", "out", "state"):
        with pytest.raises(TypeError, match="not callable"):
            call("delta_rule_step", given | {name: copy.copy(given[name])})


@pytest.mark.parametrize(
    "option",
    [
        dict(scale=2.0),
        dict(qk_l2norm=True),
        dict(state_layout="vk"),
        dict(accepted=0),
        dict(output_state_indices=0),
        dict(cu_seqlens=0),
        dict(state_indices=0),
        dict(out=None),
    ],
)
def test_other_options_are_looked_at(device, monkeypatch, option):
    given = step()
    call("delta_rule_step", given)
    unlooked(monkeypatch)
    with pytest.raises(TypeError, match="not callable"):
        call("delta_rule_step", given | option)


@pytest.mark.parametrize(("scale", "like"), [(1, True), (1, 1.0), (0.5, np.float32(0.5))])
def test_scales_of_other_types_are_looked_at(device, monkeypatch, scale, like):
    given = step() | dict(scale=scale)
    call("delta_rule_step", given)
    unlooked(monkeypatch)
    call("delta_rule_step", given | dict(scale=type(scale)(scale)))
    with pytest.raises(TypeError, match="not callable"):
        call("delta_rule_step", given | dict(scale=like))


@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "g", "out", "state"])
def test_an_array_that_was_reshaped_in_place_is_refused(device, name):
    given = step()
    call("delta_rule_step", given)
    x = given[name]
    x.shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
    with pytest.raises(ValueError, match="expected"):
        call("delta_rule_step", given)
    assert device.asked.count(AGAIN) == 0


@pytest.mark.parametrize("name", ["logits", "a", "A_log", "dt_bias"])
def test_a_parameter_that_was_reshaped_in_place_is_refused(device, name):
    given = raw_step()
    call("delta_rule_step", given)
    x = getattr(given["beta"] if name == "logits" else given["g"], name)
    x.shape = (*x.shape[:-1], 1, x.shape[-1])
    with pytest.raises(ValueError, match="expected"):
        call("delta_rule_step", given)


@pytest.mark.parametrize("arguments", [step, raw_step])
def test_no_array_is_held(device, arguments):
    given = arguments()
    call("delta_rule_step", given)
    arrays = [x for x in given.values() if isinstance(x, FakeArray)]
    for parameters in (given["beta"], given["g"]):
        if not isinstance(parameters, FakeArray):
            arrays += [x for x in vars(parameters).values() if isinstance(x, FakeArray)]
    parameters = None
    references = [weakref.ref(x) for x in arrays]
    device.asked.clear()
    del given, arrays
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


def test_an_array_at_the_address_of_one_that_is_gone_is_another(device, monkeypatch):
    """Python makes objects where others were: an id is none of an array alone."""
    given = step()
    call("delta_rule_step", given)
    kept = repeated._kept[place(given)]
    other = step()
    monkeypatch.setitem(repeated._kept, place(other), kept)
    unlooked(monkeypatch)
    with pytest.raises(TypeError, match="not callable"):
        call("delta_rule_step", other)


@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "g", "out", "state_indices", "accepted"])
@pytest.mark.parametrize("arguments", [step, raw_step])
def test_none_is_not_what_is_gone(device, arguments, name):
    """Nor is a gate that is gone none, while its parameters are there."""
    given = arguments()
    given |= {x: FakeArray(np.zeros(2, np.int64)) for x in ("state_indices", "accepted")}
    kept = [vars(given[x]) for x in ("beta", "g") if not isinstance(given[x], FakeArray)]
    call("delta_rule_step", given)
    device.asked.clear()
    given[name] = None
    if name in ("q", "k", "v", "beta"):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            call("delta_rule_step", given)
    else:
        call("delta_rule_step", given)
    assert AGAIN not in device.asked and len(kept) in (0, 2)


def test_new_arrays_of_the_same_memory_are_not_kept_every_time(device, monkeypatch):
    kept, keep = [], repeated._kept.__class__.__setitem__

    class Kept(dict):
        def __setitem__(self, key, value):
            kept.append(key)
            keep(self, key, value)

    monkeypatch.setattr(repeated, "_kept", Kept())
    given = step()
    alike = [{n: copy.copy(x) for n, x in given.items()} for _ in range(20)]
    for one in alike:
        call("delta_rule_step", one)
    assert kept == [place(alike[i]) for i in (0, 1, 3, 7, 15)]
    assert device.asked.count(AGAIN) == 19


def test_few_launches_are_kept(device, monkeypatch):
    monkeypatch.setattr(repeated, "KEPT_PLACES", 3)
    monkeypatch.setattr(repeated, "_kept", {})
    steps = [step() for _ in range(5)]
    for given in steps:
        call("delta_rule_step", given)
        assert len(repeated._kept) <= 3
    assert place(steps[-1]) in repeated._kept


def test_what_is_told_by_the_object_is_fixed_in_cupy():
    """No GPU is needed: the memory is nobody's, and nothing reads it."""
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(1 << 20, 1 << 10, None, 0)
    x = cupy.ndarray((4, 2), np.float32, cupy.cuda.MemoryPointer(memory, 0))
    assert weakref.ref(x)() is x
    for owner, name in ((x, "data"), (x, "dtype"), (x.data, "ptr"), (x.data, "mem")):
        with pytest.raises(AttributeError):
            setattr(owner, name, getattr(owner, name))
    with pytest.raises(AttributeError):
        x.strides = x.strides
    x.shape = (2, 4)
    assert x.shape == (2, 4)
