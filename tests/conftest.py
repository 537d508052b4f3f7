"""Settings for the whole suite: repeatable property tests, and asserts that explain themselves."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).resolve().parent
COMPILING = ("cuda", "emulator", "gpu", "jax")

pytest.register_assert_rewrite("calls", "helpers", "strengths")


def pytest_addoption(parser):
    parser.addoption(
        "--on-gpu", action="store_true", help="run tests/cuda on CuPy arrays, not emulated"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what `pytest -m fast` runs.

    That is every test but slow ones and those of folders in which kernels or programs are compiled,
    and of these the files that say so.
    """
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in COMPILING and not item.get_closest_marker("slow"):
            item.add_marker("fast")


# The same examples in every run and on every machine: a red run can be repeated by anyone.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# More and other examples, for a search by hand: pytest --hypothesis-profile=search
settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("repeatable")
