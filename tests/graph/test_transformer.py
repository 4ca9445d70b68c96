"""torch's transformer modules, traced and swapped: every projection quantized, and no fast path past it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import fxquant
from fxquant import QConfigMapping, convert_fx, default_dynamic_qconfig, quantize_dynamic
from fxquant.graph.record import record_of
from tests.samples import everything, kinds, prepare, quantize, same_bits, sqnr

D, H, FF, T, B = 16, 2, 32, 6, 3

# torch's own, about models that its fast path cannot take.
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]


def random(module):
    """Return a module with random weights, biases and norms, in eval mode."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 and "norm" in type(module).__name__ else 0.0, 0.2)
    return module.eval()


def encoder(layers=2, nested=True, **options):
    layer = nn.TransformerEncoderLayer(D, H, FF, **{"batch_first": True, **options})
    return random(nn.TransformerEncoder(layer, layers, nn.LayerNorm(D), enable_nested_tensor=nested))


def decoder(**options):
    return random(nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, FF, **options), 2))


def transformer(**options):
    return random(nn.Transformer(D, H, 2, 2, FF, **options))


def masks():
    """Return a causal mask, as bools and as floats, and a padding mask whose second sequence ends early."""
    causal, padding = torch.ones(T, T, dtype=torch.bool).triu(1), torch.zeros(B, T, dtype=torch.bool)
    padding[1, 4:] = True
    return causal, nn.Transformer.generate_square_subsequent_mask(T), padding


class Wrapped(nn.Module):
    """A user's model around one of torch's; the arguments reach it by name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, src, mask=None, padding=None):
        return self.inner(src, mask=mask, src_key_padding_mask=padding)


def slowly(model, *inputs, **named):
    """Return what a float model gives without torch's fast path: with gradients wanted, torch does not take it."""
    with torch.enable_grad():
        return model(*inputs, **named)


GELU_FIRST = {"norm_first": True, "activation": "gelu"}
ENCODERS = [{}, {"batch_first": False}, GELU_FIRST, {"bias": False}, {"activation": nn.ReLU()}]
CALLS = ["plain", "bool", "float", "padding", "bool and padding"]


def encoder_call(kind):
    causal, additive, padding = masks()
    return {
        "plain": (),
        "bool": (causal,),
        "float": (additive,),
        "padding": (None, padding),
        "bool and padding": (causal, padding),
    }[kind]


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("options", ENCODERS, ids=str)
def test_an_encoder_keeps_its_bits_when_prepared_and_its_answers_when_quantized(options, kind):
    model, call = encoder(**options), encoder_call(kind)
    x = torch.randn(B, T, D) if model.layers[0].self_attn.batch_first else torch.randn(T, B, D)
    expected = slowly(model, x, *call)
    prepared = prepare(model, x, *call)
    assert torch.equal(prepared(x, *call), expected)
    quantized, swapped = convert_fx(prepared), quantize_dynamic(model)
    for result in (quantized, swapped):
        assert len(record_of(result).sites) == 6
        assert record_of(result).skipped == ()
    assert sqnr(expected, quantized(x, *call)) > 25
    with torch.no_grad():  # where torch would take the fast path
        assert torch.equal(quantized(x, *call), swapped(x, *call))


def test_an_unmasked_encoder_is_near_the_fast_path():
    model, x = encoder(), torch.randn(B, T, D)
    with torch.no_grad():
        assert torch.allclose(prepare(model, x)(x), model(x), atol=1e-5)


def test_padded_rows_are_computed_where_the_fast_path_gives_zeros():
    model, x = encoder(), torch.randn(B, T, D)
    model.norm, padding = None, masks()[2]
    prepared = prepare(model, x, None, padding)
    with torch.no_grad():
        fast, ours = model(x, None, padding), prepared(x, None, padding)
    assert (fast[padding] == 0).all()
    assert torch.equal(ours, slowly(model, x, None, padding))
    assert torch.allclose(ours[~padding], fast[~padding], atol=1e-5)


