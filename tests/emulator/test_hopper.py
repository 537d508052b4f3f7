"""What the primitives of compute capability 9.0 do, on both legs and in any order of events."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulatorFault, Kernel, Run, copy_in, empty
from planted import plant_in_primitives
from tensor_map import tensor_map

SOURCE = Path(__file__).resolve().parent / "kernels" / "hopper.cu"
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
LEGS = ["source", "ptx"]
RUNS = [
    Run(),
    Run(completion="early"),
    Run(schedule="descending", completion="either", seed=1),
    *(Run(schedule="random", completion="either", preempt=30, seed=seed) for seed in range(3)),
]
TILE_BYTES = 64 * 64 * 2


def kernel(entry, leg, element="bf16", **defines):
    defaults = dict.fromkeys(("A_IN_REGISTERS", "A_BY_COLUMNS", "B_BY_COLUMNS"), 0) | {
        "BOX_WIDTH": 64
    }
    return Kernel(SOURCE, entry, {**defaults, "ELEMENT": element, **defines}, sm=90, leg=leg)


def normal(*shape, element="bf16", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[element])


def matrix_map(x):
    """Tiles of 64 x 64 of a matrix, columns along x and rows along z."""
    return tensor_map(x, (1, len(x), 1, x.shape[1]), (1, 64, 1, 64))


def product(leg, run=RUNS[0], element="bf16", tiles=8, a_by="rows", b_by="rows"):
    """d = 2 A B of `products`, and what NumPy gives."""
    a, b = (normal(n, 64, element=element, seed=n) for n in (64, 8 * tiles + 1))
    b = b[1:]
    a_given = copy_in(np.ascontiguousarray(a.T if a_by == "columns" else a), "a")
    b_given = copy_in(np.ascontiguousarray(b.T if b_by == "columns" else b), "b")
    out = empty((64, 8 * tiles), np.float32, "out")
    kernel(
        "products",
        leg,
        element,
        N_TILES=tiles,
        A_IN_REGISTERS=int(a_by == "registers"),
        A_BY_COLUMNS=int(a_by == "columns"),
        B_BY_COLUMNS=int(b_by == "columns"),
    ).launch(
        1,
        128,
        (1 + tiles // 8) * TILE_BYTES + 8,
        [matrix_map(a_given), matrix_map(b_given), out],
        run,
    )
    return out, 2 * a.astype(np.float64) @ b.astype(np.float64).T


@pytest.mark.parametrize("b_by", ["rows", "columns"])
@pytest.mark.parametrize("a_by", ["registers", "rows", "columns"])
@pytest.mark.parametrize("tiles", [8, 16])
@pytest.mark.parametrize("element", DTYPES)
def test_wgmma_multiplies_and_both_legs_agree(element, tiles, a_by, b_by):
    out, expected = product("source", RUNS[0], element, tiles, a_by, b_by)
    assert np.allclose(out, expected, rtol=1e-5, atol=1e-4)
    from_ptx, _ = product("ptx", RUNS[0], element, tiles, a_by, b_by)
    assert np.array_equal(out, from_ptx)


def test_half_a_warpgroup_has_no_wgmma():
    tile = copy_in(normal(64, 64), "tile")
    out = empty((64, 64), np.float32, "out")
    with pytest.raises(EmulatorFault, match="divergence: wgmma by fewer than the four warps"):
        kernel("products", "source").launch(
            1, 64, 2 * TILE_BYTES + 8, [matrix_map(tile), matrix_map(tile), out]
        )


def run_ring(leg, run, blocks=2, rows=290):
    x = normal(blocks, rows, 64)
    given, y = copy_in(x, "x"), empty(x.shape, x.dtype, "y")
    out = empty((blocks, 64, 64), np.float32, "out")
    maps = [tensor_map(v, (1, blocks, rows, 64), (1, 1, 64, 64)) for v in (given, y)]
    tiles = -(-rows // 64)
    counts = kernel("ring", leg).launch(
        blocks, 256, 3 * TILE_BYTES + 32, [*maps, out, np.int32(tiles)], run
    )
    return x, y, out, counts


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("leg", LEGS)
def test_a_ring_of_two_warpgroups(leg, run):
    x, y, out, counts = run_ring(leg, run)
    assert np.array_equal(x, y)
    padded = np.zeros((2, 5 * 64, 64))
    padded[:, : x.shape[1]] = x
    tiles = padded.reshape(2, 5, 64, 64)
    assert np.allclose(out, np.einsum("btik,btjk->bij", tiles, tiles), rtol=1e-5, atol=1e-4)
    assert counts["accesses"] > 0


def test_a_ring_gives_the_same_bits_in_any_order_of_events():
    outs = [run_ring(leg, run)[2] for leg in LEGS for run in RUNS[::3]]
    assert all(np.array_equal(out, outs[0]) for out in outs)


SHAPE, BOX = (2, 6, 3, 72), (2, 4, 2)


def move_boxes(leg, at, width=64, to=None):
    """A box from `at` to shared memory, and from there to a place of another array."""
    x = normal(*SHAPE)
    given, stored = copy_in(x, "x"), copy_in(np.zeros_like(x), "stored")
    box = (*BOX, width)
    seen = empty(box, x.dtype, "seen")
    maps = [tensor_map(v, SHAPE, box) for v in (given, stored)]
    coordinates = copy_in(np.array([*at, *(to or at)], np.int32), "at")
    kernel("boxes", leg, BOX_WIDTH=width).launch(
        1, 32, seen.nbytes + 8, [*maps, coordinates, seen, np.int32(seen.size)]
    )
    return x, seen, stored


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(
    "at", [(0, 0, 0, 0), (24, 1, 2, 1), (-8, 2, -1, 0), (40, -1, 0, 1), (0, 0, 5, 1), (0, 5, 0, 0)]
)
@pytest.mark.parametrize("width", [16, 32, 64])
def test_boxes_are_clipped_at_the_ends_of_the_array(leg, at, width):
    to = tuple(max(start, 0) for start in at)
    x, seen, stored = move_boxes(leg, at, width, to)
    expected, kept = np.zeros(seen.shape, x.dtype), np.zeros_like(x)
    for index in np.ndindex(seen.shape):
        source, target = (
            tuple(i + start for i, start in zip(index, corner[::-1], strict=True))
            for corner in (at, to)
        )
        if all(0 <= i < n for i, n in zip(source, SHAPE, strict=True)):
            expected[index] = x[source]
        if all(i < n for i, n in zip(target, SHAPE, strict=True)):
            kept[target] = expected[index]
    assert np.array_equal(seen, expected)
    assert np.array_equal(stored, kept)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("axis", range(4))
def test_a_box_is_not_stored_before_an_array(leg, axis):
    to = tuple(-8 * (axis == i) for i in range(4))
    with pytest.raises(EmulatorFault, match=r"tma_store at .* before the array"):
        move_boxes(leg, (0, 0, 0, 0), to=to)


def transpose(leg):
    x = normal(16, 16)
    same, transposed = empty(x.shape, x.dtype, "same"), empty(x.shape, x.dtype, "transposed")
    kernel("transposes", leg).launch(1, 32, 1024, [copy_in(x, "x"), same, transposed])
    return x, same, transposed


@pytest.mark.parametrize("leg", LEGS)
def test_stmatrix(leg):
    x, same, transposed = transpose(leg)
    assert np.array_equal(same, x)
    assert np.array_equal(transposed, x.T)


# Mistakes in hopper_device.cuh that every compiler accepts, what shows them, and the fault if
# there is one: otherwise values are wrong.
WRONG_TEXT = {
    "transpose dropped": ("x4.trans.shared.b16 [%0]", "x4.shared.b16 [%0]", transpose, None),
    "registers of A swapped": (
        '"r"(a[1]), "r"(a[2])',
        '"r"(a[2]), "r"(a[1])',
        lambda leg: product(leg, a_by="registers"),
        None,
    ),
    "A and B by columns swapped": (
        '"n"(A_COLUMNS), "n"(B_COLUMNS)',
        '"n"(B_COLUMNS), "n"(A_COLUMNS)',
        lambda leg: product(leg, a_by="columns"),
        "misaligned",
    ),
    "coordinates swapped": (
        '"r"(shared_address(barrier)), "r"(x), "r"(y)',
        '"r"(shared_address(barrier)), "r"(y), "r"(x)',
        lambda leg: move_boxes(leg, (24, 1, 2, 1)),
        None,
    ),
    "the other parity": ('"r"(parity)', '"r"(parity ^ 1)', product, "uninitialised"),
    "a wait that allows one more": (
        'wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING)',
        'wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING + 1)',
        product,
        "async-hazard",
    ),
}


@pytest.mark.parametrize("mistake", WRONG_TEXT)
def test_wrong_inline_ptx_is_seen(tmp_path, monkeypatch, mistake):
    right, wrong, results, kind = WRONG_TEXT[mistake]
    expected = results(leg="source")
    plant_in_primitives(monkeypatch, tmp_path, right, wrong)
    if kind:
        with pytest.raises(EmulatorFault, match=kind):
            results(leg="ptx")
    else:
        found = results(leg="ptx")
        assert any(not np.array_equal(x, y) for x, y in zip(expected, found, strict=True))


def test_a_tensor_map_is_refused_if_the_driver_would():
    x = empty((2, 4, 12), np.float16)
    for shape, box in [
        ((1, 2, 4, 13), (1, 1, 1, 64)),
        ((1, 2, 4, 12), (1, 1, 1, 64)),
        ((1, 2, 6, 8), (1, 1, 1, 24)),
        ((1, 2, 6, 8), (1, 0, 1, 64)),
    ]:
        with pytest.raises(ValueError, match=r"contiguous|box|16 bytes"):
            tensor_map(x, shape, box)
    with pytest.raises(ValueError, match="contiguous"):
        tensor_map(x[:, ::2], (1, 1, 6, 8), (1, 1, 1, 64))
