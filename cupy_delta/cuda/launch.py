"""From a plan and a problem's arrays to launches on a device."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .kernels import TensorBox
from .plan import Plan


def execute(plan: Plan, arrays: dict, device, targets: dict | None = None) -> dict:
    """Run a plan.

    Parameters
    ----------
    plan : Plan
    arrays : dict
        Input arrays by name, on the device; None where absent.
    device
        A `CupyDevice`, or the emulator's.
    targets : dict, optional
        Outputs that the caller brings, by name.

    Returns
    -------
    dict
        All arrays by name: inputs, workspace and outputs.
    """
    arrays = dict(arrays)
    for name, (shape, dtype) in (plan.workspace | plan.outputs).items():
        if targets and targets.get(name) is not None:
            arrays[name] = device.target(targets[name], name)
        elif name in plan.zeroed:
            arrays[name] = device.zeros(shape, dtype, name)
        else:
            arrays[name] = device.empty(shape, dtype, name)
    for launch in plan.launches:
        # A grid of zero would still run one block.
        if launch.grid:
            device.launch(launch, [_value(a, arrays, device) for a in launch.arguments])
    device.finish()
    return arrays


def _value(argument, arrays: dict, device):
    if isinstance(argument, str):
        return arrays.get(argument)
    if isinstance(argument, TensorBox):
        return device.tensor_map(arrays[argument.name], argument.shape, argument.box)
    return argument


def device_arrays(problem: Problem, device, names: tuple) -> dict:
    """Bring a problem's inputs to the device as the kernels read them.

    C-contiguous and aligned; beta and g in the dtype of sums; cu_seqlens and indices in int64.
    """
    wanted = dict.fromkeys(names)
    for name in ("beta", "g"):
        wanted[name] = problem.compute_dtype
    for name in ("cu_seqlens", "state_indices"):
        wanted[name] = np.dtype(np.int64)
    return {
        name: None
        if getattr(problem, name) is None
        else device.bring(getattr(problem, name), name, dtype)
        for name, dtype in wanted.items()
    }
