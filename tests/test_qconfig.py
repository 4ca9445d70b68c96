"""QConfig: what it refuses, its JSON form, and the presets' numbers beside torch.ao's."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

import fxquant
from fxquant import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigError,
    TensorSpec,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    per_channel_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
)
from fxquant.qconfig import PRESETS
from tests.samples import everything, leaves, quantize

WEIGHT = default_dynamic_qconfig.weight
ACTIVATION = default_dynamic_qconfig.activation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": None, "weight": None}, "QConfig.weight must be a TensorSpec, got NoneType"),
        ({"activation": "uint8", "weight": WEIGHT}, "QConfig.activation must be a TensorSpec, got str"),
        ({"activation": None, "weight": ACTIVATION}, "weight is quantized once"),
        (
            {"activation": TensorSpec(dtype="uint8", qmax=255, axis="channel", dynamic=True), "weight": WEIGHT},
            "activation has one scale a token or one a tensor",
        ),
        (
            {"activation": ACTIVATION, "weight": WEIGHT, "weight_observer": MinMaxObserver},
            "MinMaxObserver measures per tensor",
        ),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(QConfigError, match=message):
        QConfig(**fields)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_exported_and_go_through_json_and_pickle(name):
    preset = getattr(fxquant, name)
    assert preset is PRESETS[name]
    assert QConfig.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
    assert pickle.loads(pickle.dumps(preset)) == preset


def test_a_named_observer_goes_through_json():
    qconfig = QConfig(activation=ACTIVATION, weight=WEIGHT, weight_observer=PerChannelMinMaxObserver)
    assert QConfig.from_dict(qconfig.to_dict()) == qconfig


def test_reduce_range_is_7_bits():
    assert per_tensor_dynamic_qconfig.with_reduce_range().qmax == 127
    assert per_tensor_dynamic_qconfig.qmax == 255


def test_reduce_range_needs_integer_activations():
    with pytest.raises(QConfigError, match="reduce_range needs uint8 activations, this qconfig has None"):
        float16_dynamic_qconfig.with_reduce_range()


@pytest.mark.parametrize(
    ("qconfig", "per_token"), [(default_dynamic_qconfig, True), (per_tensor_dynamic_qconfig, False)]
)
def test_per_token(qconfig, per_token):
    assert qconfig.per_token is per_token
    with pytest.warns(DeprecationWarning, match=r"QConfig\.per_row is now \.per_token"):
        assert qconfig.per_row is per_token


def test_a_stored_qconfig_may_say_row():
    stored = default_dynamic_qconfig.to_dict()
    assert stored["activation"]["axis"] == "token"
    stored["activation"]["axis"] = "row"
    assert QConfig.from_dict(stored) == default_dynamic_qconfig  # a warning would be an error


def test_default_weights_are_symmetric_int8_one_scale_a_channel():
    weight = torch.randn(7, 20)
    values, scale, zero_point = default_dynamic_qconfig.quantize_weight(weight).tensors
    assert values.dtype == torch.int8
    assert zero_point is None
    assert torch.allclose(scale.double(), weight.double().abs().amax(1) / 127, rtol=2**-23, atol=0)
    assert values.abs().amax(1).tolist() == [127] * 7
    assert bool(((values * scale.double()[:, None] - weight).abs() <= scale.double()[:, None] / 2 * (1 + 2**-14)).all())


def test_weights_on_meta_give_meta_tensors_of_the_same_form():
    weight = torch.randn(7, 5)
    for qconfig in PRESETS.values():
        real, meta = qconfig.quantize_weight(weight), qconfig.quantize_weight(weight.to("meta"))
        for a, b in zip(real.tensors, meta.tensors, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (b.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype))


# Parity with torch.ao, whose modules are deprecated: their warnings are theirs, not ours.


def theirs(model, qconfig, *inputs):
    """Return torch.ao's quantized form of a model, made through its FX path."""
    from torch.ao.quantization import QConfigMapping as Mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    return convert_fx(prepare_fx(copy.deepcopy(model), Mapping().set_global(qconfig), inputs))


