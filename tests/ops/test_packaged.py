"""Models that run without Python: the library of operators, AOTInductor's packages, and a C++ program."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fxquant.ops import library, packaged
from fxquant.ops.register import KERNELS, OVERLOADS

ROOT = Path(__file__).parents[2]
needs_operators = pytest.mark.skipif(
    library.operators_path() is None, reason="the operators for programs without Python were not built"
)

WITHOUT_PYTHON = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for name in sys.argv[3].split():
    print(*sorted(str(schema) for schema in torch._C._jit_get_schemas_for_operator("fxquant::" + name)), sep="\\n")
cases = torch.load(sys.argv[2])
outputs = []
for name, args in cases:
    results = getattr(torch.ops.fxquant, name)(*args)
    outputs.append(results if isinstance(results, tuple) else (results,))
torch.save(outputs, sys.argv[2])
for name, args in [
    ("linear", (torch.ones(2, 9), torch.ones(4, 8, dtype=torch.int8), torch.ones(4))),
    ("matmul", (torch.ones(2, 2).double(), torch.ones(2, 2).double())),
]:
    try:
        getattr(torch.ops.fxquant, name)(*args)
    except RuntimeError as error:
        print(error)
assert "fxquant" not in sys.modules
"""


def cases():
    """Calls of operators, as they lie and such that need copies: name, arguments."""
    generator = torch.Generator().manual_seed(0)

    def floats(*shape):
        return torch.randn(*shape, generator=generator)

    def integers(*shape):
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)

    weight, scale, bias = integers(5, 8), torch.rand(5, generator=generator), floats(5)
    one = (torch.tensor(0.1), torch.tensor(3, dtype=torch.int32))
    value = torch.randint(0, 256, (2, 4, 6, 6), dtype=torch.uint8, generator=generator)
    lstm = (
        [integers(12, 4), integers(12, 3)],
        [torch.rand(12, generator=generator), torch.rand(12, generator=generator)],
        [floats(12)],
    )
    convolution = (
        integers(6, 4, 3, 3),
        torch.rand(6, generator=generator),
        floats(6),
        *one,
        [1, 1],
        [1, 1, 1, 1],
        [1, 1],
    )
    bent = (None, None, None, 255, None, None)
    query = floats(1, 3, 2, 4).transpose(1, 2)
    return [
        ("linear", (floats(3, 8), weight, scale, bias, True)),
        ("linear", (floats(8, 3).t(), weight, scale)),
        ("linear", (floats(3, 8).bfloat16(), weight, scale, bias)),
        ("linear", (floats(3, 8), weight.half(), None, None, False, True, 255, "float16")),
        ("matmul", (floats(2, 3, 4), floats(2, 4, 5))),
        ("attention", (floats(1, 2, 3, 4), floats(1, 2, 5, 4), floats(1, 2, 5, 4), None, True)),
        ("attention", (query, query, query)),
        ("embedding", (torch.tensor([[1, 4]]), weight, scale, None, 8)),
        ("embedding", (torch.tensor([1, 4]), weight, scale, None, 8, "int8", torch.bfloat16)),
        ("embedding_bag", (torch.tensor([[1, 4]]), weight, scale, None, 8)),
        ("lstm", (floats(2, 1, 4), None, floats(1, 1, 3), floats(1, 1, 3), *lstm)),
        ("rnn", (floats(2, 1, 4), None, floats(1, 1, 12), [integers(12, 4), integers(12, 12)], lstm[1], lstm[2], [],
                 "rnn_tanh", False, True, 255, ["int8", "int8"])),
        ("quantize", (floats(3, 4).t(), *one)),
        ("max_pool_value", (value, [2, 2], [2, 2], [0, 0], [1, 1])),
        ("mean_value", (value, *one, *one, [2, 3])),
        ("pad_value", (value, one[1], [1, 0, -2, 3])),
        ("pad_value", (value.contiguous(memory_format=torch.channels_last), one[1], [1, 2])),
        ("resize_value", (value, [3, 9])),
        ("resize_value", (value.transpose(2, 3), None, [1.5, 2.0], True)),
        ("lookup_channels", (value, torch.arange(1024).to(torch.uint8).view(4, 256))),
        ("static_convolution", (value, *one, *convolution)),
        ("static_convolution", (value.contiguous(memory_format=torch.channels_last), *one, *convolution)),
        ("static_convolution", (value, *one, *convolution, 1, False, [], *bent, "leaky_relu", 0.3)),
        ("static_linear", (value[0, 0], *one, weight[:, :6], scale, bias, *one, *bent, "silu")),
        ("add_values", (value, *one, value.flip(0), *one, *one)),
    ]  # fmt: skip


