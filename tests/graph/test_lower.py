import pytest
import torch
from torch import nn

import fxquant
from fxquant import convert_fx, fuse_fx, prepare_fx, prepare_qat_fx
from fxquant.graph import edit
from fxquant.graph.lower import lower
from tests.graph.convert.test_values import Twice
from tests.graph.test_teach import Net
from tests.samples import sqnr


def trained(model=None):
    torch.manual_seed(0)
    prepared = prepare_qat_fx(model or Net().train(), fxquant.default_qat_qconfig_mapping(), (torch.randn(2, 2, 6, 6),))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    for _ in range(3):
        prepared(torch.randn(8, 2, 6, 6)).square().mean().backward()
        optimizer.step()
    return prepared


def test_it_is_what_prepare_fx_gives_of_the_trained_float_model():
    prepared = trained()
    model = Net()
    model.load_state_dict({name: prepared.state_dict()[name] for name in model.state_dict()})
    expected = prepare_fx(model.eval(), fxquant.default_static_qconfig_mapping(), (torch.randn(2, 2, 6, 6),))
    lowered = edit.mirror(prepared)
    lower(lowered, prepared.record)
    theirs = [(n.op, n.target) for n in expected.graph.nodes if "_input_mean" not in n.name]
    assert [(n.op, n.target) for n in lowered.graph.nodes] == theirs
    x = torch.randn(3, 2, 6, 6)
    lowered.eval().apply(fxquant.disable_fake_quant)
    assert torch.allclose(lowered(x), fuse_fx(model, (x,))(x), atol=1e-5)


def test_the_trained_model_is_left_as_it_was():
    prepared, x = trained().eval(), torch.randn(3, 2, 6, 6)
    before, nodes = prepared(x), [n.name for n in prepared.graph.nodes]
    convert_fx(prepared)
    assert torch.equal(prepared(x), before)
    assert [n.name for n in prepared.graph.nodes] == nodes


def test_weights_have_the_integers_that_training_had():
    prepared = trained().eval()
    quantized = convert_fx(prepared)
    for path, norm in (("conv", prepared.norm), ("other", None), ("fc", None)):
        layer, product = prepared.get_submodule(path), quantized.get_submodule(path)
        gain = torch.ones(len(layer.weight)) if norm is None else norm.weight * (norm.running_var + norm.eps).rsqrt()
        rounded = layer.rounded(*((None, None) if norm is None else (norm.weight, norm.running_var)))
        shape = (-1, *[1] * (layer.weight.dim() - 1))
        integers = (rounded * gain.view(shape) / product.weight_scale.view(shape)).round()
        assert torch.equal(integers.to(torch.int8), product.weight_int8)


def test_no_trained_part_is_left():
    quantized = convert_fx(trained())
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.Conv2d, fxquant.FakeQuantize)) for m in quantized.modules())
    assert not quantized.training


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("is_later", [True, False])
def test_a_layer_that_a_part_beside_the_graph_calls_too_trains_and_converts(is_fused, is_later):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    prepared = prepare_qat_fx(Twice(is_fused, is_later).train(), fxquant.default_qat_qconfig_mapping(), (x,))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    prepared(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert sqnr(prepared.eval()(x), convert_fx(prepared)(x)) > 60
    assert prepared.get_submodule("layer").weight is prepared.get_submodule("part.layer").weight
