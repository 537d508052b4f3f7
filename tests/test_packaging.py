"""What is installed is what is here: package lists, kernel sources, and README.md's commands.

Building for real, and running what was built on every Python, is done by .ci/run.
"""

import ast
import configparser
import fnmatch
import pathlib
import re
import sys

import pytest

import cupy_delta
from cupy_delta.cuda.runtime.environment import LOWEST_CUPY
from cupy_delta.extras import EXTRAS

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup_cfg():
    config = configparser.ConfigParser()
    assert config.read(ROOT / "setup.cfg")
    return config


def lines(value):
    return value.split("\n")[1:]


def test_every_folder_with_modules_is_listed_as_a_package(setup_cfg):
    folders = {p.parent.relative_to(ROOT) for p in ROOT.glob("cupy_delta/**/*.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"cupy_delta.kernels"}
    assert set(lines(setup_cfg["options"]["packages"])) == packages


def test_every_kernel_source_is_package_data(setup_cfg):
    patterns = lines(setup_cfg["options.package_data"]["cupy_delta.kernels"])
    files = [p.relative_to(ROOT / "kernels") for p in ROOT.glob("kernels/**/*") if p.is_file()]
    assert files
    # Folder by folder: the star of a pattern does not cross a slash when setuptools expands it.
    left_out = [
        str(f)
        for f in files
        if not any(
            len(f.parts) == pattern.count("/") + 1 and fnmatch.fnmatch(str(f), pattern)
            for pattern in patterns
        )
    ]
    assert not left_out


def test_what_remedies_install_is_what_the_extras_install(setup_cfg):
    for extra, packages in EXTRAS.items():
        assert tuple(lines(setup_cfg["options.extras_require"][extra])) == packages
    lowest = ".".join(map(str, LOWEST_CUPY))
    assert all(EXTRAS[extra][0].endswith(f">={lowest}") for extra in ("cuda12", "cuda13"))


def test_the_examples_need_what_their_extra_installs(setup_cfg):
    """Beside what brings its own platform with it: CuPy, JAX, PyTorch, MPI."""
    files = list((ROOT / "examples").glob("*.py"))
    imported = set()
    for node in (n for f in files for n in ast.walk(ast.parse(f.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.partition(".")[0])
    ours = {"cupy_delta", "numpy", "scipy", "ml_dtypes", *(f.stem for f in files)}
    platforms = {"cupy", "jax", "torch", "mpi4py"}
    extra = {re.match(r"\w+", x)[0] for x in lines(setup_cfg["options.extras_require"]["examples"])}
    assert imported - ours - platforms - set(sys.stdlib_module_names) == extra


def test_classifiers_name_the_cudas_of_the_extras(setup_cfg):
    classifiers = lines(setup_cfg["metadata"]["classifiers"])
    named = [x.rpartition(" ")[2] for x in classifiers if x.startswith("Environment :: GPU :: ")]
    extras = [x for x in setup_cfg["options.extras_require"] if x.startswith("cuda")]
    assert extras == [f"cuda{version}" for version in named]


def test_pythons(setup_cfg):
    classifiers = lines(setup_cfg["metadata"]["classifiers"])
    versions = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert setup_cfg["options"]["python_requires"] == f">={versions[0]}"
    target = f'target-version = "py{versions[0].replace(".", "")}"'
    assert target in (ROOT / "ruff.toml").read_text().splitlines()


@pytest.mark.parametrize(
    "command",
    [
        'python3 -m venv .venv && .venv/bin/pip install -e ".[test]"'
        " && .venv/bin/python -m pytest -n 2",
        'python3 -m venv .venv && .venv/bin/pip install ".[plot]"'
        " && .venv/bin/python -m cupy_delta demo",
    ],
)
def test_readme_has_each_command_once_on_a_line_of_its_own(command):
    """.ci/run takes the commands from there and runs them to the letter."""
    assert (ROOT / "README.md").read_text().splitlines().count(command) == 1


def test_the_environment_of_the_readme_is_ignored_by_git():
    assert "/.venv*/" in (ROOT / ".gitignore").read_text().splitlines()


def test_every_place_names_the_same_version():
    version = cupy_delta.__version__
    headings = re.findall(r"^## (\S+?)(?:,.*)?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in (version, "Unreleased")
    assert version in headings
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_hooks_before_a_commit_run_what_ci_runs(setup_cfg):
    """Tools alone, of the pinned versions, with nothing to fetch."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
    entries = re.findall(r"entry: (.*)", hooks)
    assert set(re.findall(r"language: (.*)", hooks)) == {"system"}
    ci = (ROOT / ".ci" / "run").read_text()
    pinned = lines(setup_cfg["options.extras_require"]["test"])
    tools = {entry.split()[0] for entry in entries}
    assert tools == set(re.findall(r'"\$bin/([a-z-]+)"', ci)) - {"pip", "python"}
    for tool in tools:
        assert any(re.fullmatch(rf"{tool}==\d+\..*\*", line) for line in pinned), tool
