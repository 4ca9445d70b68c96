"""Clean: what is unused goes, what the user wrote stays, nothing is shared with the float model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import convert_fx
from tests.samples import prepare, quantize


class Careful(nn.Module):
    """Calls whose results nobody reads."""

    def __init__(self):
        super().__init__()
        self.net, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("spare", torch.zeros(3))

    def forward(self, x):
        torch._assert(x.shape[-1] == 4, "last dimension must be 4")
        x = x * 1
        x.clamp_(min=0)
        F.relu_(x)
        return self.net(x)


def test_asserts_and_inplace_calls_are_kept():
    quantized = quantize(Careful(), torch.randn(2, 4))
    assert [n.target for n in quantized.graph.nodes if n.op in ("call_function", "call_method")].count(
        torch._assert
    ) == 1
    negative = -torch.rand(2, 4)
    assert torch.equal(quantized(negative), quantized(torch.zeros(2, 4)))
    with pytest.raises(AssertionError, match="last dimension must be 4"):
        quantized(torch.randn(2, 5))


def test_unused_modules_and_tensors_go():
    quantized = quantize(Careful(), torch.randn(2, 4))
    assert {name.split(".")[0] for name in quantized.state_dict()} == {"net"}


def test_nothing_is_shared_with_the_float_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.net = nn.Conv1d(4, 4, 1), nn.LayerNorm(4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x):
            return self.net(self.norm(self.conv(x))) * self.scale + self.shift

    model = Model()
    prepared = prepare(model, torch.randn(2, 4, 4))
    quantized = convert_fx(prepared)
    theirs = {t.untyped_storage().data_ptr() for m in (model, prepared) for t in m.state_dict().values()}
    assert theirs.isdisjoint(t.untyped_storage().data_ptr() for t in quantized.state_dict().values())


def test_tied_float_tensors_stay_tied_when_copied():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.net = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.net(self.b(self.a(x)))

    quantized = quantize(Model(), torch.randn(2, 4, 4))
    assert quantized.a.weight is quantized.b.weight


def test_the_code_of_the_graph_is_printable_and_linted():
    quantized = quantize(Careful(), torch.randn(2, 4))
    quantized.graph.lint()
    assert "def forward" in quantized.code


class Asks(nn.Module):
    """Asks the weight of its layer for nothing but its dtype and device, in one of the ways of doing so."""

    def __init__(self, asks):
        super().__init__()
        self.net, self.asks = nn.Linear(4, 4), asks

    def forward(self, x):
        return self.asks(self.net(x), self.net.weight)


@pytest.mark.parametrize(
    "asks",
    [lambda y, w: y.to(w.dtype), lambda y, w: y + torch.zeros(4, device=w.device), lambda y, w: y + w.new_zeros(4),
     lambda y, w: y.type_as(w), lambda y, w: y.to(w), lambda y, w: y + w.new_full((4,), 2),
     lambda y, w: y.to(w.data.dtype), lambda y, w: y.to(w.t().device), lambda y, w: y + w.detach().new_zeros(1),
     lambda y, w: y + torch.zeros_like(w)[0], lambda y, w: y + torch.full_like(w.t(), 2.0)[0],
     lambda y, w: y + w.t().shape[0],
     lambda y, w: y.reshape(-1, w.data.size(1)),
     lambda y, w: y + torch.empty_like(w).shape[1] * w.detach().numel()],
)  # fmt: skip
def test_of_a_weight_that_is_asked_for_its_dtype_nothing_is_kept(asks):
    model, x = Asks(asks).eval(), torch.randn(2, 4)
    quantized, bare = quantize(model, x), quantize(model.net, x)
    assert quantized.record.skipped == ()
    assert torch.equal(quantized(x), asks(bare(x), model.net.weight))
    assert not any(t.numel() for name, t in quantized.state_dict().items() if "net." not in name)


def test_of_the_first_parameter_that_states_are_made_like_nothing_is_kept():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.rnn = nn.Embedding(50, 8), nn.RNN(8, 8)

        def forward(self, words):
            weight = next(
                self.parameters()
            )  # no stand-in: forward meets the tensor, and torch.fx its method as a function
            return self.rnn(self.table(words), weight.new_zeros(1, words.size(1), 8))[0]

    model, words = Model().eval(), torch.randint(50, (3, 2))
    quantized = quantize(model, words)
    assert quantized.record.coverage.share == 1
    assert not quantized.record.skipped
    assert not any(t.is_floating_point() and t.dim() > 1 for t in quantized.state_dict().values())
    assert (quantized(words) - model(words)).norm() <= 0.05 * model(words).norm()


def test_a_weight_whose_values_are_read_too_is_kept():
    quantized = quantize(Asks(lambda y, w: y.to(w.dtype) * w.sum()), torch.randn(2, 4))
    assert quantized.net_weight.shape == (4, 4)
