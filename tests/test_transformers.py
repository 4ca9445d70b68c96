"""Hugging Face's transformers, from configs with random weights: every large matrix quantized, the answers near."""

import copy
import math

import pytest
import torch
from torch import nn

import fxquant
from fxquant import convert_fx, explain, prepare_fx, quantize_dynamic
from fxquant.graph.record import record_of
from fxquant.nn import QuantizedModule
from tests.samples import everything, linear_bound, same_bits

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not trace", "ignore::FutureWarning")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**SIZES, "vocab_size": 200, "max_position_embeddings": 64}


def words():
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(5, 200, (2, 12)), "attention_mask": mask}


def gpt2():
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=200, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    return transformers.GPT2LMHeadModel(config)


def distilbert():
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(**sizes, vocab_size=200, max_position_embeddings=64)
    )


def whisper():
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    return WhisperEncoder(transformers.WhisperConfig(**sizes, num_mel_bins=20, max_source_positions=50))


MODELS = {
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**TEXT)), words),
    "distilbert": (distilbert, words),
    "roberta": (lambda: transformers.RobertaModel(transformers.RobertaConfig(**TEXT)), words),
    "gpt2": (gpt2, words),
    "vit": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    "whisper": (whisper, lambda: {"input_features": torch.randn(1, 20, 100)}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def case(request):
    make, inputs = request.param
    return make().eval(), inputs()


def first(output):
    return next(iter(output.values()))


def is_layer(module):
    return isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D"


def test_every_large_matrix_is_quantized(case):
    model, inputs = case
    quantized = convert_fx(prepare_fx(model, everything(), inputs))
    layers = [path for path, module in model.named_modules() if is_layer(module)]
    assert sorted(site.path for site in record_of(quantized).sites) == sorted(layers)
    assert all(isinstance(quantized.get_submodule(path), QuantizedModule) for path in layers)
    lefts = {left.path: left.reason for left in record_of(quantized).skipped}
    matrices = {path for path, p in quantized.named_parameters() if p.dim() > 1 and p.numel() > 64 * 64}
    assert {path.rpartition(".")[0] for path in matrices} <= lefts.keys()
    assert all("convolutions" in why or "out of reach" in why for why in lefts.values())


def test_both_ways_give_the_same_bits_and_the_models_own_outputs(case):
    model, inputs = case
    with torch.no_grad():
        expected = model(**inputs)
        eager = quantize_dynamic(model)(**inputs)
        fx = convert_fx(prepare_fx(model, everything(), inputs))(**inputs)
    assert type(fx) is type(eager) is type(expected)
    assert fx.keys() == expected.keys()
    assert same_bits(first(fx), first(eager))


def test_the_prepared_model_computes_what_the_model_does(case):
    model, inputs = case
    with torch.no_grad():
        prepared = prepare_fx(model, everything(), inputs)(**inputs)
        assert same_bits(first(prepared), first(model(**inputs)))


def by_hand(module, args, output):
    """Return what a layer gives with its weights and input rows rounded as docs/numerics.md says, in float64."""
    weight = module.weight.double().t() if type(module).__name__ == "Conv1D" else module.weight.double()
    weight_scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / weight_scale).round() * weight_scale
    if isinstance(module, nn.Embedding):
        return rounded.nan_to_num()[args[0]].to(output.dtype)  # the row of the padding index is zero
    x = args[0].double()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero_point = (-low / scale).round()
    x = (((x / scale).round() + zero_point).clamp(0, 255) - zero_point) * scale
    return (x @ rounded.t() + (0 if module.bias is None else module.bias.double())).to(output.dtype)


def power(x):
    return float(x.double().pow(2).sum())


def test_its_noise_is_that_of_the_equations(case):
    # By hand and by fxquant the layers' integers are the same, but where a float32 rounding tips one to its neighbour:
    # so what is between the two is a small part of what is between each and float. 12 dB: a quarter of it.
    model, inputs = case
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if is_layer(module):
            module.register_forward_hook(by_hand)
    with torch.no_grad():
        exact, hand, ours = (first(m(**inputs)) for m in (model, twin, quantize_dynamic(model)))
    noise_db = 10 * math.log10(power(exact) / power(hand - exact))
    agreement_db = 10 * math.log10(power(exact) / power(hand - ours))
    print(f"{type(model).__name__}: {noise_db:.1f} dB, by hand and ours {agreement_db:.1f} dB")
    assert agreement_db >= noise_db + 12


def test_the_report_says_why_there_is_no_graph(case):
    model, inputs = case
    with pytest.warns(UserWarning, match="its modules are quantized where they stand"):
        prepared = prepare_fx(model, everything(), inputs)
    assert "not traced: the whole model" in str(explain(prepared))


def test_a_checkpoint_goes_round(case, tmp_path):
    model, inputs = case
    quantized = convert_fx(prepare_fx(model, everything(), inputs))
    fxquant.save(quantized, tmp_path / "m")
    with torch.no_grad():
        loaded, expected = fxquant.load(model, tmp_path / "m")(**inputs), quantized(**inputs)
    assert same_bits(first(loaded), first(expected))


@pytest.mark.parametrize("way", [lambda m: convert_fx(prepare_fx(m, everything(), words())), quantize_dynamic])
def test_gpt2_generates_with_and_without_its_cache(way):
    model = gpt2().eval()
    quantized = way(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    prompt = words()["input_ids"][:1]
    cached = quantized.generate(prompt, use_cache=True, **options)
    assert cached.shape == (1, 18)
    with torch.no_grad():
        for length in range(12, 18):  # greedy decoding, by hand
            assert cached[0, length] == quantized(cached[:, :length]).logits[0, -1].argmax()
    assert quantized.lm_head.weight is quantized.transformer.wte.weight


def test_gpt2_conv1d_is_the_linear_of_its_transpose():
    from transformers.pytorch_utils import Conv1D

    conv, x = Conv1D(12, 24), torch.randn(3, 5, 24)
    linear = nn.Linear(24, 12)
    with torch.no_grad():
        conv.bias.normal_()
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    assert same_bits(quantize_dynamic(nn.Sequential(conv))(x), quantize_dynamic(nn.Sequential(linear))(x))
    bound = linear_bound(x, conv.weight.t(), conv.bias)
    assert bool(((quantize_dynamic(conv)(x) - conv(x)).abs() <= bound).all())
