"""docs/promises.md names tests that exist, and leaves out no convention and no public name."""

import ast
import re
from pathlib import Path

import pytest

import cupy_delta

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_that_is_named_exists(file, name):
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_a_test_or_what_ci_runs():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not re.match(r"\| (promise|item) \|", row)]
    assert len(rows) > 40
    for row in rows:
        assert re.search(r"`[\w/]+\.py::\w+`|`\.ci/run`", row.split(" | ")[1]), row


def test_every_convention_has_its_row():
    text = (ROOT / "docs" / "conventions.md").read_text()
    table = text[text.index("| item |") : text.index("What never happens here")]
    items = re.findall(r"^\| (.+?) \|", table, re.M)[1:]
    rows = re.findall(r"^\| (.+?) \|", PAGE, re.M)
    assert [item for item in items if item not in rows] == []


def test_every_public_name_is_in_it():
    assert [n for n in cupy_delta.__all__ if not re.search(rf"`{n}[`.(]", PAGE)] == []
