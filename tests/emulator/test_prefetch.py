"""Lines that are asked for ahead: no access, but of an address in some array, on both legs."""

from pathlib import Path

import numpy as np
import pytest
from emulator import EmulatorFault, Kernel, empty

SOURCE = Path(__file__).resolve().parent / "kernels" / "prefetch.cu"


def launch(leg, shift):
    x = empty((64,), np.float32, "x")
    Kernel(SOURCE, "asked_ahead", leg=leg).launch(1, 64, 0, [x, np.int32(shift)])
    return x


@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_what_is_asked_for_is_neither_read_nor_raced_for(leg):
    assert np.array_equal(launch(leg, 0), np.arange(64)[::-1])


@pytest.mark.parametrize("leg", ["source", "ptx"])
@pytest.mark.parametrize(
    ("shift", "words"),
    [(1, "prefetch of 0 bytes past the end of 'x' (256 bytes)"), (-1, "4 bytes before 'x'")],
)
def test_an_address_outside_is_found_and_located(leg, shift, words):
    with pytest.raises(EmulatorFault) as caught:
        launch(leg, shift)
    assert caught.value.kind == "out-of-bounds"
    assert words in str(caught.value)
    # What NVRTC makes names the primitive's own line.
    assert ("prefetch.cu:8" if leg == "source" else "prefetch.cuh:") in str(caught.value)
