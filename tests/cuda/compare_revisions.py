"""Which kernels compile to other machine code than at another revision, and which results differ.

python tests/cuda/compare_revisions.py code REVISION [--only sm90/forward] [--arch sm_90]
python tests/cuda/compare_revisions.py bits REVISION -- tests/cuda/test_pairwise.py

For changes of form: `code` compiles every variant of tests/golden/resources.json, here and there,
and needs no GPU; names and comments do not count.
`bits` runs emulated tests, here and there, and compares what their kernels leave in memory. Both
end with status 1 when something differs. REVISION is anything that git knows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))

import compile_cache
import nvrtc

# Of an ELF section: it takes no place in the file.
NOBITS = 8
TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
# Run in either checkout, whose files are its own: prints the variants of its table.
LIST = """
import json, pathlib, sys
(path,) = pathlib.Path("tests").rglob("resources.py")
sys.path[:0] = [str(path.parent), "tests/emulator", "."]
import resources
for arch, name in resources.cases():
    launch = resources.launches(arch)[name]
    macros = getattr(launch, "macros", launch.defines)
    print(json.dumps([launch.arch or arch, name, launch.file, launch.entry, macros]))
"""


class Variant(NamedTuple):
    """One kernel for one architecture, as a checkout describes it."""

    arch: str
    name: str
    file: str
    entry: str
    defines: tuple

    def unit(self) -> str:
        """Return what is compiled: whatever the entry is called, its symbol is `entry`."""
        macros = "".join(f"#define {name} {value}\n" for name, value in self.defines)
        return f'{macros}#define {self.entry} entry\n#include "{self.file}"\n'


# ---- machine code --------------------------------------------------------------------------------


def variants(root: Path) -> list[Variant]:
    command = [sys.executable, "-c", LIST]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the kernels of {root} cannot be listed:\n{result.stderr}")
    return [Variant(*json.loads(line)) for line in result.stdout.splitlines()]


def machine_code(cubin: bytes) -> bytes:
    """Return what runs: instructions, registers, constants and shared bytes, without any name.

    Names of variables, and constants that no instruction reads, are kept in other sections.
    """
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + i * size) for i in range(count)]
    found = []
    for name_at, kind, _, _, offset, length, _, info, _, _ in headers:
        at = headers[names][4] + name_at
        name = cubin[at : cubin.index(b"\0", at)].decode()
        if re.match(r"\.(text|nv\.constant[0-3]|nv\.shared)\.", name):
            content = b"" if kind == NOBITS else cubin[offset : offset + length]
            found.append(repr((name, info >> 24, length)).encode() + content)
    return b"".join(found)


def code_of(unit: str, arch: str, kernels: Path) -> str:
    """Return a digest of the code of a unit that includes files of a folder of kernels."""
    digest = compile_cache.digest_of(unit, [kernels], arch, nvrtc.version(), "machine code")

    def make(part: Path) -> None:
        cubin = nvrtc.compile_source(unit, arch, ("-ftz=true",), kernels).cubin
        part.write_text(hashlib.sha256(machine_code(cubin)).hexdigest())

    return compile_cache.kept(f"code-{digest}", make).read_text()


def codes(root: Path, chosen: list[Variant]) -> dict[tuple[str, str], str]:
    """Return a digest of its machine code for each architecture and name of a variant."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda v: code_of(v.unit(), v.arch, root / "kernels"), chosen)
        return {(v.arch, v.name): digest for v, digest in zip(chosen, digests, strict=True)}


def compare_code(there: dict, here: dict) -> list[str]:
    """Return a line for each kernel that has no equal on the other side.

    Variants of one name are compared; of those that only one side has by name, each may be any of
    the other side's with the same code.
    """
    lines = [f"differs: {' '.join(k)}" for k in there.keys() & here.keys() if there[k] != here[k]]
    for what, one, other in (("gone", there, here), ("new", here, there)):
        others = {(arch, code) for (arch, _), code in other.items()}
        for key in one.keys() - other.keys():
            if (key[0], one[key]) not in others:
                lines.append(f"{what}: {' '.join(key)}")
    return sorted(lines)


# ---- bits of emulated tests ----------------------------------------------------------------------


def bits(root: Path, arguments: list[str]) -> dict[str, str]:
    """Run tests of a checkout and return digests of what their kernels left, by test."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "bits.json"
        path = os.pathsep.join([str(TESTS / "plugins"), str(root)])
        environment = os.environ | {"CUPY_DELTA_RECORD_BITS": str(record), "PYTHONPATH": path}
        options = ["-q", "-p", "record_bits", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        status = subprocess.run(command, cwd=root, env=environment).returncode
        if not record.exists():
            raise RuntimeError(f"pytest ended with status {status} in {root}")
        return json.loads(record.read_text())


def compare_bits(there: dict, here: dict) -> tuple[list[str], int]:
    """Return the tests with other bits, and how many were compared.

    Tests are told apart by name and parameters alone: their files may be others.
    """

    def by_name(digests: dict) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for node, digest in sorted(digests.items(), key=lambda item: item[1]):
            found.setdefault(node.partition("::")[2], []).append(digest)
        return found

    one, other = by_name(there), by_name(here)
    common = {name for name in one.keys() & other.keys() if len(one[name]) == len(other[name])}
    lines = sorted(f"differs: {name}" for name in common if one[name] != other[name])
    return lines, sum(len(one[name]) for name in common)


# ---- the command ---------------------------------------------------------------------------------


def checkout(revision: str, folder: Path) -> None:
    """Write the files of a revision to a folder."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise SystemExit(f"{revision}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    code = commands.add_parser("code", help="machine code of every variant")
    code.add_argument("revision")
    code.add_argument("--only", default="", help="a part of the path of kernel files here")
    code.add_argument("--arch", default="", help="an architecture, e.g. sm_90")
    tests = commands.add_parser("bits", help="what emulated kernels leave in memory")
    tests.add_argument("revision")
    tests.add_argument("arguments", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkout(options.revision, Path(folder))
        if options.what == "code":
            here = [v for v in variants(ROOT) if options.only in v.file]
            # Files may have other names there: with --only, entries have to have the same.
            entries = {v.entry for v in here}
            there = [v for v in variants(Path(folder)) if not options.only or v.entry in entries]
            here, there = (
                codes(root, [v for v in some if v.arch.startswith(options.arch)])
                for root, some in ((ROOT, here), (Path(folder), there))
            )
            lines, count = compare_code(there, here), len(here)
        else:
            there = bits(Path(folder), options.arguments)
            lines, count = compare_bits(there, bits(ROOT, options.arguments))
    print("\n".join([*lines, f"{len(lines)} of {count} differ from {options.revision}"]))
    raise SystemExit(bool(lines) or not count)


if __name__ == "__main__":
    main()
