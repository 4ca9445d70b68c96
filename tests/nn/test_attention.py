"""DynamicQuantizedMultiheadAttention: nn.MultiheadAttention's every form, beside projections done by themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import DTypeError, ShapeError, default_dynamic_qconfig, float16_dynamic_qconfig, per_tensor_dynamic_qconfig
from fxquant.nn import DynamicQuantizedLinear, DynamicQuantizedMultiheadAttention
from tests.samples import same_bits, sqnr

L, S, B, E, H = 5, 7, 4, 24, 3
OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 10, "vdim": 14},
    {"kdim": 10, "batch_first": True, "bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "vdim": 14},
]
MASKS = ["none", "bool", "float", "3-D", "padding", "float padding", "bool and padding"]


def attention(qconfig=default_dynamic_qconfig, **options):
    """Return a float module with weights of a trained one's size, and its quantized form."""
    module = nn.MultiheadAttention(E, H, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module, DynamicQuantizedMultiheadAttention.from_float(module, qconfig)


def given(module, kind="cross"):
    """Return query, key and value in the form that a module takes."""
    query, key, value = torch.randn(L, B, E), torch.randn(S, B, module.kdim), torch.randn(S, B, module.vdim)
    if kind == "self":
        key = value = query
    elif kind == "memory":
        value = key
    return tuple(x.transpose(0, 1) for x in (query, key, value)) if module.batch_first else (query, key, value)


def masks(kind):
    """Return the keyword arguments that mask some keys."""
    padding, causal = torch.zeros(B, S, dtype=torch.bool), torch.ones(L, S, dtype=torch.bool).triu(1)
    padding[1, 4:] = True
    return {
        "none": {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(L, S)},
        "3-D": {"attn_mask": torch.randn(B * H, L, S)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(B, S)},
        "bool and padding": {"attn_mask": causal, "key_padding_mask": padding},
    }[kind]


def by_hand(module, qconfig, query, key, value, **masked):
    """Return what torch's own attention makes of projections that quantized linears do, and how far ours may be off.

    torch gets the projected rows with the identity for its weights, so that masks, added rows, softmax and averages are
    its code. Where the float part rounds otherwise, a value of a row that goes into out_proj may become the next
    integer: at most a step s of the row for each, s Σ|w| after the product.
    """
    packed = module._qkv_same_embed_dim
    weights = module.in_proj_weight.chunk(3) if packed else (getattr(module, f"{n}_proj_weight") for n in "qkv")
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    rows = []
    for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
        rows.append(DynamicQuantizedLinear(qconfig.quantize_weight(weight), bias, qconfig)(x))
    options = {"add_zero_attn": module.add_zero_attn, "batch_first": module.batch_first}
    inner = nn.MultiheadAttention(E, H, add_bias_kv=module.bias_k is not None, **options).eval()
    with torch.no_grad():
        inner.in_proj_weight.copy_(torch.eye(E).repeat(3, 1))
        inner.out_proj.weight.copy_(torch.eye(E))
        if module.bias_k is not None:
            inner.bias_k.copy_(module.bias_k)
            inner.bias_v.copy_(module.bias_v)
    attended, scores = inner(*rows, **masked)
    output = DynamicQuantizedLinear.from_float(module.out_proj, qconfig)(attended)
    step = (attended.amax(-1, keepdim=True).clamp(min=0) - attended.amin(-1, keepdim=True).clamp(max=0)) / 255
    return output, scores, step * module.out_proj.weight.abs().sum(-1) + 1e-5


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_torchs_attention_over_quantized_projections(options, kind):
    torch.manual_seed(7)
    module, quantized = attention(**options)
    inputs, masked = given(module), masks(kind)
    output, scores, bound = by_hand(module, default_dynamic_qconfig, *inputs, **masked)
    got, weights = quantized(*inputs, **masked)
    assert ((got - output).abs() <= bound).all()
    assert torch.allclose(weights, scores, atol=1e-6)
    alone, none = quantized(*inputs, need_weights=False, **masked)
    assert none is None
    assert ((alone - output).abs() <= bound).all()


@pytest.mark.parametrize("qconfig", [default_dynamic_qconfig, per_tensor_dynamic_qconfig, float16_dynamic_qconfig])
@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
def test_a_tensor_given_twice_is_projected_as_if_it_were_two(kind, qconfig):
    _, quantized = attention(qconfig)
    inputs = given(quantized, kind)
    got, apart = quantized(*inputs)[0], quantized(*[x.clone() for x in inputs])[0]
    assert torch.allclose(got, apart, atol=1e-5) if qconfig.activation is None else torch.equal(got, apart)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"kdim": 10, "add_bias_kv": True}], ids=str)
