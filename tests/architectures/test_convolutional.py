"""Published convolutional architectures under the static default: near, whole, and the same bits from a file."""

import pytest
import torch

import fxquant
from fxquant import convert_fx, prepare_fx
from tests.architectures.convolutional import CONVOLUTIONAL, make
from tests.samples import leaves, same_bits, sqnr


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@torch.no_grad()
def test_it_is_near_and_nothing_is_left_float(name, tmp_path):
    model, data = make(name)
    quantized = convert_fx(prepare_fx(model, fxquant.default_static_qconfig_mapping(), data[0]), data=data)
    expected, got = leaves(model(*data[0])), leaves(quantized(*data[0]))
    assert min(map(sqnr, expected, got)) > 30
    kept = {skipped.path for skipped in quantized.record.skipped}
    assert kept <= {"position"}  # which is added, not multiplied with
    alone = leaves(quantized(data[0][0][1:2]))
    if not quantized.record.values.floats and all(site.is_static for site in quantized.record.sites):
        assert all(torch.equal(one, together[1:2]) for one, together in zip(alone, got, strict=True))
    fxquant.save(quantized, tmp_path / "q")
    with torch.device("meta"):
        skeleton = CONVOLUTIONAL[name]().eval()
    assert same_bits(fxquant.load(skeleton, tmp_path / "q")(*data[0]), got)
    twice = fxquant.compare(model, quantized, data[:1])
    assert all(row.calls and not row.unpaired for row in twice.rows)
