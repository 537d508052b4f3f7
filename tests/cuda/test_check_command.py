"""What the command `check` would find on a GPU, and that it expects of one what runs there."""

import itertools

import pytest
from emulator import HOPPER

from cupy_delta.commands import check

# The fast ones: every operation, and the forward with a gate per channel.
FAST = {
    "chunk",
    "chunk, channel gate",
    "recurrent",
    "step, indexed pool",
    "building blocks",
    "transfer",
    "gradients",
}

# Compute capability 9.0 has kernels of its own for 16-bit types: of these one goes there, in turns.
HALVES = [("float16", "bfloat16"), ("bfloat16", "float16")]
CALLS = [
    pytest.param(case, dtype, sm, marks=[pytest.mark.fast] * (case.name in FAST))
    for case, (here, there) in zip(check.CASES, itertools.cycle(HALVES), strict=False)
    for dtype, sm in (("float64", 80), ("float32", 80), (here, 80), (there, 90))
]
# The same calls as in the operators' tests, which run on both.
LEGS = ["source"]


class OnGpu:
    """The device of the command `check`, for arrays that only count as being on a GPU."""

    name = "gpu"

    def to(self, x):
        return x

    back = to


def test_every_type_is_called():
    assert {call.values[1] for call in CALLS} == set(check.BOUNDS)


def test_every_operation_is_called_while_one_works():
    operators = {x.operator for x in check.CASES if x.name in FAST}
    assert {x.split()[-1] for x in operators} == {x.operator.split()[-1] for x in check.CASES}


@pytest.mark.parametrize(
    ("case", "dtype", "sm"), CALLS, ids=lambda x: x.name if hasattr(x, "name") else None
)
def test_cases_of_the_check_command(emulated, on_reference, monkeypatch, case, dtype, sm):
    """All that the command expects of a GPU runs there, and within its bounds."""
    if sm == 90:
        emulated(**HOPPER)
    if check._only_on_cpu(case, dtype):
        with pytest.raises(NotImplementedError):
            check._error(case, dtype, OnGpu(), 0)
        return
    exact = check._exact
    monkeypatch.setattr(check, "_exact", lambda *args: on_reference(exact, *args))
    error, not_finite = check._error(case, dtype, OnGpu(), 0)
    assert error <= case.bound(dtype) and not_finite is None
