"""What the documents show: links lead somewhere, code is code, commands are commands.

Blocks with ``>>>`` are run by ``pytest --doctest-glob='*.md' README.md docs``, those of the guide
that need a GPU by tests/gpu/test_guide.py.
"""

import re
import shlex
from pathlib import Path

import pytest

import cupy_delta
from cupy_delta.commands.main import _parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
GUIDE = ROOT / "docs" / "guide.md"


def anchors(path):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [x for x in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in x]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_what_the_library_says_of_pages_is_there():
    """In docstrings and messages: a page, or a heading of one by its words."""
    text = "\n".join(p.read_text() for p in (ROOT / "cupy_delta").rglob("*.py"))
    pages = set(re.findall(r"docs/\w+\.md", text))
    assert {"docs/conventions.md", "docs/derivation.md"} <= pages
    assert [page for page in pages if not (ROOT / page).is_file()] == []
    named = set(re.findall(r'"([^"\n]+)" in (docs/\w+\.md)', text))
    assert ("When it diverges", "docs/conventions.md") in named
    for heading, page in named:
        assert re.search(rf"^#+ {heading}$", (ROOT / page).read_text(), re.MULTILINE), heading
    assert '"When it diverges" in docs/conventions.md' in cupy_delta.chunk_delta_rule.__doc__


def blocks(language, path=GUIDE):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_code_for_a_gpu_is_code_and_names_what_there_is(page):
    found = blocks("python", ROOT / page)
    assert found
    for block in found:
        compile(block, page, "exec")
        for name in re.findall(r"\bcupy_delta\.(\w+)", block):
            assert hasattr(cupy_delta, name)


def test_commands_are_understood():
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(python -m cupy_delta [^`]+)`", GUIDE.read_text())
    assert len(lines) >= 4
    for line in lines:
        words = [w for w in shlex.split(line) if not re.match(r"[A-Z_]+=", w)]
        assert words[:3] == ["python", "-m", "cupy_delta"]
        _parser().parse_args(words[3:])
