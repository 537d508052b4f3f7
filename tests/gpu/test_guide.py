"""The documents' code for a GPU, block after block as a reader runs it."""

import doctest
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_page_runs(page):
    if page == "docs/guide.md":
        pytest.importorskip("torch")
    text = (ROOT / page).read_text()
    names: dict = {}
    start = 0
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if "mpi4py" in found[1]:  # of several processes: tests/parallel/test_readme.py
            break
        # What stands before it runs as a doctest in CI; here it makes the arrays.
        for example in doctest.DocTestParser().get_examples(text[start : found.start()]):
            exec(example.source, names)
        # Numbered as in the page, for the traceback.
        code = "\n" * text[: found.start(1)].count("\n") + found[1]
        exec(compile(code, page, "exec"), names)
        start = found.end()
    assert start
