"""What single rows refuse, with the reason that the report shows."""

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

import fxquant
from fxquant import QConfigError
from tests.samples import Call, SelfAttention, everything, indices, kinds, prepare, quantize, same_bits


def reasons(model, *inputs, mapping=None):
    prepared = prepare(model, *inputs, mapping=mapping)
    assert prepared.record.sites == ()
    assert same_bits(quantize(model, *inputs, mapping=mapping)(*inputs), model(*inputs))
    return [left.reason for left in prepared.record.skipped]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_stays_float(kind):
    (reason,) = reasons(nn.Sequential(kind(20, 9, max_norm=1.0)), indices(3, 4))
    assert reason == "max_norm rescales its float rows at each call"


def test_functional_max_norm_stays_float():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 9), requires_grad=False)

        def forward(self, x):
            return F.embedding(x, self.table, None, 0.5)

    model = Model()
    prepared = prepare(model, indices(3))
    assert [left.reason for left in prepared.record.skipped] == ["max_norm rescales its float rows at each call"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_no_parameter_stays_float():
    linear = nn.Linear(6, 6)
    del linear.weight
    linear.weight, linear.other = torch.randn(6, 6), nn.Parameter(torch.randn(2, 2))
    (reason,) = reasons(nn.Sequential(linear), torch.randn(3, 6))
    assert reason == "its weight is recomputed at each call (weight_norm or the like); remove that first"


@pytest.mark.parametrize(
    ("convolution", "which", "told"),
    [
        (nn.Conv1d(3, 4, 2), "convolutions of fewer than 64 output channels", "3 → 4 channels, kernel 2"),
        (
            nn.Conv1d(512, 511, 1),
            "pointwise convolutions of fewer than 262,144 weights",
            "512 → 511 channels, kernel 1",
        ),
        (
            nn.Conv1d(4096, 255, 1),
            "pointwise convolutions of fewer than 256 channels in or out",
            "4096 → 255 channels, kernel 1",
        ),
        (
            nn.Conv1d(255, 4096, 1),
            "pointwise convolutions of fewer than 256 channels in or out",
            "255 → 4096 channels, kernel 1",
        ),
        (nn.Conv1d(64, 127, 8), "convolutions of fewer than 65,536 weights", "64 → 127 channels, kernel 8"),
        (
            nn.Conv1d(128, 128, 3, dilation=2),
            "dilated convolutions of fewer than 262,144 weights",
            "128 → 128 channels, kernel 3",
        ),
        (nn.Conv2d(512, 63, 3), "convolutions of fewer than 64 output channels", "512 → 63 channels, kernel 3×3"),
        (nn.Conv2d(512, 1024, (1, 3), groups=2), "convolutions in groups", "512 → 1024 channels, kernel 1×3"),
    ],
    ids=str,
)
def test_a_convolution_says_why_it_stays_float(convolution, which, told):
    inputs = torch.randn(1, convolution.in_channels, *[9] * len(convolution.kernel_size))
    (reason,) = reasons(nn.Sequential(convolution), inputs)
    assert reason == f"{which} stay float, where they are faster: this is {told}"


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv1d(256, 1024, 1),
        nn.Conv2d(16, 64, 8, 2, 3),
        nn.Conv2d(64, 512, (2, 4), dilation=(1, 2), bias=False),
        nn.Conv2d(64, 64, 4, dilation=(2, 1)),
    ],
    ids=str,
)
def test_a_large_convolution_is_quantized(convolution):
    model, x = nn.Sequential(convolution), torch.randn(2, convolution.in_channels, *[20] * len(convolution.kernel_size))
    quantized = quantize(model, x)
    (site,) = quantized.record.sites
    assert (site.operator, site.shape) == ("convolution", ())
    assert (quantized(x) - model(x)).norm() < 0.02 * model(x).norm()


def test_a_convolution_of_too_wide_a_window_stays_float():
    (reason,) = reasons(nn.Sequential(nn.Conv2d(1024, 64, (8, 9))), torch.randn(1, 1024, 8, 9))
    assert reason == "its weight has 73728 columns; int32 sums are exact up to 65793"


class OtherLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def spoil_out_proj(attention):
    attention.out_proj.weight.data[0, 0] = float("nan")


def wrap_out_proj(attention):
    attention.out_proj = OtherLinear(8, 8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil_out_proj, "out_proj: its weight holds NaN or infinity"),
        (wrap_out_proj, "its out_proj is a OtherLinear"),
    ],
)
def test_attention_that_cannot_be_quantized_says_why(change, reason):
    model = SelfAttention(8, 2)
    change(model.attention)
    (left,) = prepare(model, torch.randn(3, 2, 8)).record.skipped
    assert (left.path, left.reason) == ("attention", reason)


@pytest.mark.parametrize("name", ["set_module_name", "set_module_name_regex"])
def test_a_part_of_attention_cannot_be_decided_by_itself(name):
    mapping = getattr(everything(), name)("attention.out_proj", None)
    with pytest.raises(QConfigError, match="is quantized as a whole: name 'attention'"):
        prepare(SelfAttention(8, 2), torch.randn(3, 2, 8), mapping=mapping)


