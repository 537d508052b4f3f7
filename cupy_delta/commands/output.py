"""Files that commands write: found writable before the work, and written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, cast

STANDARD_OUTPUT = "-"
# What must find room on a disk before the work; a disk that is full has not even that.
ROOM = 4096


def check_output(path: str | None, endings: tuple[str, ...] = ()) -> None:
    """Refuse a name under which nothing could be written in the end.

    With `endings` the name must have one of them, or none at all.
    """
    from .main import CommandError

    if path is None:
        return
    if not path:
        raise CommandError("expected the name of a file to write, got ''")
    if path == STANDARD_OUTPUT:
        raise CommandError(f"{path}: expected the name of a file; only JSON goes to the output")
    ending = os.path.splitext(path)[1].lower()
    if endings and ending and ending not in endings:
        raise CommandError(f"{path}: expected a name that ends in {_one_of(endings)}, got {ending}")
    with _named(path):
        target = _target(path)
        if os.path.exists(target) and not os.access(target, os.W_OK):
            raise PermissionError("it is read-only")
        if _is_replaced(target):
            with tempfile.TemporaryFile(dir=os.path.dirname(target)) as file:
                file.write(bytes(ROOM))


def check_json(path: str | None) -> None:
    """Do as `check_output` does, for JSON, which may also go to the standard output."""
    from .main import CommandError

    if path != STANDARD_OUTPUT:
        check_output(path)
    elif sys.stdout is None:
        raise CommandError(f"{path}: the output is closed")


def check_picture(path: str | None) -> None:
    """Do as `check_output` does, for a picture that matplotlib will draw."""
    from matplotlib.backend_bases import FigureCanvasBase

    check_output(path, tuple(f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()))


def check_different(*paths: str | None) -> None:
    """Refuse a name under which two results would go."""
    from .main import CommandError

    taken = set()
    for path in paths:
        if path is None or path == STANDARD_OUTPUT:
            continue
        target = os.path.realpath(path)
        if target in taken and _is_replaced(target):
            raise CommandError(f"{path}: expected another file for each result")
        taken.add(target)


@contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Open a file that is written whole or not at all: a full disk leaves an old one as it was."""
    with _named(path):
        target = _target(path)
        if not _is_replaced(target):
            with open(target, "wb") as file:
                yield cast(BinaryIO, _OneWay(file))
            return
        handle, temporary = tempfile.mkstemp(suffix=".part", dir=os.path.dirname(target))
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def write_json(path: str, report) -> None:
    """Write a report to a file, or to the standard output for ``-``."""
    text = json.dumps(report, indent=1) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    with whole_file(path) as file:
        file.write(text.encode())


def save_figure(figure, path: str) -> None:
    """Write a picture of the kind that its name says, PNG if it says none."""
    kind = os.path.splitext(path)[1][1:].lower() or "png"
    with whole_file(path) as file:
        figure.savefig(file, format=kind, dpi=150)


def tell(line: str) -> None:
    """Write a line for people; if nobody can read it, the work goes on all the same."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def text_beside(path: str | None):
    """Return where text for people goes when JSON is written to a path."""
    return sys.stderr if path == STANDARD_OUTPUT else sys.stdout


def _target(path: str) -> str:
    """Return what a name stands for, links followed; a folder is an error."""
    folder, name = os.path.split(path)
    if not name:
        raise IsADirectoryError("it names a directory")
    os.stat(folder or ".")  # an error where there is none: to follow links is to overlook that
    if os.path.isdir(path):
        raise IsADirectoryError("it is a directory")
    target = os.path.realpath(path)
    # A pipe that is open has a name in /dev/fd alone.
    return path if os.path.exists(path) and not os.path.exists(target) else target


def _is_replaced(target: str) -> bool:
    """Tell whether a new file takes the place of what is there; into a device it is written."""
    return os.path.isfile(target) or not os.path.exists(target)


class _OneWay(io.RawIOBase):
    """A file that can only be written to: a device may say that it can go back, and not do it."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        return self._file.write(data)


@contextmanager
def _named(path: str) -> Iterator[None]:
    from .main import CommandError

    try:
        yield
    except OSError as error:
        raise CommandError(f"{path}: cannot be written ({error.strerror or error})") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _one_of(names: tuple[str, ...]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} or {last}" if others else last
