"""Models that cannot be traced, and the errors that say so."""

import re
import sys

import pytest
import torch
from torch import nn

from fxquant import (
    ModelStateError,
    TraceError,
    fuse_fx,
    prepare_fx,
    quantize_dynamic,
)
from tests.graph.trace.test_trace import HERE, BranchOnValue, LoopOverTensor, ToNumber, line_of
from tests.samples import everything, prepare, quantize


@pytest.mark.parametrize(
    ("kind", "marker"),
    [
        (BranchOnValue, "# the branch"),
        (LoopOverTensor, "# the loop"),
        (ToNumber, "# the conversion"),
    ],
)
def test_a_model_that_does_not_trace_names_the_users_line(kind, marker):
    model = kind()
    with pytest.raises(TraceError, match=rf"does not trace: .+\n.*{HERE}:{line_of(marker)}, in forward") as caught:
        prepare(model, torch.ones(2, 2))
    assert "torch.fx.wrap" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("wrap", "inner"),
    [(lambda m: torch.compile(m, backend="eager"), "_orig_mod"), (nn.DataParallel, "module")],
)
def test_a_wrapper_is_an_error_that_names_the_model_inside(wrap, inner):
    wrapped = wrap(nn.Sequential(nn.Linear(2, 2)).eval()).eval()
    with pytest.raises(ModelStateError, match=rf"pass the model inside it: model\.{inner}"):
        prepare_fx(wrapped, everything(), torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:.*torch.jit.*is not supported")
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (
            lambda m: torch.compile(m, backend="eager"),
            r"OptimizedModule is a wrapper; put what it holds, its ._orig_mod",
        ),
        (nn.DataParallel, r"DataParallel is a wrapper; put what it holds, its .module,"),
        (torch.jit.script, "it is compiled to TorchScript; put the nn.Module that it was made from"),
    ],
)
@pytest.mark.parametrize("way", [quantize, lambda m, x: quantize_dynamic(m)])
def test_a_wrapped_part_stays_float_with_the_reason(monkeypatch, wrap, reason, way):
    data_parallel = sys.modules[nn.DataParallel.__module__]
    monkeypatch.setattr(data_parallel, "_get_available_device_type", lambda: None)  # else it wants a GPU's tensors
    x = torch.randn(2, 4)
    model = nn.Sequential(wrap(nn.Sequential(nn.Linear(4, 4)).eval()), nn.Linear(4, 4)).eval()
    quantized = way(model, x)
    assert torch.equal(quantized.get_submodule("0")(x), model[0](x))
    (left,) = quantized._fxquant_record.skipped
    assert re.match(reason, left.reason)
    assert [site.path for site in quantized._fxquant_record.sites] == ["1"]


@pytest.mark.parametrize("call", [lambda m: prepare_fx(m, everything(), torch.ones(2, 2)), fuse_fx])
def test_training_mode_is_an_error(call):
    with pytest.raises(ModelStateError, match=r"Linear is in training mode; call model.eval\(\) first"):
        call(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:.*torch.jit.*is not supported")
def test_a_torchscript_model_is_an_error():
    with pytest.raises(ModelStateError, match="TorchScript models cannot be quantized"):
        prepare_fx(torch.jit.script(nn.Linear(2, 2)).eval(), everything(), torch.ones(2, 2))


@pytest.mark.parametrize("thing", [None, lambda x: x, {"a": 1}, nn.Linear])
def test_something_that_is_no_module_is_an_error(thing):
    with pytest.raises(ModelStateError, match=r"expected a torch.nn.Module, got"):
        prepare_fx(thing, everything(), torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_is_an_error():
    with pytest.raises(ModelStateError, match=r"'0.weight' is lazy and has no shape yet"):
        prepare(nn.Sequential(nn.LazyLinear(3)), torch.ones(2, 2))


def test_a_root_whose_forward_was_replaced_on_the_instance_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model.forward = lambda x: x
    with pytest.raises(ModelStateError, match="the forward of this Sequential was replaced on the instance"):
        prepare(model, torch.randn(2, 4))
