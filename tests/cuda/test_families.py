"""Families of kernels: one table of what is computed by which, and one place for each thing."""

import ast
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cupy_delta.cuda
from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda import operators
from cupy_delta.cuda.families import FAMILIES, LIMITS, family_for, refusal, support
from cupy_delta.cuda.plan import made
from cupy_delta.cuda.runtime.sources import kernel_folder
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.problem import Problem

pytestmark = pytest.mark.fast

PACKAGE = Path(cupy_delta.cuda.__file__).parent
H200 = DeviceFacts(132, 227 * 1024, (9, 0))
CALL = Call(dtype=FLOAT_DTYPES["bfloat16"], B=1, T=4096, N=1, H=8, HV=8, K=128, V=128)


def test_the_table_says_what_a_plan_is_made_from():
    table = {(x.operation, x.option, x.architecture): x for x in support()}
    assert len(table) == len(support())
    for operation, option, architecture, family in (
        ("forward", "float16, bfloat16", "sm_90", "sm90"),
        ("forward", "float16, bfloat16", "sm_80", "portable"),
        ("forward", "float32", "sm_90", "portable"),
        ("backward", "chunk_size of 64", "sm_90", "sm90"),
        ("backward", "chunk_size of 16 or 32", "sm_90", "portable"),
        ("step", "float64", "sm_90", "tokens"),
        ("state_pass", "cu_seqlens", "sm_90", "portable"),
    ):
        assert table[operation, option, architecture].family == family
    assert "float64: the chunked operators" in table["forward", "float64", "sm_90"].refusal
    assert ("forward", "beta of (B, T, HV, V)", "sm_90") not in table


def test_what_the_table_refuses_raises_and_what_it_names_is_planned():
    for operation, fields in (
        ("forward", {}),
        ("forward", dict(dtype=FLOAT_DTYPES["float64"])),
        ("transfer", dict(V=257)),
        ("recurrent", dict(K=300)),
        ("step", dict(pool_dtype=np.dtype(np.float32), T=2)),
    ):
        call = replace(CALL, **fields)
        if message := refusal(operation, call):
            with pytest.raises(NotImplementedError, match=re.escape(message)):
                made(operation, call, H200)
        else:
            assert made(operation, call, H200).launches
            assert family_for(operation, call, H200) in FAMILIES


def test_every_limit_names_what_it_is_about():
    for limit in LIMITS:
        message = limit.message.format(call=CALL)
        assert re.match(
            r"(T|K|V|g|state|checkpoint_every|float64|chunk_size)( = \d+| = None)?: ", message
        )


# ---- one place for each thing --------------------------------------------------------------------


def functions():
    """Top-level functions and classes of the backend: (file, name)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield path.relative_to(PACKAGE).as_posix(), node.name


def test_no_two_functions_have_one_name():
    """But for the doors of families, which are the same by design, and what choices are."""
    doors = {f"plan_{operation}" for family in FAMILIES for operation in family.plans}
    public = {name for _, name in functions() if not name.startswith("_")} - doors - {"Choice"}
    counts = Counter(name for _, name in functions() if name in public)
    # The public operators call the backend's by their own names.
    assert {name for name, count in counts.items() if count > 1} == set()


def test_every_kernel_is_launched_by_one_function_in_the_folder_of_its_own():
    found = {name: file for file, name in functions() if name.endswith("_launch")}
    for path in kernel_folder().rglob("*.cu"):
        text = path.read_text()
        (entry,) = re.findall(r'extern "C" __global__[^;{]*?\b([a-z]\w+)\((?:const|int) ', text)
        assert Path(found[f"{entry}_launch"]).parent.name == path.parent.name


def test_of_plans_only_the_support_of_a_family_asks_for_an_architecture():
    asking = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "facts.capability" in path.read_text()
    }
    assert {file for file in asking if not file.startswith("runtime/")} == {"sm90/tiles.py"}


# ---- the way of a call ---------------------------------------------------------------------------

# The words in which plans are written; every station speaks them.
WORDS = {"spec.py", "architectures.py", "sm90/tiles.py", "sm90/segments.py", "portable/decays.py"}


def entered(function, *args):
    """The files of the backend that a call enters from another file of it, in order."""
    stations = []

    def follow(frame, event, _):
        if event != "call":
            return
        here, there = (Path(f.f_code.co_filename) for f in (frame, frame.f_back))
        if here != there and here.is_relative_to(PACKAGE):
            stations.append(here.relative_to(PACKAGE).as_posix())

    sys.setprofile(follow)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return [file for file in stations if file not in WORDS]


class Nowhere:
    """A device on which nothing is computed."""

    facts = H200

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def empty(self, shape, dtype, name):
        return name

    def bring(self, x, name, dtype):
        return name

    def prepare(self, launches):
        pass

    def launch(self, launch, arrays):
        pass


@pytest.mark.parametrize("gate", [None, "scalar"])
@pytest.mark.parametrize("operator", ["chunk_delta_rule", "recurrent_delta_rule", "wy_factors"])
def test_each_station_of_a_call_is_entered_once(monkeypatch, operator, gate):
    """Where nothing is kept of calls before it; `docs/architecture.md` draws this way."""
    monkeypatch.setattr(operators, "device_of", lambda x: Nowhere())
    sizes = dict(B=1, T=8192, N=1, H=4, HV=4, K=128, V=128)
    problem = Problem(kind="cupy", dtype=CALL.dtype, **sizes, gate=gate, g=gate)
    stations = entered(getattr(operators, operator), problem)
    assert stations[:3] == ["operators.py", "plan.py", "families.py"]
    assert stations[-1] == "runtime/execute.py"
    if operator == "chunk_delta_rule":
        way = ["sm90/forward.py", "sm90/cost.py"] + ["sm90/gates.py"] * (gate is not None)
        assert [file for file in stations if "sm90" in file] == way
    assert len(stations) == len(set(stations)), stations