@pytest.mark.parametrize(
    "forward",
    [lambda self, x: x @ (self.weight.exp() * x.mean()), lambda self, x: torch.bmm(x[None], self.cube[:1]),
     lambda self, x: torch.mv(self.weight, x[0])],
)  # fmt: skip
def test_other_uses_of_a_weight_are_reported(forward):
    model = type("Model", (nn.Module,), {"forward": forward})()
    model.weight, model.cube = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(2, 4, 4))
    reason = reasons(model, torch.randn(3, 4))[0]
    assert reason.startswith("there is no quantized form of ")


def test_linear_on_an_input_stays_float():
    class Model(nn.Module):
        def forward(self, x, w):
            return F.linear(x, w)

    assert reasons(Model(), torch.randn(3, 4), torch.randn(2, 4)) == [
        "its weight is not a registered parameter or buffer"
    ]


@pytest.mark.parametrize("where", ["root", "child"])
def test_linear_on_a_plain_tensor_is_quantized_and_saved(where, tmp_path):
    inner = Call(F.linear, 4, 6)
    expected, x = quantize(inner, torch.randn(3, 6)), torch.randn(3, 6)
    weight = inner.weight.detach()
    del inner.weight
    inner.weight = weight
    model = nn.Sequential(inner).eval() if where == "child" else inner
    quantized = quantize(model, x)
    assert torch.equal(quantized(x), expected(x))
    assert [name.removeprefix("0.") for name in quantized.state_dict()] == [*expected.state_dict()]
    assert inner.weight is weight
    fxquant.save(quantized, tmp_path / "model.safetensors")
    assert torch.equal(fxquant.load(model, tmp_path / "model.safetensors")(x), expected(x))
    name = "0.weight" if where == "child" else "weight"
    (left,) = prepare(model, x, mapping=everything().set_module_name(name, None)).record.skipped
    assert left.rule == f"module_name {name!r}"


def test_linear_on_a_computed_weight_stays_float():
    class Model(Call):
        def forward(self, x):
            return F.linear(x, self.weight * x.mean())

    found = reasons(Model(None, 4, 6), torch.randn(3, 6))
    assert "its weight is not a registered parameter or buffer" in found


def test_linear_on_a_buffer_is_quantized():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(4, 6))

        def forward(self, x):
            return F.linear(x, self.weight)

    model, x = Model(), torch.randn(3, 6)
    quantized = quantize(model, x)
    assert [site.path for site in quantized.record.sites] == ["weight"]
    assert "weight" not in dict(quantized.named_buffers())


def test_a_bag_takes_all_of_its_options_by_name_and_place():
    class Model(Call):
        def forward(self, x, offsets, weights):
            return F.embedding_bag(x, self.weight, offsets, None, 2.0, False, "sum", False, weights,
                                   include_last_offset=True, padding_idx=2)  # fmt: skip

    model = Model(None, 20, 9)
    inputs = indices(7), torch.tensor([0, 3, 7]), torch.rand(7)
    quantized = quantize(model, *inputs)
    assert (quantized(*inputs) - model(*inputs)).abs().max() <= model.weight.abs().max() / 254 * 4 * 1.01


def test_a_functional_embedding_keeps_its_padding_index_out_of_the_way():
    class Model(Call):
        def forward(self, x):
            return F.embedding(x, self.weight, padding_idx=0)

    model, x = Model(None, 20, 9), indices(5)
    assert (quantize(model, x)(x) - model(x)).abs().max() <= model.weight.abs().max() / 254 * 1.01


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: F.linear(x, w, bias=b),
        lambda x, w, b: F.linear(x, weight=w, bias=b),
        lambda x, w, b: F.linear(bias=b, weight=w, input=x),
        lambda x, w, b: F.linear(x, w, None) + b,
    ],
)
def test_linear_takes_its_operands_by_name_and_place(call):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 4)

        def forward(self, x):
            return call(x, self.net.weight, self.net.bias)

    model, x = Model(), torch.randn(3, 6)
    quantized, expected = quantize(model, x), quantize(nn.Sequential(model.net), x)
    assert torch.equal(quantized(x), expected(x))


def test_linear_may_have_its_bias_from_the_input():
    class Model(Call):
        def forward(self, x, bias):
            return F.linear(x, self.weight, bias)

    model, inputs = Model(None, 4, 6), (torch.randn(3, 6), torch.randn(4))
    quantized = quantize(model, *inputs)
    assert (quantized(*inputs) - model(*inputs)).norm() < 0.02 * model(*inputs).norm()


def test_modules_inside_a_users_container_are_all_reached():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"a": nn.Linear(4, 4)})["a"]))
    assert list(kinds(quantize(model, torch.randn(2, 4))).values()).count("DynamicQuantizedLinear") == 2


def test_a_half_model_gives_its_own_dtype():
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).half(), torch.randn(3, 8).half()
    quantized = quantize(model, x, mapping=everything())
    assert quantized(x).dtype == torch.float16
    assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()
