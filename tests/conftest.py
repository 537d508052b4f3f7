"""Settings for the whole suite: repeatable property tests, and asserts that explain themselves."""

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("calls", "helpers")


def pytest_addoption(parser):
    parser.addoption(
        "--on-gpu", action="store_true", help="run tests/cuda on CuPy arrays, not emulated"
    )


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
