"""A static model's graph computes with integers: what each node becomes, and that the numbers are those of the plan."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, ops, prepare_fx
from fxquant.errors import CalibrationError
from tests.graph.plan.test_values import Net, Residual
from tests.samples import sqnr


def quantized(model, *batches):
    data = batches or [torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    prepared = prepare_fx(model.eval(), fxquant.default_static_qconfig_mapping(), (data[0],))
    return convert_fx(prepared, data=[(x,) for x in data]), data[0]


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("body", "inputs", "function"),
    [
        (lambda x: F.max_pool2d(x, 2), 8, ops.max_pool_value),
        (nn.MaxPool2d(3, 2, 1), 8, ops.max_pool_value),
        (lambda x: F.avg_pool2d(x, 2, ceil_mode=True), 8, ops.pool_value),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), 8, ops.pool_value),
        (nn.AdaptiveAvgPool2d(1), 8, ops.mean_value),
        (nn.AdaptiveAvgPool2d((2, 3)), 8, ops.adaptive_pool_value),
        (lambda x: x.mean((2, 3), keepdim=True), 8, ops.mean_value),
        (lambda x: F.pad(x, (1, 2)), 8, ops.pad_value),
        (nn.GELU(), 8, ops.lookup),
        (lambda x: x * 0.5 + 1, 8, ops.lookup),
        (nn.PReLU(8, 0.1), 8, ops.lookup_channels),
        (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), 8, ops.resize_value),
        (lambda x: F.interpolate(x, x.shape[2:], mode="bilinear", align_corners=True), 8, ops.resize_value),
        (nn.UpsamplingBilinear2d(scale_factor=3), 8, ops.resize_value),
        (lambda x: x[:, :4] + x[:, 4:], 4, ops.add_values),
        (lambda x: x[:, :4] - x[:, 4:], 4, ops.add_values),
        (lambda x: x[:, :4] * x[:, 4:], 4, ops.mul_values),
    ],
)
def test_a_node_becomes_an_operator_of_ours_and_gives_what_float_gives(body, inputs, function):
    torch.manual_seed(0)
    model = Net(body, inputs)
    with torch.no_grad():
        module, x = quantized(model)
        assert function in targets(module)
        assert ops.dequantize not in targets(module)
        assert sqnr(model(x), module(x)) > 30


@torch.no_grad()
def test_an_addition_is_in_the_convolutions_call():
    torch.manual_seed(0)
    model = Residual()
    module, x = quantized(model)
    assert targets(module) == [ops.quantize]
    assert sqnr(model(x), module(x)) > 30


@torch.no_grad()
def test_a_value_that_both_kinds_read_is_dequantized_once():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(x), F.softmax(x, 1), x.cumsum(1)

    module, _ = quantized(Both())
    assert targets(module).count(ops.dequantize) == 1


@torch.no_grad()
def test_scales_are_plain_buffers_named_after_their_values():
    module, _ = quantized(Net(F.relu))
    state = module.state_dict()
    assert {
        name: (tensor.dtype, tensor.shape) for name, tensor in state.items() if "_scale" in name and "." not in name
    } == {
        "x_scale": (torch.float32, ()),
        "first_scale": (torch.float32, ()),
    }
    assert state["x_zero_point"].dtype == torch.int32


@torch.no_grad()
def test_a_hook_sees_floats_and_what_it_gives_is_used():
    torch.manual_seed(0)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model, seen = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), []

        def hook(_, args, output=None, seen=seen):
            seen.append(args[0].dtype)
            return 2 * output if output is not None else (2 * args[0],)

        getattr(model[1], register)(hook)
        module, x = quantized(model)
        (skipped,) = module.record.skipped
        assert (skipped.path, skipped.reason) == ("1", "it has a hook, which would see integers")
        seen.clear()
        assert sqnr(model(x), module(x)) > 30
        assert set(seen) == {torch.float32}


@torch.no_grad()
def test_a_preserved_method_calls_a_static_layer_with_floats():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def features(self, x):
            return self.conv(x)

        def forward(self, x):
            return self.last(F.relu(self.conv(x)))

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 3, 6, 6)
    mapping = fxquant.default_static_qconfig_mapping()
    module = convert_fx(prepare_fx(model, mapping, (x,), preserved_attributes=("features",)), data=[(x,)])
    assert {site.operator for site in module.record.sites} == {"static convolution"}
    assert sqnr(model.features(x), module.features(x)) > 40


@torch.no_grad()
def test_calibration_data_is_not_kept():
    refs = []

    def batches():
        for _ in range(4):
            x = torch.randn(2, 3, 6, 6)
            assert sum(ref() is not None for ref in refs) <= 1  # of the batches before, the last at most
            refs.append(weakref.ref(x))
            yield (x,)

    mapping = fxquant.default_static_qconfig_mapping()
    convert_fx(prepare_fx(Net(F.relu).eval(), mapping, (torch.randn(2, 3, 6, 6),)), data=batches())
    assert len(refs) == 4


@torch.no_grad()
def test_what_saw_no_data_is_an_error_that_names_it():
    prepared = prepare_fx(Net(F.relu).eval(), fxquant.default_static_qconfig_mapping(), (torch.randn(2, 3, 6, 6),))
    line = r"\(.*test_values\.py:\d+\)"  # of the user's code that made the value
    with pytest.raises(
        CalibrationError, match=rf"not calibrated: 'x', 'first' {line} of 2 values saw no data\. Run the "
    ):
        convert_fx(prepared)


@torch.no_grad()
def test_the_bias_takes_back_what_rounding_the_weights_takes_on_average():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 1)
    x = torch.rand(4, 3, 6, 6) + 1  # of one sign: each weight's rounding adds up
    module, _ = quantized(nn.Sequential(conv), x)
    product = module.get_submodule("0")
    rest = conv.weight - product.dequantize("weight").transpose(0, 0)
    mean = x.mean((0, 2, 3))
    assert torch.allclose(product.bias, conv.bias + rest.flatten(1) @ mean, atol=1e-6)
    assert not torch.equal(product.bias, conv.bias)


class Norms(nn.Module):
    """BatchNorms with no layer before them to be folded into: before a convolution, and in a residual branch."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.flat, self.head = nn.BatchNorm2d(8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        for norm in (self.norm, self.last, self.flat):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.2, 2)

    def forward(self, x):
        x = self.first(x)
        x = x + self.second(F.relu(self.norm(x)))
        return self.head(F.relu(self.flat(F.relu6(self.last(x)).mean((2, 3)))))