def test_the_feed_forward_is_fused():
    quantized = quantize(encoder(), torch.randn(B, T, D))
    found = kinds(quantized)
    assert found["layers.0.linear1"] == "DynamicQuantizedLinearReLU"
    assert found["layers.0.linear2"] == "DynamicQuantizedLinear"
    assert found["layers.1.self_attn"] == "DynamicQuantizedMultiheadAttention"


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_whole_transformer_with_masks(batch_first):
    model = transformer(batch_first=batch_first)
    causal, _, padding = masks()
    shape = (B, T, D) if batch_first else (T, B, D)
    call = (torch.randn(shape), torch.randn(shape), None, causal, None, padding, padding, padding)
    expected = slowly(model, *call)
    prepared = prepare(model, *call)
    assert torch.equal(prepared(*call), expected)
    quantized, swapped = convert_fx(prepared), quantize_dynamic(model)
    assert len(quantized.record.sites) == 2 * 3 + 2 * 4
    assert quantized.record.skipped == ()
    assert sqnr(expected, quantized(*call)) > 25
    with torch.no_grad():
        assert torch.equal(swapped(*call), quantized(*call))


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_a_decoder_with_a_causal_mask_and_a_hint(options, is_causal):
    model, call = decoder(**options), (torch.randn(T, B, D), torch.randn(T + 2, B, D))
    named = {"tgt_mask": masks()[1], "tgt_is_causal": is_causal}
    expected = slowly(model, *call, **named)
    prepared = prepare(model, *call)
    assert torch.equal(prepared(*call, **named), expected)
    assert sqnr(expected, convert_fx(prepared)(*call, **named)) > 25
    assert torch.equal(quantize_dynamic(model)(*call, **named), convert_fx(prepared)(*call, **named))


@pytest.mark.parametrize("make", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_a_layer_by_itself(make):
    model = random(make(D, H, FF, batch_first=True))
    call = (torch.randn(B, T, D),) * (1 if make is nn.TransformerEncoderLayer else 2)
    assert torch.equal(prepare(model, *call)(*call), slowly(model, *call))
    quantized = quantize(model, *call)
    assert sqnr(slowly(model, *call), quantized(*call)) > 25
    with torch.no_grad():
        assert torch.equal(quantize_dynamic(model)(*call), quantized(*call))


def test_without_a_batch():
    model, x = encoder(), torch.randn(T, D)
    assert torch.equal(prepare(model, x)(x), slowly(model, x))
    assert sqnr(slowly(model, x), quantize(model, x)(x)) > 25


def test_masks_that_the_example_inputs_did_not_have():
    model, x = Wrapped(encoder()).eval(), torch.randn(B, T, D)
    causal, _, padding = masks()
    prepared = prepare(model, x)
    for call in ({}, {"mask": causal}, {"padding": padding}, {"mask": causal, "padding": padding}):
        assert torch.equal(prepared(x, **call), slowly(model, x, **call))


# The fast path: off where it would read a quantized module's weights, and only there.


@pytest.mark.parametrize("kind", ["plain", "padding"])
@pytest.mark.parametrize("what", [nn.Linear, nn.MultiheadAttention, "layers.1.linear2", "layers.1.self_attn"])
def test_a_part_of_an_encoder_swapped_alone(what, kind):
    model, x, call = encoder(), torch.randn(B, T, D), encoder_call(kind)
    swapped = quantize_dynamic(model, {what})
    mapping = QConfigMapping().set_object_type(what, default_dynamic_qconfig) if isinstance(what, type) else (
        QConfigMapping().set_module_name(what, default_dynamic_qconfig))  # fmt: skip
    quantized = quantize(model, x, *call, mapping=mapping)
    with torch.no_grad():
        assert sqnr(slowly(model, x, *call), swapped(x, *call)) > 25
        assert torch.allclose(swapped(x, *call), quantized(x, *call), atol=0.02)
    assert {type(module) for module in swapped.layers} == {nn.TransformerEncoderLayer}


def test_an_encoder_that_stays_float_keeps_its_fast_path():
    model = nn.ModuleDict({"kept": encoder(), "int8": encoder()}).eval()
    swapped = quantize_dynamic(model, {"int8"})
    assert swapped["kept"].use_nested_tensor
    assert swapped["kept"].layers[0].activation_relu_or_gelu == 1
    assert not swapped["int8"].use_nested_tensor
    assert model["int8"].use_nested_tensor
    assert model["int8"].layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("path", ["inner", "inner.layers.0", "inner.layers.0.self_attn", "inner.layers.0.linear1"])
def test_hooks_inside_are_kept_and_fire(path):
    model, x, seen = Wrapped(encoder()).eval(), torch.randn(B, T, D), []
    model.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    quantized = quantize(model, x)
    assert len(quantized.record.sites) == 6
    assert seen == []
    with torch.no_grad():
        assert sqnr(slowly(model, x), quantized(x)) > 25
    assert seen == [path] * 2


class Loop(nn.Module):
    """A model around an encoder that does not trace."""

    def __init__(self):
        super().__init__()
        self.inner = encoder()

    def forward(self, x):
        return self.inner(x) if float(x.sum()) < 1e9 else x


def test_an_encoder_inside_what_does_not_trace():
    model, x = nn.Sequential(nn.Linear(D, D), Loop()).eval(), torch.randn(B, T, D)
    prepared = prepare(model, x)
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))  # it is called as it is
        assert sqnr(model(x), convert_fx(prepared)(x)) > 25
    assert len(prepared.record.sites) == 7


