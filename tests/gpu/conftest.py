"""What the tests on a GPU share."""

import pytest


@pytest.fixture(scope="module")
def cupy():
    import cupy

    if not cupy.is_available():
        pytest.fail("these tests need an NVIDIA GPU")
    return cupy
