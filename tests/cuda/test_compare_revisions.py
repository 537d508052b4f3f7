"""The comparison of revisions sees what it is for, and nothing else."""

import compare_revisions
import pytest

TEXT = """// what it does
extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }
"""


@pytest.fixture
def kernels(tmp_path):
    """Return a function that gives the code of a text as a kernel file, with macros."""

    def code(text, entry="scale", **defines):
        (tmp_path / "k.cu").write_text(text)
        variant = compare_revisions.Variant("sm_80", "k", "k.cu", entry, tuple(defines.items()))
        return compare_revisions.code_of(variant.unit(), "sm_80", tmp_path)

    return code


def test_names_and_comments_are_not_code(kernels):
    renamed = 'extern "C" __global__ void by(float* all) { all[threadIdx.x] *= N; }'
    assert kernels(TEXT, FACTOR=3) == kernels(renamed, "by", N=3)


def test_constants_with_a_name_are_not_code(kernels):
    named = TEXT.replace("FACTOR", "factor").replace(
        "extern", "constexpr int factor = 3;\nextern", 1
    )
    assert kernels(TEXT, FACTOR=3) == kernels(named)


def test_other_code_is_seen(kernels):
    assert len({kernels(TEXT, FACTOR=3), kernels(TEXT, FACTOR=5)}) == 2


def test_variants_are_compared_by_name_and_else_by_code():
    there = {("sm_80", "a X=1"): "1", ("sm_80", "a X=2"): "2", ("sm_80", "b"): "3"}
    assert not compare_revisions.compare_code(there, there)
    renamed = {("sm_80", "a Y=1"): "1", ("sm_80", "a Y=2"): "2", ("sm_80", "b"): "4"}
    assert compare_revisions.compare_code(there, renamed) == ["differs: sm_80 b"]
    changed = {("sm_80", "a Y=1"): "1", ("sm_90", "a Y=2"): "2", ("sm_80", "b"): "3"}
    assert compare_revisions.compare_code(there, changed) == [
        "gone: sm_80 a X=2",
        "new: sm_90 a Y=2",
    ]


def test_bits_are_compared_by_test_wherever_it_is():
    there = {"tests/old.py::test[1]": "1", "tests/old.py::test[2]": "2", "tests/old.py::gone": "3"}
    moved = {"tests/new.py::test[1]": "1", "tests/new.py::test[2]": "9", "tests/new.py::new": "3"}
    assert compare_revisions.compare_bits(there, moved) == (["differs: test[2]"], 2)
    assert compare_revisions.compare_bits(there, there) == ([], 3)


def test_of_tests_with_one_name_all_count():
    there = {"a.py::test": "1", "b.py::test": "2"}
    assert compare_revisions.compare_bits(there, there) == ([], 2)
    assert compare_revisions.compare_bits(there, there | {"b.py::test": "3"}) == (
        ["differs: test"],
        2,
    )
