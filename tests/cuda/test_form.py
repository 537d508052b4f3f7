"""Kernel files keep their form: few conditionals, short functions with few parameters."""

import nvrtc
import pytest
from form import conditionals, functions

pytestmark = pytest.mark.fast

MAX_CONDITIONALS, MAX_LINES, MAX_PARAMETERS, MAX_FILE = 12, 80, 7, 600
FILES = {
    path.relative_to(nvrtc.KERNELS).as_posix(): path.read_text()
    for path in sorted(nvrtc.KERNELS.rglob("*.cu*"))
}


def excess(text: str) -> set[str]:
    """Return what is too much in a file. Entries take as many parameters as arrays."""
    found = {
        function.name
        for function in functions(text)
        if function.lines > MAX_LINES
        or (function.parameters > MAX_PARAMETERS and not function.entry)
    }
    if conditionals(text) > MAX_CONDITIONALS:
        found.add("conditionals")
    if text.count("\n") > MAX_FILE:
        found.add("lines")
    return found


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_too_long(name):
    """A function is shortened by steps with names, and by structs of what goes together."""
    assert excess(FILES[name]) == set()


def test_every_function_is_found():
    names = {name: {f.name for f in functions(text)} for name, text in FILES.items()}
    assert {"take_stage", "load_chunk", "step", "forward"} <= names["portable/forward.cu"]
    assert {"sum", "pair", "load", "carry"} <= names["tiles/decay.cuh"]
    assert all(
        name.endswith(".cuh") or any(f.entry for f in functions(FILES[name])) for name in FILES
    )


PLANTED = """
#include "a.cuh"
#ifndef WIDTH
#error "no WIDTH"
#endif
#define TWICE(x) \\
  { (x) + (x); }
#if WIDTH > 8  // counts
#elif WIDTH    // counts
#else
#endif
struct Row {
  float* x;
  Row(float* x, int n) : x(x) {}
  PRIM float at(int i) const { return x[i]; }
};
template <class F>
PRIM void each(F f, int (&a)[2][3], const Pair<int, int>& b) {
  auto g = [&](int i) {
    return "}{" + i;
  };
  if (b) {
    f(g);
  }
}
extern "C" __global__ void __launch_bounds__(32, 1) entry(float* x) {
}
"""


def test_what_is_counted():
    assert conditionals(PLANTED) == 2
    found = {f.name: (f.lines, f.parameters, f.entry) for f in functions(PLANTED)}
    assert found == {
        "Row": (1, 2, False),
        "at": (1, 1, False),
        "each": (9, 3, False),
        "entry": (2, 1, True),
    }


@pytest.mark.parametrize(
    "more",
    [
        "#if A\n#endif\n" * 11,
        "PRIM void f() {\n" + "  g();\n" * 79 + "}\n",
        "PRIM void f(int a, int b, int c, int d, int e, int f, int g, int h) {}\n",
        "\n" * 600,
    ],
)
def test_what_is_planted_is_seen(more):
    assert not excess(PLANTED)
    assert len(excess(PLANTED + more)) == 1