class Scaled(nn.TransformerEncoderLayer):
    """A user's layer with an attention block of its own; its forward is inherited."""

    def _sa_block(self, x, *masks, is_causal=False):
        return 2 * super()._sa_block(x, *masks, is_causal=is_causal)


@pytest.mark.parametrize("way", [lambda model, x: quantize(model, x), lambda model, x: quantize_dynamic(model)])
def test_a_subclass_that_inherits_forward(way):
    model, x = random(nn.TransformerEncoder(Scaled(D, H, FF, batch_first=True), 2)), torch.randn(B, T, D)
    quantized = way(model, x)
    assert len(record_of(quantized).sites) == 6
    with torch.no_grad():
        assert sqnr(slowly(model, x), quantized(x)) > 25


class Posted(nn.TransformerEncoderLayer):
    """A user's layer whose forward adds to torch's."""

    def forward(self, src, *masks, **named):
        return super().forward(src, *masks, **named) + 1


@pytest.mark.parametrize("way", [lambda model, x: quantize(model, x), lambda model, x: quantize_dynamic(model)])
def test_a_subclass_whose_forward_calls_torchs(way):
    model, x = (
        Wrapped(random(nn.TransformerEncoder(Posted(D, H, FF, batch_first=True), 2))).eval(),
        torch.randn(B, T, D),
    )
    quantized = way(model, x)
    assert len(record_of(quantized).sites) == 6
    with torch.no_grad():
        assert sqnr(slowly(model, x), quantized(x)) > 25


# Copies, checkpoints, compilers, rows.


RESULTS = {
    "fx": lambda model, x: quantize(model, x),
    "eager": lambda model, x: quantize_dynamic(model),
}


@pytest.fixture(params=RESULTS)
def result(request):
    model, x = encoder(), torch.randn(B, T, D)
    return model, x, RESULTS[request.param](model, x)


def test_copies_and_pickles(result):
    _, x, quantized = result
    stored = io.BytesIO()
    torch.save(quantized, stored)
    stored.seek(0)
    twins = copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), torch.load(stored, weights_only=False)
    with torch.no_grad():
        for twin in twins:
            assert torch.equal(twin(x), quantized(x))


def test_state_dicts(result):
    model, x, quantized = result
    stored = io.BytesIO()
    torch.save(quantized.state_dict(), stored)
    stored.seek(0)
    other = RESULTS["fx" if record_of(quantized).is_traced else "eager"](model, x)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(torch.load(stored, weights_only=True))
        assert torch.equal(other(x), quantized(x))
    with pytest.raises(RuntimeError, match=r"(?s)is a weight that is not quantized.*_int8|Missing key.*_int8"):
        quantized.load_state_dict(model.state_dict())


def test_checkpoints(result, tmp_path):
    _, x, quantized = result
    fxquant.save(quantized, tmp_path / "q")
    with torch.device("meta"):
        skeleton = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, FF, batch_first=True), 2, nn.LayerNorm(D))
    loaded = fxquant.load(skeleton.eval(), tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(loaded(x), quantized(x))
        assert torch.equal(loaded(x, None, masks()[2]), quantized(x, None, masks()[2]))


@pytest.mark.parametrize("kind", ["plain", "mask", "padding"])
def test_compile_and_export(result, kind):
    _, x, quantized = result
    causal, _, padding = masks()  # is_causal, because torch's own code would look at the mask's values
    call = {"plain": (x,), "mask": (x, causal, None, False), "padding": (x, None, padding)}[kind]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, inside export and dynamo
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")(*call)
        exported = torch.export.export(quantized, call).module()(*call)
        assert torch.equal(compiled, quantized(*call))
        assert torch.equal(exported, quantized(*call))


def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch(result):
    _, _, quantized = result
    x, (causal, *_) = torch.randn(5, T, D), masks()
    with torch.no_grad():
        together = quantized(x, causal)
        for b in range(5):
            assert torch.equal(quantized(x[b : b + 1], causal), together[b : b + 1])


def test_the_model_is_not_changed():
    model, x = encoder(), torch.randn(B, T, D)
    before = str(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        quantize(model, x)(x), quantize_dynamic(model)(x)
        assert torch.equal(model(x), expected)  # by the fast path still
    assert (str(model), model.use_nested_tensor) == (before[0], True)
    assert same_bits(model.state_dict(), before[1])
    assert {type(module) for module in model.layers} == {nn.TransformerEncoderLayer}


def test_it_is_accounted_for_as_attention_and_linears():
    quantized = quantize(encoder(1), torch.randn(B, T, D), mapping=everything())
    found = [(row.path, row.kind, row.operator) for row in fxquant.explain(quantized).rows]
    assert found == [
        ("layers.0.self_attn", "nn.MultiheadAttention", "attention"),
        ("layers.0.linear1", "nn.Linear", "linear"),
        ("layers.0.linear2", "nn.Linear", "linear"),
    ]
