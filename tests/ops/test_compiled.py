import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import fxquant
from fxquant.ops import compiled, library
from fxquant.ops.register import KERNELS, OVERLOADS

needs_library = pytest.mark.skipif(not library.available(), reason="calls of the native library")


@needs_library
@pytest.mark.parametrize("name", ["linear", "attention", "embedding"])
def test_compiled_graphs_call_the_native_library(name, monkeypatch):
    if name == "attention":
        quantized, x = Attention(), torch.ones(1, 2, 3, 4)
    else:
        model, x = (nn.Linear(8, 4), torch.ones(2, 8)) if name == "linear" else (nn.Embedding(9, 8), torch.arange(3))
        quantized = fxquant.quantize_dynamic(model.eval())
    seen, call = [], getattr(compiled.calls, name)
    monkeypatch.setattr(compiled.calls, name, lambda *args: seen.append(args) or call(*args))
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        run = torch.compile(quantized, dynamic=False)
        assert torch.equal(run(x), quantized(x))
    assert len(seen) == 1
    native = KERNELS[name].native()
    assert (KERNELS[name].at_once or (lambda native, args: native(True, *args)))(native, seen[0]) is not None


@needs_library
def test_compiled_graphs_check_no_sizes_around_calls():
    quantized = fxquant.quantize_dynamic(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4)).eval())
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        _, (code,) = run_and_get_code(torch.compile(quantized, dynamic=False), torch.arange(3))
    assert "fxquant_calls.linear(" in code
    written = [line for line in code.splitlines() if line.strip().startswith("assert_size_stride(")]
    assert len(written) <= 1, written  # torch 2.14 checks the first call's inputs in one line


def graph_of_inputs():
    """Return a graph in which a call alone reads `weight`, and torch as well reads `x`."""
    graph = torch.fx.Graph()
    x, weight, scale = map(graph.placeholder, ("x", "weight", "scale"))
    graph.output((graph.call_function(OVERLOADS["linear"], (x, weight, scale)), graph.call_function(torch.neg, (x,))))
    return graph


def check(name, op_name="input"):
    return SimpleNamespace(name=name, op_name=op_name)


def test_inputs_that_others_read_too_are_checked():
    kept = ["# a comment", check("x"), check("weight", "aten.add")]
    wrapper = SimpleNamespace(lines=[*kept, check("weight")], _pending_input_asserts={"x": (), "scale": ()})
    compiled._leave_out_checks(wrapper, graph_of_inputs())
    assert wrapper.lines == kept
    assert wrapper._pending_input_asserts == {"x": ()}


@pytest.mark.parametrize("line", ["assert_size_stride(weight, (2, ), (1, ))", SimpleNamespace(op_name="input")])
def test_checks_that_another_inductor_writes_stay(line):
    wrapper = SimpleNamespace(lines=[line])
    compiled._leave_out_checks(wrapper, graph_of_inputs())
    assert wrapper.lines == [line]


class Attention(nn.Module):
    def forward(self, x):
        return fxquant.ops.attention(x, x, x)


@needs_library
def test_what_the_library_does_not_take_goes_through_the_dispatcher():
    weight, scale = torch.ones(2, 8, dtype=torch.int8), torch.ones(2)
    args = (weight, scale, None, False, True, 255, "int8", 0, 0)
    half = compiled.calls.linear(torch.ones(3, 8, dtype=torch.bfloat16), *args)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.float(), compiled.calls.linear(torch.ones(3, 8), *args))


def test_without_inductor_nothing_is_taught(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._inductor.lowering", raising=False)
    monkeypatch.setattr(compiled, "_taught", set())
    compiled.teach_inductor("linear", OVERLOADS["linear"], KERNELS["linear"].arguments)
    assert not compiled._taught
    assert "torch._inductor.lowering" not in sys.modules


def test_another_inductor_keeps_its_own_way(monkeypatch):
    import torch._inductor.lowering as lowering

    monkeypatch.setattr(compiled, "_taught", set())
    monkeypatch.delattr(lowering, "make_fallback")
    compiled.teach_inductor("rnn", OVERLOADS["rnn"], KERNELS["rnn"].arguments)
    assert compiled._taught == {"rnn"}
