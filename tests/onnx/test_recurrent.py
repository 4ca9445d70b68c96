"""Recurrent layers as Scan: any number of steps, both directions, projections, states."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant import QConfigMapping
from tests.onnx.runtime import Exported, error


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, bidirectional=True)
        self.projected = nn.LSTM(12, 16, proj_size=5, bias=False)
        self.gru = nn.GRU(12, 16, bidirectional=True)
        self.plain = nn.RNN(12, 16, nonlinearity="relu")
        self.tanh = nn.RNN(12, 16)
        self.cell = nn.GRUCell(12, 16)

    def forward(self, x, h):
        stacks = [self.lstm(x), self.projected(x), self.gru(x), self.tanh(x, h), self.plain(x, h)]
        return self.cell(x[0], h[0]), *stacks


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, inputs = Layers().eval(), (torch.randn(4, 3, 12), torch.randn(1, 3, 16))
    mapping = QConfigMapping().set_global(fxquant.default_dynamic_qconfig)
    mapping.set_module_name("tanh", fxquant.int4_dynamic_qconfig)
    quantized = fxquant.convert_fx(fxquant.prepare_fx(model, mapping, inputs))
    time, batch = torch.export.Dim("time", min=2, max=64), torch.export.Dim("batch", min=1, max=64)
    path = tmp_path_factory.mktemp("onnx") / "layers.onnx"
    return Exported(quantized, inputs, path, dynamic_shapes=({0: time, 1: batch}, {1: batch}))


@pytest.mark.parametrize(("time", "batch"), [(4, 3), (9, 1)])
def test_results_agree_at_other_lengths_and_batches(exported, time, batch):
    pairs = exported.both(torch.randn(time, batch, 12), torch.randn(1, batch, 16))
    for expected, got in pairs[:-2]:
        # Sigmoid and Tanh differ by some 2**-23; a hidden state that is rounded to another integer by up to 1 / 255.
        assert error(expected, got) < 1 / 255
        assert float((expected - got).abs().median()) < 1e-6
    for expected, got in pairs[-2:]:  # ReLU has nothing to round
        assert torch.equal(expected, got)


def test_each_direction_is_a_scan(exported):
    assert exported.operators().count("Scan") == 4 + 1 + 2 + 1 + 1 + 1
