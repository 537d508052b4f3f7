"""The form of kernel files: conditionals of a file, and the length and parameters of functions."""

from __future__ import annotations

import re
from typing import NamedTuple


class Function(NamedTuple):
    """One function of a file: where it starts, its lines, and how many parameters it takes."""

    name: str
    line: int
    lines: int
    parameters: int
    entry: bool


def blank(found: re.Match) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def without_comments(text: str) -> str:
    """Return the text with comments and strings as spaces, every character in its place."""

    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


def without_directives(text: str) -> str:
    """Return the text with what is for the preprocessor as spaces, macros of several lines too."""
    return re.sub(r"^[ \t]*#(?:[^\\\n]|\\.|\\\n)*", blank, text, flags=re.MULTILINE)


def conditionals(text: str) -> int:
    """Count what makes code conditional for the preprocessor, but for checks of macros.

    A check either ends in ``#error`` or asks whether a macro is defined.
    """
    lines = [line.strip() for line in without_comments(text).splitlines()]
    asked = [i for i, line in enumerate(lines) if re.match(r"#\s*(if|elif)\b", line)]
    return sum(
        "defined" not in lines[i] and not re.match(r"#\s*error\b", lines[i + 1]) for i in asked
    )


def functions(text: str) -> list[Function]:
    """Return the functions that a file defines, lambdas within them not counted."""
    code = without_directives(without_comments(text))
    found: list[Function] = []
    start = depth = 0
    opened = None  # head and depth of the function that we are in
    for at, character in enumerate(code):
        if character == "{":
            head = code[start:at]
            if opened is None and (open_ := declared(head)):
                opened = (*open_, start + len(head) - len(head.lstrip()), depth)
            depth += 1
        elif character == "}":
            depth -= 1
            if opened and depth == opened[-1]:
                name, parameters, first, _ = opened
                line = code.count("\n", 0, first) + 1
                lines = code.count("\n", first, at) + 1
                found.append(
                    Function(name, line, lines, parameters, "__global__" in code[first:at])
                )
                opened = None
        if character in "{};" and opened is None:
            start = at + 1
    return found


def declared(head: str) -> tuple[str, int] | None:
    """Return the name and the number of parameters if this is what comes before a body."""
    head = re.sub(r"\b__launch_bounds__\([^()]*\)", "", head)
    bare = without_inner(head)
    # What is initialised is listed after a colon that is no part of `::`.
    bare = re.split(r"(?<!:):(?!:)", bare)[0]
    found = re.fullmatch(r".*?(\w+)\s*\(([^()]*)\)\s*(const)?\s*", bare, re.DOTALL)
    if found is None or "=" in bare[: found.start(1)]:
        return None
    return found[1], len(found[2].split(",")) if found[2].strip() else 0


def without_inner(head: str) -> str:
    """Return a head without what is in brackets within brackets, and without its template's."""
    head = re.sub(r"<[^<>()]*>", "", head)
    inner = r"\([^()]*(?:\([^()]*\)[^()]*)*\)"
    return re.sub(inner, lambda m: "(" + re.sub(r"\([^()]*\)", "", m[0][1:-1]) + ")", head)
