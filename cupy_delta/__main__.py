"""``python -m cupy_delta``, and the command of that name."""

import sys


def run() -> int:
    """Run one command; Ctrl-C while it is still being imported is as quiet as later."""
    try:
        from .commands import main

        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
