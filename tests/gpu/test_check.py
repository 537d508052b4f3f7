"""`check` passes on a healthy GPU, whatever its seed."""

import pytest

from cupy_delta.commands import check
from cupy_delta.commands.console import Device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_hardest_case_is_within_its_bounds(dtype):
    case = next(case for case in check.CASES if case.correlation)
    device = Device("gpu")
    errors = [check._error(case, dtype, device, seed)[0] for seed in range(400)]
    assert max(errors) <= case.bound(dtype)
