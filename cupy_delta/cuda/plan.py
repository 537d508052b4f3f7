"""The plan of a call: from the first family of kernels that computes it, and kept with the call."""

from __future__ import annotations

from ..call import Call
from .families import family_for
from .spec import DeviceFacts, Plan


def plan(operation: str, call: Call, facts: DeviceFacts) -> Plan:
    """Return the plan of an operation, the same one for all calls that are alike."""
    key = (operation, facts)
    found = call.kept.get(key)
    if found is None:
        found = call.kept[key] = made(operation, call, facts)
    return found


def made(operation: str, call: Call, facts: DeviceFacts) -> Plan:
    """Make a plan, or refuse what no kernel does."""
    return family_for(operation, call, facts).plans[operation](call, facts)


def names_for_backward(call: Call, facts: DeviceFacts) -> tuple[str, ...]:
    """Name the arrays of the forward that the backward reads; refuse what it would refuse."""
    key = ("names for backward", facts)
    names = call.kept.get(key)
    if names is None:
        training = plan("training", call, facts)
        there = {name for name, *_ in training.read + training.made}
        read = plan("backward", call, facts).read
        names = call.kept[key] = tuple(name for name, _ in read if name in there)
    return names
