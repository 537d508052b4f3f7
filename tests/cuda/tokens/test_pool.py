"""Copies between the slots of a pool and an array of states: how wide their accesses are."""

import pytest

from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda.tokens.pool import pool_states_launch

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("pool", "alignment", "V", "vector"),
    [
        ("float32", 16, 8, 4),
        ("float32", 8, 8, 1),
        ("bfloat16", 8, 8, 4),
        ("bfloat16", 4, 8, 1),
        ("float32", 16, 9, 1),
    ],
)
def test_no_access_reaches_over_the_alignment_of_slots(pool, alignment, V, vector):
    call = Call(
        dtype=FLOAT_DTYPES["bfloat16"],
        **dict(B=1, T=70, N=1, H=1, HV=1, K=2, V=V),
        pool_dtype=FLOAT_DTYPES[pool],
        pool_alignment=alignment,
    )
    for states in ("initial_state", "final_state"):
        launch = pool_states_launch(call, states)
        assert dict(launch.defines)["VECTOR"] == vector
        assert launch.grid == 1
