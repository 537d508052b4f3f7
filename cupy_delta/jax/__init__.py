"""The delta rule on JAX arrays, in compiled programs on CPUs and CUDA GPUs.

Importing this imports JAX, 0.5 or newer: the extra ``jax``. On GPUs it needs CuPy as well, the
extra ``cuda12`` or ``cuda13``. docs/jax.md tells how it works.
"""

try:
    from jax.ffi import ffi_call as _needed  # noqa: F401
except ImportError as error:
    from ..extras import EXTRAS, install_command

    raise ImportError(
        f"cupy_delta.jax needs JAX 0.5 or newer ({error}): {install_command(*EXTRAS['jax'])}"
    ) from error

from . import platforms, raw
from .operators import chunk_delta_rule, delta_rule_step, recurrent_delta_rule

platforms.register()
raw.register()

__all__ = ["chunk_delta_rule", "delta_rule_step", "recurrent_delta_rule"]
