"""The CUDA platform: a custom call launches the kernels of a plan, on XLA's stream and buffers.

Everything a plan needs besides its inputs and outputs is a further result of the call, so that XLA
allocates it. Kernels are compiled and loaded when XLA has a program. What is left for running it,
or for capturing it in a command buffer, are the launches.
"""

from __future__ import annotations

from functools import cache, lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from ..call import Call
from ..cuda.plan import plan, plan_with_residuals
from ..cuda.runtime.sources import digest, kernel_folder
from ..cuda.spec import DeviceFacts, Plan
from .work import BACKWARD, FORWARD, RECURRENT, STEP, WHOLE, Buffer, Work

NAME = "cuda"
OPERATIONS = {
    WHOLE: "forward",
    FORWARD: "training",
    BACKWARD: "backward",
    RECURRENT: "recurrent",
    STEP: "step",
}


def contract() -> tuple[str, ...]:
    return (digest(kernel_folder()),)


@cache
def devices() -> dict:
    """Return this process's devices by CUDA's numbers."""
    from ..cuda.operators import device_by_index

    found = (x.local_hardware_id for x in jax.local_devices(backend="cuda"))
    return {index: device_by_index(index) for index in found}


@cache
def facts() -> DeviceFacts:
    """Return what programs are planned for, so that they run on any of this process's devices.

    Devices of different architectures have the portable kernels in common.
    """
    each = [device.facts for device in devices().values()]
    capabilities = {x.capability for x in each}
    return DeviceFacts(
        sm_count=min(x.sm_count for x in each),
        shared_bytes=min(x.shared_bytes for x in each),
        capability=capabilities.pop() if len(capabilities) == 1 else (8, 0),
    )


def plan_of(function: str, call: Call) -> Plan:
    return plan(OPERATIONS[function], call, facts())


def check(function: str, call: Call) -> None:
    plan_of(function, call)
    if function == FORWARD:
        residuals(call)


def residuals(call: Call) -> tuple[Buffer, ...]:
    """What of the forward's arrays the backward reads."""
    planned, names = plan_with_residuals(call, facts())
    return tuple(Buffer(*x) for x in planned.made if x[0] in names)


def trace(bind, function: str, call: Call, arrays: dict, results: tuple[Buffer, ...]) -> dict:
    planned = plan_of(function, call)
    sources = {name: _as_read(arrays[name], of) for name, of in planned.read if name in arrays}
    targets = [Buffer(*x) for x in planned.made]
    targets += [x for x in results if x.name == "state"]
    made = bind(sources, tuple(targets))
    return {x.name: made[x.name].astype(x.dtype) for x in results}


def _as_read(x, dtype: np.dtype | None):
    """Return `x` in the dtype that kernels read, or the bytes of that."""
    if dtype is None or x.dtype == dtype:
        return x
    if dtype == np.int64:
        # JAX may have no 64-bit integers: the low word, and a high one that copies the sign.
        return jnp.stack([x, x >> 31], axis=-1)
    return x.astype(dtype)


def holder(address: int) -> int:
    """Return the number of the device that has some memory."""
    import cupy

    return cupy.cuda.runtime.pointerGetAttributes(address).device


def prepare(work: Work) -> None:
    """Compile the kernels, and load them on every device of this process."""
    for index in devices():
        _prepared(index, work)


@lru_cache(4096)
def _prepared(index: int, work: Work) -> Plan:
    planned, device = plan_of(work.function, work.call), devices()[index]
    with device:
        device.load(planned.working)
    return planned


def run(work: Work, sources: list[int], targets: list[int], context) -> None:
    index = context.device()
    if index is None:
        index = holder(next(filter(None, targets)))
    device, planned = devices()[index], _prepared(index, work)
    arrays: dict = dict.fromkeys(name for name, _ in planned.read)
    buffers = zip((*work.sources, *work.targets), (*sources, *targets), strict=True)
    with device, device.stream(context.stream()):
        for x, address in buffers:
            arrays[x.name] = device.borrow(address, x.nbytes)
        for launch in planned.working:
            device.launch(launch, arrays)
