"""From a plan and a problem's arrays to launches on a device."""

from __future__ import annotations

from collections.abc import Mapping

from ... import workspace
from ..spec import Device, Plan

NONE: Mapping = {}


def execute(
    plan: Plan, given: Mapping, device: Device, targets: Mapping = NONE, ready: Mapping = NONE
) -> dict:
    """Run a plan.

    Parameters
    ----------
    plan : Plan
    given : mapping
        The arrays that the plan reads by name, None where absent: as callers gave them.
    device
        A `CupyDevice`, or the emulator's.
    targets : mapping, optional
        Arrays of the caller that are written, by name; None is as good as absent.
    ready : mapping, optional
        Arrays that lie on the device as kernels read them, instead of those in `given`.

    Returns
    -------
    dict
        All arrays by name, as the kernels saw them.
    """
    arrays, stand_ins = dict(ready), []
    for name, x in targets.items():
        if x is not None:
            arrays[name] = y = device.target(x, name)
            if y is not x:
                stand_ins.append((x, y))
    kept = workspace.current()
    for name, dtype in plan.read:
        if name not in arrays:
            x = given[name]
            if kept is not None and x is not None and kept.name_of(x) in plan.made_names:
                x = device.apart(x, name)
            arrays[name] = None if x is None else device.bring(x, name, dtype)
    for name, shape, dtype in plan.made:
        if targets.get(name) is None:
            make = device.zeros if name in plan.zeroed else device.empty
            arrays[name] = make(shape, dtype, name)
    device.prepare(plan.working)
    for launch in plan.working:
        device.launch(launch, arrays)
    for x, y in stand_ins:
        x[...] = y
    return arrays
