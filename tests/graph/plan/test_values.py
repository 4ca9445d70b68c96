"""What becomes of each value of a static model: integers from where to where, and with whose scale."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import prepare_fx
from fxquant.graph.why import StaysFloat
from fxquant.operators.values import Form
from fxquant.ranges import Fixed


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, body, inputs=8):
        super().__init__()
        self.first, self.last, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(inputs, 4, 1), body

    def forward(self, x):
        return self.last(self.body(self.first(x)))


def values_of(model, mapping=None):
    mapping = mapping or fxquant.default_static_qconfig_mapping()
    return prepare_fx(model.eval(), mapping, (torch.randn(2, 3, 6, 6),)).record.values


def forms(values):
    return [call.form for call in values.calls]


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        (F.relu6, (0.0, 6.0)),
        (F.relu, (0.0, None)),
        (lambda x: x.clamp(-0.5, 0.5), (-0.5, 0.5)),
        (lambda x: x.clamp(min=0.25), (0.25, None)),
        (lambda x: F.hardtanh(x, -2.0, 3.0), (-2.0, 3.0)),
        (nn.Hardtanh(), (-1.0, 1.0)),
        (nn.ReLU6(), (0.0, 6.0)),
    ],
)
def test_a_clamp_is_done_by_the_product_before_it(body, bounds):
    values = values_of(Net(body))
    assert forms(values) == [Form.PRODUCT, Form.PRODUCT]
    assert (values.calls[0].low, values.calls[0].high) == bounds


@pytest.mark.parametrize(
    ("body", "curve"),
    [
        (F.hardswish, ("hardswish", 0.0)),
        (nn.SiLU(), ("silu", 0.0)),
        (lambda x: F.silu(x, inplace=True), ("silu", 0.0)),
        (F.leaky_relu, ("leaky_relu", 0.01)),
        (lambda x: F.leaky_relu(x, 0.2), ("leaky_relu", 0.2)),
        (lambda x: F.leaky_relu(x, negative_slope=0.3), ("leaky_relu", 0.3)),
        (nn.LeakyReLU(0.4), ("leaky_relu", 0.4)),
    ],
)
def test_a_curve_is_done_by_the_product_before_it(body, curve):
    values = values_of(Net(body))
    assert forms(values) == [Form.PRODUCT, Form.PRODUCT]
    assert (values.calls[0].curve, values.calls[0].slope) == curve


@pytest.mark.parametrize(
    "body",
    [lambda x: F.silu(F.relu(x)), lambda x: F.silu(x) + x, F.gelu, nn.PReLU()],
    ids=["relu", "read", "other", "own"],
)
def test_other_curves_and_those_after_a_clamp_or_of_what_others_read_are_tables(body):
    calls = values_of(Net(body)).calls
    assert Form.LOOKS_UP in [call.form for call in calls]
    assert not any(call.curve for call in calls)


def test_a_curve_whose_floats_alone_are_read_stays_float():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish())
    (call,) = values_of(model).calls
    assert (call.output, call.curve, call.absorbed) == ("", "", ())


def test_a_clamp_of_what_others_read_too_is_not():
    values = values_of(Net(lambda x: F.relu6(x) + F.max_pool2d(x, 3, 1, 1)))
    assert forms(values) == [Form.PRODUCT, Form.LOOKS_UP, Form.POOLS, Form.ADDS, Form.PRODUCT]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(F.relu(self.conv(x) + x))


def test_an_addition_and_its_relu_are_done_by_the_product_before_them():
    values = values_of(Residual())
    assert forms(values) == [Form.PRODUCT] * 3
    second = values.calls[1]
    assert second.addend == values.calls[0].output
    assert (second.low, len(second.absorbed)) == (0.0, 2)


@pytest.mark.parametrize(
    "body",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: x.transpose(2, 3).contiguous(),
        lambda x: F.pad(x, (1, 0, 1, 0)),
        lambda x: x[:, :, 1:],
        lambda x: F.dropout(x, 0.5, False),
        lambda x: x.permute(0, 1, 3, 2),
        lambda x: F.interpolate(x, scale_factor=2),
    ],
)
def test_what_only_moves_keeps_its_scale(body):
    values = values_of(Net(body))
    moved = [edge for edge in values.edges if edge.is_moved]
    assert {edge.scale_of for edge in moved} == {values.calls[0].output}


def test_what_is_joined_has_one_scale():
    values = values_of(Net(lambda x: torch.cat([F.max_pool2d(x, 3, 1, 1), F.sigmoid(x)], 1), 16))
    assert len({edge.scale_of for edge in values.edges}) == 2  # the input's, and that of all others


@pytest.mark.parametrize(("function", "fixed"), [(torch.sigmoid, Fixed(0, 1)), (torch.tanh, Fixed(-1, 1))])
def test_a_range_that_is_known_needs_no_data(function, fixed):
    values = values_of(Net(function))
    assert fixed in [edge.spec.range for edge in values.edges]


def test_outputs_stay_float_and_inputs_do_not():
    values = values_of(Net(F.relu))
    assert values.edges[0].is_float
    assert values.edges[0].at == "x"
    assert values.calls[-1].output == ""


def test_what_has_no_integer_form_stands_in_float_between_two_quantized_values():
    values = values_of(Net(lambda x: F.softmax(x, 1)))
    assert forms(values) == [Form.PRODUCT, Form.PRODUCT]
    assert [edge.is_float for edge in values.edges] == [True, True]  # the convolution before gives floats at once


def test_the_other_operand_of_view_as_gives_only_its_shape():
    values = values_of(Net(lambda x: x.flatten(2).view_as(F.softmax(x, 1))))
    assert forms(values) == [Form.PRODUCT, Form.KEEPS, Form.KEEPS, Form.PRODUCT]


def test_what_stays_float_between_integers_says_why():
    values = values_of(Net(lambda x: F.interpolate(F.softmax(x, 1) * 2, scale_factor=2.0, mode="bicubic")))
    assert [(value.node, value.why.why) for value in values.floats] == [
        ("softmax", StaysFloat.NO_FORM),
        ("mul", StaysFloat.READS_FLOATS),
        ("interpolate", StaysFloat.READS_FLOATS),
    ]
    (value,) = values_of(Net(lambda x: F.pad(x, (1, 1), value=2.0))).floats
    assert value.why.why is StaysFloat.OTHER_ARGUMENTS
    assert str(value).startswith("pad (F.pad at ")


def test_what_has_an_integer_form_says_that_a_float_layer_reads_it():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm, self.end = nn.Conv2d(3, 8, 3), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.end(self.lstm(F.adaptive_avg_pool2d(self.conv(x), (1, 3)).flatten(2).transpose(1, 2))[0])

    assert [(value.node, value.why.why) for value in values_of(Reader()).floats] == [
        ("adaptive_avg_pool2d", StaysFloat.READ_AS_FLOATS),
        ("flatten", StaysFloat.READS_FLOATS),
        ("transpose", StaysFloat.READS_FLOATS),
    ]


def test_what_stands_before_or_after_all_integers_is_not_between_them():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return F.softmax(self.conv(F.normalize(x)), 1)

    assert values_of(Ends()).floats == ()


def test_strict_refuses_values_that_stay_float():
    mapping = fxquant.default_static_qconfig_mapping()
    with pytest.raises(fxquant.QConfigError, match=r"strict: 1 of Net's values would stay float between integers"):
        prepare_fx(Net(lambda x: F.softmax(x, 1)).eval(), mapping, (torch.randn(2, 3, 6, 6),), strict=True)
    prepare_fx(Net(F.relu).eval(), mapping, (torch.randn(2, 3, 6, 6),), strict=True)


def test_a_float_layer_ends_the_integers_before_it():
    mapping = fxquant.default_static_qconfig_mapping().set_module_name("last", None)
    values = values_of(Net(F.relu), mapping)
    assert forms(values) == [Form.PRODUCT]
    assert values.calls[0].output == ""


def test_the_finer_of_two_wishes_is_kept():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    fine = fxquant.default_static_qconfig
    coarse = fxquant.QConfig(
        activation=fxquant.TensorSpec(dtype="uint8", qmax=15, axis="tensor", range=fine.activation.range),
        weight=fine.weight,
    )
    mapping = fxquant.QConfigMapping().set_global(fine).set_module_name("a", coarse)
    assert values_of(Two(), mapping).edges[0].spec.qmax == 255


def test_a_dynamic_mapping_decides_nothing_about_values():
    values = values_of(Net(F.relu), fxquant.default_dynamic_qconfig_mapping())
    assert (values.edges, values.calls) == ((), ())
