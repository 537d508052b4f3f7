"""Ten thousand acts of an engine on pools of NumPy arrays."""

import ml_dtypes
import numpy as np
import pytest
from schedules import Schedule

SMALL = dict(K=3, V=2, chunk=8, every=8)
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))]
)
@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_float64(seed, gate, layout):
    options = dict(dtype=np.float64, pool_dtype=np.float64, bounds=(1e-12, 1e-12))
    schedule = Schedule(seed, **options, **SMALL, gate=gate, layout=layout)
    schedule.run(250)
    assert min(schedule.done.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["float32", "float16", "bfloat16"])
def test_pools_are_rounded_once_an_act(pool):
    dtype = np.dtype(getattr(ml_dtypes, pool, pool))
    rounding = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}[pool]
    options = dict(dtype=np.float32, pool_dtype=dtype, bounds=(1e-5, rounding))
    Schedule(9, **options, **SMALL).run(1000)
