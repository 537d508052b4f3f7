"""The CUDA platform without a GPU: planned for one, or run with nothing but the device swapped."""

import contextlib
import ctypes
import re

import emulator
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta as cd
from cupy_delta import jax as cdj
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.jax import cuda, ffi, host, platforms
from cupy_delta.jax.work import work_of

FACTS = {"8.0": DeviceFacts(108, 163 * 1024, (8, 0)), "9.0": DeviceFacts(132, 227 * 1024, (9, 0))}


class EmulatedDevice(emulator.EmulatorDevice):
    """What `CupyDevice` is besides: buffers of XLA are copied into emulated memory and back."""

    loaded = 0

    def load(self, launches):
        self.loaded += 1
        self.prepare(launches)

    @contextlib.contextmanager
    def stream(self, address):
        assert address == STREAM
        self.borrowed = []
        yield
        for memory, x in self.borrowed:
            memory[...] = x

    def borrow(self, address, nbytes):
        memory = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)
        self.borrowed.append((memory, emulator.copy_in(memory)))
        return self.borrowed[-1][1]


STREAM = 12345


@pytest.fixture
def emulated(monkeypatch):
    """Run the CUDA platform's calls on the CPU platform, and return the device."""
    device = EmulatedDevice()
    monkeypatch.setattr(cuda, "devices", lambda: {0: device})
    monkeypatch.setattr(cuda, "facts", lambda: device.facts)
    monkeypatch.setattr(platforms, "available", lambda: {"cpu": cuda})
    monkeypatch.setattr(ffi.Context, "device", lambda self: 0)
    monkeypatch.setattr(ffi.Context, "stream", lambda self: STREAM)
    jax.clear_caches()
    yield device
    jax.clear_caches()


