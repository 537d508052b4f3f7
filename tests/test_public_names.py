"""The public names are the documented ones, and importing them costs nothing it need not."""

import inspect
import json
import re
import subprocess
import sys

import pytest

import cupy_delta

OPERATORS = [
    "chunk_delta_rule",
    "recurrent_delta_rule",
    "delta_rule_step",
    "chunk_delta_rule_fwd",
    "chunk_delta_rule_bwd",
]
BUILDING_BLOCKS = ["wy_factors", "state_pass", "chunk_output", "sequence_transfer"]
RESULTS = {
    "DeltaRuleOutput": ["o", "final_state"],
    "DeltaRuleForward": ["o", "final_state", "residuals"],
    "DeltaRuleGradients": ["q", "k", "v", "beta", "g", "initial_state"],
    "WYFactors": ["w", "u", "t"],
    "StatePass": ["states", "v_new", "final_state"],
    "Transfer": ["p", "h"],
    "GateGradients": ["a", "A_log", "dt_bias"],
    "BetaGradients": ["logits"],
}
RAW = {
    "SoftplusGate": ["a", "A_log", "dt_bias"],
    "SigmoidGate": ["a", "A_log", "dt_bias", "bound"],
    "SigmoidBeta": ["logits", "scale"],
}
FUNCTIONS = [*OPERATORS, *BUILDING_BLOCKS]
METHODS = ["Transfer.apply", "Transfer.then"]

OPERATOR_OPTIONS = "scale initial_state cu_seqlens qk_l2norm chunk_size state_layout out"
POOL_OPTIONS = " state state_indices output_state_indices fresh checkpoint_every"
STEP_OPTIONS = "state state_indices output_state_indices cu_seqlens accepted scale qk_l2norm"
STEP_OPTIONS += " state_layout out"
# positional arguments | keyword-only arguments
SIGNATURES = {
    "chunk_delta_rule": ("q k v beta g", OPERATOR_OPTIONS + POOL_OPTIONS),
    "recurrent_delta_rule": ("q k v beta g", OPERATOR_OPTIONS.replace(" chunk_size", "")),
    "chunk_delta_rule_fwd": ("q k v beta g", OPERATOR_OPTIONS),
    "delta_rule_step": ("q k v beta g", STEP_OPTIONS),
    "chunk_delta_rule_bwd": ("residuals do dfinal_state", ""),
    "wy_factors": ("k v beta g", "qk_l2norm chunk_size cu_seqlens"),
    "state_pass": ("k w u g", "initial_state qk_l2norm chunk_size cu_seqlens"),
    "chunk_output": ("q k v_new states g", "scale qk_l2norm chunk_size cu_seqlens"),
    "sequence_transfer": ("k v beta g", "qk_l2norm cu_seqlens"),
    "Transfer.apply": ("self state", ""),
    "Transfer.then": ("self later", ""),
}
DEFAULTS = {
    "g": None,
    "scale": None,
    "initial_state": None,
    "cu_seqlens": None,
    "qk_l2norm": False,
    "chunk_size": None,
    "state_layout": "kv",
    "out": None,
    "state": None,
    "state_indices": None,
    "output_state_indices": None,
    "fresh": None,
    "accepted": None,
    "checkpoint_every": None,
    "dfinal_state": None,
}
SECTIONS = ["Parameters", "Returns", "Raises", "Notes", "References", "Examples"]


def public(name):
    found = cupy_delta
    for part in name.split("."):
        found = getattr(found, part)
    return found


