"""Ranks that are threads: what they give away is theirs again, and whose error is whose."""

import numpy as np
import pytest

from cupy_delta import parallel


@pytest.mark.parametrize("what", ["all_gather", "shift"])
def test_an_array_may_change_once_the_call_has_returned(what):
    def call(communicator):
        right = True
        for turn in range(30):
            x = np.full(1_000_000, float(turn))
            found = communicator.all_gather(x) if what == "all_gather" else communicator.shift(x, 1)
            x[:] = -1
            right = right and (found is None or bool((found == turn).all()))
        return right

    assert parallel.in_threads(3, call, 30) == [True] * 3
