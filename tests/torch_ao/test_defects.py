"""Known defects of torch.ao's FX quantization, one a test: here each works, and gives the numbers of an independent
computation in float64, straight from the equations of docs/numerics.md."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import ArgumentError, ModelStateError, convert_fx, float_qparams_weight_only_qconfig_4bit, fuse_fx
from tests.samples import Call, everything, kinds, leaves, prepare, quantize, same_bits

ROUNDING = 2**-20  # of some dozen float32 operations, relative to the size of what they add up


def on_grid(x):
    """Return rows of activations as their 8-bit integers stand for them: (q - z) s, one scale and zero point a row."""
    x = x.detach().double()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = torch.where(high > low, (high - low) / 255, 1.0)
    zero_point = (-low / step).round()
    return ((x / step).round() + zero_point).clamp(0, 255).sub(zero_point) * step


def int8_rows(weight):
    """Return a weight as its int8 rows stand for it."""
    weight = weight.detach().double()
    step = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / torch.where(step > 0, step, 1.0)).round() * step


def linear(x, weight, bias=None):
    """Return the quantized linear form: grid(x) @ int8(weight).T + bias."""
    return on_grid(x) @ int8_rows(weight).t() + (0 if bias is None else bias.detach().double())


def assert_near(got, expected, rounding=ROUNDING):
    """Assert equality to float rounding, far below one step of the quantization."""
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= rounding * expected.abs().max()


class Net(nn.Module):
    """A Linear and a forward that is given."""

    def __init__(self, forward):
        super().__init__()
        self.l = nn.Linear(6, 4)
        self.use = forward

    def forward(self, x):
        return self.use(self.l, x)


def test_load_state_dict_of_a_functional_linear_in_a_submodule():
    model, other = (Net(lambda layer, x: F.linear(x, layer.weight, layer.bias)) for _ in range(2))
    x = torch.randn(3, 6)
    quantized = quantize(other, x)
    state = quantize(model, x).state_dict()
    quantized.load_state_dict(state)
    assert set(state) == {"l.weight_int8", "l.weight_scale", "l.bias"}
    assert_near(quantized(x), linear(x, model.l.weight, model.l.bias))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_embedding_bag_mean_and_max(mode):
    bag, indices, offsets = nn.EmbeddingBag(20, 7, mode=mode), torch.randint(20, (9,)), torch.tensor([0, 4, 7])
    rows = int8_rows(bag.weight)[indices]
    parts = [rows[:4], rows[4:7], rows[7:]]
    expected = torch.stack([part.mean(0) if mode == "mean" else part.amax(0) for part in parts])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = bag

        def forward(self, indices, offsets):
            return self.bag(indices, offsets)

    quantized = quantize(Model(), indices, offsets)
    assert kinds(quantized)["bag"] == "QuantizedEmbeddingBag"
    assert_near(quantized(indices, offsets), expected)


def test_padding_idx_of_an_embedding_bag_does_not_count():
    model, indices = (
        nn.Sequential(nn.EmbeddingBag(20, 7, mode="mean", padding_idx=3)),
        torch.tensor([[1, 3, 5], [3, 3, 2]]),
    )
    with torch.no_grad():
        model[0].weight[3] = 100.0
    table = int8_rows(model[0].weight)
    expected = torch.stack([(table[1] + table[5]) / 2, table[2]])
    quantized = quantize(model, indices)
    assert kinds(quantized)["0"] == "QuantizedEmbeddingBag"
    assert_near(quantized(indices), expected)


def test_padding_idx_of_an_embedding_gives_its_row():
    model, indices = nn.Sequential(nn.Embedding(20, 7, padding_idx=3)), torch.tensor([[1, 3, 5], [3, 3, 2]])
    output = quantize(model, indices)(indices)
    assert torch.equal(output[indices == 3], torch.zeros(3, 7))
    assert_near(output, int8_rows(model[0].weight)[indices])


@pytest.mark.parametrize("columns", [1, 7, 13])
def test_4_bit_rows_of_odd_dimensions(columns):
    model, indices = nn.Sequential(nn.Embedding(20, columns)), torch.arange(20)
    weight = model[0].weight.detach().double()
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    step = torch.where(high > low, (high - low) / 15, 1.0)
    expected = low + ((weight - low) / step).round() * step
    quantized = quantize(model, indices, mapping=everything(float_qparams_weight_only_qconfig_4bit))
    assert quantized.get_submodule("0").weight_uint4.shape == (20, (columns + 1) // 2)
    assert_near(quantized(indices), expected)


def lstm(module, x):
    """Return the outputs and last states of a one-layer nn.LSTM over (T, I): the equations of its documentation."""
    named = dict(module.named_parameters())
    h, c = torch.zeros(module.proj_size or module.hidden_size).double(), torch.zeros(module.hidden_size).double()
    bias = sum(named[name].detach().double() for name in ("bias_ih_l0", "bias_hh_l0") if name in named)
    outputs = []
    for row in x:
        gates = linear(row[None], named["weight_ih_l0"]) + linear(h[None], named["weight_hh_l0"]) + bias
        i, f, g, o = gates[0].chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if module.proj_size:
            h = linear(h[None], named["weight_hr_l0"])[0]
        outputs.append(h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize("options", [{"bias": False}, {"proj_size": 3}, {"bias": False, "proj_size": 3}, {}])
@pytest.mark.parametrize("is_batched", [True, False])
def test_lstm_without_bias_with_proj_size_unbatched(options, is_batched):
    torch.manual_seed(1)
    model = nn.Sequential(nn.LSTM(6, 5, **options))
    x = torch.randn(4, 2, 6) if is_batched else torch.randn(4, 6)
    quantized = quantize(model, x)
    assert kinds(quantized)["0"] == "DynamicQuantizedLSTM"
    got = leaves(quantized(x))
    assert [t.shape for t in got] == [t.shape for t in leaves(model(x))]
    for b in range(2 if is_batched else 1):
        expected = lstm(model[0], x[:, b] if is_batched else x)
        for part, want in zip(got, expected, strict=True):
            part = part[:, b] if is_batched else part
            assert_near(part.reshape(want.shape), want, rounding=2**-18)


def test_functional_linear_with_its_weight_by_name():
    model, x = Net(lambda layer, x: F.linear(x, weight=layer.weight, bias=layer.bias)), torch.randn(3, 6)
    quantized = quantize(model, x)
    assert [site.path for site in quantized.record.sites] == ["l.weight"]
    assert_near(quantized(x), linear(x, model.l.weight, model.l.bias))


def test_functional_linear_of_a_transposed_weight():
    model, x = Call(lambda x, w: F.linear(x, w.t()), 6, 4), torch.randn(3, 6)
    quantized = quantize(model, x)
    assert [site.path for site in quantized.record.sites] == ["weight"]
    assert_near(quantized(x), linear(x, model.weight.t()))


def test_a_module_called_with_its_input_by_name():
    model, x = Net(lambda layer, x: F.relu(layer(input=x))), torch.randn(3, 6)
    quantized = quantize(model, x)
    assert kinds(quantized)["l"].startswith("DynamicQuantizedLinear")
    assert_near(quantized(x), linear(x, model.l.weight, model.l.bias).relu())


def test_a_branch_on_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(6, 6)

        def forward(self, x, h=None):
            if h is None:
                h = torch.zeros_like(x)
            return self.cell(x) + h

    model, x, h = Model().eval(), torch.randn(3, 6), torch.randn(3, 6)
    expected = linear(x, model.cell.weight, model.cell.bias)
    with pytest.warns(UserWarning, match="traced for h=None"):
        quantized = quantize(model, x)
    assert_near(quantized(x), expected)
    with pytest.raises(ArgumentError, match="prepared for h=None"):
        quantized(x, h)  # the other branch is no wrong answer: it needs a model of its own
    assert_near(quantize(model, x, h)(x, h), expected + h)


def test_variable_arguments():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 4)

        def forward(self, *args):
            return self.l(args[0]) + args[1]

    model, x, y = Model(), torch.randn(3, 6), torch.randn(3, 4)
    quantized = quantize(model, x, y)
    assert kinds(quantized)["l"] == "DynamicQuantizedLinear"
    assert_near(quantized(x, y), linear(x, model.l.weight, model.l.bias) + y)


def test_half_inputs():
    model, x = Net(lambda layer, x: layer(x)).half(), torch.randn(3, 6).half()
    output = quantize(model, x)(x)
    assert output.dtype == torch.float16
    assert_near(output, linear(x, model.l.weight, model.l.bias), rounding=2**-11)  # of the result, to half precision


@pytest.mark.parametrize("shape", [(), (2, 3, 4)])
def test_indices_of_no_and_of_three_dimensions(shape):
    model, indices = nn.Sequential(nn.Embedding(20, 7)), torch.randint(20, shape)
    quantized = quantize(model, indices)
    assert kinds(quantized)["0"] == "QuantizedEmbedding"
    assert_near(quantized(indices), int8_rows(model[0].weight)[indices])


def settled(norm):
    """Return a BatchNorm with statistics and weights as after training."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def normalized(y, norm):
    """Return a BatchNorm's result by its equation, in float64; y: (B, C, T)."""
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return (y - norm.running_mean.double()[:, None]) * gain[:, None] + norm.bias.double()[:, None]


