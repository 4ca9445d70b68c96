import sys

import pytest
import torch
from torch import nn

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
