"""Steps drawn at random: with what earlier ones have left and without, the same launch or error."""

import copy
import random

import numpy as np
import pytest
from standins import FakeArray, Launcher, on_device, stand_in_for_cupy

import cupy_delta as cd
from cupy_delta import operators, problem, repeated
from cupy_delta.cuda import operators as cuda_operators

pytestmark = pytest.mark.fast

B, H, HV, K, V, SLOTS = 2, 2, 4, 8, 8, 4
SHAPES = dict(
    q=(B, 1, H, K),
    k=(B, 1, H, K),
    v=(B, 1, HV, V),
    out=(B, 1, HV, V),
    state=(SLOTS, HV, K, V),
    logits=(B, 1, HV),
    per_head=(HV,),
)
CALLS = 1000


def fake(name):
    return on_device({name: np.zeros(SHAPES[name], np.float32)})[name]


class Recorder(Launcher):
    """A device whose launches are told by all that they are given."""

    def bring(self, x, name, dtype):
        if isinstance(x, FakeArray) and dtype in (None, x.dtype):
            return x
        y = FakeArray(x)
        y.address = "copied", name, x.tobytes() if isinstance(x, np.ndarray) else x.address
        return y

    def empty(self, shape, dtype, name):
        x = FakeArray(np.empty(shape, dtype))
        x.address = "made", name
        return x

    def launch(self, launch, arrays):
        self.asked.append(self.told(launch, arrays))

    def repeated(self, launch, arrays):
        told = self.told(launch, arrays)
        return lambda: self.asked.append(told)

    def prepare(self, launches):
        pass

    @staticmethod
    def told(launch, arrays):
        given = {n: arrays[n] and (arrays[n].address, arrays[n].shape) for n in launch.arrays()}
        arguments = [(type(x), given.get(x, x)) for x in launch.arguments]
        return launch.entry, launch.defines, launch.grid, launch.shared, arguments


class Caller:
    """Draws calls, of which many are the one before, from few arrays that come and go."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.arrays = {name: [fake(name) for _ in range(2)] for name in SHAPES}
        self.of_others = {name: self.others(name) for name in ("beta", "g", "state_indices")}
        self.start()

    def others(self, name):
        """Return what may be given beside arrays that are always there."""
        logits, per_head = (self.random.choice(self.arrays[n]) for n in ("logits", "per_head"))
        number, indices = self.random.choice([1.0, 2.0]), np.arange(B)
        bounded = cd.SigmoidGate(logits, per_head, None, -number)
        return dict(
            beta=[fake("logits"), cd.SigmoidBeta(logits), cd.SigmoidBeta(logits, number)],
            g=[None, logits, cd.SoftplusGate(logits, per_head, per_head), bounded],
            state_indices=[FakeArray(indices), FakeArray(indices.astype(np.int32)), indices],
        )[name]

    def start(self):
        """Have a right call next, of arrays as they were made."""
        for name, arrays in self.arrays.items():
            for x in arrays:
                x.shape = SHAPES[name]
        named = {name: self.random.choice(x) for name, x in self.of_others.items()}
        if isinstance(named["state_indices"], np.ndarray):
            named["state_indices"][:] = range(B)
        usual = {n: self.random.choice(self.arrays[n]) for n in ("q", "k", "v", "out", "state")}
        self.call = usual | named | dict(scale=None, qk_l2norm=False, state_layout="kv")

    def change(self):
        """Change nothing, or one thing that a caller can."""
        call, choose = self.call, self.random.choice
        name = choose(["q", "k", "v", "out", "state", "beta", "g", "state_indices"])
        what, options = choose(["array", "array", "none", "shape", "copy", "gone", "option"]), {}
        if what == "array":
            call[name] = choose(self.arrays.get(name) or self.of_others[name])
        elif what == "none":
            call[name] = None
        elif what == "shape" and isinstance(call[name], FakeArray):
            call[name].shape = tuple(self.random.sample(call[name].shape, call[name].ndim))
        elif what == "copy" and isinstance(call[name], FakeArray):
            call[name] = copy.copy(call[name])
        elif what == "gone" and name in self.arrays:
            self.arrays[name][0], call[name] = fake(name), choose(self.arrays[name])
        elif what == "gone":
            self.of_others[name] = self.others(name)
            call[name] = choose(self.of_others[name])
        elif what == "option":
            options["scale"] = [None, 1, 1.0, True, np.float32(1), -0.0, [1]]
            options["qk_l2norm"] = [False, True, np.True_, 1]
            options["state_layout"] = ["kv", "vk", None]
            name = choose(list(options))
            call[name] = choose(options[name])
        if isinstance(call["state_indices"], np.ndarray):
            call["state_indices"][0] = choose([0, 1, SLOTS])


def outcome(device, call):
    device.asked.clear()
    try:
        result = cd.delta_rule_step(**call) is call["out"]
    except (TypeError, ValueError) as error:
        result = type(error), str(error)
    return result, list(device.asked)


@pytest.mark.parametrize("seed", [1, 2])
def test_steps_are_as_if_there_had_been_none_before(monkeypatch, seed):
    stand_in_for_cupy(monkeypatch)
    device, caller, found = Recorder(), Caller(seed), []
    monkeypatch.setattr(operators, "backend_for", lambda kind: cuda_operators)
    monkeypatch.setattr(cuda_operators, "device_of", lambda x: device)
    find = repeated.find
    monkeypatch.setattr(repeated, "find", lambda *x: found.append(find(*x)) or found[-1])
    right, got = 0, (None, [])
    for _ in range(CALLS):
        if not got[1] and caller.random.random() < 0.6:
            caller.start()
        elif caller.random.random() < 0.4:
            caller.change()
        got = outcome(device, caller.call)
        with monkeypatch.context() as nothing_kept:
            nothing_kept.setattr(repeated, "_kept", {})
            nothing_kept.setattr(problem, "_steps_that_passed", problem.PassedCalls())
            assert got == outcome(device, caller.call), caller.call
        right += bool(got[1])
    assert right > CALLS / 2
    assert sum(x is not None for x in found) > CALLS / 5