@torch.no_grad()
def test_a_norm_by_itself_is_a_table_a_channel_with_the_clamp_after_it():
    torch.manual_seed(0)
    model = Norms()
    module, x = quantized(model)
    assert targets(module).count(ops.lookup_channels) == 3
    assert not {ops.dequantize, ops.lookup, F.relu} & set(targets(module))
    assert module.record.values.floats == ()
    assert sqnr(model(x), module(x)) > 30
    table = module.get_buffer("norm_table")
    scales = [module.get_buffer(f"{name}_{part}") for name in ("first", "norm") for part in ("scale", "zero_point")]
    every = ops.dequantize(torch.arange(256, dtype=torch.uint8), *scales[:2]).expand(1, 8, 1, 256)
    assert torch.equal(table, ops.quantize(F.relu(model.norm(every)), *scales[2:]).view(8, 256))


class Calls(nn.Module):
    """A network without a module that holds weights."""

    def __init__(self):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(8, 3, 3, 3) / 5), nn.Parameter(torch.randn(8))
        self.oi, self.io = nn.Parameter(torch.randn(6, 8) / 3), nn.Parameter(torch.randn(6, 5) / 3)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        x = F.relu6(F.conv2d(x, self.kernel, self.shift, padding=1)) + x.mean()
        return torch.addmm(self.bias, F.relu(F.linear(x.mean((2, 3)), self.oi)), self.io)


class Modules(Calls):
    """The same of modules."""

    def __init__(self, calls):
        nn.Module.__init__(self)
        self.conv, self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6, bias=False), nn.Linear(6, 5)
        self.conv.weight, self.conv.bias, self.first.weight = calls.kernel, calls.shift, calls.oi
        self.last.weight, self.last.bias = nn.Parameter(calls.io.t().contiguous()), calls.bias

    def forward(self, x):
        x = F.relu6(self.conv(x)) + x.mean()
        return self.last(F.relu(self.first(x.mean((2, 3)))))


@torch.no_grad()
def test_calls_give_the_bits_of_modules_with_the_same_weights():
    calls = Calls()
    module, x = quantized(calls)
    assert torch.equal(module(x), quantized(Modules(calls))[0](x))
    assert [(site.path, site.call, site.is_static) for site in module.record.sites] == [
        ("kernel", "conv2d", True), ("oi", "linear", True), ("io", "addmm", True)
    ]  # fmt: skip
    assert not {"kernel", "oi", "io", "shift"} & dict(module.named_parameters()).keys()
    report = fxquant.compare(calls, module, [(x,)])
    assert all(row.sqnr_db > 30 for row in report.rows)


@torch.no_grad()
def test_a_call_whose_bias_is_computed_is_dynamic_or_says_so():
    class Computed(Calls):
        def forward(self, x):
            x = F.conv2d(x, self.kernel, x.mean() * self.shift)
            return F.linear(x.mean((2, 3)), self.oi, x.mean() * self.shift[:6])

    record = prepare_fx(Computed().eval(), fxquant.default_static_qconfig_mapping(), (torch.randn(2, 3, 6, 6),)).record
    assert [skipped.reason for skipped in record.skipped] == ["its bias is computed at each call"]
    assert [(site.call, site.is_static) for site in record.sites] == [("linear", False)]


class Choosing(nn.Module):
    """It does not trace."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class Twice(nn.Module):
    """A layer that the graph calls, and a part beside it too. is_fused: with a ReLU; is_later: after that part."""

    def __init__(self, is_fused, is_later):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.part, self.is_fused, self.is_later = Choosing(self.layer), is_fused, is_later

    def forward(self, x):
        x = self.part(x) if self.is_later else x
        x = self.layer(x)
        x = F.relu(x) if self.is_fused else x * 2
        return x if self.is_later else self.part(x)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("is_later", [True, False])
@torch.no_grad()
def test_a_layer_that_a_part_beside_the_graph_calls_too_is_static_there(is_fused, is_later, tmp_path):
    torch.manual_seed(0)
    model = Twice(is_fused, is_later).eval()
    module, x = quantized(model)
    record = module.record
    assert record.skipped == ()
    assert {site.path: site.is_static for site in record.sites} == (
        {"layer": True, "part.layer": True} if is_fused else {"layer": True}
    )
    parts = [module.get_submodule(path) for path in ("layer", "part.layer")]
    assert parts[0].weight_int8.data_ptr() == parts[1].weight_int8.data_ptr()
    assert not any(type(part) is nn.Conv2d for part in module.modules())
    assert sqnr(model(x), module(x)) > 30
    fxquant.save(module, tmp_path / "q")
    assert torch.equal(fxquant.load(Twice(is_fused, is_later).eval(), tmp_path / "q")(x), module(x))
