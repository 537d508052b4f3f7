"""What the kernels cost on every architecture, read from NVRTC's log; no GPU needed.

python tests/cuda/resources.py           # prints the table
python tests/cuda/resources.py --write   # and makes it tests/golden/resources.json

A row of the table ends with a digest of what was compiled for it: source with all that it includes,
architecture, options and NVRTC. While that is the same nothing is compiled again.
"""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import nvrtc
from compile_cache import digest_of, kept

from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda import architectures
from cupy_delta.cuda.runtime.sources import variant_source
from cupy_delta.cuda.spec import SUMS, Plan
from cupy_delta.cuda.tokens.affine import plan_affine
from cupy_delta.cuda.tokens.raw import (
    raw_beta_gradient_launch,
    raw_beta_launch,
    raw_gate_gradient_launch,
    raw_gate_launch,
    raw_gate_sums_launch,
)
from cupy_delta.cuda.variants import launches_of
from cupy_delta.raw import RawBeta, RawGate

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "resources.json"
NAMES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
OPTIONS = ("-ftz=true", "--ptxas-options=-v")
ARCHITECTURES = {name: architectures.ARCHITECTURES[name] for name in NAMES}

ALL = ("forward", "backward", "recurrent", "step", "blocks")
CALLS = (
    dict(dtype="bfloat16", K=128, V=128, H=8, passes=ALL),
    dict(dtype="bfloat16", K=128, V=128, H=64, passes=("forward", "backward", "prefill")),
    dict(dtype="bfloat16", K=128, V=128, H=8, passes=("prefill",), checkpoint_every=256),
    dict(
        dtype="bfloat16",
        K=128,
        V=128,
        H=64,
        gate=True,
        varlen=True,
        B=4,
        passes=("prefill",),
        checkpoint_every=256,
    ),
    dict(dtype="bfloat16", K=128, V=128, B=4, H=64, varlen=True, passes=("forward",)),
    dict(dtype="bfloat16", K=128, V=128, B=4, H=64, passes=("forward",)),
    dict(dtype="float16", K=128, V=128, B=4, H=64, state_layout="vk", passes=("forward",)),
    dict(dtype="bfloat16", K=64, V=128, B=4, H=64, passes=("forward",)),
    dict(dtype="bfloat16", K=128, V=128, H=4, T=32768, passes=("forward", "prefill")),
    dict(dtype="bfloat16", K=128, V=128, H=24, T=32768, passes=("forward",)),
    dict(dtype="bfloat16", K=64, V=64, H=64, passes=("forward", "backward")),
    dict(dtype="bfloat16", K=128, V=128, gate=True, varlen=True, B=3, passes=("forward", "blocks")),
    dict(dtype="float32", K=128, V=128, gate=True, passes=("blocks", "backward")),
    dict(dtype="bfloat16", K=128, V=128, gate=True, H=64, HV=128, passes=("backward",)),
    dict(dtype="float16", K=64, V=96, gate=True, varlen=True, passes=("backward",)),
    dict(dtype="bfloat16", K=96, V=192, gate=True, H=30, passes=("backward",)),
    dict(dtype="bfloat16", K=256, V=256, gate=True, passes=("backward",)),
    dict(dtype="bfloat16", K=128, V=128, gate=True, B=4, H=64, passes=("forward",)),
    dict(dtype="bfloat16", K=128, V=128, gate=True, H=32, T=32768, passes=("forward",)),
    dict(dtype="bfloat16", K=128, V=128, gate=True, H=24, T=32768, passes=("forward",)),
    dict(dtype="bfloat16", K=128, V=128, gate=True, H=64, T=32768, passes=("forward",)),
    dict(dtype="bfloat16", K=128, V=128, gate="channel", passes=("backward", "blocks")),
    dict(dtype="float32", K=128, V=128, gate="channel", passes=("backward",)),
    dict(dtype="float16", K=64, V=64, gate="channel", varlen=True, passes=("backward",)),
    dict(dtype="bfloat16", K=256, V=256, gate="channel", passes=("backward",)),
    dict(dtype="bfloat16", K=128, V=128, gate="channel", H=4, T=32768, passes=("forward",)),
    dict(dtype="bfloat16", K=128, V=128, state_layout="vk", passes=("backward", "step")),
    dict(dtype="float16", K=100, V=40, qk_l2norm=True, passes=("forward", "backward", "step")),
    *(
        dict(dtype="bfloat16", K=128, V=128, T=1, gate=True, passes=("step",)) | options
        for options in ({}, dict(state_layout="vk", qk_l2norm=True), dict(raw="softplus"))
    ),
    *(
        dict(dtype="bfloat16", K=128, V=128, pool_dtype="bfloat16", B=256)
        | dict(qk_l2norm=True, passes=("step",))
        | options
        for options in (
            dict(T=1, gate=True),
            dict(T=4, gate="channel", state_layout="vk"),
            dict(T=4, raw="softplus"),
            dict(T=4, raw="softplus", B=1),
            dict(T=4, pool_dtype="float32", accepting=True),
            dict(T=4, gate=True, state_layout="vk"),
            dict(T=1024),
            dict(T=1, gate="channel"),
            dict(T=1, raw="softplus"),
        )
    ),
    dict(dtype="float32", K=128, V=128, passes=ALL),
    dict(dtype="float32", K=60, V=17, passes=("forward", "backward")),
    dict(dtype="float64", K=128, V=128, passes=("recurrent", "step")),
    dict(dtype="bfloat16", K=256, V=256, passes=("forward", "backward", "step")),
    dict(dtype="bfloat16", K=64, V=64, chunk_size=64, passes=("forward", "backward")),
    dict(dtype="bfloat16", K=128, V=128, B=4, H=32, T=8192, passes=("backward",)),
    dict(dtype="bfloat16", K=128, V=128, H=8, T=32768, passes=("backward",)),
    dict(dtype="float16", K=64, V=128, H=64, varlen=True, state_layout="vk", passes=("backward",)),
)
# Chunks of 64 for which not every architecture has the shared memory, and what differs there alone.
HOPPER_CALLS = (
    dict(dtype="float16", K=128, V=128, gate=True, H=8, T=32768, passes=("forward",)),
    dict(
        dtype="float16",
        K=128,
        V=128,
        gate=True,
        H=64,
        B=4,
        varlen=True,
        state_layout="vk",
        passes=("forward",),
    ),
    dict(dtype="float16", K=128, V=128, gate=True, H=64, B=4, passes=("forward",)),
    dict(dtype="bfloat16", K=128, V=128, gate=True, H=64, B=4, varlen=True, passes=("forward",)),
    dict(dtype="bfloat16", K=128, V=128, chunk_size=64, passes=("backward",)),
    dict(dtype="float16", K=96, V=200, chunk_size=64, B=3, varlen=True, passes=("backward",)),
    dict(dtype="bfloat16", K=128, V=128, gate=True, H=8, T=32768, passes=("backward",)),
    dict(dtype="float16", K=128, V=64, gate=True, varlen=True, B=3, passes=("backward",)),
    *(
        dict(dtype="bfloat16", K=128, V=128, gate="channel", passes=("forward", "backward")) | sizes
        for sizes in (
            dict(B=4, H=32, T=8192),
            dict(B=5, H=32, T=8192),
            dict(H=8, T=32768),
            dict(B=4, H=32, T=8192, narrow_gate=True),
            dict(B=4, H=32, T=32768, varlen=True),
            dict(B=4, H=32, T=8192, dtype="float16"),
            dict(H=8, T=32768, narrow_gate=True),
        )
    ),
    dict(dtype="float16", K=96, V=200, gate="channel", B=2, HV=2, passes=("backward",)),
    dict(dtype="bfloat16", K=128, V=128, gate="channel", HV=32, passes=("backward",)),
)


