"""The shape of csrc/: who includes whom, what included code says, and sizes. Reads the sources alone."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".c", ".cpp", ".h"))
NAMES = {str(path.relative_to(CSRC)): path for path in FILES}
INCLUDE = re.compile(r'^#include "(.+)"', re.M)
EDGES = {name: INCLUDE.findall(path.read_text()) for name, path in NAMES.items()}

MOST_FILE_LINES = 300
MOST_FUNCTION_LINES = 40
LONG_FUNCTIONS = {
    "exp_minus_1_part": "one polynomial, cut into eight parts that the callers spread between other instructions",
    "matmul_nibbles_16": "its sums stay in registers from the first column to the last",
}


def test_includes_name_files_from_the_top_of_csrc():
    assert {target for targets in EDGES.values() for target in targets} <= set(NAMES)


def test_no_file_includes_itself_by_others():
    edges = {name: set(targets) for name, targets in EDGES.items()}
    while leaf := next((name for name, targets in edges.items() if not targets), None):
        del edges[leaf]
        for targets in edges.values():
            targets.discard(leaf)
    assert not edges, f"a cycle among {sorted(edges)}"


def test_only_included_code_is_named_so_and_no_c_file_is_included():
    targets = {target for targets in EDGES.values() for target in targets}
    assert {name for name in NAMES if name.endswith("-inl.h")} <= targets
    assert not {name for name in targets if name.endswith(".c")}


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-inl.h")])
def test_included_code_says_what_it_expects(name):
    text = NAMES[name].read_text()
    assert text.startswith("/*")
    assert "Expects:" in text[: text.index("*/")]


def functions(text):
    """Yield the name and the number of lines of each function of a formatted file."""
    for match in re.finditer(r"^\w[^;{}()]*?\b(\w+)\([^;{}]*\) \{\n(?:.*\n)*?\}$", text, re.M):
        yield match[1], match[0].count("\n") + 1


def test_functions_are_found():
    assert dict(
        functions("static int a(int b,\n             int c) {\n    return b;\n}\n\nint d(void) { return 1; }\n")
    ) == {"a": 4}
    assert sum(len(list(functions(path.read_text()))) for path in FILES) > 250


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_fit_a_screen(name):
    text = NAMES[name].read_text()
    assert text.count("\n") <= MOST_FILE_LINES
    long = {function: lines for function, lines in functions(text) if lines > MOST_FUNCTION_LINES}
    assert set(long) <= set(LONG_FUNCTIONS), long


def test_long_functions_are_still_long():
    lines = dict(found for path in FILES for found in functions(path.read_text()))
    assert all(lines[name] > MOST_FUNCTION_LINES for name in LONG_FUNCTIONS)
