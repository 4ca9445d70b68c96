"""Tables under ONNX Runtime: rows to the bit, bags to float rounding."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant import QConfigMapping
from tests.onnx.runtime import Exported, error

FORMATS = {
    "int8": fxquant.default_dynamic_qconfig,
    "uint8": fxquant.float_qparams_weight_only_qconfig,
    "uint4": fxquant.uint4_weight_only_qconfig,
    "float16": fxquant.float16_dynamic_qconfig,
}
BAGS = [(mode, padding) for mode in ("sum", "mean", "max") for padding in (None, 3)]


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(50, 17) for name in FORMATS})
        self.bags = nn.ModuleList(nn.EmbeddingBag(50, 16, mode=mode, padding_idx=pad) for mode, pad in BAGS)
        self.weighted = nn.EmbeddingBag(50, 16, mode="sum", include_last_offset=True)

    def forward(self, indices, flat, offsets, shares):
        rows = [table(indices) for table in self.tables.values()]
        equal = [bag(indices) for bag in self.bags]
        begun = [bag(flat, offsets) for bag in self.bags]
        return *rows, *equal, *begun, self.weighted(flat, offsets, shares)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, inputs = Tables().eval(), inputs_of(2, 9)
    mapping = QConfigMapping().set_global(fxquant.default_dynamic_qconfig)
    for name, qconfig in FORMATS.items():
        mapping.set_module_name(f"tables.{name}", qconfig)
    quantized = fxquant.convert_fx(fxquant.prepare_fx(model, mapping, inputs))
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    shapes = ({0: batch}, {0: length}, None, {0: length})
    return Exported(quantized, inputs, tmp_path_factory.mktemp("onnx") / "tables.onnx", dynamic_shapes=shapes)


def inputs_of(batch, length):
    flat = torch.randint(5, (length,))
    flat[:2] = 3  # the first bag is nothing but padding, and the second is empty
    return torch.randint(5, (batch, 6)), flat, torch.tensor([0, 2, 2, 5, length]), torch.randn(length)


@pytest.mark.parametrize(("batch", "length"), [(2, 9), (1, 30)])
def test_rows_and_bags_agree(exported, batch, length):
    pairs = exported.both(*inputs_of(batch, length))
    for expected, got in pairs[: len(FORMATS)]:
        assert torch.equal(expected, got)
    for expected, got in pairs[len(FORMATS) :]:
        assert error(expected, got) < 16 * 2**-24
