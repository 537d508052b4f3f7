"""Other array libraries on the CPU, of which JAX believes that it has four."""

import os

import pytest

# Read by JAX when it first looks for devices, which no other folder of tests makes it do.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"


@pytest.fixture
def x64():
    """Let JAX have 64-bit numbers."""
    import jax

    with (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True):
        yield
