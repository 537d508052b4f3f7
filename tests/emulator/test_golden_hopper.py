"""The emulator's TMA, mbarriers, clusters and wgmma against what an NVIDIA GPU of 9.0 gave.

Kept in tests/golden/hopper.npz, which `python tests/emulator/test_golden_hopper.py` writes anew on
such a GPU. Factors are small integers, so that products have one right answer in any order of sums.
"""

from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden" / "hopper.npz"
KERNELS = HERE / "kernels"
ELEMENTS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
TILE_BYTES = 64 * 64 * 2
BOXED = (2, 6, 3, 72)  # what boxes are taken of
# A box is loaded and stored at each. None lies before the array: to store there is an illegal
# instruction to an H200.
CORNERS = [(0, 0, 0, 0), (24, 1, 2, 1), (0, 0, 5, 1), (0, 5, 0, 0)]


class Emulator:
    """Memory and launches on the CPU, by one of the two legs."""

    def __init__(self, leg: str):
        self.leg = leg

    def array(self, x):
        from emulator import copy_in

        return copy_in(x)

    def tensor_map(self, x, shape, box):
        from tensor_map import tensor_map

        return tensor_map(x, shape, box)

    def launch(self, source, entry, defines, blocks, threads, shared, arguments):
        from emulator import Kernel

        kernel = Kernel(KERNELS / source, entry, defines, sm=90, leg=self.leg)
        kernel.launch(blocks, threads, shared, arguments)

    def result(self, x):
        return np.array(x)


class Gpu:
    """The same with CuPy."""

    def array(self, x):
        import cupy

        return cupy.asarray(x.view(np.uint16)) if x.itemsize == 2 else cupy.asarray(x)

    def tensor_map(self, x, shape, box):
        from cupy_delta.cuda.runtime.device import by_value
        from cupy_delta.cuda.runtime.tensor_maps import tensor_map

        return by_value(tensor_map(x.data.ptr, shape, box))

    def launch(self, source, entry, defines, blocks, threads, shared, arguments):
        import cupy

        options = ["--std=c++17", f"-I{HERE.parent.parent / 'kernels'}", "-arch=sm_90a"]
        options += [f"-D{name}={value}" for name, value in defines.items()]
        code = (KERNELS / source).read_text()
        kernel = cupy.RawModule(code=code, options=tuple(options)).get_function(entry)
        kernel((blocks,), (threads,), tuple(arguments), shared_mem=shared)
        cupy.cuda.Device().synchronize()

    def result(self, x):
        return x.get()


def integers(*shape, element="bf16", seed=0):
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(ELEMENTS[element])


