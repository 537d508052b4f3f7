"""What is known of memory, of sixteen bytes at once or of two: no race is lost between them."""

from pathlib import Path

import numpy as np
import pytest
from emulator import Kernel, Run, empty
from planted import check_kind

SOURCE = Path(__file__).resolve().parent / "kernels" / "histories.cu"
RACES, NO_RACE = range(5), 5


def launch(which, schedule, leg):
    y = empty(2, np.uint32, "y")
    Kernel(SOURCE, "histories", leg=leg).launch(
        1, 64, 16, [y, np.int32(which)], Run(schedule=schedule)
    )


@pytest.mark.parametrize("which", RACES)
@pytest.mark.parametrize("schedule", ["ascending", "descending"])
@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_races_of_a_line_and_its_parts(leg, schedule, which):
    check_kind(lambda: launch(which, schedule, leg), "race")


@pytest.mark.parametrize("schedule", ["ascending", "descending"])
@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_neighbours_are_no_race(leg, schedule):
    launch(NO_RACE, schedule, leg)
