"""Steps on the arrays of an earlier one, which CUDA's driver launches, beside steps on others."""

import threading

import ml_dtypes
import numpy as np
import pytest

import cupy_delta as cd

pytestmark = pytest.mark.gpu
B, H, HV, D = 3, 2, 4, 64


class Steps:
    """Arrays of a step and, of the same values, a pool that other arrays advance."""

    def __init__(self, cupy, raw):
        rng = cupy.random.default_rng(0)
        normal = lambda *shape: rng.standard_normal(shape, "float32")  # noqa: E731
        bf16 = np.dtype(ml_dtypes.bfloat16)
        q, k, v = (normal(B, 1, n, D).astype(bf16) for n in (H, H, HV))
        beta, g = cupy.abs(normal(B, 1, HV)) % 1, -cupy.abs(normal(B, 1, HV))
        if raw:
            beta, g = cd.SigmoidBeta(beta.astype(bf16)), cd.SoftplusGate(g.astype(bf16), normal(HV))
        self.arrays, self.out = (q, k, v, beta, g), cupy.empty_like(v)
        self.indices = cupy.asarray([4, 0, 2])
        self.state = normal(5, HV, D, D).astype(bf16)
        self.other = self.state.copy()

    def step(self):
        options = dict(state_indices=self.indices, qk_l2norm=True)
        return cd.delta_rule_step(*self.arrays, state=self.state, out=self.out, **options)

    def advance_other(self):
        """Return the outputs of a step on the other pool, whose launch is not kept."""
        options = dict(state_indices=self.indices, qk_l2norm=True)
        return cd.delta_rule_step(*self.arrays, state=self.other, **options)

    def as_others_do(self):
        """Advance the other pool, too, and compare."""
        for x, y in ((self.advance_other(), self.out), (self.other, self.state)):
            assert bool((x.view(np.uint16) == y.view(np.uint16)).all())


@pytest.mark.parametrize("raw", [False, True])
def test_repeated_steps_are_steps(cupy, raw):
    steps = Steps(cupy, raw)
    for i in range(4):
        steps.arrays[2][...] += i  # values are none of what is kept
        assert steps.step() is steps.out
        steps.as_others_do()


def test_a_repeated_step_goes_to_the_current_stream(cupy):
    steps = Steps(cupy, True)
    steps.step()
    steps.as_others_do()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        steps.step()
        stream.begin_capture()
        steps.step()
        steps.step()
        graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    for _ in range(2):
        steps.advance_other()
    steps.as_others_do()


def test_a_repeated_step_in_a_thread_that_has_not_used_cuda(cupy):
    steps, failed = Steps(cupy, False), []

    def run():
        try:
            steps.step()
            cupy.cuda.get_current_stream().synchronize()
        except Exception as error:
            failed.append(error)

    steps.step()
    steps.as_others_do()
    cupy.cuda.Device().synchronize()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed
    steps.as_others_do()


def test_an_array_that_was_reshaped_is_refused(cupy):
    steps = Steps(cupy, False)
    steps.step()
    steps.step()
    before = steps.state.copy()
    steps.arrays[2].shape = (B, 1, D, HV)
    with pytest.raises(ValueError, match="expected"):
        steps.step()
    assert bool((before.view(np.uint16) == steps.state.view(np.uint16)).all())
    steps.arrays[2].shape = (B, 1, HV, D)
    steps.step()


def test_a_repeated_step_with_another_device_current(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    steps = Steps(cupy, True)
    steps.step()
    steps.as_others_do()
    with cupy.cuda.Device(1):
        steps.step()
        assert cupy.cuda.runtime.getDevice() == 1
    steps.as_others_do()


def test_a_gate_that_is_gone_is_not_taken(cupy):
    steps, plain = Steps(cupy, True), Steps(cupy, True)
    steps.step()
    q, k, v, beta, gate = steps.arrays
    parameters = vars(gate)  # which go on
    steps.arrays = plain.arrays = (q, k, v, beta, None)
    del gate
    plain.state = steps.state.copy()
    for one in (steps, plain):
        one.step()
    for x, y in ((steps.state, plain.state), (steps.out, plain.out)):
        assert bool((x.view(np.uint16) == y.view(np.uint16)).all())
    assert parameters["dt_bias"] is None


def test_steps_that_take_turns_on_a_pool(cupy):
    steps = Steps(cupy, False)
    outs = [steps.out, cupy.empty_like(steps.out)]
    for i in range(6):
        steps.out = outs[i % 2]
        steps.step()
        steps.as_others_do()
