"""What was timed is what runs: the machine code of programs whose times docs and pages give.

tests/golden/timed.json has digests. Who changes a program on purpose says in docs/performance.md
that it was not timed since, and writes new ones: `PYTHONPATH=. python tests/cuda/test_timed.py`.
"""

import itertools
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))

import nvrtc
import resources
from compare_revisions import ROOT, Variant, code_of

from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda.spec import GATES
from cupy_delta.cuda.tokens.decode import decode_launch
from cupy_delta.cuda.tokens.decode_products import decode_products_launch
from cupy_delta.raw import RawBeta, RawGate

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "timed.json"


BF16 = FLOAT_DTYPES["bfloat16"]


def step_call(T, pool, **options):
    """A step as benchmarks/decode.py makes it, with g and beta as arrays unless they are given."""
    sizes = dict(B=64, N=64, T=T, H=16, HV=32, K=128, V=128)
    on_pool = dict(pool_slots=64, pool_dtype=pool, pool_stride=32 * 128 * 128)
    return Call(dtype=BF16, **sizes, **on_pool, **dict(qk_l2norm=True) | options)


def steps():
    for pool, layout, gate in itertools.product(
        (FLOAT_DTYPES["float32"], BF16), ("kv", "vk"), GATES
    ):
        yield decode_launch(step_call(1, pool, gate=gate, state_layout=layout))


def steps_by_products():
    raw = dict(raw_gate=RawGate("softplus", BF16, "head", 0.0), raw_beta=RawBeta(BF16, 1.0))
    for layout in ("kv", "vk"):
        for options in (dict(gate="scalar") | raw, dict(gate="channel")):
            yield decode_products_launch(step_call(4, BF16, state_layout=layout, **options))


# Of the walks on compute capability 9.0 of calls without a pool, of sequences of one length, which
# share their code.
WALKS = (
    dict(MATH=1, HAS_GATE=0, TRANSFER=0, JOINS=0),
    dict(MATH=1, HAS_GATE=1, TRANSFER=0, JOINS=1),
    dict(MATH=2, HAS_GATE=1, TRANSFER=0, JOINS=0),
    dict(MATH=2, HAS_GATE=1, TRANSFER=1, VARLEN=0),
)


def walks():
    launches = [x for x in resources.launches("sm_90").values() if x.entry == "forward_hopper"]
    for wanted in WALKS:
        yield next(
            x
            for x in launches
            if wanted.items() <= dict(x.defines).items() and "ON_POOL" not in dict(x.defines)
        )


PROGRAMS = {
    "steps of one token": steps,
    "steps by products": steps_by_products,
    "walks without a pool": walks,
}


def name_of(launch):
    return " ".join(f"{n}={v}" for n, v in sorted(launch.defines))


def program(launch):
    """Return what is compared: threads, shared memory, and a digest of the machine code."""
    unit = Variant(launch.arch or "sm_90", "", launch.file, launch.entry, launch.macros)
    return [launch.block, launch.shared, code_of(unit.unit(), unit.arch, ROOT / "kernels")]


@pytest.mark.parametrize("what", PROGRAMS)
def test_programs_are_those_that_were_timed(what):
    timed = json.loads(GOLDEN.read_text())
    if nvrtc.version() != timed["nvrtc"]:
        pytest.skip("another NVRTC makes other code")
    found = {name_of(x): program(x) for x in PROGRAMS[what]()}
    assert found == timed["programs"][what]


if __name__ == "__main__":
    programs = {what: {name_of(x): program(x) for x in some()} for what, some in PROGRAMS.items()}
    table = dict(nvrtc=nvrtc.version(), programs=programs)
    GOLDEN.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
