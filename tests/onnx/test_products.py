"""Products under ONNX Runtime: int8 and int16 ones to the bit, 4- and 3-bit and float16 ones to float rounding."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant import QConfigMapping
from tests.onnx.runtime import Exported, error

EXACT = {
    "int8": fxquant.default_dynamic_qconfig,
    "tensor": fxquant.per_tensor_dynamic_qconfig,
    "int16": fxquant.int16_dynamic_qconfig,
}
ROUNDED = {
    "int4": fxquant.int4_dynamic_qconfig,
    "int3": fxquant.int3_dynamic_qconfig,
    "float16": fxquant.float16_dynamic_qconfig,
}
COLUMNS = 72  # of 4-bit groups of 32 the last is shorter


class Formats(nn.Module):
    """A layer in each format."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(COLUMNS, 24) for name in (*EXACT, *ROUNDED)})

    def forward(self, x):
        products = [torch.relu(layer(x)) for layer in self.layers.values()]
        return *products, self.layers["int8"](x[0, 0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, x = Formats().eval(), torch.randn(2, 5, COLUMNS)
    mapping = QConfigMapping().set_global(fxquant.default_dynamic_qconfig)
    for name, qconfig in (EXACT | ROUNDED).items():
        mapping.set_module_name(f"layers.{name}", qconfig)
    quantized = fxquant.convert_fx(fxquant.prepare_fx(model, mapping, (x,)))
    batch = torch.export.Dim("batch", min=1, max=64)
    path = tmp_path_factory.mktemp("onnx") / "formats.onnx"
    return Exported(quantized, (x,), path, dynamic_shapes=({0: batch},))


HARD = torch.stack((
    torch.zeros(5, COLUMNS),  # a scale of 1
    torch.full((5, COLUMNS), 3.0),
    torch.full((5, COLUMNS), -1e-39),  # a scale that is not normal
    torch.linspace(-1e30, 2e30, 5 * COLUMNS).view(5, COLUMNS),
    torch.arange(5 * COLUMNS).view(5, COLUMNS).remainder(7).float(),
))  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
def test_integer_products_give_fxquants_bits(exported, batch):
    pairs = exported.both(torch.randn(batch, 5, COLUMNS) * 3)
    for expected, got in (*pairs[: len(EXACT)], pairs[-1]):
        assert torch.equal(expected, got)


def test_tokens_with_extreme_ranges_give_the_same_bits_too(exported):
    expected, got = exported.both(HARD)[0]
    assert torch.equal(expected, got)


def test_float_products_agree_to_float_rounding(exported):
    for expected, got in exported.both(torch.randn(3, 5, COLUMNS))[len(EXACT) : -1]:
        assert error(expected, got) < 24 * 2**-24 * COLUMNS**0.5


def test_integers_stay_integers_under_the_runtime(exported):
    names = exported.operators(optimized=True)
    assert sum("MatMulInteger" in name for name in names) == len(EXACT)  # int8, twice; per tensor
    assert not any("MatMulNBits" in name for name in names)  # it would round activations once more
