"""What the public functions share: inference mode, torch.ao's keyword arguments, warnings at the user's line."""

import inspect
import warnings

import pytest
import torch
from torch import nn

from fxquant import ArgumentError, convert_fx, fuse_fx, prepare_fx, quantize_dynamic
from fxquant.entry import SUCCESSORS
from tests.samples import everything, prepare

FUNCTIONS = {
    prepare_fx: lambda model, x, **theirs: prepare_fx(model, everything(), (x,), **theirs),
    convert_fx: lambda model, x, **theirs: convert_fx(prepare(model, x), **theirs),
    fuse_fx: lambda model, x, **theirs: fuse_fx(model, **theirs),
    quantize_dynamic: lambda model, x, **theirs: quantize_dynamic(model, {nn.Linear}, **theirs),
}


def theirs():
    import torch.ao.quantization as ao
    from torch.ao.quantization import quantize_fx as ao_fx

    for ours, other in ((prepare_fx, ao_fx.prepare_fx), (convert_fx, ao_fx.convert_fx), (fuse_fx, ao_fx.fuse_fx),
                        (quantize_dynamic, ao.quantize_dynamic)):  # fmt: skip
        for name in inspect.signature(other).parameters:
            if name not in inspect.signature(ours).parameters and name not in ("model", "graph_module"):
                yield ours, name


@pytest.mark.parametrize(("function", "name"), list(theirs()), ids=lambda part: getattr(part, "__name__", part))
def test_every_keyword_of_torch_ao_is_answered(function, name):
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    with pytest.raises(ArgumentError, match=rf"{function.__name__} takes no '{name}'.*: \w+") as caught:
        FUNCTIONS[function](model, x, **{name: None})
    assert str(caught.value).endswith(SUCCESSORS[name])


def test_other_keywords_are_pythons_own_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'exmple_kwargs'"):
        prepare_fx(nn.Linear(2, 2).eval(), everything(), torch.randn(1, 2), exmple_kwargs={})


def test_signatures_and_docstrings_stay():
    assert list(inspect.signature(prepare_fx).parameters)[:4] == [
        "model", "qconfig_mapping", "example_inputs", "example_kwargs",
    ]  # fmt: skip
    assert prepare_fx.__doc__.startswith("Return the model as a graph")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_can_be_used_outside_of_inference_mode(function):
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    with torch.inference_mode():
        result = FUNCTIONS[function](model, x)
    assert not any(tensor.is_inference() for tensor in (*result.parameters(), *result.buffers()))


class Branches(nn.Linear):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x):
        return sum(self.net(row) for row in x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: prepare_fx(nn.Sequential(nn.ReLU()).eval(), everything(), x), "nothing in this Sequential is"),
        (lambda x: prepare_fx(Branches(4, 4).eval(), everything(), x), "was traced for mask=None"),
        (lambda x: prepare_fx(Loops().eval(), everything(), x), "does not trace"),
        (lambda x: quantize_dynamic(Loops(), {nn.Linear, nn.LSTM}), "nn.LSTM, which occurs nowhere"),
    ],
)
def test_warnings_are_given_once_and_at_the_users_line(call, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(torch.randn(2, 4))
    (warning,) = caught
    assert message in str(warning.message)
    assert warning.filename == __file__