def sections_of(docstring):
    """Split a numpydoc docstring: title -> body, with the summary under ""."""
    parts = re.split(r"^([A-Z]\w+)\n-+\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    for title in parts[1::2]:
        underline = re.search(rf"^{title}\n(-+)$", inspect.cleandoc(docstring), re.MULTILINE)
        assert len(underline[1]) == len(title)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def documented_parameters(body):
    """Names of the parameters in their order; one heading may name several."""
    headings = re.findall(r"^(\w[\w, ]*?)(?: : .*)?$", body, re.MULTILINE)
    return [name for heading in headings for name in heading.split(", ")]


def test_all_is_what_is_documented():
    assert set(cupy_delta.__all__) == {*FUNCTIONS, *RESULTS, *RAW, "Workspace", "__version__"}
    assert cupy_delta.__all__ == sorted(cupy_delta.__all__)


def test_nothing_else_is_public():
    modules = {n for n, x in vars(cupy_delta).items() if inspect.ismodule(x)}
    names = {n for n in dir(cupy_delta) if not n.startswith("_")} - modules
    assert names == set(cupy_delta.__all__) - {"__version__"}


def test_the_version_is_one_that_package_indexes_take():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", cupy_delta.__version__)


@pytest.mark.parametrize("name", RESULTS)
def test_fields_of_results(name):
    assert list(public(name)._fields) == RESULTS[name]


@pytest.mark.parametrize("name", RAW)
def test_raw_gates_and_strengths(name):
    assert list(inspect.signature(public(name)).parameters) == RAW[name]
    sections = sections_of(public(name).__doc__)
    assert list(sections) == ["", "Attributes", "Notes", "Examples"]
    assert documented_parameters(sections["Attributes"]) == RAW[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(public(name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert (" ".join(positional), " ".join(keywords)) == SIGNATURES[name]
    assert len(positional) + len(keywords) == len(parameters)
    for p in parameters:
        if p.default is not p.empty:
            assert (p.name, p.default) == (p.name, DEFAULTS[p.name])


def test_every_public_function_has_its_signature_here():
    assert set(SIGNATURES) == {*FUNCTIONS, *METHODS}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_have_every_section_in_order(name):
    assert list(sections_of(public(name).__doc__)) == ["", *SECTIONS]


@pytest.mark.parametrize("name", METHODS)
def test_docstrings_of_methods(name):
    assert list(sections_of(public(name).__doc__)) == ["", *SECTIONS[:3]]


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_documented_parameters_are_those_of_the_signature(name):
    documented = documented_parameters(sections_of(public(name).__doc__)["Parameters"])
    parameters = [p for p in inspect.signature(public(name)).parameters if p != "self"]
    assert sorted(documented) == sorted(parameters)


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS, *RESULTS, *RAW, "Workspace"])
def test_summaries_are_one_sentence(name):
    summary = inspect.cleandoc(public(name).__doc__).split("\n\n")[0]
    assert summary[0].isupper()
    assert summary.endswith(".")
    assert len(summary) <= 200


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run_code_or_point_to_some(name):
    examples = sections_of(public(name).__doc__)["Examples"]
    pointed = re.search(r"See `(\w+)`", examples)
    target = sections_of(public(pointed[1]).__doc__)["Examples"] if pointed else examples
    assert f"cupy_delta.{name}(" in target


def test_the_workspace_is_documented():
    assert list(sections_of(cupy_delta.Workspace.__doc__)) == [
        "",
        "Attributes",
        "Notes",
        "Examples",
    ]


IMPORTED = """
import json, sys
before = set(sys.modules)
import cupy_delta
{then}
print(json.dumps(sorted({{name.split(".")[0] for name in set(sys.modules) - before}})))
"""
CALL = """
import numpy as np
x = np.ones((1, 2, 1, 1))
cupy_delta.chunk_delta_rule(x, x, x, np.ones((1, 2, 1)))
"""
OURS = {"cupy_delta", "numpy", "ml_dtypes"}
BACKEND = {"scipy", "threadpoolctl"}


def imported(then):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(then=then)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return set(json.loads(done.stdout)) - set(sys.stdlib_module_names)


def own(names):
    """Leave out what Python's own start-up and NumPy bring in beside themselves."""
    return {n for n in names if not n.startswith(("_", "cython")) and n != "pyximport"}


def test_importing_loads_no_framework_but_numpy():
    assert own(imported("")) == OURS


def test_importing_leaves_the_parts_of_numpy_that_take_long():
    code = (
        "import sys, ml_dtypes, numpy; before = set(sys.modules); import cupy_delta;"
        "print(*sorted(m for m in set(sys.modules) - before if m.startswith('numpy')))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == []


def test_a_numpy_call_loads_scipy_and_no_other_framework():
    assert own(imported(CALL)) == OURS | BACKEND


def test_importing_loads_no_backend():
    """NumPy users never load the CuPy backend; nobody loads SciPy before the first call."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, cupy_delta;"
            "print(*sorted(m for m in sys.modules if m.startswith('cupy_delta.')))",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    loaded = {name.split(".")[1] for name in done.stdout.split()}
    expected = "arrays building_blocks call checker dispatch forking operators problem raw repeated"
    expected += " results starting typing version workspace"
    assert loaded == {*expected.split()}