def products(machine, element, tiles, a_by, b_by):
    """2 A B of wgmma, with operands from registers, and from shared memory by rows and columns."""
    a, b = (integers(n, 64, element=element, seed=n) for n in (64, 8 * tiles))
    a = machine.array(np.ascontiguousarray(a.T if a_by == "columns" else a))
    b = machine.array(np.ascontiguousarray(b.T if b_by == "columns" else b))
    out = machine.array(np.zeros((64, 8 * tiles), np.float32))
    maps = [machine.tensor_map(x, (1, x.shape[0], 1, x.shape[1]), (1, 64, 1, 64)) for x in (a, b)]
    defines = dict(
        ELEMENT=element,
        N_TILES=tiles,
        A_IN_REGISTERS=int(a_by == "registers"),
        A_BY_COLUMNS=int(a_by == "columns"),
        B_BY_COLUMNS=int(b_by == "columns"),
        BOX_WIDTH=64,
    )
    shared = (1 + tiles // 8) * TILE_BYTES + 8
    machine.launch("hopper.cu", "products", defines, 1, 128, shared, [*maps, out])
    return {"out": machine.result(out)}


PLAIN = dict(ELEMENT="bf16", A_IN_REGISTERS=0, A_BY_COLUMNS=0, B_BY_COLUMNS=0)


def ring(machine, blocks=2, rows=290):
    """A ring of TMA loads, sums of X X^T, and X stored again; 290 rows end within a tile."""
    x = integers(blocks, rows, 64)
    given, y = machine.array(x), machine.array(np.zeros_like(x))
    out = machine.array(np.zeros((blocks, 64, 64), np.float32))
    maps = [machine.tensor_map(v, (1, blocks, rows, 64), (1, 1, 64, 64)) for v in (given, y)]
    arguments = [*maps, out, np.int32(-(-rows // 64))]
    defines = PLAIN | {"BOX_WIDTH": 64}
    machine.launch("hopper.cu", "ring", defines, blocks, 256, 3 * TILE_BYTES + 32, arguments)
    return {"out": machine.result(out), "y": machine.result(y)}


def boxes(machine, width):
    """Boxes that reach over the ends of an array, from it and to another one."""
    x, found = integers(*BOXED), {}
    for n, at in enumerate(CORNERS):
        given, stored = machine.array(x), machine.array(np.zeros_like(x))
        seen = machine.array(np.zeros((2, 4, 2, width), x.dtype))
        maps = [machine.tensor_map(v, BOXED, (2, 4, 2, width)) for v in (given, stored)]
        corner = machine.array(np.array([*at, *at], np.int32))
        arguments = [*maps, corner, seen, np.int32(seen.size)]
        defines = PLAIN | {"BOX_WIDTH": width}
        machine.launch("hopper.cu", "boxes", defines, 1, 32, 2 * seen.size + 8, arguments)
        found |= {f"seen {n}": machine.result(seen), f"stored {n}": machine.result(stored)}
    return found


def transposes(machine):
    """A tile by ldmatrix and stmatrix, as it is and transposed."""
    x = integers(16, 16)
    outs = [machine.array(np.zeros_like(x)) for _ in range(2)]
    defines = PLAIN | {"BOX_WIDTH": 64}
    machine.launch("hopper.cu", "transposes", defines, 1, 32, 1024, [machine.array(x), *outs])
    return dict(zip(("same", "transposed"), map(machine.result, outs), strict=True))


def cluster(machine, size):
    """Rows sent round the rings of two clusters; sums of floats in the order of the rounds."""
    blocks, rounds = 2 * size, 3
    x = np.random.default_rng(0).standard_normal((blocks, rounds, 64), np.float32)
    y, ranks = (machine.array(np.zeros(n, d)) for n, d in (((blocks, 64), "f4"), (blocks, "i4")))
    arguments = [machine.array(x), y, ranks, np.int32(rounds)]
    defines = {"CLUSTER": size}
    machine.launch("planted_cluster.cu", "planted", defines, blocks, 64, 544, arguments)
    return {"y": machine.result(y), "ranks": machine.result(ranks)}


CASES = {
    **{
        f"products {' '.join(map(str, case))}": (products, case)
        for case in [
            *product(ELEMENTS, (8,), ("registers", "rows", "columns"), ("rows", "columns")),
            ("bf16", 16, "registers", "columns"),
            ("f16", 16, "columns", "rows"),
        ]
    },
    "ring": (ring, ()),
    **{f"boxes {width}": (boxes, (width,)) for width in (16, 32, 64)},
    "transposes": (transposes, ()),
    **{f"cluster {size}": (cluster, (size,)) for size in (2, 4)},
}


def bits(x):
    return np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32}[x.itemsize])


def run(machine, case):
    function, arguments = CASES[case]
    return {f"{case}: {name}": x for name, x in function(machine, *arguments).items()}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def test_every_case_was_recorded_on_such_a_gpu(golden):
    assert {name.split(":")[0] for name in golden} == {*CASES, "gpu"}
    for case in CASES:
        assert any(x.any() for name, x in golden.items() if name.startswith(f"{case}:"))


@pytest.mark.parametrize("leg", ["source", "ptx"])
@pytest.mark.parametrize("case", CASES)
def test_the_emulator_gives_what_a_gpu_gave(golden, case, leg):
    found = run(Emulator(leg), case)
    assert found
    for name, x in found.items():
        different = np.argwhere(bits(x) != golden[name].astype(bits(x).dtype))
        assert not len(different), (name, different[:5])


if __name__ == "__main__":
    import cupy

    found = {name: bits(x) for case in CASES for name, x in run(Gpu(), case).items()}
    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    np.savez_compressed(GOLDEN, **found, gpu=np.array(gpu))
    print(f"wrote {GOLDEN}")
