"""The plan of a call: from the first family of kernels that computes it, and kept with the call."""

from __future__ import annotations

from ..call import Call
from .families import family_for
from .spec import DeviceFacts, Plan
from .tokens.pool import on_pool
from .tokens.raw import formed, through_raw
from .tokens.units import in_units


def plan(operation: str, call: Call, facts: DeviceFacts) -> Plan:
    """Return the plan of an operation, the same one for all calls that are alike."""
    key = (operation, facts)
    found = call.kept.get(key)
    if found is None:
        found = call.kept[key] = made(operation, call, facts)
    return found


def made(operation: str, call: Call, facts: DeviceFacts) -> Plan:
    """Make a plan, or refuse what no kernel does."""
    found = family_for(operation, call, facts).plans[operation](call, facts)
    for launch in found.launches:
        if launch.shared > facts.shared_bytes:
            raise NotImplementedError(
                f"chunk_size = {dict(launch.defines)['CHUNK']}: {launch.entry} would need"
                f" {launch.shared} bytes of shared memory per block, this GPU has"
                f" {facts.shared_bytes}; a smaller chunk_size works"
            )
    if operation == "forward":
        found = on_pool(found, call)
    if operation != "backward":
        return formed(found, call)
    return through_raw(in_units(found, call) if call.dtype.name == "float16" else found, call)


def plan_with_residuals(call: Call, facts: DeviceFacts) -> tuple[Plan, tuple[str, ...]]:
    """Return the plan of the forward for gradients, and the names of what the backward reads of it.

    What the backward would refuse is refused here.
    """
    key = ("with residuals", facts)
    found = call.kept.get(key)
    if found is None:
        backward, training = plan("backward", call, facts), plan("training", call, facts)
        there = {name for name, *_ in training.read + training.made}
        names = tuple(name for name, _ in backward.read if name in there)
        found = call.kept[key] = training, names
    return found
