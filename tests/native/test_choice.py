"""Which kernels run: the environment's word, warnings for what is broken, and the dispatch of calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxquant import ops
from fxquant.nn import DynamicQuantizedLinear, QuantizedEmbedding
from fxquant.ops import library
from tests.native import cases
from tests.native.cases import int8, int16, same_bits
from tests.ops import reference

ROOT = Path(__file__).parents[2]


def run_python(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], env=env, capture_output=True, text=True, check=False, cwd=ROOT
    )


SHOW = "from fxquant.ops import kernel_info; info = kernel_info(); print(info.isa, '|', info)"


def test_an_instruction_set_can_be_forced(isa):
    result = run_python(SHOW, FXQUANT_ISA=isa)
    assert result.stdout.startswith(f"{isa} | fxquant runs on {isa} kernels"), result
    assert "Warning" not in result.stderr


def test_one_that_is_not_there_is_warned_about():
    result = run_python(SHOW, FXQUANT_ISA="z80")
    assert "RuntimeWarning: FXQUANT_ISA=z80: there is no such instruction set" in result.stderr
    assert result.stdout.startswith(library._library.active_isa())


def test_without_library_the_reference_runs_and_says_so():
    code = f"""{SHOW}
import torch
from fxquant import ops
print(ops.linear(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int8), torch.ones(1)))"""
    result = run_python(code, FXQUANT_NATIVE="0")
    assert result.stdout.startswith("None | fxquant runs on plain torch, no native kernels"), result
    assert "FXQUANT_NATIVE=0" in result.stdout
    assert "tensor([[2.]])" in result.stdout
    assert not result.stderr


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("raise ImportError('undefined symbol: nonsense')", "undefined symbol: nonsense"),
        ("interface = 0; __file__ = 'old.so'", "another version"),
    ],
)
def test_a_broken_library_is_warned_about_once(module, words):
    code = f"""
import importlib.abc, importlib.machinery, sys
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "fxquant._native" else None
    def exec_module(self, module):
        exec({module!r}, module.__dict__)
