"""Signatures of kernels, read from their sources, beside the arguments that launches give them."""

from __future__ import annotations

import re
from typing import NamedTuple

from cupy_delta.call import Call
from cupy_delta.cuda.runtime.sources import kernel_folder
from cupy_delta.cuda.sm90.cost import Cut
from cupy_delta.cuda.sm90.segments import Part
from cupy_delta.cuda.spec import C_TYPES, Launch, Plan, TensorBox

# The dtypes of NumPy that C types stand for; those of 16 bits by their names in the kernels.
DTYPES = {
    "int": "int32",
    "uint32_t": "uint32",
    "int64_t": "int64",
    "float2": "float32",
    "float4": "float32",
    "bool": "bool",
} | {c: name for name, c in C_TYPES.items()}
# What enters a backward, as it is given or in units.
DO, DFINAL = ("do", "do_scaled"), ("dfinal_state", "dfinal_scaled")
# Where a parameter has another name than its array: one that serves several arrays, by entry, and
# the array that a keyword of C++ has the name of.
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "forward": dict(
        q_or_w=("q", "q_read", "w"),
        k=("k", "k_read"),
        v=("v", "u"),
        initial_state=("initial_state", "entering"),
        final_state=("final_state", "segment_h", "segment_p", "h", "p"),
        corrections=("corrections", "v_new"),
    ),
    "forward_hopper": dict(
        q_map=("q", "k"),
        o_map=("o", "v"),
        p_map=("segment_p",),
        h=("segment_h",),
        decays=("segment_decays",),
        x_map=("segment_x",),
        initial_state=("initial_state", "after_first"),
        final_state=("final_state", "after_first"),
    ),
    "forward_residuals_hopper": dict(
        q_map=("q", "q_read"),
        k_map=("k", "k_read"),
        decays=("decays", "channel_decays"),
        n_map=("corrections",),
        transfer_map=("segment_p",),
        h=("segment_h",),
    ),
    "backward_state": dict(q=("q", "q_read"), k=("k", "k_read"), d_o=DO, dfinal_state=DFINAL),
    "backward_chunk": dict(d_o=DO),
    "backward_channel": dict(d_o=DO),
    "backward_channel_hopper": dict(d_o=DO),
    "chunk_output": dict(q=("q", "q_read")),
    "backward_state_hopper": dict(
        q_map=("q", "q_read"),
        k_map=("k", "k_read"),
        decays=("decays", "channel_decays"),
        do_map=DO,
        dfinal_state=DFINAL,
        dy_map=("dy", "dv"),
        dy=("dy", "dv"),
        small_dy=("dy",),
        transfer_map=("segment_p",),
        h=("segment_h",),
    ),
    "joined_transfer_hopper": dict(
        transfer_map=("segment_p",),
        initial_state=("initial_state", "dfinal_state"),
        p=("p", "told_p"),
        h=("h", "told_h"),
    ),
    "backward_chunk_hopper": dict(
        do_map=DO, n_map=("corrections",), dy_map=("dy", "dv"), small_dy=("dy",)
    ),
    "pool_states": dict(states=("initial_state", "final_state")),
    "segment_starts": dict(gates_of_chunks=("token_factors", "decays")),
    "token_factors": dict(beta=("beta", "logits"), g=("g", "a")),
    "decode": dict(g=("g", "a"), beta=("beta", "logits")),
    "decode_products": dict(g=("g", "a"), beta=("beta", "logits")),
    "l2norm": dict(x=("q", "k"), y_or_dx=("q", "k", "dq"), x2=("k",), y_or_dx2=("k", "dk")),
}
KEYWORDS = {"d_o": "do"}
# Sizes that a call has no name for.
COUNTS = {
    "rows",
    "slots",
    "pairs",
    "elements",
    "tokens",
    "parts",
    "size",
    "most",
    "blocks",
    *Part._fields,
    *Cut._fields,
}
COUNTS |= {"counted", "items"}
# Numbers of what beta and g are formed of.
COUNTS |= {"bound", "factor", *(f"other_{name}" for name in Part._fields)}


class Parameter(NamedTuple):
    """Of a kernel: its name, C type without const and pointer, and whether it is one."""

    name: str
    type: str
    pointer: bool


def signature(text: str, entry: str, macros: dict) -> list[Parameter]:
    """Read the parameters of an entry; ``#if`` among them may ask for macros of its launch."""
    (found,) = re.findall(rf'extern "C" __global__[^;{{]*?\b{entry}\(([^;{{]*)\)\s*{{', text)
    kept, conditions = [], [True]
    for line in found.splitlines():
        directive, _, condition = line.strip().partition(" ")
        if directive == "#if":
            names = {name: macros.get(name, 0) for name in re.findall(r"[A-Z]\w*", condition)}
            asked = condition.replace("||", " or ").replace("&&", " and ").replace("!", " not ")
            conditions.append(eval(asked, {}, names))
        elif directive == "#endif":
            conditions.pop()
        elif all(conditions):
            kept.append(line)
    return [parameter(one, macros) for one in " ".join(kept).split(",")]


def parameter(text: str, macros: dict) -> Parameter:
    words = [w for w in text.split() if w not in ("const", "__grid_constant__")]
    type_, name = words
    c_type = type_.rstrip("*")
    return Parameter(name, str(macros.get(c_type, c_type)), type_.endswith("*"))


def mismatches(
    launch: Launch, parameters: list[Parameter], plan: Plan, call: Call, dtypes: dict
) -> list[str]:
    """Say which arguments of a launch are not what the kernel's parameters are named and typed.

    Sizes are told apart by the values that `call` gives them. `dtypes` are those of arrays that no
    kernel of the plan writes, None where they may have several.
    """
    if len(parameters) != len(launch.arguments):
        return [f"{len(parameters)} parameters, {len(launch.arguments)} arguments"]
    made = {name: dtype for name, (_, dtype) in (plan.outputs | plan.workspace).items()}
    wrong = []
    inverse = (2**32 - 1) // call.HV
    for p, argument in zip(parameters, launch.arguments, strict=True):
        dtype = call.compute_dtype.name if p.type == "real" else DTYPES.get(p.type)
        if isinstance(argument, TensorBox):
            fits = p.type == "TensorMap" and named(launch.entry, p.name, argument.name)
        elif isinstance(argument, str):
            its = (dtypes | made).get(argument)
            fits = p.pointer and its in (None, dtype) and named(launch.entry, p.name, argument)
        elif argument is None:
            fits = p.pointer
        else:
            size = argument if p.name in COUNTS else getattr(call, p.name, None)
            size = inverse if p.name == "inverse" else size
            fits = argument.dtype == dtype and size is not None and argument == type(argument)(size)
        if not fits:
            wrong.append(f"{launch.entry}: {p.type} {p.name} is given {argument!r}")
    return wrong


def named(entry: str, parameter: str, array: str) -> bool:
    """Whether a parameter has its array's name, a declared one, or that of its map."""
    array = array.removesuffix("_normal")
    aliases = ALIASES.get(entry, {})
    if parameter in aliases:
        return array in aliases[parameter]
    name = parameter.removesuffix("_map")
    return KEYWORDS.get(name, name) == array


def text_of(launch: Launch) -> str:
    return (kernel_folder() / launch.file).read_text()


def argument(launch: Launch, name: str) -> object:
    """Return what a launch gives the parameter of that name."""
    parameters = signature(text_of(launch), launch.entry, dict(launch.defines))
    return launch.arguments[[p.name for p in parameters].index(name)]
