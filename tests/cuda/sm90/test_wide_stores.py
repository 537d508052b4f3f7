"""Rows leave factors and gradients sixteen bytes at a time, in what NVRTC makes of them."""

import re
from collections import defaultdict

import nvrtc
import pytest
import resources

from cupy_delta.cuda.runtime.sources import variant_source

STORE = re.compile(r"st\.global\.[bfu]32\s+\[(%\w+)(?:\+(\d+))?\]")


def single_words(ptx: str) -> int:
    """Count sixteen bytes of one address that are stored as four words."""
    offsets = defaultdict(set)
    for register, offset in STORE.findall(ptx):
        offsets[register].add(int(offset or 0))
    return sum(
        {x, x + 4, x + 8, x + 12} <= found
        for found in offsets.values()
        for x in found
        if x % 16 == 0
    )


@pytest.mark.parametrize(
    "entry", ["wy_factors_hopper", "channel_factors_hopper", "backward_chunk_hopper"]
)
def test_sixteen_bytes_are_one_store(entry):
    launch = next(x for x in resources.launches("sm_90").values() if x.entry == entry)
    ptx = nvrtc.compile_source(variant_source(launch.file, launch.macros), "compute_90a").ptx
    assert "st.global.v4" in ptx
    assert single_words(ptx) == 0


def test_single_words_are_seen():
    words = [f"st.global.u32 [%rd7{x}], %r{i};" for i, x in enumerate(("+16", "+20", "+24", "+28"))]
    assert single_words("\n".join(words)) == 1
    assert single_words("\n".join(words[1:])) == 0
