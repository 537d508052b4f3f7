"""How PTX instructions are called in the interpreter: a name, and operands one after another."""

from __future__ import annotations

import re

SPECIAL = {f"%{name}.{d}" for name in ("tid", "ctaid", "ntid", "nctaid") for d in "xyz"} | {
    "%laneid",
    "%cluster_ctarank",
    "dynamic_shared",
}
# Modifiers that this machine does not model (flushing, approximation) or that change nothing.
IGNORED = {
    *("rn", "ftz", "approx", "full", "uni", "sync", "aligned", "volatile", "relaxed", "gpu"),
    *("nc", "cg", "ca", "cs", "L1", "no_allocate", "L1::no_allocate"),
}
# What has no effect here: memory is in order, and ptxas has checked how many registers there are.
NOTHING = re.compile(r"membar\..*|setmaxnreg\..*|fence\.(sc|acq_rel)\..*")
# Whole names, where parts of them say where an operand lies.
NAMES = {
    "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes": "tma load",
    "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group": "tma store",
    "cp.async.bulk.commit_group": "tma commit",
    "cp.async.bulk.wait_group.read": "tma wait",
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes": "send",
    "mapa.shared::cluster.u32": "mapa",
    "barrier.cluster.arrive.release": "cluster arrive",
    "barrier.cluster.wait.acquire": "cluster wait",
    "fence.mbarrier_init.release.cluster": "mbarrier fence",
    "fence.proxy.async.shared::cta": "proxy fence",
    "wgmma.fence.sync.aligned": "wgmma fence",
    "wgmma.commit_group.sync.aligned": "wgmma commit",
    "wgmma.wait_group.sync.aligned": "wgmma wait",
    "bar.sync": "bar",
    "barrier.sync": "bar",
    "barrier.cta.sync": "bar",
    "bar.warp.sync": "bar.warp",
    "exit": "ret",
}
WGMMA = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64(n32|n64|n128)k16\.f32\.(?:(bf16)\.bf16|(f16)\.f16)"
)


class UnknownInstruction(NotImplementedError):
    """Neither the translator nor the interpreter knows an instruction."""


def operands(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    return [
        part.strip()
        for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
        if part.strip()
    ]


def flat(operand: str) -> list[str]:
    """Return the registers and numbers of an operand, which may be several."""
    if operand[0] == "{":
        return [x.strip() for x in operand.strip("{} ").split(",")]
    if operand[0] != "[":
        return operand.split("|")
    if box := re.fullmatch(r"\[\s*(\S+), (\{.*\})\s*\]", operand):
        return [box[1], *flat(box[2])]
    m = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    return [m[1], m[2] or "0"]


def instructions(opcode: str, a: list[str]) -> list[tuple[str, list[str]]]:
    """Return what the interpreter does for an instruction: mostly one of its own."""
    if NOTHING.fullmatch(opcode):
        return []
    parts = opcode.split(".")
    if opcode in NAMES:
        name = NAMES[opcode]
        if name == "bar" and len(a) == 1:  # of all threads
            a = [*a, "0"]
    elif parts[0] in SHAPED:
        return SHAPED[parts[0]](opcode, parts, a)
    else:
        name = plain(parts)
    return [(name, [x for operand in a for x in flat(operand)])]


def plain(parts: list[str]) -> str:
    return ".".join(p for p in parts if p not in IGNORED)


def composed(opcode, parts, a):
    """``mov``: a vector on either side makes or takes apart the other."""
    name = plain(parts)
    if a[1][0] == "{":
        name += f".of{len(flat(a[1]))}"
    elif a[0][0] == "{":
        name += f".into{len(flat(a[0]))}"
    return [(name, [*flat(a[0]), *flat(a[1])])]


def loaded(opcode, parts, a):
    """``ld``: a register of 64 bits takes fewer by a conversion."""
    name, to = plain(parts), flat(a[0])
    type_ = parts[-1]
    steps = [(name, [*to, *flat(a[1])])]
    if type_[0] in "su" and type_[1:] != "64" and to[0].startswith("%rd"):
        steps += [(f"cvt.{type_[0]}64.{type_}", [x, x]) for x in to]
    return steps


def compared(opcode, parts, a):
    """``setp``: a third operand is combined with what the comparison says."""
    parts = [p for p in parts if p not in IGNORED]
    combine = [p for p in parts[2:-1] if p in ("and", "or", "xor")]
    steps = [(".".join(p for p in parts if p not in combine), a[:3])]
    if "|" in a[0] or len(a) != 3 + len(combine):
        raise UnknownInstruction(f"{opcode} {', '.join(a)}")
    return steps + [(f"{p}.pred", [a[0], a[0], a[3]]) for p in combine]


def copied(opcode, parts, a):
    """``cp.async``, whose last operand says how many bytes there are."""
    if opcode.startswith("cp.async.bulk"):
        raise UnknownInstruction(opcode)
    if len(a) == 3:
        a = [*a, a[2]]
    return [(plain(parts), [x for operand in a for x in flat(operand)])]


def summed(opcode, parts, a):
    """``red``: ``atom`` without a result."""
    return [(plain(["atom", *parts[1:]]), ["_", *flat(a[0]), a[1]])]


def shuffled(opcode, parts, a):
    """``shfl``, with a place for whether the lane was in range."""
    to = flat(a[0])
    return [(plain(parts), [*to, *(["_"] if len(to) == 1 else []), *a[1:]])]


def barrier(opcode, parts, a):
    """``mbarrier``: an arrival may say how many bytes are expected besides."""
    if parts[1] == "arrive":
        if a[0] != "_":
            raise UnknownInstruction(f"{opcode} {', '.join(a)}")
        a = a[1:] if len(a) == 3 else [a[1], "0"]
    return [(opcode.removesuffix(".b64"), [x for operand in a[:3] for x in flat(operand)])]


def warpgroup(opcode, parts, a):
    """``wgmma.mma_async``: A may be in registers, and only then may be negated."""
    shape = WGMMA.fullmatch(opcode)
    in_registers = a[1][0] == "{"
    signs = (["1", "1"], ["-1", "1"]) if in_registers else (["1", "1"],)
    if not shape or a[4:6] not in signs or len(a) != (7 if in_registers else 8):
        raise UnknownInstruction(f"{opcode} {', '.join(a)}")
    name = f"wgmma {shape[1]} {shape[2] or shape[3]} {'registers' if in_registers else 'tile'}"
    return [(name, [x for operand in a for x in flat(operand)])]


SHAPED = {
    "mov": composed,
    "ld": loaded,
    "setp": compared,
    "cp": copied,
    "red": summed,
    "shfl": shuffled,
    "mbarrier": barrier,
    "wgmma": warpgroup,
}