sys.meta_path.insert(0, Finder())
{SHOW}"""
    result = run_python(code)
    assert result.stderr.count("RuntimeWarning") == 1, result
    assert words in result.stderr
    assert result.stdout.startswith("None |")


def run_linear(x, weight=None, scale=None, bias=None, how=("int8", 0, 0)):
    """Return what the library gives at once."""
    weight = int8(3, 4) if weight is None else weight
    scale = torch.rand(3) if scale is None else scale
    return library._library.linear(True, x, weight, scale, bias, False, True, 255, *how)


def test_a_plain_call_passes_the_dispatcher_by():
    x, weight, scale = torch.randn(2, 5, 4), int8(3, 4), torch.rand(3)
    assert same_bits(run_linear(x, weight, scale), reference.linear(x, weight, scale))
    assert run_linear(torch.nn.Parameter(x)) is None
    with torch.no_grad():
        assert run_linear(torch.nn.Parameter(x)) is not None


def test_a_strided_look_up_passes_the_dispatcher_by_too(monkeypatch):
    module = QuantizedEmbedding.from_float(torch.nn.Embedding(9, 4))
    words = torch.randint(9, (5, 3))
    expected = module(words[:, 1].contiguous())
    monkeypatch.setitem(ops.OVERLOADS, "embedding", None)
    assert torch.equal(module(words[:, 1]), expected)


def test_a_quantized_model_can_be_traced():
    traced = torch.fx.symbolic_trace(DynamicQuantizedLinear.from_float(torch.nn.Linear(4, 3)))
    assert traced(torch.randn(2, 4)).shape == (2, 3)


def strided(x):
    return x.t().contiguous().t()


def negated(x):
    return torch._neg_view(x)


def freed(x):
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize(
    "change",
    [
        strided,
        negated,
        freed,
        lambda x: torch._efficientzerotensor(x.shape),
        torch.Tensor.double,
        torch.Tensor.requires_grad_,
        torch.Tensor.to_sparse,
        lambda x: x.to("meta"),
        lambda x: x[:, :3],
        lambda x: x.as_subclass(type("Marked", (torch.Tensor,), {})),
        lambda x: x.view(1, 1, 1, 1, 1, 1, 1, 2, 4),
        lambda x: x[0, 0].expand(2**52, 4),
        lambda x: x.tolist(),
        lambda x: None,
    ],
)
def test_an_unusual_input_is_not_taken_at_once(change):
    assert run_linear(change(torch.randn(2, 4))) is None


@pytest.mark.parametrize(
    "operands",
    [
        {"weight": int8(3, 5)},
        {"weight": int8(3, 4).int()},
        {"weight": int8(3, 4).float()},
        {"weight": int8(4, 3).t()},
        {"weight": int8(12)},
        {"scale": torch.rand(2)},
        {"scale": torch.rand(6)[::2]},
        {"scale": torch.rand(3, 1)},
        {"bias": torch.rand(4)},
        {"bias": torch.rand(3).double()},
        {"bias": freed(torch.rand(3))},
        {"weight": freed(int8(3, 4))},
    ],
)
def test_an_unusual_operand_is_not_taken_at_once(operands):
    assert run_linear(torch.randn(2, 4), **operands) is None


def test_an_option_that_is_no_number_is_pythons_own_error():
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        library._library.linear(True, torch.randn(2, 4), int8(3, 4), torch.rand(3), None, "no", True, 255, "int8", 0, 0)


INT16 = ("int16", 0, 0)


def test_an_int16_call_passes_the_dispatcher_by():
    x, weight, scale = torch.randn(2, 5, 66), int16(3, 66), torch.rand(3)
    expected = reference.linear(x, weight, scale, format="int16")
    assert same_bits(run_linear(x, weight, scale, how=INT16), expected)


@pytest.mark.parametrize(
    "operands",
    [
        {"weight": int16(3, 5)},
        {"weight": int16(4, 3).t()},
        {"weight": int8(3, 4)},
        {"how": ("int16", 64, 4)},
        {"how": ("int17", 0, 0)},
        {"how": (16, 0, 0)},
    ],
)
def test_an_unusual_int16_operand_is_not_taken_at_once(operands):
    assert run_linear(torch.randn(2, 4), **{"weight": int16(3, 4), "how": INT16, **operands}) is None


INT4 = {"weight": int8(3, 33).view(torch.uint8), "scale": torch.rand(3, 2).bfloat16(), "how": ("int4", 64, 66)}


def test_an_int4_call_passes_the_dispatcher_by():
    x = torch.randn(2, 5, 66)
    expected = reference.linear(x, INT4["weight"], INT4["scale"], None, False, True, 255, "int4", 64, 66)
    assert same_bits(run_linear(x, **INT4), expected)


@pytest.mark.parametrize(
    "operands",
    [
        {"weight": int8(3, 33)},
        {"weight": int8(3, 66).view(torch.uint8)},
        {"scale": torch.rand(3, 2)},
        {"scale": torch.rand(3, 3).bfloat16()},
        {"scale": torch.rand(2, 2).bfloat16()},
        {"scale": torch.rand(6).bfloat16()},
        {"how": ("int4", 48, 66)},
        {"how": ("int4", 64, 65)},
        {"how": ("int4", 0, 0)},
        {"how": ("uint4", 64, 66)},
        {"how": ("int4", -1, 66)},
        {"bias": torch.rand(4)},
    ],
)
def test_an_unusual_int4_operand_is_not_taken_at_once(operands):
    assert run_linear(torch.randn(2, 66), **{**INT4, **operands}) is None


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning", "ignore:.torch.jit.trace:FutureWarning")
def test_a_call_that_somebody_watches_is_not_taken_at_once():
    x, weight, scale, seen = torch.randn(2, 4), int8(3, 4), torch.rand(3), []
    with torch._subclasses.FakeTensorMode() as mode:
        assert run_linear(mode.from_tensor(x)) is None
    with torch.overrides.TorchFunctionMode():
        assert run_linear(x, weight, scale) is None
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert run_linear(x, weight, scale) is None
    torch.func.vmap(lambda row: (seen.append(run_linear(row, weight, scale)), row)[1])(x)
    torch.func.vmap(lambda row: (seen.append(run_linear(x, weight, scale)), row)[1])(x)
    torch.jit.trace(lambda row: (seen.append(run_linear(row, weight, scale)), row)[1], (x,), check_trace=False)
    assert len(seen) >= 3
    assert set(seen) == {None}


def recurrent_operands():
    """Return an LSTM's operands after `asks`: T 3, B 2, I 4, H 5, bidirectional, projected to 2."""
    weights = [int8(20, 4), int8(20, 2), int8(2, 5)] * 2
    scales = [torch.rand(weight.shape[0]) for weight in weights]
    states = torch.randn(2, 2, 2), torch.randn(2, 2, 5)
    return [torch.randn(3, 2, 4), None, *states, weights, scales, [torch.randn(20)] * 2, True, True, 255, None]


