"""CONTRIBUTING.md is true: its kernel is added to a copy of the checkout as the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
TEST = "tests/cuda/tokens/test_row_norms.py"
LINE = "  if (row >= rows) return;  // a whole warp\n"


def files():
    """The files that the page shows, by name: each is named in the text before its block."""
    found = {}
    for name, block in re.findall(
        r"^\*\*\d\. [^`]*?`([^`]+)`(?:(?!^```)[\s\S])*?^```\w+\n(.*?)^```", PAGE, re.M | re.S
    ):
        found[name] = block
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with the page's files in it."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("cupy_delta", "kernels", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", root)
    for name, text in files().items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def run(root):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TEST]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.stdout


def test_the_three_files_are_there():
    assert list(files()) == [
        "kernels/tokens/row_norms.cu",
        "cupy_delta/cuda/tokens/row_norms.py",
        TEST,
    ]


@pytest.mark.slow
def test_the_kernel_passes_its_test_as_it_stands(checkout):
    assert re.search(r"^8 passed", run(checkout), re.M)


@pytest.mark.slow
def test_the_mistake_ends_with_the_message_that_is_shown(checkout):
    kernel = checkout / "kernels" / "tokens" / "row_norms.cu"
    text = kernel.read_text()
    assert LINE in text and LINE.strip().split("  ")[0] in PAGE
    kernel.write_text(text.replace(LINE, ""))
    try:
        output = run(checkout)
    finally:
        kernel.write_text(text)
    (message,) = re.findall(r"^out-of-bounds: .*", PAGE, re.M)
    assert message in output


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_its_files_are_formatted_as_ours(tool, tmp_path):
    for name in ("ruff.toml", ".clang-format"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in files().items():
        (tmp_path / Path(name).name).write_text(text)
    suffix, command = {
        "ruff": (".py", ["ruff", "format", "--check"]),
        "clang-format": (".cu", ["clang-format", "--dry-run", "-Werror"]),
    }[tool]
    tool_here = Path(sys.executable).with_name(command[0])
    names = [Path(name).name for name in files() if name.endswith(suffix)]
    command = [str(tool_here), *command[1:], *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_has_its_row_in_the_table():
    table = (ROOT / "kernels" / "README.md").read_text()
    folder = ROOT / "kernels"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.cu")}
    assert files == set(re.findall(r"^\|[^|]*\| `([\w/]+\.cu)` \|", table, re.M))


def test_what_the_page_names_is_there():
    places = [ROOT, ROOT / "kernels", ROOT / "cupy_delta"]
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S)
    for name in re.findall(r"`([\w.]+/[\w./-]*)`", prose):
        assert name in files() or any((place / name).exists() for place in places), name
