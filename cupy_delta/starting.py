"""What Ctrl-C does while a command is still being imported: what it does later, a line and 130.

Python imports the package before the module of a command, which could catch it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def hand_over() -> None:
    """Leave Ctrl-C to whoever catches it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # until Python has found the module
        return ("-m", "cupy_delta") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return os.path.basename(program) == "cupy_delta"


def _end(number, frame) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(130)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _end)
