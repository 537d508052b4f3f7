"""What is asked for ahead and what nobody needs again, on both legs.

Lines that are asked for need an address in some array.
"""

from pathlib import Path

import numpy as np
import pytest
from emulator import EmulatorFault, Kernel, copy_in, empty

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


def asked_for(leg, size):
    x = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    y = empty((1728,), np.uint8, "y")
    Kernel(SOURCE, "asked_for", leg=leg).launch(1, 32, 0, [y, copy_in(x, "x")])
    return x, y


@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_loads_and_stores_of_every_size(leg):
    x, y = asked_for(leg, 1728)
    assert np.array_equal(x, y)


@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_a_load_outside_is_found(leg):
    with pytest.raises(EmulatorFault, match="read of 2 bytes, 0 bytes past the end of 'x'"):
        asked_for(leg, 1726)
