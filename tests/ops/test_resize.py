"""Linear interpolation of integer values."""

import pytest
import torch
import torch.nn.functional as F

from fxquant import ops
from fxquant.errors import DTypeError, ShapeError

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("factors", [None, (2.0, 2.0, 2.0), (1.3, 0.7, 2.5)])
@pytest.mark.parametrize("rank", MODES)
def test_the_integers_are_those_of_interpolated_floats(rank, factors, align_corners):
    x = torch.randint(256, (2, 3, *(5, 6, 4)[:rank]), dtype=torch.uint8)
    options = {"size": (7, 5, 1)[:rank]} if factors is None else {"scale_factor": factors[:rank]}
    expected = F.interpolate(x.double(), mode=MODES[rank], align_corners=align_corners, **options)
    got = ops.resize_value(x, options.get("size"), options.get("scale_factor"), align_corners)
    assert got.dtype == torch.uint8
    assert (got.double() - expected).abs().max() <= 0.5 + 1e-4  # float32 sums of numbers up to 255
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(ops.resize_value(strided, options.get("size"), options.get("scale_factor"), align_corners), got)


def test_constants_stay():
    x = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 3, 4)
    assert torch.equal(ops.resize_value(x, 7), x[..., :1, :1].expand(1, 256, 7, 7))


def test_what_does_not_fit_is_refused():
    x = torch.zeros(1, 2, 3, 4, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="one for each dimension after the second"):
        ops.resize_value(x, (2, 3, 4))
    with pytest.raises(DTypeError, match=r"resize_value of a static model takes uint8 values, got torch\.float32"):
        ops.resize_value(x.float(), 2)