@pytest.mark.parametrize(
    ("place", "operand"),
    [
        (0, torch.randn(3, 2, 5)),
        (0, torch.randn(3, 3, 4)),
        (0, torch.randn(6, 4)),
        (1, torch.tensor([2, 1])),
        (1, torch.tensor([2, 2, 2])),
        (2, torch.randn(1, 2, 2)),
        (2, torch.randn(2, 2, 3)),
        (3, torch.randn(2, 1, 5)),
        (3, torch.randn(2, 2, 4)),
        (4, [int8(20, 4), int8(20, 2), int8(2, 5)]),
        (4, [int8(20, 4), int8(20, 2), int8(2, 5), int8(20, 4), int8(20, 3), int8(2, 5)]),
        (4, [int8(20, 4), int8(20, 2), int8(2, 5).double()] * 2),
        (5, [torch.rand(20)] * 6),
        (6, [torch.rand(20)]),
        (6, [torch.rand(5)] * 2),
        (7, False),
        (10, ["int8"] * 5),
        (10, ["int8", "int8", "int16"] * 2),
        (10, ["int8", "int8", None] * 2),
    ],
)
def test_an_unusual_recurrent_operand_is_not_taken_at_once(place, operand):
    operands = recurrent_operands()
    assert library._library.lstm(True, *operands) is not None
    operands[place] = operand
    assert library._library.lstm(True, *operands) is None


def test_tensors_are_read_without_the_exchange_interface_too():
    library._introduce_torch(library._library, None)
    try:
        x, args = torch.randn(2, 5, 4), (int8(3, 4), torch.rand(3), torch.randn(3))
        assert same_bits(run_linear(x, *args), reference.linear(x, *args))
        assert library._library.lstm(True, *recurrent_operands()) is not None
        unusual = (strided(torch.randn(2, 4)), torch.randn(2, 4).double(), torch.randn(2, 4).to("meta"))
        unusual += (torch.randn(1, 1, 1, 1, 1, 1, 1, 2, 4), torch.randn(2, 4).to_sparse())
        assert [run_linear(tensor) for tensor in unusual] == [None] * 5
    finally:
        library._introduce_torch(library._library, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))


def test_the_registered_operator_gives_the_same_bits(isa):
    x, args = torch.randn(5, 40), (int8(30, 40), torch.rand(30), torch.randn(30), True)
    with cases.kernels(isa, 1):
        assert same_bits(torch.ops.fxquant.linear(x, *args), ops.linear(x, *args))
        assert same_bits(torch.ops.fxquant.linear(x, *args), reference.linear(x, *args))


@pytest.mark.parametrize("method", ["gemv", "tiled", "packed"])
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 70, 65), (5, 64, 16), (20, 130, 100), (33, 7, 3)])
def test_every_form_of_a_product_gives_the_same_bits(isa, method, rows, columns, outputs):
    torch.manual_seed(0)
    x, weight, scale = torch.randn(rows, columns), int8(outputs, columns), torch.rand(outputs)
    with cases.kernels(isa, threads=2):
        try:
            assert cases.LIBRARY.use_method(method)
            found = ops.linear(x, weight, scale)
        finally:
            assert cases.LIBRARY.use_method(None)
    assert same_bits(found, reference.linear(x, weight, scale))


def test_an_unknown_form_is_none_and_leaves_the_choice_to_the_kernels():
    assert not cases.LIBRARY.use_method("guess")
    assert not cases.LIBRARY.use_way("guess")
    assert cases.LIBRARY.use_method(None)
    assert cases.LIBRARY.use_way(None)


def test_a_table_of_thresholds_is_in_order(isa):
    with cases.kernels(isa, threads=1):
        gemv, packed, streamed, share = cases.LIBRARY.thresholds()
    assert gemv >= 0
    assert streamed == packed == 0 or gemv < streamed <= packed
    assert share == 1  # of cases.kernels