def test_without_a_batch_it_is_a_batch_of_one(options):
    module, quantized = attention(**options)
    batch = 0 if module.batch_first else 1
    inputs = [x.narrow(batch, 0, 1) for x in given(module)]
    mask, padding = torch.randn(H, L, S), torch.randn(S)
    expected = quantized(*inputs, attn_mask=mask, key_padding_mask=padding.unsqueeze(0), average_attn_weights=False)
    flat = [x.squeeze(batch) for x in inputs]
    got = quantized(*flat, attn_mask=mask, key_padding_mask=padding, average_attn_weights=False)
    assert got[0].shape == (L, E)
    assert got[1].shape == (H, L, S + (module.bias_k is not None))
    assert same_bits(got, (expected[0].squeeze(batch), expected[1].squeeze(0)))


def test_weights_of_each_head_or_their_mean():
    module, quantized = attention()
    inputs = given(module)
    each, mean = quantized(*inputs, average_attn_weights=False)[1], quantized(*inputs)[1]
    assert each.shape == (B, H, L, S)
    assert torch.allclose(each.sum(-1), torch.ones(B, H, L))
    assert torch.equal(each.mean(1), mean)


@pytest.mark.parametrize("padding", [None, torch.zeros(B, L)])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_a_causal_hint_counts_as_in_torch(options, need_weights, padding):
    torch.manual_seed(7)
    module, quantized = attention(**options)
    query, *_ = given(module)
    hinted = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(L), "is_causal": True}
    hinted.update(need_weights=need_weights, key_padding_mask=padding)
    output, _, bound = by_hand(module, default_dynamic_qconfig, query, query, query, **hinted)
    assert ((quantized(query, query, query, **hinted)[0] - output).abs() <= bound).all()


