"""What is a constant in a graph, and which way round."""

import pytest
import torch
from torch import nn

from fxquant.graph.constants import constant_of
from tests.samples import prepare


class Model(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("buffer", torch.randn(5, 4))
        self.view = view

    def forward(self, x):
        return self.view(self.weight), self.view(self.buffer), x


def constants(view):
    """Return what the parameter is, seen through a view, and what the buffer."""
    graph = torch.fx.Tracer().trace(Model(view))
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    return [constant_of(operand) for operand in returned[:2]]


TRANSPOSITIONS = [
    lambda w: w.t(),
    lambda w: w.T,
    lambda w: w.mT,
    lambda w: torch.t(w),
    lambda w: w.transpose(0, 1),
    lambda w: w.transpose(-1, -2),
    lambda w: w.transpose(dim0=-2, dim1=1),
    lambda w: torch.transpose(w, 1, 0),
    lambda w: torch.swapaxes(w, 0, 1),
    lambda w: w.swapdims(1, 0),
    lambda w: w.permute(1, 0),
    lambda w: w.permute((-1, -2)),
    lambda w: torch.permute(w, (1, 0)),
    lambda w: w.t().T.transpose(0, 1),
    lambda w: w.H,
    lambda w: w.mH,
    lambda w: w.adjoint(),
    lambda w: torch.adjoint(w),
    lambda w: torch.movedim(w, 0, -1),
    lambda w: w.moveaxis(1, 0),
]
VALUES = [lambda w: w.t().contiguous(), lambda w: w.data.t(), lambda w: w.detach().permute(0, 1).T]


@pytest.mark.parametrize("view", [*TRANSPOSITIONS, *VALUES])
def test_a_transpose_of_a_parameter_is_constant_however_it_is_written(view):
    (source, is_transposed, _), _ = constants(view)
    assert (source.target, is_transposed) == ("weight", True)
    matrix = torch.randn(5, 4)
    assert torch.equal(view(matrix), matrix.t())


@pytest.mark.parametrize(
    "view",
    [lambda w: w, lambda w: w.t().t(), lambda w: w.T.permute(1, 0), lambda w: w.permute(0, 1), lambda w: w.detach(),
     lambda w: w.transpose(0, 0), lambda w: w.movedim(-1, 1), lambda w: w.contiguous(), lambda w: w.data],
)  # fmt: skip
def test_two_transpositions_are_none(view):
    (source, is_transposed, _), _ = constants(view)
    assert (source.target, is_transposed) == ("weight", False)


@pytest.mark.parametrize(
    "view",
    [lambda w: w * 1, lambda w: w.view(4, 5), lambda w: w[0], lambda w: w.data.t() + 0, lambda w: w.real,
     lambda w: w.movedim((0, 1), (1, 0))],
)  # fmt: skip
def test_anything_else_is_no_constant(view):
    assert constants(view)[0] is None


@pytest.mark.parametrize("view", TRANSPOSITIONS)
def test_a_transposed_buffer_keeps_its_name(view):
    model, x = Model(view).eval(), torch.randn(3)
    prepared = prepare(model, x)
    assert [t.shape for t in prepared(x)[:2]] == [(4, 5), (4, 5)]
    assert "buffer" in {node.target for node in prepared.graph.nodes if node.op == "get_attr"}


def test_another_view_of_a_buffer_is_a_tensor_of_the_graph():
    model, x = Model(lambda w: w[1:]).eval(), torch.randn(3)
    prepared = prepare(model, x)
    assert "buffer" not in {node.target for node in prepared.graph.nodes}
    assert torch.equal(prepared(x)[1], model.buffer[1:])