def raw_plan() -> Plan:
    """Return what forms g and beta, and carries their gradients back."""
    bf16 = FLOAT_DTYPES["bfloat16"]
    raw = dict(raw_gate=RawGate("softplus", bf16, "channel", 0.0), raw_beta=RawBeta(bf16, 1.0))
    sizes = dict(B=1, T=1024, N=1, H=8, HV=8, K=128, V=128)
    call = Call(dtype=bf16, gate="channel", **sizes, **raw)
    return Plan(
        (
            raw_gate_launch(call, SUMS),
            raw_beta_launch(call, SUMS),
            raw_gate_gradient_launch(call),
            raw_gate_sums_launch(call),
            raw_beta_gradient_launch(call),
        ),
        {},
    )


# Of kernels that no operation above is planned with: one plan each.
OWN_PLANS = (plan_affine((1, 8, 128), 128, np.dtype(np.float32), True), raw_plan())


class Resources(NamedTuple):
    """Of one kernel: registers and spilled bytes per thread, static shared bytes.

    `serialised`: ptxas made wgmma wait for each other, for want of registers or of a fence.
    """

    registers: int
    spilled: int
    static_shared: int
    serialised: bool = False


@cache
def launches(arch: str) -> dict:
    """Return the kernels of all calls by a name that tells them apart."""
    found = [launch for plan in OWN_PLANS for launch in plan.launches]
    for call in CALLS + (HOPPER_CALLS if arch == "sm_90" else ()):
        found += launches_of(ARCHITECTURES[arch], **call)
    return {f"{x.entry} {' '.join(f'{n}={v}' for n, v in sorted(x.defines))}": x for x in found}


