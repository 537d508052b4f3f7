"""The end of a process that has computations under way, which JAX starts and does not wait for.

A thread of XLA that wants to call Python when Python has come to its end is ended itself. XLA's
client waits for all of its threads when it is taken away, so it would wait for that one forever.
"""

from __future__ import annotations

import atexit
import ctypes
from contextlib import suppress
from functools import cache

import jax


@cache
def end_well(platform: str) -> None:
    """Make the end of this process wait for a platform's arrays, and leave its client alone."""
    atexit.register(_end, platform)


def _end(platform: str) -> None:
    # Nobody can see what is no array any more, so that is not waited for: its thread may end, and
    # with one more reference, never given back, the client does not ask after it.
    client = jax.devices(platform)[0].client
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))
    for array in jax.live_arrays(platform):
        with suppress(Exception):  # of the computation, which nobody has asked for
            array.block_until_ready()
