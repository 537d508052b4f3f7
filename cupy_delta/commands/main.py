"""The command line: arguments in, exit status out; every error is one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from ..version import __version__

COMMANDS = ("info", "check", "bench", "demo", "run", "compile")

EPILOG = """\
exit status: 0 success, 1 a check failed, 2 wrong arguments or nothing could be done,
130 interrupted. Errors are one line; --traceback shows where they came from.
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
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.function(args) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away; give the interpreter nothing left to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.traceback:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"cupy_delta {args.command}: {text}", file=sys.stderr)
        return 2


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
        summary = (module.__doc__ or name).strip().splitlines()[0]
        sub = subparsers.add_parser(name, help=summary, description=summary)
        sub.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        module.add_arguments(sub)
        sub.set_defaults(function=module.run_command)
    return parser
