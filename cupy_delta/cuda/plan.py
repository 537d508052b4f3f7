"""The plan of a call: from the first family of kernels that computes it, and kept with the call."""

from __future__ import annotations

from dataclasses import replace

from ..call import Call
from .families import family_for
from .spec import DeviceFacts, Halves, Plan, Tells
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
    found = through_raw(in_units(found, call) if call.dtype.name == "float16" else found, call)
    # Of a gate per key channel g is as much as all else that is kept: it is formed again.
    return formed(found, call, ("g",)) if call.gate == "channel" else found


def plan_with_residuals(call: Call, facts: DeviceFacts) -> tuple[Plan, tuple[str, ...]]:
    """Return the plan of the forward for gradients, and the names of what the backward reads of it.

    What the backward would refuse is refused here.
    """
    key = ("with residuals", facts)
    found = call.kept.get(key)
    if found is None:
        backward, training = plan("backward", call, facts), plan("training", call, facts)
        found = call.kept[key] = training, residuals_of(backward, training)
    return found


def residuals_of(backward: Plan, *training: Plan) -> tuple[str, ...]:
    """Return the names of what a backward reads of the arrays of a forward."""
    there = {name for one in training for name, *_ in one.read + one.made}
    return tuple(name for name, _ in backward.read if name in there)


def halves(operation: str, call: Call, facts: DeviceFacts, tells: Tells) -> Halves | None:
    """Return the plan of an operation on sequences that go on elsewhere, if there is one.

    Not for gradients of float16: their unit would depend on what enters.
    """
    family = family_for(operation, call, facts)
    in_float16 = operation != "forward" and call.dtype.name == "float16"
    if operation not in family.halves or in_float16:
        return None
    key = (operation, facts, tells)
    found = call.kept.get(key)
    if found is None:
        first, second = family.halves[operation](call, facts, tells)
        if operation == "backward":
            second = through_raw(second, call)
        else:
            first = _formed_before(first, second, call)
        found = call.kept[key] = Halves(first, second)
    return found


def residuals_of_halves(call: Call, facts: DeviceFacts, tells: Tells) -> tuple[str, ...]:
    """Return the names of what the backward reads of a forward in halves."""
    key = ("residuals of halves", facts, tells)
    found = call.kept.get(key)
    if found is None:
        training = halves("training", call, facts, tells) or ()
        found = call.kept[key] = residuals_of(plan("backward", call, facts), *training)
    return found


def _formed_before(first: Plan, second: Plan, call: Call) -> Plan:
    """Return the first half with what forms the g and beta that either half reads."""
    alone = Plan((*first.launches, *second.launches), {})
    both = formed(alone, call)
    forming = both.launches[: len(both.launches) - len(alone.launches)]
    workspace = first.workspace | both.workspace
    return replace(first, launches=(*forming, *first.launches), workspace=workspace)
