"""What a kernel is given is what its parameters are called: names, types and sizes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from resources import OWN_PLANS
from signatures import ALIASES, DTYPES, mismatches, signature, text_of

from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda.plan import halves, made
from cupy_delta.cuda.runtime.sources import kernel_folder
from cupy_delta.cuda.spec import GATES, DeviceFacts, Launch, Plan
from cupy_delta.cuda.tokens.affine import maps_of_rows, plan_affine
from cupy_delta.raw import RawBeta, RawGate

pytestmark = pytest.mark.fast

A100 = DeviceFacts(108, 163 * 1024)
H200 = DeviceFacts(132, 227 * 1024, (9, 0))
# No two sizes are equal, so that none passes for another.
SIZES = dict(B=1, N=3, T=70000, H=2, HV=6, K=64, V=128)
OPERATIONS = ("forward", "training", "backward", "recurrent", "step")
PIECES = ("wy_factors", "state_pass", "chunk_output", "transfer")


def cases():
    """Every operation with and without a gate, on either architecture: (operation, call, facts)."""
    bf16, f32 = FLOAT_DTYPES["bfloat16"], FLOAT_DTYPES["float32"]
    call = Call(
        dtype=bf16, **SIZES, varlen=True, scale=0.3, qk_l2norm=True, pool_slots=9, pool_dtype=f32
    )
    few_heads = replace(call, N=1, HV=2, H=1, T=40000)
    for facts in (A100, H200):
        for gate in GATES:
            for operation in (*OPERATIONS, *PIECES):
                for one in (call, few_heads):
                    yield operation, replace(one, gate=gate), facts
                    if operation == "forward":
                        yield operation, replace(one, gate=gate, pool_dtype=None), facts
        yield "forward", replace(call, checkpoint_every=64), facts
    filling = dict(B=22, N=22, T=7000, K=128, varlen=False, pool_dtype=None, gate="channel")
    for narrow in (False, True):
        one = replace(call, **filling, narrow_gate=narrow)
        yield "forward", one, H200
        yield "forward", replace(one, B=1, N=1, T=70000), H200
        yield "backward", one, H200
        yield "forward", replace(one, B=1, T=154000, varlen=True), H200
    for facts, gate in itertools.product((A100, H200), GATES):
        yield "backward", replace(call, dtype=FLOAT_DTYPES["float16"], gate=gate), facts
    for bias in ("head", "channel", None):
        raw = RawGate("sigmoid", bf16, bias, -5.0)
        gated = dict(gate="scalar", raw_gate=raw, raw_beta=RawBeta(f32, 2.0))
        for operation in ("backward", "recurrent", "step"):
            yield operation, replace(call, **gated), A100
        yield "forward", replace(call, **gated), H200
        few = replace(call, B=3, T=4, varlen=False, pool_dtype=bf16)
        for one in (few, replace(few, **gated), replace(few, gate="scalar")):
            yield "step", one, A100
    for dtype in (bf16, FLOAT_DTYPES["float16"]):
        for HV in (2, 6):
            yield "backward", replace(call, HV=HV, gate="channel", dtype=dtype), H200
    yield "forward", replace(call, dtype=f32), A100
    yield "recurrent", replace(call, dtype=FLOAT_DTYPES["float64"]), A100


def dtypes_of(call, plan):
    """The dtypes of arrays that callers give, as kernels read them."""
    given = dict.fromkeys(("q", "k", "v", "w", "u", "v_new", "do", "states_in"), call.dtype)
    given |= dict(initial_state=call.state_dtype, dfinal_state=call.state_dtype)
    given |= dict(state=call.pool_dtype, states=None)
    given |= dict(a=getattr(call.raw_gate, "dtype", None))
    given |= dict(logits=getattr(call.raw_beta, "dtype", None))
    given |= dict.fromkeys(plan.as_given, call.dtype)
    return given | {name: dtype for name, dtype in plan.read if dtype is not None}


def launched():
    """Every launch of `cases` that differs from those before it by kernel, macros or arguments."""
    found = {}
    for operation, call, facts in cases():
        for plan in plans_of(operation, call, facts):
            for launch in plan.launches:
                key = (launch.file, launch.defines, repr(launch.arguments))
                found.setdefault(key, (launch, plan, call))
    return list(found.values())


def plans_of(operation, call, facts):
    """The plan of an operation, and those in halves, each put together."""
    try:
        yield made(operation, call, facts)
    except NotImplementedError:
        return
    for tells in ("nothing", "state", "transfer"):
        if found := halves(operation, call, facts, tells):
            first, second = found
            arrays = first.outputs | first.workspace | second.workspace
            yield Plan((*first.launches, *second.launches), second.outputs, arrays)


LAUNCHED = launched()
OWN = [launch for plan in OWN_PLANS for launch in plan.launches]


def check(launch, plan, call):
    parameters = signature(text_of(launch), launch.entry, dict(launch.defines))
    return mismatches(launch, parameters, plan, call, dtypes_of(call, plan))


def test_every_argument_is_what_its_parameter_is_called():
    wrong = [line for launch in LAUNCHED for line in check(*launch)]
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def test_every_kernel_is_looked_at():
    files = {p.relative_to(kernel_folder()).as_posix() for p in kernel_folder().rglob("*.cu")}
    assert {launch.file for launch, *_ in LAUNCHED} | {launch.file for launch in OWN} == files


@pytest.mark.parametrize("launch", OWN, ids=lambda launch: launch.entry)
def test_arguments_of_kernels_that_no_operation_is_planned_with(launch):
    parameters = signature(text_of(launch), launch.entry, dict(launch.defines))
    for p, argument in zip(parameters, launch.arguments, strict=True):
        if p.pointer:
            assert argument in (p.name, None)
        else:
            assert argument.dtype == DTYPES[p.type]


def test_the_sizes_of_a_transfer_applied():
    (launch,) = plan_affine((2, 3, 5), 7, np.dtype(np.float32), True).launches
    parameters = signature(text_of(launch), launch.entry, dict(launch.defines))
    assert [p.name for p in parameters[5:]] == [
        "p_at",
        "x_at",
        "h_at",
        "step",
        "maps",
        "K",
        "columns",
    ]
    assert launch.arguments == ("p", "x", "h", "y", None, 0, 0, 0, 0, 1, 5, 7)


def test_where_transfers_of_ranks_begin():
    shape = 2, 3, 5, 7
    P, row = 2 * 3 * 5 * 5, 2 * 3 * 5 * (5 + 7)
    for ranks, step in ((range(1, 4), row), (range(5, 2, -1), -row)):
        maps = maps_of_rows(ranks, shape)
        (launch,) = plan_affine(shape[:3], 7, np.dtype(np.float32), True, maps).launches
        first, second = ranks[0] * row, ranks[1] * row
        begin = second, first + P, second + P
        assert launch.arguments == ("p", "x", "h", "y", "spare", *begin, step, 2, 5, 7)


def test_every_alias_is_needed():
    used = {
        (launch.entry, p.name, argument if isinstance(argument, str) else argument.name)
        for launch, *_ in LAUNCHED
        for p, argument in zip(
            signature(text_of(launch), launch.entry, dict(launch.defines)),
            launch.arguments,
            strict=True,
        )
        if isinstance(argument, str) or hasattr(argument, "box")
    }
    used = {(entry, name, array.removesuffix("_normal")) for entry, name, array in used}
    declared = {
        (e, p, a) for e, names in ALIASES.items() for p, some in names.items() for a in some
    }
    assert declared <= used


# ---- planted: each must be seen ------------------------------------------------------------------


def of(entry, **macros):
    """A launch of a kernel with such macros, its plan and its call."""
    return next(
        found
        for found in LAUNCHED
        if found[0].entry == entry and macros.items() <= dict(found[0].defines).items()
    )


def swapped(launch: Launch, one, other) -> Launch:
    """Swap the arguments at two positions, given by name or value."""
    arguments = list(launch.arguments)
    i, j = (
        next(n for n, a in enumerate(arguments) if getattr(a, "name", a) == name)
        for name in (one, other)
    )
    arguments[i], arguments[j] = arguments[j], arguments[i]
    return replace(launch, arguments=tuple(arguments))


@pytest.mark.parametrize(
    ("entry", "one", "other"),
    [
        ("forward", "core", "p"),
        ("backward_chunk", "corrections", "dy"),
        ("backward_chunk_hopper", "states", "dstates"),
        ("forward_residuals_hopper", "core", "p"),
        ("wy_factors_hopper", "core", "p"),
        ("recurrent", "beta", "g"),
        ("decode", "q", "k"),
        ("wy_factors", SIZES["H"], SIZES["HV"]),
    ],
)
def test_swapped_arguments_are_seen(entry, one, other):
    macros = {"HAS_GATE": 1} if entry == "recurrent" else {}
    launch, plan, call = of(entry, **macros)
    assert not check(launch, plan, call)
    assert len(check(swapped(launch, one, other), plan, call)) == 2


@pytest.mark.parametrize("name", ["core", "beta", "scale", "HV"])
def test_a_renamed_parameter_is_seen(name):
    launch, plan, call = of("backward_state")
    parameters = signature(text_of(launch), launch.entry, dict(launch.defines))
    renamed = [p._replace(name="it" if p.name == name else p.name) for p in parameters]
    found = mismatches(launch, renamed, plan, call, dtypes_of(call, plan))
    assert len(found) == 1 and " it is given" in found[0]


def test_another_type_is_seen():
    launch, plan, call = of("backward_state")
    parameters = signature(text_of(launch), launch.entry, dict(launch.defines))
    other = [p._replace(type="double" if p.name == "beta" else p.type) for p in parameters]
    assert mismatches(launch, other, plan, call, dtypes_of(call, plan))


def test_parameters_that_macros_leave_out():
    text = 'extern "C" __global__ void f(int a,\n#if A || B\n int b,\n#endif\n const float* c) {'
    assert [p.name for p in signature(text, "f", dict(A=0, B=1))] == ["a", "b", "c"]
    assert [p.name for p in signature(text, "f", dict(A=0, B=0))] == ["a", "c"]