@pytest.fixture
def _their_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_their_warnings")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("reduce_range", [False, True])
def test_per_tensor_linear_gives_torch_aos_numbers(seed, channels, reduce_range):
    import torch.ao.quantization as tq

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 24)).eval()
    x = torch.randn(5, 32) * 3
    peer = theirs(model, tq.per_channel_dynamic_qconfig if channels else tq.default_dynamic_qconfig, x).get_submodule(
        "0"
    )
    ours = per_channel_dynamic_qconfig if channels else per_tensor_dynamic_qconfig
    quantized = quantize(model, x, mapping=everything(ours.with_reduce_range() if reduce_range else ours))
    assert torch.equal(quantized.get_submodule("0").weight_int8, peer.weight().int_repr())
    # The same integers go in and come out; only the order of the float32 roundings after them differs.
    expected = torch.ops.quantized.linear_dynamic(x, peer._packed_params._packed_params, reduce_range)
    assert bool(((quantized(x) - expected).abs() <= 4 * 2**-23 * expected.abs().amax()).all())


@pytest.mark.usefixtures("_their_warnings")
def test_per_tensor_lstm_gives_torch_aos_numbers():
    import torch.ao.quantization as tq

    model = nn.Sequential(nn.LSTM(12, 8)).eval()
    x = torch.randn(1, 2, 12)  # one step from zeros: later ones differ where a hidden value sits on a step's edge
    peer = theirs(model, tq.default_dynamic_qconfig, x)
    quantized = quantize(model, x, mapping=everything(per_tensor_dynamic_qconfig.with_reduce_range()))
    for name, tensor in peer.get_submodule("0").get_weight().items():
        assert torch.equal(getattr(quantized.get_submodule("0"), f"{name}_int8"), tensor.int_repr()), name
    for a, b in zip(leaves(quantized(x)), leaves(peer(x)), strict=True):
        assert (a - b).abs().max() <= 8 * 2**-23  # gates within (-8, 8), σ and tanh to a few roundings


@pytest.mark.usefixtures("_their_warnings")
@pytest.mark.parametrize("bag", [False, True])
def test_float_qparams_rows_give_torch_aos_numbers(bag):
    import torch.ao.quantization as tq

    model = (Bags() if bag else nn.Sequential(nn.Embedding(30, 16))).eval()
    inputs = (torch.randint(30, (20,)), torch.tensor([0, 3, 9])) if bag else (torch.randint(30, (20,)),)
    expected = theirs(model, tq.float_qparams_weight_only_qconfig, *inputs)(*inputs)
    quantized = quantize(model, *inputs, mapping=everything(float_qparams_weight_only_qconfig))
    largest = next(model.parameters()).abs().max()
    assert (quantized(*inputs) - expected).abs().max() <= 8 * 2**-23 * 11 * largest  # at most 11 rows a bag


@pytest.mark.usefixtures("_their_warnings")
def test_4_bit_rows_are_torch_aos_but_for_its_half_precision_scales():
    import torch.ao.quantization as tq

    model, ids = Bags().eval(), torch.arange(30)
    inputs = ids, ids  # a bag a row
    expected = theirs(model, tq.float_qparams_weight_only_qconfig_4bit, *inputs)(*inputs)
    quantized = quantize(model, *inputs, mapping=everything(float_qparams_weight_only_qconfig_4bit))
    low, high = model.bag.weight.detach().aminmax(dim=1, keepdim=True)
    # Theirs keeps scale and offset in float16: 2⁻¹¹ of (15 scales) and of the offset.
    assert bool(((quantized(*inputs) - expected).abs() <= 2**-11 * ((high - low) + low.abs()) * 1.01).all())