def close(found, expected, tolerance):
    for x, y in zip(found, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


@pytest.mark.parametrize("gate", [None, "scalar"])
def test_outputs_and_gradients(emulated, gate):
    args, kwargs = make_inputs(
        40,
        H=2,
        G=2,
        K=16,
        V=16,
        gate=gate,
        cu_seqlens=[0, 0, 33, 40],
        initial=True,
        dtype=np.float32,
    )
    ends = kwargs.pop("cu_seqlens")
    expected = cd.chunk_delta_rule_fwd(*args, cu_seqlens=ends, qk_l2norm=True, **kwargs)
    do = np.random.default_rng(1).standard_normal(expected.o.shape).astype(np.float32)
    dfinal = np.ones_like(expected.final_state)

    def call(arrays):
        found = cdj.chunk_delta_rule(**arrays, cu_seqlens=ends, qk_l2norm=True)
        return (found.o * do).sum() + found.final_state.sum(), found

    arrays = dict(zip(cd.DeltaRuleGradients._fields, (*args, kwargs["initial_state"]), strict=True))
    arrays = {name: x for name, x in arrays.items() if x is not None}
    close(jax.jit(call)(arrays)[1], expected[:2], 1e-5)
    gradients, found = jax.jit(jax.grad(call, has_aux=True))(arrays)
    close(found, expected[:2], 1e-5)
    of_numpy = cd.chunk_delta_rule_bwd(expected.residuals, do, dfinal)._asdict()
    close(gradients.values(), (of_numpy[name] for name in gradients), 1e-5)
    assert emulated.loaded == 3  # once each: forward, forward with residuals, backward


def test_a_gate_and_beta_in_16_bits(emulated):
    args, _ = make_inputs(20, K=16, V=16, gate="scalar", dtype=ml_dtypes.bfloat16)
    close(jax.jit(cdj.chunk_delta_rule)(*args), cd.chunk_delta_rule(*args), 2e-2)


def test_recurrent_and_step_in_place(emulated):
    args, _ = make_inputs(3, B=2, K=16, V=16, beta_per_value=True, dtype=np.float32)
    close(jax.jit(cdj.recurrent_delta_rule)(*args), cd.recurrent_delta_rule(*args), 1e-6)
    args, _ = make_inputs(3, B=2, K=16, V=16, dtype=np.float32)
    pool = np.ones((3, 1, 16, 16), np.float32)
    given, indices = jnp.array(pool), np.array([2, -1], np.int32)
    before = given.unsafe_buffer_pointer()
    step = jax.jit(cdj.delta_rule_step, donate_argnames="state")
    o, state = step(*args, state=given, state_indices=indices)
    assert state.unsafe_buffer_pointer() == before
    close([o], [cd.delta_rule_step(*args, state=pool, state_indices=indices)], 1e-6)
    close([state], [pool], 1e-6)
    assert not np.asarray(o[1]).any()


def test_kernels_are_loaded_when_a_program_is_there_and_not_when_it_runs(emulated):
    args, _ = make_inputs(20, K=16, V=16, dtype=np.float32)
    program = jax.jit(cdj.chunk_delta_rule).lower(*args[:4])
    assert emulated.loaded == 0
    program = program.compile()
    assert (emulated.loaded, emulated.launches) == (1, [])
    for _ in range(2):
        jax.block_until_ready(program(*args[:4]))
    assert emulated.loaded == 1 and emulated.launches


def test_an_error_of_a_launch_keeps_its_text(emulated, monkeypatch):
    args, _ = make_inputs(20, K=16, V=16, dtype=np.float32)
    monkeypatch.setattr(emulated, "launch", lambda *_: 1 / 0)
    error = getattr(jax.errors, "JaxRuntimeError", None) or Exception
    with pytest.raises(error, match="INTERNAL: ZeroDivisionError: division by zero"):
        jax.block_until_ready(jax.jit(cdj.chunk_delta_rule)(*args[:4]))


# ---- planned for a GPU ---------------------------------------------------------------------------


@pytest.fixture(params=FACTS)
def planned(monkeypatch, request):
    """Let this process believe that it has a GPU."""
    monkeypatch.setattr(cuda, "facts", lambda: FACTS[request.param])
    monkeypatch.setattr(platforms, "available", lambda: platforms.BACKENDS)
    jax.clear_caches()
    yield
    jax.clear_caches()


def lowered(function, *args):
    """The works that XLA gets for CUDA."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    # JAX 0.5 has other platforms' calls in the text as well, in a branch that is not taken.
    found = re.findall(rf'custom_call @{ffi.name_of(cuda)}\(.*?work = "(.*?)"', text)
    works = [work_of(x.replace(r"\22", '"').encode()) for x in found]
    return works


def test_all_that_a_plan_makes_is_a_result(planned):
    args, _ = make_inputs(300, H=2, G=2, K=64, V=64, dtype=ml_dtypes.bfloat16)

    def value(v):
        return cdj.chunk_delta_rule(*args[:2], v, args[3]).o.astype(jnp.float32).sum()

    works = lowered(jax.grad(value), args[2])
    assert [work.function for work in works] == ["chunk_delta_rule_fwd", "chunk_delta_rule_bwd"]
    for work in works:
        plan = cuda.plan_of(work.function, work.call)
        assert {x.name for x in work.targets} == {name for name, *_ in plan.made}
        given = {x.name for x in work.sources}
        absent = {"g", "cu_seqlens", "initial_state"}
        assert given == {name for name, _ in plan.read} - absent


def test_integers_go_as_words_of_64_bits(planned):
    args, _ = make_inputs(90, H=2, K=16, V=16, dtype=np.float32)

    def call(ends):
        return cdj.chunk_delta_rule(*args[:4], cu_seqlens=ends).o

    (work,) = lowered(call, np.array([0, 40, 90]))
    (ends,) = (x for x in work.sources if x.name == "cu_seqlens")
    assert (ends.shape, ends.dtype) == ((3, 2), np.int32)
    words = np.asarray(cuda._as_read(jnp.array([5, -1, 2**31 - 1]), np.dtype(np.int64)))
    assert words.view(np.int64).ravel().tolist() == [5, -1, 2**31 - 1]


def test_what_the_kernels_lack_is_refused_by_name(planned, monkeypatch):
    monkeypatch.setattr(platforms, "default_platform", lambda: "cuda")
    args, _ = make_inputs(20, K=16, V=300, gate="channel", dtype=np.float32)
    with pytest.raises(NotImplementedError, match="V = 300"):
        jax.jit(cdj.chunk_delta_rule)(*args)
    with pytest.raises(NotImplementedError, match="K = 300"):
        cdj.chunk_delta_rule(*make_inputs(20, K=300, V=16, dtype=np.float32)[0])


def test_where_arrays_are_on_the_cpu_by_default_it_computes_what_the_kernels_lack(planned):
    args, _ = make_inputs(20, K=300, V=16, gate="channel", dtype=np.float32)

    def value(v):
        return (cdj.chunk_delta_rule(*args[:2], v, *args[3:]).o ** 2).sum()

    forward = cd.chunk_delta_rule_fwd(*args)
    expected = cd.chunk_delta_rule_bwd(forward.residuals, 2 * forward.o).v
    found = jax.jit(jax.grad(value))(args[2])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_default_platform_is_what_jax_is_told():
    assert platforms.default_platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert platforms.default_platform() == "cpu"


def test_the_cpu_of_a_process_with_a_gpu(planned):
    """Residuals are the GPU's there; on the CPU the gradients are the same without them."""
    args, _ = make_inputs(70, H=2, G=2, K=16, V=16, dtype=np.float32)

    def value(v):
        return (cdj.chunk_delta_rule(*args[:2], v, args[3]).o ** 2).sum()

    found = jax.jit(jax.grad(value))(args[2])
    forward = cd.chunk_delta_rule_fwd(*args)
    expected = cd.chunk_delta_rule_bwd(forward.residuals, 2 * forward.o).v
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_devices_that_differ_have_the_portable_kernels_in_common(monkeypatch):
    class Device:
        def __init__(self, facts):
            self.facts = facts

    def common(*names):
        devices = {i: Device(FACTS[name]) for i, name in enumerate(names)}
        monkeypatch.setattr(cuda, "devices", lambda: devices)
        return cuda.facts.__wrapped__()

    assert common("9.0", "9.0") == FACTS["9.0"]
    assert common("9.0", "8.0") == DeviceFacts(108, 163 * 1024, (8, 0))


def test_a_gpu_without_cupy_is_said(monkeypatch):
    monkeypatch.setattr(platforms, "_has_cuda", lambda: True)
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: None)
    assert platforms.available.__wrapped__() == {"cpu": host}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert platforms.default_platform() == "cuda"
    with pytest.raises(ImportError, match=r"CuPy, which is not installed: .*cupy-cuda12x"):
        platforms.available.__wrapped__()
