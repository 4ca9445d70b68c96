"""Where a static model computes with integers, as profile shows it."""

import torch
from torch import nn

import fxquant
from fxquant import convert_fx, default_dynamic_qconfig_mapping, default_static_qconfig_mapping, prepare_fx, profile
from fxquant.debug.measure.regions import integer_regions

X = torch.randn(2, 3, 6, 6)


class Parts(nn.Module):
    """Two branches that meet, a softmax in float, and integers again."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(n, 8, 1) for n in (3, 3, 16, 8))

    def forward(self, x):
        x = self.c(torch.cat([self.a(x).relu(), self.b(x)], 1))
        return self.d(x.softmax(1))


def quantized(mapping):
    model = Parts().eval()
    return convert_fx(prepare_fx(model, mapping, (X,)), data=[(X,)] if mapping.has_static else None)


def test_a_region_ends_where_floats_begin():
    module = quantized(default_static_qconfig_mapping())
    first, second = integer_regions(module, module.record)
    assert (first.first, first.last, first.nodes, first.sites) == ("quantize", "c", 5, ("a", "b", "c"))
    assert (second.first, second.last, second.nodes, second.sites) == ("quantize_1", "d", 2, ("d",))


def test_profile_shows_the_regions():
    report = profile(quantized(default_static_qconfig_mapping()), (X,), rounds=1)
    assert [region.last for region in report.regions] == ["c", "d"]
    assert "integers: quantize → c (5 nodes), sites 0." in str(report)


def test_dynamic_and_prepared_models_have_none():
    module = quantized(
        default_dynamic_qconfig_mapping().set_object_type(nn.Conv2d, None).set_global(fxquant.int16_dynamic_qconfig)
    )
    assert integer_regions(module, module.record) == ()
    prepared = prepare_fx(Parts().eval(), default_static_qconfig_mapping(), (X,))
    assert integer_regions(prepared, prepared.record) == ()
