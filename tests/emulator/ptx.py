"""The second leg: what NVRTC generates, executed by an interpreter (interpreter/).

So the text of the inline PTX is executed too, and not only its twins. Here every instruction
becomes a line for the interpreter: its name without modifiers that change nothing, and the places
of its operands. What it does is written there; one that is not known stops a program from being
read.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import NamedTuple

import nvrtc
from compile_cache import digest_of, kept
from ptx_instructions import SPECIAL, UnknownInstruction, instructions, operands

# The files whose text decides what a translation says.
TRANSLATOR = ("ptx", "ptx_instructions")
STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*"
    r"|(?P<label>[\w$]+):(?!:)|(?P<statement>[^;]+);)"
)
# Four-byte units that a register of a type has.
UNITS = {"pred": 1} | {f"{k}{n}": max(1, n // 32) for k in "bsuf" for n in (8, 16, 32, 64)}


class Program(NamedTuple):
    """One entry for the interpreter: bytes of its parameters, blocks per cluster, what it reads."""

    sizes: list[int]
    cluster: int
    text: str


class Entry:
    """One kernel being translated.

    Parameters
    ----------
    parameters, body : str
        Parts of the entry's text.
    files : dict
        Names of source files by their number in ``.loc``.
    """

    def __init__(self, parameters: str, body: str, files: dict):
        self.files = files
        self.sizes: list[int] = []
        self.units = self.local_bytes = 0
        self.start: list[str] = []  # what registers hold at first
        self.scopes: list[dict] = [{}]  # places by what the text says for them
        self.constants: dict[int, int] = {}
        for text in filter(None, (p.strip() for p in parameters.split(","))):
            m = re.match(r"\.param\b.*?\.([usbf]\d+)\b.*?(\w+)(?:\[(\d+)\])?$", text, re.S)
            self.scopes[0][m[2]] = self.initial("parameter", len(self.sizes))
            self.sizes.append(int(m[1][1:]) // 8 * int(m[3] or 1))
        self.steps: list[tuple] = []
        self.labels: dict[str, int] = {}
        self.site = "- 0"
        self.translate(body.strip())

    # ---- places

    def take(self, units: int) -> int:
        """Return the place of so many more units, at a multiple of them."""
        at = -(-self.units // units) * units
        self.units = at + units
        return at

    def initial(self, kind: str, what) -> int:
        at = self.take(2)
        self.start.append(f"{kind} {at} {what}")
        return at

    def declare(self, name: str, type_: str) -> None:
        """Declare one register, or a family of them, ``%r<8>``."""
        family = re.match(r"(%?[\w$]+)<(\d+)>", name)
        names = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name]
        for each in names:
            self.scopes[-1][each] = self.take(UNITS[type_])

    def constant(self, bits: int) -> int:
        if bits not in self.constants:
            self.constants[bits] = self.initial("constant", bits)
        return self.constants[bits]

    def place(self, x: str) -> int:
        """Return where an operand is that is a register, a number or a symbol."""
        for scope in reversed(self.scopes):
            if x in scope:
                return scope[x]
        if m := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", x):
            return self.constant(int(m[1], 16))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", x):
            return self.constant(int(x.rstrip("U"), 0) & (2**64 - 1))
        if x == "_":
            self.scopes[0][x] = self.take(2)
        elif x in SPECIAL:
            self.scopes[0][x] = self.initial("special", x)
        else:
            raise UnknownInstruction(f"operand {x}")
        return self.scopes[0][x]

    # ---- statements

    def translate(self, body: str) -> None:
        for m in STATEMENT.finditer(body):
            if m["statement"]:
                self.statement(" ".join(m["statement"].split()))
            elif m["label"]:
                self.labels[m["label"]] = len(self.steps)
            elif m["file"]:
                self.site = f"{self.files[m['file']]} {m['line']}"
            elif m["open"]:
                self.scopes.append({})
            else:
                self.scopes.pop()

    def statement(self, text: str) -> None:
        if m := re.match(r"\.reg \.(\w+) (.*)", text):
            for name in operands(m[2]):
                self.declare(name, m[1])
        elif m := re.match(r"\.local \.align \d+ \.b8 (\w+)\[(\d+)\]", text):
            self.scopes[0][m[1]] = self.initial("array", self.local_bytes)
            self.local_bytes += -(-int(m[2]) // 16) * 16
        elif text.startswith("."):
            if not text.startswith(".pragma"):
                raise UnknownInstruction(text)
        else:
            self.instruction(text)

    def instruction(self, text: str) -> None:
        guard = re.match(r"@(!?)(%?[\w$]+) (.*)", text)
        opcode, _, rest = (guard[3] if guard else text).partition(" ")
        when = "if" if guard and not guard[1] else "unless"
        if opcode.startswith("bra"):
            name, condition = (f"bra {when}", [guard[2]]) if guard else ("bra", [])
            self.step(name, condition, rest)
            return
        if guard:
            over = {"if": "unless", "unless": "if"}[when]
            self.step(f"bra {over}", [guard[2]], f" after {len(self.steps)}")
            skip = len(self.steps) - 1
        for name, names in instructions(opcode, operands(rest)):
            self.step(name, names)
        if guard:
            self.labels[f" after {skip}"] = len(self.steps)

    def step(self, name: str, names: list[str], label: str | None = None) -> None:
        self.steps.append((name, [self.place(x) for x in names], label, self.site))

    # ---- the program

    def program(self, cluster: int) -> Program:
        lines = [f"units {self.units}", f"local {self.local_bytes}", *self.start]
        for i, (name, places, label, site) in enumerate(self.steps):
            jump = self.labels[label] - i if label else 0
            lines.append(f"step {site} {jump} {' '.join(map(str, places))} : {name}")
        if self.units >= 2**16:
            raise UnknownInstruction(f"{self.units} units of registers")
        return Program(self.sizes, cluster, "\n".join(lines) + "\n")


def cluster_size(directives: str) -> int:
    """Return the number of blocks in a cluster of an entry, from the text before its body."""
    m = re.search(r"\.reqnctapercluster\s+(.*)", directives)
    size = re.fullmatch(r"([1248])(, 1, 1)?", m[1].strip()) if m else None
    if m and not size:
        raise UnknownInstruction(m[0])
    return int(size[1]) if size else 1


def translate(ptx: str, entry: str) -> Program:
    """Return the program of an entry of a PTX module."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', ptx))
    ptx = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.S)
    m = re.search(rf"\.visible\s+\.entry\s+{entry}\s*\((.*?)\)([^{{]*)\{{", ptx, re.S)
    depth = 1
    for brace in re.compile(r"[{}]").finditer(ptx, m.end()):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            break
    return Entry(m[1], ptx[m.end() : brace.start()], files).program(cluster_size(m[2]))


