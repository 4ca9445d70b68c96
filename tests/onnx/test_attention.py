"""Attention and products of two activations under ONNX Runtime: float arithmetic, in another order."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.ops import library
from tests.onnx.runtime import Exported, error


class Attention(nn.Module):
    """Self-attention with a padding mask, a float one, and a causal one."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, mask):
        query, key, value = self.inner(x).view(x.shape[0], -1, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value, mask[:, None, None, :])
        shifted = F.scaled_dot_product_attention(query, key, value, -mask[:, None, None, :].float(), scale=0.5)
        before = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return seen, shifted, before, query @ key.transpose(2, 3), self.outer(before.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, inputs = Attention().eval(), inputs_of(2, 5)
    mapping = fxquant.QConfigMapping().set_global(fxquant.default_dynamic_qconfig)
    quantized = fxquant.convert_fx(fxquant.prepare_fx(model, mapping, inputs))
    batch, length = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "length"))
    sizes = {0: batch, 1: length}
    return Exported(
        quantized, inputs, tmp_path_factory.mktemp("onnx") / "attention.onnx", dynamic_shapes=(sizes, sizes)
    )


def inputs_of(batch, length):
    mask = torch.rand(batch, length) > 0.4
    mask[0, 0], mask[1] = True, not library.available()  # whose queries see no key; torch's own attention, which stands
    # in the graph where there is no library, has another result for them in ONNX
    return torch.randn(batch, length, 32), mask


@pytest.mark.parametrize(("batch", "length"), [(2, 5), (3, 9)])
def test_results_agree_to_float_rounding(exported, batch, length):
    *attended, (expected, got) = exported.both(*inputs_of(batch, length))
    for ours, theirs in attended:
        assert error(ours, theirs) < 64 * 2**-24
    assert error(expected, got) < 1 / 255  # a value next to a boundary may become another integer
    assert not library.available() or not attended[0][1][1].any()  # of queries that see no key
