"""The command line: arguments in, exit status out; every error is one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback

from .. import starting
from ..version import __version__
from .output import tell

COMMANDS = ("info", "check", "bench", "demo", "run", "compile")

EPILOG = """\
exit status: 0 success, 1 a check failed, 2 wrong arguments or nothing could be done,
3 outputs that are not finite (run, check), 130 interrupted. Errors are one line;
--traceback shows where they came from.
"""


class CommandError(Exception):
    """Something the user can mend; the message says how."""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        The exit status.
    """
    args = None
    if sys.stderr is None:  # closed; what is for people is lost, and the rest is not
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  as long as the process
    try:
        args = _parser().parse_args(argv)
        starting.hand_over()  # all is imported, and work clears up behind itself
        status = args.function(args) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except BrokenPipeError:
        _abandon_output()  # its reader went away
        return 0
    except Exception as error:
        if args is None or args.traceback:
            traceback.print_exc()
        else:
            text = " ".join(str(error).split()) or type(error).__name__
            tell(f"cupy_delta {args.command}: {text}")
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _abandon_output()  # the disk that it goes to is full
        return 2


def _abandon_output() -> None:
    """Give the interpreter nothing that it would flush, and fail to flush, at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cupy_delta",
        description="The delta rule of DeltaNet for NumPy and CuPy arrays.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cupy_delta {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __package__)
        description = (module.__doc__ or "").strip()
        sub = subparsers.add_parser(
            name,
            help=description.partition("\n")[0],  # none with python -OO
            description=description,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        module.add_arguments(sub)
        sub.set_defaults(function=module.run_command)
    return parser