@needs_operators
def test_the_library_alone_has_the_schemas_and_the_bits_of_the_package(tmp_path):
    native = list(KERNELS)
    torch.save(cases(), tmp_path / "cases.pt")
    command = [sys.executable, "-c", WITHOUT_PYTHON, library.operators_path(), tmp_path / "cases.pt", " ".join(native)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *schemas, misfit, doubles = done.stdout.splitlines()
    assert schemas == [str(OVERLOADS[name]._schema) for name in native]
    assert misfit.startswith("fxquant::linear: the arguments do not fit each other")
    assert doubles.startswith("fxquant::matmul: the arguments do not fit each other")
    for (name, args), results in zip(cases(), torch.load(tmp_path / "cases.pt"), strict=True):
        expected = KERNELS[name].run(*args)
        for got, want in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
            assert torch.equal(got, want), name
            assert (got.dtype, got.stride()) == (want.dtype, want.stride()), name


@needs_operators
@pytest.mark.long
def test_a_package_runs_in_a_program_and_in_a_process_without_fxquant(tmp_path):
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    package, program = tmp_path / "model.pt2", tmp_path / "build"
    torch_files = torch.utils.cmake_prefix_path
    build = f"cmake -S {ROOT}/examples/cpp -B {program} -DCMAKE_PREFIX_PATH={torch_files} && cmake --build {program}"
    building = subprocess.Popen(build, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    export = [sys.executable, ROOT / "examples/cpp/export_model.py", package]
    done = subprocess.run(export, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    expected = done.stdout
    said = building.communicate()[0]
    assert building.returncode == 0, said
    assert (
        subprocess.run([program / "run_model", package, "2", "32"], capture_output=True, text=True).stdout == expected
    )
    run = "import sys, torch; y = torch._inductor.aoti_load_package(sys.argv[1])(torch.ones(2, 32)); "
    run += "print(*(f'{value:.6f}' for value in y.flatten().tolist())); assert 'fxquant' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", run, package], capture_output=True, text=True, check=False)
    assert done.stdout == expected, done.stderr


def test_values_are_written_as_the_library_reads_them():
    wrapper = SimpleNamespace(
        val_to_arg_str_for_prim_type=lambda value, _: f'"{value}"' if isinstance(value, str) else str(value),
        codegen_dtype=lambda dtype: f"cached_{dtype}",
    )
    written = packaged._write(wrapper, [packaged._Reference("buf0"), None, 3, True, 0.5, "int8", torch.float32, []])
    assert written.replace("fxquant_operators::", "") == (
        'list({tensor(buf0), none(), integer(3), integer(True), number(0.5), text("int8"), '
        "integer(cached_torch.float32), list({})})"
    )


@pytest.mark.parametrize(("device", "takes"), [("cpu", True), ("cuda", False)])
def test_calls_are_written_for_the_cpu_alone(device, takes, monkeypatch):
    node = SimpleNamespace(get_device=lambda: torch.device(device))
    monkeypatch.setattr(packaged, "operators_path", lambda: "libfxquant_ops.so.1")
    assert packaged.takes(node) is takes
    monkeypatch.setattr(packaged, "operators_path", lambda: None)
    assert not packaged.takes(node)


@pytest.mark.parametrize("outputs", [[], ["buf1"], ["buf1", "buf2"]])  # none: torch 2.14, a call that is its output
def test_a_call_names_its_outputs(outputs, monkeypatch):
    monkeypatch.setattr(packaged, "operators_path", lambda: "folder/libfxquant_ops.so.1")
    lines, named = [], [SimpleNamespace(get_name=lambda name=name: name) for name in outputs]
    tensor = SimpleNamespace(codegen_reference=lambda: "buf0")
    node = SimpleNamespace(
        inputs=[tensor],
        constant_args=(),
        unflatten_args=lambda inputs, constants: ([*inputs, *constants], {}),
        outputs=named,
        get_name=lambda: "buf9",
    )
    header = SimpleNamespace(splice=lines.append)
    wrapper = SimpleNamespace(additional_files=[], header=header, writeline=lines.append)
    packaged.write_call(node, wrapper, "lookup")
    assert wrapper.additional_files == ["folder/libfxquant_kernels.so.1", "folder/libfxquant_ops.so.1"]
    first = outputs[0] if outputs else "buf9"
    call = 'fxquant_operators::call("lookup", {fxquant_operators::tensor(buf0)}, '
    assert lines[2] == f"{call}{first}_results);"
    results = outputs or ["buf9"]
    assert lines[3:] == [f"RAIIAtenTensorHandle {name}({first}_results[{i}]);" for i, name in enumerate(results)]
