"""What is compiled for launches, and how several programs are compiled side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ...threads import side_by_side
from ..spec import Launch
from .sources import AT_ONCE, kernel_folder, variant_source

# CuPy compiles an empty file before the first program with some options, to learn what NVRTC is.
# Done with this one, it is not done again in every thread.
NOTHING = 'extern "C" __global__ void nothing() {}'


class Program(NamedTuple):
    """What is compiled for one or several launches."""

    source: str
    options: tuple[str, ...]

    @classmethod
    def of(cls, launch: Launch) -> Program:
        options: tuple[str, ...] = ("--std=c++17", f"-I{kernel_folder()}")
        if launch.arch:
            options += (f"-arch={launch.arch}",)
        return cls(variant_source(launch.file, launch.macros), options)


def compile_side_by_side(programs: Iterable[Program], compile_one: Callable) -> None:
    """Compile programs, each in a thread.

    NVRTC takes a second or two and one core for a program. The threads are gone when this returns,
    and of several errors the one that is raised is the first program's.
    """
    programs = list(programs)
    if len(programs) == 1:
        compile_one(programs[0])
    elif programs:
        for nothing in empty_programs(programs):
            compile_one(nothing)
        side_by_side(compile_one, programs, AT_ONCE)


def empty_programs(programs: Iterable[Program]) -> list[Program]:
    """Return what is compiled before several programs, once for their options."""
    options = dict.fromkeys(program.options for program in programs)
    return [Program(NOTHING, some) for some in options]
