"""The PTX leg sees what the primitives' twins cannot: the text of the inline PTX."""

import shutil
from pathlib import Path

import numpy as np
import nvrtc
import ptx
import pytest
import test_golden
from emulator import EmulatorFault

pytestmark = pytest.mark.fast

# Mistakes in device.cuh that every compiler accepts, and the results or the fault that show them.
WRONG_TEXT = {
    "halves of a pair swapped": ('"=r"(y) : "f"(high), "f"(low)', '"=r"(y) : "f"(low), "f"(high)'),
    "transpose dropped": ("m8n8.x4.trans.shared", "m8n8.x4.shared"),
    "b0 and b1 swapped": ('"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)'),
    "a's registers swapped": ('"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'),
    "all bytes copied": ("[%0], [%1], %2, %3;", "[%0], [%1], %2, %2;"),
    "a wait that allows one more": ('"n"(PENDING)', '"n"(PENDING + 1)'),
}


@pytest.mark.parametrize("mistake", WRONG_TEXT)
def test_wrong_inline_ptx_is_seen(tmp_path, monkeypatch, mistake):
    right, wrong = WRONG_TEXT[mistake]
    shutil.copytree(nvrtc.KERNELS, tmp_path / "kernels")
    device = tmp_path / "kernels" / "primitives" / "device.cuh"
    text = device.read_text()
    assert right in text
    device.write_text(text.replace(right, wrong))
    expected = test_golden.from_emulator(leg="ptx")
    monkeypatch.setattr(nvrtc, "KERNELS", tmp_path / "kernels")
    try:
        found = test_golden.from_emulator(leg="ptx")
    except EmulatorFault as fault:
        assert mistake == "a wait that allows one more" and fault.kind == "async-hazard"
    else:
        assert any(not np.array_equal(found[n], expected[n], equal_nan=True) for n in expected)


def test_an_unknown_instruction_stops_the_translation():
    entry = ".visible .entry k()\n{\n .reg .b32 %r<2>;\n brev.b32 %r0, %r1;\n ret;\n}\n"
    with pytest.raises(ptx.UnknownInstruction, match=r"brev\.b32"):
        ptx.translate(entry)


def test_what_nvrtc_refuses_is_shown():
    with pytest.raises(nvrtc.CompileError, match="undefined_name"):
        nvrtc.compile_source("__global__ void k() { undefined_name(); }", "sm_80")


def test_code_for_another_architecture_has_its_own_ptx():
    source = f'#include "{Path(test_golden.SOURCE)}"\n'
    for sm in (80, 120):
        assert f".target sm_{sm}" in nvrtc.compile_source(source, f"sm_{sm}").ptx
