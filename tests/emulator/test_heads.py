"""Which head of which sequence a block that decodes has: a division by a product."""

from pathlib import Path

import numpy as np
import pytest
from emulator import Kernel, copy_in, empty

SOURCE = Path(__file__).resolve().parent / "kernels" / "heads.cu"


@pytest.mark.parametrize("HV", [1, 2, 3, 7, 32, 48, 65535])
def test_sequence_and_head(HV):
    numbers = np.random.default_rng(HV).integers(0, 2**31, 64, np.uint32)
    numbers[:32] = HV * (numbers[:32] // HV)  # the first head of a sequence, or the last one
    numbers[1:32:2] += HV - 1
    n, hv = empty((64,), np.uint32, "n"), empty((64,), np.uint32, "hv")
    given = [n, hv, copy_in(numbers, "numbers"), np.uint32(HV), np.uint32((2**32 - 1) // HV)]
    Kernel(SOURCE, "heads").launch(1, 64, 0, given)
    assert np.array_equal(n, numbers // HV)
    assert np.array_equal(hv, numbers % HV)