def compiled(unit: str, entry: str, arch: str, roots: list[Path], fused: bool = False) -> Program:
    """Return the program of an entry of a CUDA source.

    Unless `fused` it has no fused multiply-adds, as the twins have none. The architecture is a
    virtual one, ``"compute_80"``, so that no time goes into machine code. The source includes files
    of kernels/ and of `roots`.
    """
    options = (f"-fmad={str(fused).lower()}", "-lineinfo")
    digest = digest_of(unit, [nvrtc.KERNELS, *roots], nvrtc.version(), arch, *options)

    def compile_(part: Path) -> None:
        search = (f"-I{root}" for root in roots)
        found = nvrtc.compile_source(unit, arch, (*search, *options), nvrtc.KERNELS)
        # Names of files without the folders of this checkout.
        text = re.sub(r'(\.file\s+\d+\s+")(?:[^"]*/)?', r"\1", found.ptx)
        part.write_bytes(zlib.compress(text.encode()))

    source = kept(f"ptx-{digest}.z", compile_)

    def translate_(part: Path) -> None:
        program = translate(zlib.decompress(source.read_bytes()).decode(), entry)
        head = " ".join(map(str, (program.cluster, *program.sizes)))
        part.write_bytes(zlib.compress(f"{head}\n{program.text}".encode()))

    translator = [Path(__file__).with_name(f"{name}.py").read_text() for name in TRANSLATOR]
    name = f"program-{digest_of(digest, [], entry, *translator)}.z"
    head, _, text = zlib.decompress(kept(name, translate_).read_bytes()).decode().partition("\n")
    cluster, *sizes = map(int, head.split())
    return Program(sizes, cluster, text)
