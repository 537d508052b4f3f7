"""Hundreds of acts of an engine on the kernels of both architectures."""

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER
from schedules import Schedule

LEGS = ["source"]
BF16 = np.dtype(ml_dtypes.bfloat16)
# Relative to the largest output and the largest element of a state.
BOUNDS = (2e-2, 2e-2)


@pytest.mark.parametrize(
    ("facts", "gate", "pool", "chunk"),
    [({}, None, np.float32, 32), (HOPPER, "scalar", BF16, 64)],
    ids=["portable", "hopper"],
)
def test_schedules(emulated, facts, gate, pool, chunk):
    emulated(**facts)
    sizes = dict(K=16, V=8, chunk=chunk, every=chunk, most=70)
    schedule = Schedule(3, dtype=BF16, pool_dtype=pool, bounds=BOUNDS, gate=gate, **sizes)
    schedule.run(150)
    assert min(schedule.done.values()) > 10
