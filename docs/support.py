"""Write docs/support.md from the table of what the backends compute.

python docs/support.py           # writes the page
python docs/support.py --check   # fails if it is not what would be written
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from cupy_delta.cuda.families import OPTIONS, Support, support

PAGE = Path(__file__).with_name("support.md")
FUNCTIONS = {
    "forward": "chunk_delta_rule",
    "training": "chunk_delta_rule_fwd",
    "backward": "chunk_delta_rule_bwd",
    "recurrent": "recurrent_delta_rule",
    "step": "delta_rule_step",
    "wy_factors": "wy_factors",
    "state_pass": "state_pass",
    "chunk_output": "chunk_output",
    "transfer": "sequence_transfer",
}
OTHERS, HOPPER = "sm_80", "sm_90"
HEAD = """\
# What runs on which arrays

Written by `python docs/support.py` from the table by which calls are refused
(`cupy_delta/cuda/families.py`); a test fails where it is not what the code does.

**NumPy arrays**: every function with every option that it takes, on any machine.

**CuPy arrays**, on GPUs of compute capability 8.0 and newer. *yes 9.0*: with kernels of its own on
compute capability 9.0 (H100, H200), elsewhere with those for all GPUs. *no*: refused by a
`NotImplementedError` before anything is written. Empty: the function has no such option. Chunks of
64 run where the shared memory of a block holds them: the error names a size that works.

"""


def page() -> str:
    """Return the page as Markdown."""
    cells = {(c.operation, c.option, c.architecture): c for c in support((OTHERS, HOPPER))}
    lines = [["", *(f"`{name}`" for name in FUNCTIONS.values())], ["---"] * (len(FUNCTIONS) + 1)]
    for option in OPTIONS:
        found = [tuple(cells.get((o, option, c)) for c in (OTHERS, HOPPER)) for o in FUNCTIONS]
        lines.append([_code(option), *(_cell(*pair) for pair in found)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return HEAD + table + "\n\n## What is refused\n\n" + "\n".join(_refusals(cells)) + "\n"


def _code(option: str) -> str:
    argument = option.isidentifier() and not option.startswith("float")
    return f"`{option}`" if "=" in option or argument else option


def _cell(elsewhere: Support | None, hopper: Support | None) -> str:
    if elsewhere is None or hopper is None:
        return ""
    if elsewhere.refusal:
        return "no"
    return "yes" if hopper.family == elsewhere.family else "yes 9.0"


def _refusals(cells: dict) -> list[str]:
    """One line for each message, with the functions that it comes from."""
    refused = [c for c in cells.values() if c.refusal and c.architecture == OTHERS]
    refused.sort(key=lambda c: (list(OPTIONS).index(c.option), c.refusal))
    lines = []
    for (_, message), group in groupby(refused, key=lambda c: (c.option, c.refusal)):
        operations = {c.operation for c in group}
        names = [f"`{name}`" for o, name in FUNCTIONS.items() if o in operations]
        lines.append(f"- {', '.join(names)}: {message}")
    return lines


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
