"""What the quantized modules share: plain buffers that keep their dtypes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fxquant import float16_dynamic_qconfig, float_qparams_weight_only_qconfig
from fxquant.nn import (
    DynamicQuantizedLinear,
    DynamicQuantizedLinearReLU,
    DynamicQuantizedLSTM,
    LinearReLU,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
)
from tests.samples import same_bits

MAKERS = {
    "linear": lambda: (DynamicQuantizedLinear.from_float(nn.Linear(6, 4)), torch.randn(3, 6)),
    "linear_relu": lambda: (DynamicQuantizedLinearReLU.from_float(LinearReLU(6, 4)), torch.randn(3, 6)),
    "lstm": lambda: (DynamicQuantizedLSTM.from_float(nn.LSTM(6, 4, 2, bidirectional=True)), torch.randn(5, 3, 6)),
    "embedding": lambda: (QuantizedEmbedding.from_float(nn.Embedding(9, 6)), torch.randint(9, (3, 2))),
    "embedding_bag": lambda: (QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(9, 6)), torch.randint(9, (3, 2))),
}


@pytest.fixture(params=MAKERS)
def made(request):
    return MAKERS[request.param]()


def test_the_state_dict_is_plain_tensors_of_int8_and_float32(made):
    module, _ = made
    dtypes = {}
    for name, tensor in module.state_dict().items():
        assert type(tensor) is torch.Tensor
        dtypes.setdefault("scale" if name.endswith("_scale") else name.split("_")[0], set()).add(tensor.dtype)
    assert dtypes.pop("weight") == {torch.int8}
    assert dtypes.pop("scale") == {torch.float32}
    assert dtypes.pop("bias", {torch.float32}) == {torch.float32}
    assert not dtypes


def test_a_state_dict_goes_through_torch_load_weights_only(made):
    module, x = made
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    expected = module(x)
    for tensor in module.state_dict().values():
        tensor.zero_()
    assert not same_bits(module(x), expected)
    module.load_state_dict(torch.load(buffer, weights_only=True))
    assert same_bits(module(x), expected)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(made, twin_of):
    module, x = made
    assert same_bits(twin_of(module)(x), module(x))


@pytest.mark.parametrize(
    "move",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16),
     lambda m: m.to("cpu", torch.float64), lambda m: m.type(torch.float64), lambda m: m.float()],
)  # fmt: skip
def test_another_dtype_leaves_integers_and_scales_alone(made, move):
    module, _ = made
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert move(module) is module
    for name, buffer in module.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


def test_to_the_meta_device_moves_all(made):
    module, _ = made
    assert {t.device.type for t in module.to("meta").state_dict().values()} == {"meta"}


def test_biases_follow_the_module_and_results_the_input():
    module = DynamicQuantizedLinear.from_float(nn.Linear(6, 4)).double()
    assert module.bias.dtype == torch.float64
    assert module(torch.randn(3, 6)).dtype == torch.float32


def test_nothing_is_trainable_or_in_training_mode(made):
    module, _ = made
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training


def test_a_float_state_dict_is_refused():
    module = DynamicQuantizedLinear.from_float(nn.Linear(6, 4))
    before = module.weight_int8.clone()
    state = nn.Linear(6, 4).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight_int8\", \"weight_scale\""):
        module.load_state_dict(state)
    found = module.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["weight_int8", "weight_scale"], ["weight"])
    assert torch.equal(module.weight_int8, before)


def test_a_float_module_takes_no_quantized_state_dict(made):
    module, _ = made
    float_names = {"DynamicQuantizedLSTM": nn.LSTM(6, 4, 2, bidirectional=True)}.get(
        type(module).__name__, nn.Linear(6, 4) if hasattr(module, "bias") else nn.Embedding(9, 6)
    )
    found = float_names.load_state_dict(module.state_dict(), strict=False)
    assert {name for name in float_names.state_dict() if "weight" in name} <= set(found.missing_keys)


def test_a_quantized_state_dict_is_refused_inside_a_users_model():
    module = nn.Sequential(QuantizedEmbedding.from_float(nn.Embedding(9, 6)))
    other = nn.Sequential(QuantizedEmbedding.from_float(nn.Embedding(9, 6), float_qparams_weight_only_qconfig))
    before = module[0].weight_int8.clone()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.weight_int8\""):
        module.load_state_dict(other.state_dict())
    found = module.load_state_dict(other.state_dict(), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (
        ["0.weight_int8"],
        ["0.weight_uint8", "0.weight_zero_point"],
    )
    assert torch.equal(module[0].weight_int8, before)


def test_float16_weights_stay_float16():
    module = DynamicQuantizedLinear.from_float(nn.Linear(6, 4), float16_dynamic_qconfig)
    assert module.double().weight_float16.dtype == torch.float16
    assert module.weight.dtype == torch.float64


def test_half_scales_are_taken_into_float32():
    module = DynamicQuantizedLinear.from_float(nn.Linear(6, 4))
    state = {n: t.half() if t.is_floating_point() else t for n, t in module.state_dict().items()}
    module.load_state_dict(state)
    assert module.weight_scale.dtype == torch.float32
    assert torch.equal(module.weight_scale, state["weight_scale"].float())


def test_the_float_module_is_left_as_it_was():
    for float_module, kind in ((nn.Linear(6, 4), DynamicQuantizedLinear), (nn.LSTM(6, 4), DynamicQuantizedLSTM)):
        before = {n: t.clone() for n, t in float_module.state_dict().items()}
        module = kind.from_float(float_module)
        for parameter in module.parameters():
            parameter.add_(1)
        assert all(torch.equal(t, before[n]) for n, t in float_module.state_dict().items())
