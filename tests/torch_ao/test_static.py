"""torch.ao's static models: its integers, scales and zero points, and so its outputs."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import TorchAoError, from_torch_ao, load_torch_ao
from fxquant.graph.record import record_of


@pytest.fixture(autouse=True)
def tq():
    """torch.ao.quantization, whose modules are deprecated: its warnings are its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.ao.nn.quantized
        import torch.ao.quantization
        import torch.ao.quantization.quantize_fx

        yield torch.ao.quantization


def graphed(tq, model, x, mapping=None):
    """Return torch.ao's static FX form, calibrated on x."""
    mapping = mapping or tq.get_default_qconfig_mapping("x86")
    prepared = tq.quantize_fx.prepare_fx(copy.deepcopy(model).eval(), mapping, (x,))
    prepared(x)
    return tq.quantize_fx.convert_fx(prepared)


def check_outputs(ours, theirs, x):
    """Check that outputs are theirs: torch.ao rounds biases to int32 too, so that a tie may fall to the other side."""
    got, expected = ours(x), theirs(x)
    step = expected.flatten().unique().diff().min()
    assert (got - expected).abs().max() <= 1.01 * step
    assert ((got - expected).abs() > 0.01 * step).float().mean() <= 0.1


class Net(nn.Module):
    """Most of what torch.ao has integers for, a softmax between."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool, self.fc1, self.act, self.fc = nn.MaxPool2d(2), nn.Linear(16, 12), nn.Sigmoid(), nn.Linear(12, 5)
        self.weight = nn.Parameter(torch.randn(5, 5))
        for norm in (self.stem[1], self.bn1):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.conv2(F.relu6(self.bn1(self.conv1(x)))))
        x = self.pool(torch.cat([x, F.hardswish(x * 2)], 1))
        x = self.fc(self.act(self.fc1(F.adaptive_avg_pool2d(x, 1).flatten(1))))
        return F.linear(torch.softmax(x, -1), self.weight)


class Curves(nn.Module):
    """Activations and numbers, and what enlarges."""

    def __init__(self):
        super().__init__()
        self.leaky, self.elu = nn.LeakyReLU(0.1), nn.ELU()

    def forward(self, x):
        x = F.leaky_relu(F.elu(self.elu(self.leaky(x * 1.5))), 0.2)
        x = F.interpolate(torch.tanh(x) + 1.0, scale_factor=2.0)
        return F.hardsigmoid(F.hardtanh(F.pad(x, (1, 1, 1, 1))).sub(0.5)) * -0.7


class Back(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.back = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3, 2, output_padding=1)

    def forward(self, x):
        return self.back(F.relu(self.conv(x)))


@pytest.mark.parametrize("make", [Net, Curves])
def test_a_graph_gives_torch_aos_outputs(tq, make):
    model, x = make().eval(), torch.randn(4, 3, 8, 8)
    theirs = graphed(tq, model, x)
    ours = from_torch_ao(theirs)
    check_outputs(ours, theirs, x)
    assert "torch.ao" not in str(ours.graph)
    assert not [node for node in ours.graph.nodes if "mark" in node.name]


def test_the_integers_and_scales_are_theirs(tq):
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    theirs = graphed(tq, model, x)
    ours = from_torch_ao(theirs)
    for path in ("stem.0", "conv1", "conv2", "fc1", "fc"):
        got, module = ours.get_submodule(path), theirs.get_submodule(path)
        weight = module.weight()
        assert torch.equal(got.weight_int8, weight.int_repr())
        assert torch.equal(got.weight_scale, weight.q_per_channel_scales().float())
        assert torch.equal(got.bias, module.bias())
        name = path.replace(".", "_")
        assert float(ours.get_buffer(f"{name}_scale")) == pytest.approx(module.scale, rel=1e-7)
        assert int(ours.get_buffer(f"{name}_zero_point")) == module.zero_point
    assert not ours.get_submodule("_packed_weight_0").bias.any()
    static = {site.path for site in record_of(ours).sites if site.is_static}
    assert static == {"stem.0", "conv1", "conv2", "fc1", "fc", "_packed_weight_0"}


def test_a_transposed_convolution_of_one_scale(tq):
    mapping = tq.QConfigMapping().set_global(tq.default_qconfig)
    model, x = Back().eval(), torch.randn(2, 3, 8, 8)
    theirs = graphed(tq, model, x, mapping)
    ours = from_torch_ao(theirs)
    check_outputs(ours, theirs, x)
    weight = theirs.back.weight().int_repr()
    assert torch.equal(ours.back.weight_int8.transpose(0, 1), weight)


def test_one_layer_dynamic_and_one_float(tq):
    mapping = tq.get_default_qconfig_mapping("x86").set_module_name("fc1", None)
    mapping.set_module_name("fc", tq.default_dynamic_qconfig)
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    theirs = graphed(tq, model, x, mapping)
    ours = from_torch_ao(theirs, qconfig=fxquant.per_tensor_dynamic_qconfig.with_reduce_range())
    assert type(ours.fc1) is nn.Linear
    assert not ours.fc.qconfig.is_static
    check_outputs(ours, theirs, x)


# Eager mode


def make_eager(tq):
    class Eager(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
            self.conv2, self.curve, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Hardswish(), nn.Linear(8, 4)
            self.skip = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x):
            x = self.relu(self.bn(self.conv(self.quant(x))))
            x = self.curve(self.skip.add_relu(x, self.conv2(x)))
            return self.dequant(self.fc(x.mean((2, 3))))

    model = Eager().eval()
    model.bn.running_mean.normal_()
    return model


def eager(tq, model, x, fused=True):
    model = copy.deepcopy(model)
    model.qconfig = tq.get_default_qconfig("x86")
    prepared = tq.prepare(tq.fuse_modules(model, [["conv", "bn", "relu"] if fused else ["conv", "bn"]]))
    prepared(x)
    return tq.convert(prepared)


@pytest.mark.parametrize("form", ["alone", "with the float model", "state_dict"])
@pytest.mark.parametrize("fused", [True, False])
def test_eager_mode(tq, form, fused):
    model, x = make_eager(tq), torch.randn(32, 3, 8, 8)
    theirs = eager(tq, model, x, fused)
    before = copy.deepcopy(model.state_dict())
    source, beside = theirs.state_dict() if form == "state_dict" else theirs, None if form == "alone" else model
    ours = from_torch_ao(source, beside)
    check_outputs(ours, theirs, x)
    assert [site.is_static for site in record_of(ours).sites] == [True] * 3
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)


def test_files(tq, tmp_path):
    model, x = make_eager(tq), torch.randn(32, 3, 8, 8)
    theirs = eager(tq, model, x)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    ours = load_torch_ao(tmp_path / "theirs.pt", model)
    check_outputs(ours, theirs, x)
    fxquant.save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(fxquant.load(model, tmp_path / "ours.safetensors")(x), ours(x))


# What does not come over


def test_a_graphs_state_dict_does_not_say_whose_its_scales_are(tq):
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    with pytest.raises(TorchAoError, match=r"converted\.load_state_dict\(state_dict\).*from_torch_ao\(converted\)"):
        from_torch_ao(graphed(tq, model, x).state_dict(), model)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.BatchNorm2d(3)], r"'0' is torch\.ao\.nn\.quantized\.modules\.batchnorm\.BatchNorm2d"),
        ([nn.PReLU()], r"'0' is torch\.ao\.nn\.quantized\.modules\.activation\.PReLU"),
        ([nn.InstanceNorm2d(3, affine=True)], r"'0' is torch\.ao\.nn\.quantized\.modules\.normalization"),
    ],
)
def test_what_has_no_integers_here_is_named(tq, layers, message):
    model = nn.Sequential(*layers, nn.Conv2d(3, 3, 1)).eval()
    with pytest.raises(TorchAoError, match=f"{message}.*quantize the float model anew"):
        from_torch_ao(graphed(tq, model, torch.randn(2, 3, 4, 4)))


def test_signed_values_are_named():
    class Signed(nn.Module):
        def forward(self, x):
            return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()

    with pytest.raises(TorchAoError, match=r"gives torch\.qint8; activations of quint8 alone"):
        from_torch_ao(torch.fx.symbolic_trace(Signed()))


def test_a_sum_of_integers_in_a_graph_of_no_known_scale():
    class Whole(nn.Module):
        def forward(self, x):
            return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8).cumsum(1).dequantize()

    with pytest.raises(TorchAoError, match=r"'cumsum' \(\.cumsum\(\)\) has no integer form here"):
        from_torch_ao(torch.fx.symbolic_trace(Whole()))
