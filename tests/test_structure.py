"""The package's shape: floors, sizes, docstrings, and what it may not import."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import fxquant

PACKAGE = pathlib.Path(fxquant.__file__).parent
FLOORS = {
    "errors": 0, "entry": 0, "formats": 0, "spec": 0, "_version": 0, "ranges": 0, "observer_names": 0,
    "torch_ao.names": 0, "frames": 0, "progress": 0,
    "tensor_file": 1, "plain_values": 1,
    "numerics": 1, "gptq": 1, "ops": 1, "straight_through": 1, "snapshot": 1,
    "qconfig": 2, "qconfig_mapping": 2, "observers": 2, "value_observers": 2, "nn": 2,
    "backends": 2, "fake_quantize": 2, "rounding": 2, "learned": 2,
    "operators": 3,
    "graph": 4,
    "quantize_fx": 5, "balance": 5, "qat": 5, "eager": 5, "checkpoint": 5, "torch_ao": 5, "onnx": 5,
    "debug": 6, "huggingface": 6,
    "tuning": 7, "selftest": 7,
    "": 8,
    "__main__": 9,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))

LONG_FUNCTIONS = {
    "checkpoint.files.save": "the docstring of a public function",
    "graph.edit.mirror": "one pass over a memo that all its parts share",
    "graph.preserve.bound._view_class": "a class made at run time, with its methods inside",
    "nn.attention_calls.forward": "torch's signature, and the conditions of its fast path",
    "nn.embedding.forward": "torch's signature of nn.EmbeddingBag, and its checks",
    "qat.prepare_qat_fx": "the docstring of a public function",
    "ops.triton_walk.walk_kernel": "a kernel's operands, and what the steps of a walk share",
    "quantize_fx.prepare_fx": "the docstring of a public function",
    "torch_ao.load.from_torch_ao": "the docstring of a public function",
}
"""Functions of more than 40 lines, and why. They may not grow past 60."""

TESTED_ELSEWHERE = {
    "__main__": "tests/test_selftest.py, with what it shows",
    "_version": "it holds one string",
    "backends": "tests/test_observer_names.py, with torch.ao's other names",
    "checkpoint.files": "tests/test_checkpoint.py: the files that save writes and load reads",
    "checkpoint.plan": "tests/test_checkpoint.py: what each format's plan is made of",
    "checkpoint.rebuild": "tests/test_checkpoint.py: the models that load makes, and those that it refuses",
    "debug.measure.activation": "tests/debug/measure/test_compare.py, with what compare shows",
    "frames": "tests/test_errors.py: the lines that errors and warnings name",
    "graph.balance": "tests/test_balance.py: equalize_fx and smooth_fx",
    "graph.eager": "tests/test_eager.py, with fxquant.eager",
    "graph.norms": "tests/graph/test_layers.py and tests/graph/trace/test_aten_values.py",
    "graph.old_keys": "tests/test_old_files.py: files and state_dicts of the old keys",
    "graph.plan.calls": "tests/graph/plan/test_planner.py, with all that a plan decides",
    "graph.plan.decisions": "tests/graph/plan/test_planner.py, with all that a plan decides",
    "graph.plan.modules": "tests/graph/plan/test_planner.py, with all that a plan decides",
    "graph.plan.reasons": "tests/debug/test_explain.py: the reasons that explain gives",
    "graph.plan.targets": "tests/graph/plan/test_rules.py: what the entries of a mapping match",
    "graph.values": "tests/graph/plan/test_values.py, with the decisions about values",
    "graph.plan.functions": "tests/graph/test_pointwise.py, with the functions that are written out",
    "graph.plan.floats": "tests/graph/plan/test_values.py, with the decisions about values",
    "graph.plan.operands": "tests/graph/plan/test_values.py, with the decisions about values",
    "graph.record": "tests/graph/test_plain.py: what a record holds, and in files",
    "graph.run_nodes": "tests/graph/test_runs.py, with the runs that are made of them",
    "graph.run_steps": "tests/graph/test_runs.py, with the runs that are made of them",
    "graph.why": "tests/debug/test_explain.py: the reasons that explain gives",
    "graph.whole": "tests/test_quantize_fx.py: models that do not trace",
    "graph.preserve.bound": "tests/graph/preserve/test_preserve.py: the methods that a graph keeps",
    "rounding": "tests/test_fake_quantize.py and tests/test_straight_through.py",
    "huggingface.tree": "tests/huggingface/test_quantizer.py: the models that come of it",
    "nn.attention_calls": "tests/nn/test_attention.py, with the quantized layer",
    "nn.recurrent_calls": "tests/nn/test_recurrent.py, with the quantized layers",
    "nn.trained": "tests/nn/test_trained_product.py and tests/operators/test_training.py: what all of them share",
    "nn.trained_attention": "tests/operators/test_training.py, with all rows in training",
    "nn.cells": "tests/nn/test_recurrent.py, with the layers",
    "nn.stored": "tests/nn/test_base.py, with the modules whose weights these are",
    "onnx.graph": "tests/onnx/test_export.py: the files that are made with it",
    "onnx.pools": "tests/onnx/test_static.py, with the other operators on values",
    "onnx.ranges": "tests/onnx/test_static.py, with the models that need them",
    "onnx.refusals": "tests/onnx/test_export.py: what is refused, and where",
    "onnx.table": "tests/onnx/test_export.py: that no operator is missing",
    "operators.attention": "tests/operators/test_rows.py, the rows of all operators",
    "operators.convolution": "tests/operators/test_rows.py, the rows of all operators",
    "operators.embedding": "tests/operators/test_rows.py, the rows of all operators",
    "operators.linear": "tests/operators/test_rows.py, the rows of all operators",
    "ops.pools": "tests/ops/test_values.py, with the other operators on values",
    "nn.stubs": "tests/test_observer_names.py, with torch.ao's other names",
    "ranges": "tests/test_value_observers.py, with what measures them",
    "operators.pools": "tests/graph/convert/test_values.py: the calls that poolings become",
    "operators.static": "tests/operators/test_rows.py, the rows of all operators",
    "operators.recurrent": "tests/operators/test_rows.py, the rows of all operators",
    "operators.transposed": "tests/operators/test_linear_forms.py, with the forms of the Linear row",
    "ops.recurrent_checks": "tests/ops/test_recurrent.py: what the operators refuse",
    "ops.triton_cells": "tests/ops/test_triton_recurrent.py, with the layers",
    "ops.triton_states": "tests/ops/test_triton_recurrent.py, with the layers",
    "ops.triton_walk": "tests/ops/test_triton_recurrent.py, with the layers",
    "ops.library": "tests/ops/test_register.py and tests/ops/test_calls.py: what is registered, and where calls run",
    "ops.triton_common": "tests/ops/test_triton_values.py and its like: what all of Triton's kernels share",
    "ops.triton_gemv": "tests/ops/test_triton_linear.py, with more tokens",
    "ops.triton_tokens": "tests/ops/test_triton_linear.py, with the products of these tokens",
    "ops.output_pool": "tests/native/test_output_pool.py",
    "tensor_file": "tests/test_checkpoint.py: the files that save writes and load reads",
    "torch_ao.architecture": "tests/torch_ao/test_load.py: the checkpoints of torch.ao",
    "torch_ao.packed": "tests/torch_ao/test_load.py: the checkpoints of torch.ao",
    "torch_ao.state": "tests/torch_ao/test_load.py: the checkpoints of torch.ao",
    "torch_ao.values": "tests/torch_ao/test_static.py, with the marks that it reads",
}
"""Modules without a test file of their own name, and where their tests are."""

WAY_OVER = "fxquant.torch_ao.load"


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in FILES}


def part_of(name):
    """Return the part of the package that a module belongs to: what is at its top, or what FLOORS names inside."""
    inner = name.partition(".")[2]
    return inner if inner in FLOORS else inner.partition(".")[0]


def imports(path, walk=ast.walk):
    """Return the modules that a file imports anywhere in it, `from a import b` as a.b where that is a module."""
    found = set()
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in NAMES else str(node.module))
    return found


EDGES = {name: {i for i in imports(path) if i in NAMES and i != name} for name, path in NAMES.items()}


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_downward_only(name):
    assert part_of(name) in FLOORS, f"{name} has no floor; give it one in this test and in DESIGN.md"
    upward = {i for i in EDGES[name] if FLOORS[part_of(i)] > FLOORS[part_of(name)]}
    assert not upward, f"{name} imports from a floor above it: {sorted(upward)}"


def test_no_import_cycles():
    # A package's __init__ gathers its own files, so inside a package an edge to the __init__ would be a cycle too.
    edges = {name: set(targets) for name, targets in EDGES.items()}
    while leaf := next((name for name, targets in edges.items() if not targets), None):
        del edges[leaf]
        for targets in edges.values():
            targets.discard(leaf)
    assert not edges, f"a cycle among {sorted(edges)}"


@pytest.mark.parametrize("path", [p for p in FILES if module_name(p) != WAY_OVER], ids=module_name)
def test_nothing_names_what_upstream_deprecates(path):
    quantized = {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}
    for node in ast.walk(ast.parse(path.read_text())):
        dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        assert not dotted.startswith(("torch.ao", "torch.ops.quantized", "torch.quantization")), dotted
        assert not (isinstance(node, ast.Attribute) and node.attr in quantized), dotted
        assert not (isinstance(node, ast.alias) and node.name in quantized), ast.unparse(node)
    theirs = {i for i in imports(path) if i.startswith(("torch.ao", "torch.quantization", "torch.nn.quantized"))}
    assert not theirs


def test_importing_it_imports_nothing_of_torch_ao_or_of_an_extra():
    code = (
        "import sys, torch; had = set(sys.modules); import fxquant; "
        "of = ('torch.ao', 'torch.quantization', 'transformers'); "
        "print(sorted(m for m in set(sys.modules) - had if m.startswith(of)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == "[]"


def test_nothing_is_ever_unpickled_but_on_the_way_over():
    users = {name for name, path in NAMES.items() if imports(path) & {"pickle", "dill", "cloudpickle"}}
    calls = {
        name
        for name, path in NAMES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "eval", "exec")
    }
    assert not users
    assert calls == {"fxquant.torch_ao.load"}  # with weights_only=True wherever a float model is given


def test_only_lazily_is_the_way_over_imported():
    for name in (name for name, targets in EDGES.items() if WAY_OVER in targets):
        assert WAY_OVER not in imports(NAMES[name], ast.iter_child_nodes), name


def test_files_stay_small():
    assert not [name for name, path in NAMES.items() if len(path.read_text().splitlines()) > 300]


def test_each_module_has_a_test_file_of_its_name():
    modules = [path.relative_to(PACKAGE) for path in FILES if path.name != "__init__.py"]
    tests = pathlib.Path(__file__).parent
    bare = {path for path in modules if not (tests / path.parent / f"test_{path.name}").exists()}
    assert {".".join(path.with_suffix("").parts) for path in bare} == TESTED_ELSEWHERE.keys()
    for reason in TESTED_ELSEWHERE.values():
        for place in re.findall(r"tests/[\w/]+\.py", reason):
            assert (tests.parent / place).exists(), place


def test_every_public_name_has_a_docstring():
    bare = []
    for name, path in NAMES.items():
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None:
            bare.append(name)
        classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        for owner in [tree, *classes]:
            for node in owner.body:
                is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
                if is_definition and not node.name.startswith("_") and ast.get_docstring(node) is None:
                    bare.append(f"{name}.{node.name}")
    assert not bare


def test_functions_fit_a_screen():
    lines = [
        (f"{name.partition('.')[2]}.{node.name}", node.end_lineno - node.lineno + 1)
        for name, path in NAMES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert {name for name, count in lines if count > 40} == LONG_FUNCTIONS.keys()
    assert not [name for name, count in lines if count > 60]


def test_nothing_prints():
    calls = [
        f"{name}:{node.lineno}"
        for name, path in NAMES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls


def test_everything_exported_exists_and_is_sorted():
    assert all(hasattr(fxquant, name) for name in fxquant.__all__)
    numbers = {
        name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)] for name in fxquant.__all__
    }
    constants_first = sorted(numbers, key=lambda name: (not name.isupper(), not name[0].isupper(), numbers[name]))
    assert fxquant.__all__ == constants_first


def test_no_decision_is_taken_by_a_sentence():
    sentences = {"reason", "rule", "part_rules", "rounding", "note", "decision", "unchecked"}
    methods = {"startswith", "endswith", "removeprefix", "removesuffix", "replace", "partition", "split", "find"}
    codes = {"fxquant.debug.diff.fold": {"decision"}, "fxquant.debug.diff.svg": {"decision"}}  # there one of few words

    def is_sentence(node, name):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "str" and len(node.args) == 1:
            return isinstance(node.args[0], ast.Attribute) and node.args[0].attr == "why"
        return isinstance(node, ast.Attribute) and node.attr in sentences - codes.get(name, set())

    found = []
    for name, path in NAMES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in methods:
                parts = [node.func.value]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
                parts = node.args
            else:
                continue
            found += [f"{name}:{node.lineno}" for part in parts if is_sentence(part, name)]
    assert not found