class Bags(nn.Module):
    """An EmbeddingBag called with offsets."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(30, 16, mode="sum")

    def forward(self, indices, offsets):
        return self.bag(indices, offsets)


def test_int4_weights_have_a_scale_a_group_and_use_all_sixteen_integers():
    weight = torch.randn(9, 100)
    values, scale, zero_point = int4_dynamic_qconfig.with_group_size(32).quantize_weight(weight).tensors
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (torch.uint8, (9, 50), torch.bfloat16, (9, 4))
    assert zero_point is None
    for row in range(9):
        for group in range(4):
            part = weight[row, 32 * group : 32 * group + 32].double()
            largest = part[part.abs().argmax()]
            assert abs(scale[row, group].double() * -8 / largest - 1) <= 2**-8  # bfloat16 rounds by half of 2**-7
            step = scale[row, group].double()
            nibbles = [int(b) >> shift & 15 for b in values[row, 16 * group : 16 * group + 16] for shift in (0, 4)]
            real = (torch.tensor(nibbles[: len(part)]).double() - 8) * step
            assert min(nibbles[: len(part)]) == 0  # -8 is the value of the largest magnitude
            # Half a step; a whole one where a value of the other sign is beyond 7 steps; and 2**-8 of 8 steps.
            assert bool(((real - part).abs() <= step.abs() * (1 + 8 * 2**-8)).all())
            inside = (part / step).abs() <= 7.5
            assert bool(((real - part).abs()[inside] <= step.abs() * 0.5001).all())


def test_a_group_size_is_for_int4_alone():
    assert str(int4_dynamic_qconfig.with_group_size(32).weight) == "int4 symmetric per group of 32"
    with pytest.raises(QConfigError, match="group_size=32 needs axis 'group', got 'channel'"):
        default_dynamic_qconfig.with_group_size(32)


def test_activations_have_no_groups():
    with pytest.raises(
        QConfigError, match="has one scale a token or one a tensor; got 'int4 symmetric per group of 64'"
    ):
        QConfig(activation=int4_dynamic_qconfig.weight, weight=int4_dynamic_qconfig.weight)


def test_an_int4_qconfig_goes_through_json():
    qconfig = int4_dynamic_qconfig.with_group_size(128)
    assert QConfig.from_dict(json.loads(json.dumps(qconfig.to_dict()))) == qconfig


def test_int16_weights_have_a_scale_a_channel_and_come_back_within_half_a_step():
    weight = torch.randn(9, 100) * torch.logspace(-20, 20, 9)[:, None]
    values, scale, zero_point = int16_dynamic_qconfig.quantize_weight(weight).tensors
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (torch.int16, (9, 100), torch.float32, (9,))
    assert zero_point is None
    assert values.abs().amax(1).tolist() == [32767] * 9
    error = (values.double() * scale.double()[:, None] - weight.double()).abs()
    # half a step; 1 / scale, the product and the scale itself round, relatively to up to 32767 steps
    assert bool((error <= scale.double()[:, None] * (0.5 + 32767 * 3 * 2**-24)).all())


def test_an_int16_qconfig_goes_through_json():
    assert QConfig.from_dict(json.loads(json.dumps(int16_dynamic_qconfig.to_dict()))) == int16_dynamic_qconfig


def test_gptq_is_for_symmetric_weights_of_a_scale_a_channel_or_group():
    qconfig = fxquant.default_static_qconfig.with_gptq()
    assert QConfig.from_dict(json.loads(json.dumps(qconfig.to_dict()))) == qconfig != fxquant.default_static_qconfig
    assert "gptq" not in fxquant.default_static_qconfig.to_dict()
    assert qconfig.as_dynamic.gptq
    for other in (fxquant.per_tensor_dynamic_qconfig, fxquant.float_qparams_weight_only_qconfig):
        with pytest.raises(QConfigError, match="GPTQ rounds symmetric weights per channel or per group, not"):
            other.with_gptq()
