"""The second leg: what NVRTC generates, translated to C++ on the emulator's runtime.

So the text of the inline PTX is executed too, and not only its twins. Every instruction becomes one
C++ statement; registers are unsigned integers of their size (include/ptx_on_cpu.h). An instruction
that is not known here stops the translation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nvrtc
from compile_cache import digest_of, kept
from ptx_hopper import HopperInstructions
from ptx_instructions import REGISTERS, UnknownInstruction, operands

# The files whose text decides what a translation says.
TRANSLATOR = ("ptx", "ptx_hopper", "ptx_instructions")
STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*"
    r"|(?P<label>[\w$]+):(?!:)|(?P<statement>[^;]+);)"
)


class Entry(HopperInstructions):
    """One kernel being translated.

    Parameters
    ----------
    name, parameters, body : str
        Parts of the entry's text.
    files : dict
        Names of source files by their number in ``.loc``.
    cluster : int
        Blocks per cluster.
    """

    def __init__(self, name: str, parameters: str, body: str, files: dict, cluster: int):
        self.name, self.files, self.cluster = name, files, cluster
        self.parameters: dict[str, int] = {}
        self.sizes: list[int] = []
        for text in filter(None, (p.strip() for p in parameters.split(","))):
            m = re.match(r"\.param\b.*?\.([usbf]\d+)\b.*?(\w+)(?:\[(\d+)\])?$", text, re.S)
            self.parameters[m[2]] = len(self.sizes)
            self.sizes.append(int(m[1][1:]) // 8 * int(m[3] or 1))
        self.scopes: list[dict] = [{}]
        self.registers: dict[str, tuple[str, int]] = {}
        self.locals: dict[str, str] = {}
        self.code: list[str] = []
        self.site = "Site{nullptr, 0}"
        self.translate(body.strip())

    # ---- statements

    def translate(self, body: str) -> None:
        at = 0
        while at < len(body):
            m = STATEMENT.match(body, at)
            at = m.end()
            if m["open"]:
                self.scopes.append({})
            elif m["close"]:
                self.scopes.pop()
            elif m["file"]:
                self.site = f'Site{{"{self.files[m["file"]]}", {m["line"]}}}'
            elif m["label"]:
                self.code.append(f"{self.label(m['label'])}:;")
            else:
                self.statement(" ".join(m["statement"].split()))

    def statement(self, text: str) -> None:
        if m := re.match(r"\.reg \.(\w+) (.*)", text):
            for name in operands(m[2]):
                self.declare(name, REGISTERS[m[1]])
        elif m := re.match(r"\.local \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
            self.locals[m[2]] = f"alignas({m[1]}) uint8_t {m[2]}[{m[3]}];"
        elif text.startswith("."):
            if not text.startswith(".pragma"):
                raise UnknownInstruction(text)
        else:
            guard = ""
            if m := re.match(r"@(!?)(%?[\w$]+) (.*)", text):
                guard, text = f"if ({m[1]}{self.value(m[2], 'pred')}) ", m[3]
            opcode, _, rest = text.partition(" ")
            code = self.instruction(opcode, operands(rest))
            if code:
                self.code.append(f"{guard}{{ {code} }}")

    def declare(self, name: str, type_: str) -> None:
        """Declare one register, or a family of them, ``%r<8>``: an array."""
        family = re.match(r"(%?[\w$]+)<(\d+)>", name)
        prefix, count = (family[1], int(family[2])) if family else (name, 1)
        known = f"r{len(self.registers)}_{re.sub(r'[^0-9a-zA-Z]', '', prefix)}"
        self.registers[known] = (type_, count)
        for i in range(count):
            r = f"{prefix}{i}" if family else name
            self.scopes[-1][r] = f"{known}[{i}]", type_

    # ---- the C++ function

    def function(self) -> Iterator[str]:
        yield f'extern "C" void emulator_kernel_{self.name}(void** arguments) {{'
        yield '  shared_all("all of it", Site{"", 0});'
        yield "  [[maybe_unused]] const uint64_t dynamic_shared = dynamic_shared_start();"
        for i, size in enumerate(self.sizes):
            yield f"  alignas(16) uint8_t p{i}[{size}]; memcpy(p{i}, arguments[{i}], {size});"
        for text in self.locals.values():
            yield f"  {text}"
        for name, (type_, count) in self.registers.items():
            yield f"  {type_} {name}[{count}]{{}};"
        yield from (f"  {line}" for line in self.code)
        yield "  return;\n}"
        yield f'extern "C" int emulator_sizes_{self.name}(int* sizes) {{'
        yield f"  const int known[] = {{{', '.join(map(str, self.sizes)) or 0}}};"
        yield f"  memcpy(sizes, known, sizeof known);\n  return {len(self.sizes)};\n}}"
        yield f'extern "C" int emulator_cluster_{self.name}() {{ return {self.cluster}; }}'


def cluster_size(directives: str) -> int:
    """Return the number of blocks in a cluster of an entry, from the text before its body."""
    m = re.search(r"\.reqnctapercluster\s+(.*)", directives)
    size = re.fullmatch(r"([1248])(, 1, 1)?", m[1].strip()) if m else None
    if m and not size:
        raise UnknownInstruction(m[0])
    return int(size[1]) if size else 1


def translate(ptx: str) -> str:
    """Return C++ for every entry of a PTX module."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', ptx))
    ptx = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.S)
    lines = ['#include "ptx_on_cpu.h"', "using namespace emulator;"]
    for m in re.finditer(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", ptx, re.S):
        end, depth = m.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
        body = ptx[m.end() : end - 1]
        lines += Entry(m[1], m[2], body, files, cluster_size(m[3])).function()
    return "\n".join(lines) + "\n"


def compile_to_cpp(unit: str, arch: str, roots: list[Path]) -> str:
    """Return C++ for the kernels of a CUDA source, without fused multiply-adds, as in the twins.

    The architecture is a virtual one, ``"compute_80"``, so that no time goes into machine code.
    The source includes files of kernels/ and of `roots`.
    """
    options = ("-fmad=false", "-lineinfo")
    translator = [Path(__file__).with_name(f"{name}.py").read_text() for name in TRANSLATOR]
    digest = digest_of(unit, [nvrtc.KERNELS, *roots], nvrtc.version(), arch, *options, *translator)

    def make(part: Path) -> None:
        search = (f"-I{root}" for root in roots)
        found = nvrtc.compile_source(unit, arch, (*search, *options), nvrtc.KERNELS)
        part.write_text(translate(found.ptx))

    return kept(f"ptx-{digest}.cpp", make).read_text()
