"""The PTX leg sees what the primitives' twins cannot: the text of the inline PTX."""

import shutil
from pathlib import Path

import numpy as np
import nvrtc
import ptx
import pytest
import test_golden
from emulator import EmulatorFault, Kernel, empty, interpreted

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


# Statements on registers of 16, 32 and 64 bits and predicates, and what %r0 holds after them.
FLOAT = {"3e9": "0f4F32D05E", "nan": "0f7FC00000", "-2.5": "0fC0200000", "1": "0f3F800000"}
STATEMENTS = {
    "shl.b32 %r0, 1, 35;": 0,
    "mov.u32 %r1, -8; shr.s32 %r0, %r1, 40;": 2**32 - 1,
    "mov.u32 %r1, -8; shr.u32 %r0, %r1, 40;": 0,
    "mov.u32 %r1, -3; mul.hi.s32 %r0, %r1, 5;": 2**32 - 1,
    "mov.u32 %r1, -3; mul.hi.u32 %r0, %r1, 5;": 4,
    "mov.u16 %h0, -3; mul.wide.s16 %r0, %h0, 5;": 2**32 - 15,
    "mov.u16 %h0, 65535; mul.wide.u16 %r0, %h0, %h0;": 65535**2,
    "mov.u32 %r1, -3; mul.wide.s32 %d0, %r1, 5; cvt.u32.u64 %r0, %d0;": 2**32 - 15,
    "mov.u16 %h0, 32767; add.s16 %h0, %h0, 1; cvt.s32.s16 %r0, %h0;": 2**32 - 32768,
    "mov.b64 %d0, {7, 9}; mov.b64 {%r1, %r0}, %d0;": 9,
    "bfe.u32 %r0, 0x12345678, 8, 12;": 0x456,
    "bfi.b32 %r0, 0xAB, 0x12345678, 4, 8;": 0x12345AB8,
    "prmt.b32 %r0, 0x33221180, 0x77665544, 0x8074;": 0xFF807744,
    "shf.l.wrap.b32 %r0, 0x80000000, 1, 33;": 3,
    "lop3.b32 %r0, 12, 10, 9, 0x96;": 12 ^ 10 ^ 9,
    f"cvt.rzi.s32.f32 %r0, {FLOAT['3e9']};": 2**31 - 1,
    f"cvt.rzi.s32.f32 %r0, {FLOAT['nan']};": 0,
    f"cvt.rmi.s32.f32 %r0, {FLOAT['-2.5']};": 2**32 - 3,
    f"setp.ltu.f32 %p0, {FLOAT['nan']}, {FLOAT['1']}; selp.u32 %r0, 1, 2, %p0;": 1,
    f"setp.lt.f32 %p0, {FLOAT['nan']}, {FLOAT['1']}; selp.u32 %r0, 1, 2, %p0;": 2,
    f"setp.ne.f32 %p0, {FLOAT['nan']}, {FLOAT['1']}; selp.u32 %r0, 1, 2, %p0;": 2,
    "setp.eq.s32 %p1, 1, 1; setp.lt.and.s32 %p0, -1, 0, %p1; @!%p0 mov.u32 %r0, 5;": 0,
    "setp.lt.u32 %p0, -1, 0; @!%p0 mov.u32 %r0, 5; @%p0 mov.u32 %r0, 6;": 5,
    "bra.uni OVER; mov.u32 %r0, 5; OVER: add.s32 %r0, %r0, 1;": 1,
    "{ .reg .b32 %r0; mov.u32 %r0, 5; } add.s32 %r0, %r0, 2;": 2,
}


@pytest.mark.parametrize("statements", STATEMENTS)
def test_instructions_have_the_values_of_their_definition(monkeypatch, statements):
    text = f""".visible .entry k(.param .u64 k_0)
{{
 .reg .b32 %r<4>;
 .reg .b16 %h<4>;
 .reg .b64 %d<4>;
 .reg .pred %p<4>;
 {statements}
 ld.param.u64 %d1, [k_0];
 st.global.u32 [%d1+4], %r0;
 ret;
}}
"""
    monkeypatch.setattr(ptx, "compiled", lambda *_: ptx.translate(text, "k"))
    y = empty(2, np.uint32, "y")
    Kernel(Path(test_golden.SOURCE), "k", leg="ptx").launch(1, 1, 0, [y])
    assert y[1] == STATEMENTS[statements]


SUM_OF_A_PRODUCT = """#include "primitives/primitives.cuh"
extern "C" __global__ void k(float* y, float a, float b) { y[0] = a * a + b; }
"""


@pytest.mark.parametrize(("leg", "sum_"), [("source", 0), ("ptx", 0), ("fused", 2.0**-24)])
def test_only_one_leg_fuses(tmp_path, leg, sum_):
    source, y = tmp_path / "k.cu", empty(1, np.float32, "y")
    source.write_text(SUM_OF_A_PRODUCT)
    numbers = np.float32(1 + 2.0**-12), np.float32(-1 - 2.0**-11)
    Kernel(source, "k", leg=leg).launch(1, 1, 0, [y, *numbers])
    assert y[0] == sum_


def test_an_unknown_instruction_stops_the_program():
    entry = ".visible .entry k()\n{\n .reg .b32 %r<2>;\n brev.b32 %r0, %r1;\n ret;\n}\n"
    with pytest.raises(ptx.UnknownInstruction, match=r"brev\.b32"):
        interpreted(ptx.translate(entry, "k").text)


def test_what_nvrtc_refuses_is_shown():
    with pytest.raises(nvrtc.CompileError, match="undefined_name"):
        nvrtc.compile_source("__global__ void k() { undefined_name(); }", "sm_80")


def test_code_for_another_architecture_has_its_own_ptx():
    source = f'#include "{Path(test_golden.SOURCE)}"\n'
    for sm in (80, 120):
        assert f".target sm_{sm}" in nvrtc.compile_source(source, f"sm_{sm}").ptx