def test_it_agrees_with_float_as_attention_written_with_linears_does():
    torch.manual_seed(3)
    module, quantized = attention(batch_first=True)
    x = torch.randn(8, 20, E)
    linears = nn.ModuleList(nn.Linear(E, E) for _ in range(4))
    with torch.no_grad():
        weights = (*module.in_proj_weight.chunk(3), module.out_proj.weight)
        biases = (*module.in_proj_bias.chunk(3), module.out_proj.bias)
        for linear, weight, bias in zip(linears, weights, biases, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)

    def written(layers):
        q, k, v = (layer(x).unflatten(-1, (H, -1)).transpose(1, 2) for layer in layers[:3])
        return layers[3](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    expected = module(x, x, x)[0]
    assert torch.allclose(written(linears), expected, atol=1e-5)
    by_linears = written([DynamicQuantizedLinear.from_float(linear) for linear in linears])
    ours, theirs = sqnr(expected, quantized(x, x, x)[0]), sqnr(expected, by_linears)
    assert ours == pytest.approx(theirs, abs=0.5)  # dB; the integers are the same
    assert ours > 30


def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch():
    module, quantized = attention(batch_first=True)
    inputs, mask = given(module), masks("float")["attn_mask"]
    for need_weights in (False, True):
        together = quantized(*inputs, attn_mask=mask, need_weights=need_weights)[0]
        for b in range(B):
            alone = quantized(*[x[b : b + 1] for x in inputs], attn_mask=mask, need_weights=need_weights)[0]
            assert torch.equal(alone, together[b : b + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    module, quantized = attention(add_bias_kv=True)
    inputs, masked = given(module), masks("bool and padding")
    expected, scores = quantized(*inputs, **masked)
    output, weights = quantized(*[x.to(dtype) for x in inputs], **masked)
    assert (output.dtype, weights.dtype) == (dtype, dtype)
    assert (output.float() - expected).norm() <= 0.03 * expected.norm()
    assert torch.allclose(weights.float(), scores, atol=0.02)
    assert quantized.to(dtype).in_proj_weight_int8.dtype == torch.int8


def test_an_empty_sequence_and_an_empty_batch():
    _, quantized = attention()
    assert quantized(torch.zeros(0, B, E), *[torch.randn(S, B, E)] * 2)[0].shape == (0, B, E)
    assert quantized(*[torch.zeros(L, 0, E)] * 3)[0].shape == (L, 0, E)


ROWS, KEYS = torch.zeros(L, B, E), torch.zeros(S, B, E)


@pytest.mark.parametrize(
    ("inputs", "masked", "error", "message"),
    [
        ((ROWS[None], KEYS, KEYS), {}, ShapeError, r"takes 3-D query, .* got .*\(1, 5, 4, 24\)"),
        ((ROWS[:, 0], KEYS, KEYS), {}, ShapeError, "takes 3-D query, key and value, or 2-D ones"),
        ((ROWS, KEYS[:, :2], KEYS[:, :2]), {}, ShapeError, "takes one batch size, and as many values as keys"),
        ((ROWS, KEYS, KEYS[:3]), {}, ShapeError, "takes one batch size, and as many values as keys"),
        ((ROWS[..., :9], KEYS, KEYS), {}, ShapeError, "a quantized linear of 24 inputs"),
        ((ROWS, KEYS, KEYS), {"attn_mask": ROWS[0, :1, :S]}, ShapeError, r"shape \(5, 7\) or \(12, 5, 7\), got"),
        ((ROWS, KEYS, KEYS), {"key_padding_mask": ROWS[0, 0, :S]}, ShapeError, r"mask of shape \(4, 7\), got \(7,\)"),
        ((ROWS, KEYS, KEYS), {"is_causal": True}, ShapeError, "is_causal=True, a hint on attn_mask, without one"),
        ((ROWS, KEYS, KEYS), {"attn_mask": torch.zeros(L, S).int()}, DTypeError, "bool or floating point, got"),
        ((ROWS.int(), KEYS, KEYS), {}, DTypeError, "takes a float tensor"),
        ((None, KEYS, KEYS), {}, DTypeError, "a quantized MultiheadAttention takes a tensor, got NoneType"),
        ((ROWS, KEYS, [1.0]), {}, DTypeError, "a quantized MultiheadAttention takes a tensor, got list"),
        ((ROWS, KEYS, KEYS), {"attn_mask": [[0.0]]}, DTypeError, "attn_mask takes a tensor, got list"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(inputs, masked, error, message):
    _, quantized = attention()
    with pytest.raises(error, match=message):
        quantized(*inputs, **masked)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_is_an_error():
    _, quantized = attention(batch_first=True)
    nested = torch.nested.nested_tensor([torch.zeros(3, E), torch.zeros(2, E)])
    with pytest.raises(ShapeError, match="pad them and pass a key_padding_mask"):
        quantized(nested, nested, nested)


def test_the_state_dict_is_named_after_the_float_one():
    module, quantized = attention(add_bias_kv=True)
    weights = ("in_proj_weight", "out_proj.weight")
    assert set(module.state_dict()) - set(quantized.state_dict()) == set(weights)
    own = {f"{name}_{kind}" for name in weights for kind in ("int8", "scale")}
    assert set(quantized.state_dict()) - set(module.state_dict()) == own


def test_print_shows_the_options():
    text = str(attention(kdim=10, batch_first=True)[1])
    assert "24, 3, kdim=10, vdim=24, batch_first=True, int8" in text