def cases() -> list[tuple[str, str]]:
    """Return what is compiled: architectures and names of kernels.

    What 8.6 and 8.9 share is compiled for 8.9 alone: the sources do not tell them apart, and ptxas
    by some registers at most.
    """
    return [
        (arch, name)
        for arch in ARCHITECTURES
        for name in launches(arch)
        if arch != "sm_86" or name not in launches("sm_89")
    ]


def must_not_spill(name: str) -> bool:
    """Tell whether a kernel is for head sizes up to 128, at the default chunk size.

    Steps by products spare registers for more warps: some words that spill cost less. So do two
    slices per block where float16 has a gate: a warp that inverts has up to two words too few. The
    forward with a gate per key channel in one kernel gives its warps what 65536 registers have.
    Its gradients go from value head to value head, for which ragged sequences and K up to 64 have
    some words too few.
    """
    if name.split()[0] in ("decode_products", "channel_forward_hopper"):
        return False
    if {"forward_hopper", "DTYPE=f16", "HAS_GATE=1", "MATH=2", "TRANSFER=0"} <= {*name.split()}:
        return False
    sizes = dict(re.findall(r"(HEAD_K|HEAD_V|CHUNK)=(\d+)", name))
    if {"backward_channel_hopper", "GROUPED=1"} <= {*name.split()}:
        return "VARLEN=0" in name and int(sizes["HEAD_K"]) > 64
    heads = max(int(sizes.get("HEAD_K", 0)), int(sizes.get("HEAD_V", 0)))
    default = 64 if name.split()[0].endswith("_hopper") else 32
    return heads <= 128 and int(sizes.get("CHUNK", 0)) <= default


class Row(NamedTuple):
    """Of the table: what a kernel costs, and the digest of what was compiled."""

    resources: Resources
    digest: str


@cache
def table() -> dict[tuple[str, str], Row]:
    """Return the rows of the golden table by architecture and name."""
    rows = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    return {
        (arch, name): Row(Resources(*row[:4]), "".join(row[4:]))
        for arch in rows
        for name, row in rows[arch].items()
    }


def row(arch: str, name: str) -> Row:
    """Return the row of the table, compiled anew if it is of another source or is missing."""
    digest, known = digest_for(*text(arch, name)), table().get((arch, name))
    return known if known and known.digest == digest else Row(measure(arch, name), digest)


def measure(arch: str, name: str) -> Resources:
    """Compile a kernel as CuPy does and read ptxas' report."""
    return compiled(*text(arch, name))


def text(arch: str, name: str) -> tuple[str, str]:
    """Return what is compiled for a kernel, and for which architecture."""
    launch = launches(arch)[name]
    return variant_source(launch.file, launch.macros), launch.arch or arch


def digest_for(source: str, arch: str) -> str:
    # Without the first line, which is of every kernel file: what is included counts here.
    source = re.sub(r"\A// kernels .*\n", "", source)
    return digest_of(source, [nvrtc.KERNELS], nvrtc.version(), arch, *OPTIONS)


def compiled(source: str, arch: str) -> Resources:
    def make(part: Path) -> None:
        part.write_text(nvrtc.compile_source(source, arch, OPTIONS).log)

    log = kept(f"log-{digest_for(source, arch)}.txt", make).read_text()
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    shared = re.search(r"(\d+) bytes smem", log)
    return Resources(
        int(re.search(r"Used (\d+) registers", log)[1]),
        sum(int(n) for pair in spilled for n in pair),
        int(shared[1]) if shared else 0,
        "serialized" in log,
    )


def main() -> None:
    work = cases()
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(row, *zip(*work, strict=True)))
    found: dict = {arch: {} for arch in ARCHITECTURES}
    for (arch, name), (resources, digest) in zip(work, rows, strict=True):
        found[arch][name] = [*resources, digest]
        print(f"{arch:7}{resources.registers:4} registers{resources.spilled:5} spilled  {name}")
    if "--write" in sys.argv:
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