def test_a_grouped_transposed_convolution_with_a_batch_norm():
    model = nn.Sequential(nn.ConvTranspose1d(6, 4, 3, groups=2), settled(nn.BatchNorm1d(4))).eval()
    x = torch.randn(2, 6, 5)
    conv = model[0]
    parts = zip(x.double().chunk(2, 1), conv.weight.detach().double().chunk(2, 0), strict=True)
    outputs = torch.zeros(2, 4, 7).double()
    for group, (part, weight) in enumerate(parts):  # y[b, o, t + k] += x[b, i, t] w[i, o, k]
        for t in range(5):
            outputs[:, 2 * group : 2 * group + 2, t : t + 3] += torch.einsum("bi,iok->bok", part[:, :, t], weight)
    expected = normalized(outputs + conv.bias.detach().double()[:, None], model[1])
    fused = fuse_fx(model, x)
    assert list(kinds(fused)) == ["", "0"]
    assert_near(fused(x), expected.detach())


@pytest.mark.parametrize("relu", [nn.ReLU(), None])
def test_a_relu_between_a_convolution_and_its_batch_norm_keeps_them_apart(relu):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv1d(3, 4, 2), settled(nn.BatchNorm1d(4)), relu

        def forward(self, x):
            y = self.conv(x)
            return self.norm(F.relu(y) if self.relu is None else self.relu(y))

    model, x = Model().eval(), torch.randn(2, 3, 6)
    windows = x.double().unfold(2, 2, 1)
    y = torch.einsum("bitk,oik->bot", windows, model.conv.weight.double()) + model.conv.bias.double()[:, None]
    for stage in (fuse_fx(model, x), quantize(model, x)):
        assert_near(stage(x), normalized(y.clamp(min=0), model.norm).detach())


def test_converting_twice():
    model, x = Net(lambda layer, x: F.linear(layer(x)[:, :1].expand(-1, 6), layer.weight)), torch.randn(3, 6)
    prepared = prepare(model, x)
    first, second = convert_fx(prepared), convert_fx(prepared)
    hidden = linear(x, model.l.weight, model.l.bias).float()[:, :1].expand(-1, 6)
    for quantized in (first, second):
        assert len(quantized.record.sites) == 2
        assert_near(quantized(x), linear(hidden, model.l.weight))
    assert same_bits(prepared(x), model(x))
    with pytest.raises(ModelStateError, match="got a model that is quantized already"):
        convert_fx(first)
    assert fxquant.explain(first).total == fxquant.explain(second).total
