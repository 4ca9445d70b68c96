"""Tracing: leaves, errors that name the user's line, example inputs that are really run."""

import copy
import pathlib
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    ExampleInputsError,
    convert_fx,
    explain,
    prepare_fx,
)
from tests.samples import everything, prepare, quantize, same_bits

HERE = pathlib.Path(__file__).name


def line_of(text, path=__file__):
    """Return the number of the first line of a file that holds a text."""
    lines = pathlib.Path(path).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


class BranchOnValue(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the branch
            return x
        return -x


class LoopOverTensor(nn.Module):
    def forward(self, x):
        return sum(row for row in x)  # the loop


class ToNumber(nn.Module):
    def forward(self, x):
        return x * float(x.max())  # the conversion


class Bug(nn.Module):
    def forward(self, x):
        return x + self.absent  # the bug


@pytest.mark.parametrize(
    ("kind", "marker"),
    [(BranchOnValue, "# the branch"), (LoopOverTensor, "# the loop"), (ToNumber, "# the conversion")],
)
def test_a_submodule_that_does_not_trace_is_called_as_it_is_and_told(kind, marker):
    model, x = nn.Sequential(nn.Linear(2, 2), kind()), torch.ones(2, 2)
    quantized = quantize(model, x)
    assert list(quantized.record.untraced) == ["1"]
    assert f"{HERE}:{line_of(marker)}, in forward" in quantized.record.untraced["1"]
    assert "not traced: 1: " in str(explain(quantized))
    assert type(quantized.get_submodule("1")) is kind


def test_a_submodule_with_a_bug_is_an_error():
    with pytest.raises(ExampleInputsError, match=rf"fails on example_inputs at .*{HERE}:{line_of('# the bug')}, in"):
        prepare(nn.Sequential(nn.Linear(2, 2), Bug()), torch.ones(2, 2))


class Loop(nn.Module):
    """A decoder as people write it: a Python loop over a cell, with an early end."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        state, outputs = None, []
        for step in x.unbind(0):
            state = self.cell(step, state)
            outputs.append(self.out(state[0]))
            if bool(state[0].abs().max() > 1e6):
                break
        return torch.stack(outputs)


def test_the_modules_inside_one_that_does_not_trace_are_quantized(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), Loop()).eval(), torch.randn(4, 3, 6)
    quantized = quantize(model, x)
    assert [site.path for site in quantized.record.sites] == ["0", "1.cell", "1.out"]
    assert (quantized(x) - model(x)).norm() <= 0.05 * model(x).norm()
    fxquant.save(quantized, tmp_path / "m.safetensors")
    assert same_bits(fxquant.load(model, tmp_path / "m.safetensors")(x), quantized(x))


def test_example_inputs_may_be_one_tensor_or_a_list():
    model, x = nn.Sequential(nn.Linear(2, 2)).eval(), torch.ones(3, 2)
    for inputs in (x, (x,), [x]):
        assert torch.equal(prepare_fx(model, everything(), inputs)(x), model(x))


@pytest.mark.parametrize("inputs", [None, {1, 2}, "x", 3])
def test_example_inputs_of_another_kind_are_an_error(inputs):
    with pytest.raises(ExampleInputsError, match=f"or one tensor, got {type(inputs).__name__}"):
        prepare_fx(nn.Linear(2, 2).eval(), everything(), inputs)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_example_inputs_is_an_error(count):
    with pytest.raises(ExampleInputsError, match=rf"has {count} arguments, but forward is Linear\(input"):
        prepare_fx(nn.Linear(2, 2).eval(), everything(), (torch.ones(3, 2),) * count)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x):
        return self.net(x)  # the line that fails


def test_a_model_that_sets_attributes_in_forward():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls, self.last, self.log = nn.Linear(4, 4), 0, None, []

        def forward(self, x):
            self.calls += 1
            self.last = self.net(x)
            self.log.append("called")
            return self.last

    model, x = Model(), torch.randn(3, 4)
    quantized = quantize(model, x)
    assert (model.calls, model.last, model.log) == (0, None, [])
    assert quantized(x).shape == (3, 4)


def test_a_model_that_appends_to_a_global_like_list_of_its_child():
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = nn.Linear(4, 4), {"shapes": []}

        def forward(self, x):
            self.seen["shapes"].append(1)
            return self.net(x)

    model = nn.Sequential(Child())
    quantize(model, torch.randn(3, 4))
    assert model[0].seen == {"shapes": []}


def test_a_buffer_written_in_forward_is_the_prepared_models_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return self.net(x) + self.count

    model, x = Model().eval(), torch.randn(3, 4)
    prepared = prepare(model, x)
    quantized = convert_fx(prepared)
    assert (prepared.count.item(), quantized.count.item()) == (0, 0)
    assert torch.equal(prepared(x), copy.deepcopy(model)(x))
    for module, counts in ((prepared, (1, 0)), (quantized, (0, 1))):
        for other in (prepared, quantized):
            other.count.zero_()
        module(x)
        assert (prepared.count.item(), quantized.count.item()) == counts
    assert model.count == 0


def test_a_graph_module_can_be_prepared():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
    graph = torch.fx.symbolic_trace(model)
    assert same_bits(quantize(graph, x)(x), quantize(model, x)(x))


def test_a_module_with_a_lock_can_be_prepared():
    import threading

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    model.lock = threading.Lock()
    assert quantize(model, x)(x).shape == (3, 4)


def test_shape_arithmetic_stays_dynamic():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 6)

        def forward(self, x):
            b, t, _ = x.shape
            return self.net(x).view(b, t, 2, 3).reshape(b * t, -1)

    quantized = quantize(Model(), torch.randn(2, 3, 4))
    assert quantized(torch.randn(5, 7, 4)).shape == (35, 6)


def test_tracing_fires_no_autograd():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    prepare(model, x)
    assert all(p.grad is None and p.is_leaf for p in model.parameters())


class PositionalEncoding(nn.Module):
    """A buffer sliced by the input's length, as in the transformer tutorial."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("pe", torch.randn(50, 1, 4))

    def forward(self, x):
        return self.net(x + self.pe[: x.size(0)])


def test_a_buffer_sliced_by_the_inputs_length():
    model = PositionalEncoding().eval()
    prepared = prepare(model, torch.randn(3, 2, 4))
    x = torch.randn(7, 2, 4)
    assert torch.equal(prepared(x), model(x))
    assert convert_fx(prepared)(x).shape == (7, 2, 4)


def test_a_buffer_that_forward_branches_on():
    class Model(PositionalEncoding):
        def __init__(self):
            super().__init__()
            self.register_buffer("times", torch.tensor(2))

        def forward(self, x):
            for _ in range(int(self.times)):
                x = self.net(x)
            return x

    model, x = Model().eval(), torch.randn(3, 2, 4)
    assert torch.equal(prepare(model, x)(x), model(x))


class Counts(Named):
    """Counts its calls in a buffer, by an assignment."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.how == "+=":
            self.calls += 1
        elif self.how == "+":
            self.calls = self.calls + 1
        else:
            self.calls = self.calls + x.sum() * 0 + 1
        return self.net(x)


@pytest.mark.parametrize("how", ["+=", "+", "of the input"])
@pytest.mark.parametrize("is_root", [False, True])
def test_a_buffer_set_in_forward_is_kept_up_and_told(how, is_root):
    part, x = Counts(how).eval(), torch.randn(3, 4)
    model = part if is_root else nn.Sequential(part, nn.Linear(4, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the root's: its own code runs on
        quantized = quantize(model, x)
    for _ in range(3):
        quantized(x)
    counter = quantized if is_root else quantized.get_submodule("0")
    assert (counter.calls, part.calls) == (3, 0)
    assert "forward sets the buffer 'calls'" in explain(quantized).untraced[0]
    assert len(quantized._fxquant_record.sites) == (1 if is_root else 2)
    assert pickle.loads(pickle.dumps(quantized))(x).equal(quantized(x))


def test_the_reason_is_of_the_attempt_that_got_further():
    """A slice of a buffer by the input's size is not what stands in the way: the conversion, behind it, is."""

    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("positions", torch.randn(1, 8, 4))
            self.part = ToNumber()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(self.part(x + self.positions[:, : x.size(1)]), self.weight)

    quantized = quantize(Positioned().eval(), torch.randn(2, 3, 4))
    (told,) = explain(quantized).untraced
    assert re.match(rf"part: .*{HERE}:{line_of('# the conversion')}", told)
    assert [site.path for site in quantized.record.sites] == ["weight"]


@pytest.mark.parametrize("is_hooked", [False, True])
@pytest.mark.parametrize("is_container", [False, True])
def test_a_part_whose_forward_was_replaced_on_the_instance_keeps_it(is_hooked, is_container):
    linear = nn.Linear(4, 4)
    part = nn.Sequential(linear) if is_container else linear
    model, x = nn.Sequential(part, nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    if is_hooked:
        part.register_forward_hook(lambda *_: None)
    part.forward = lambda x: F.linear(x, linear.weight) * 3
    prepared = prepare(model, x)
    assert torch.equal(prepared(x), model(x))
    assert [site.path for site in prepared.record.sites] == ["1"]
    assert [left.reason for left in prepared.record.skipped] == ["its forward was replaced on the instance"]
    assert (convert_fx(prepared)(x) - model(x)).norm() < 0.1 * model(x).norm()
