"""Every row of the operator table trains: the trained form gives what the quantized one does, and its weights learn."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant import OPERATORS, convert_fx, prepare_qat_fx
from tests.samples import SAMPLES, SCHEMES, everything, leaves, sqnr

QCONFIGS = {**SCHEMES, "int8 weights, uint8 static activations": fxquant.default_qat_qconfig}
CASES = [
    pytest.param(
        row, sample, scheme.name, id=f"{row.name}-{getattr(sample.covers, '__name__', sample.covers)}-{scheme.name}"
    )
    for row in OPERATORS
    for sample in SAMPLES[row.name]
    for scheme in row.schemes
]


@pytest.mark.parametrize(("row", "sample", "scheme"), CASES)
def test_the_converted_model_gives_what_the_trained_one_does(row, sample, scheme):
    torch.manual_seed(0)
    model, inputs = sample.model().train(), sample.inputs()
    prepared = prepare_qat_fx(model, everything(QCONFIGS[scheme]), inputs, operators=(row,))
    output = leaves(prepared(*inputs))
    sum(leaf.square().sum() for leaf in output).backward()
    assert all(parameter.grad.isfinite().all() for parameter in prepared.parameters() if parameter.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in prepared.parameters() if p.dim() > 1)
    prepared.eval()
    quantized = convert_fx(prepared)
    assert [site.operator for site in quantized.record.sites] == [row.name]
    with torch.no_grad():
        for expected, got in zip(leaves(prepared(*inputs)), leaves(quantized(*inputs)), strict=True):
            assert sqnr(expected, got) > 45, sqnr(expected, got)
        if scheme != "float16 weights" and "16" not in scheme:
            assert not torch.equal(leaves(model.eval()(*inputs))[0], leaves(prepared(*inputs))[0])


@pytest.mark.parametrize(
    ("row", "sample"), [(case.values[0], case.values[1]) for case in CASES if "float16" in case.id]
)
def test_switched_off_it_is_the_float_model(row, sample):
    torch.manual_seed(0)
    model, inputs = sample.model().train(), sample.inputs()
    prepared = prepare_qat_fx(model, everything(fxquant.float16_dynamic_qconfig), inputs, operators=(row,)).eval()
    prepared.apply(fxquant.disable_fake_quant)
    with torch.no_grad():
        for expected, got in zip(leaves(model.eval()(*inputs)), leaves(prepared(*inputs)), strict=True):
            assert torch.allclose(expected, got, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "bias": False}, {"add_bias_kv": True, "kdim": 8, "vdim": 16}]
)
def test_attention_takes_masks_in_training_too(options):
    attention = nn.MultiheadAttention(24, 3, dropout=0.0, **options)
    trained = fxquant.nn.trained_attention.train_attention(attention, fxquant.default_dynamic_qconfig)
    trained.apply(fxquant.disable_fake_quant)
    query, sizes = torch.randn(5, 5, 24), (options.get("kdim", 24), options.get("vdim", 24))
    key, value = (torch.randn(5, 5, size) for size in sizes)
    mask = {"attn_mask": torch.ones(5, 5).triu(1).bool(), "key_padding_mask": torch.zeros(5, 5).bool()}
    for more in ({}, mask, {**mask, "need_weights": False}, {"average_attn_weights": False}):
        for got, expected in zip(trained(query, key, value, **more), attention(query, key, value, **more), strict=True):
            assert (got is expected is None) or torch.allclose(got, expected, atol=1e-5)


def test_attention_drops_in_training():
    attention = nn.MultiheadAttention(24, 3, dropout=0.5)
    trained = fxquant.nn.trained_attention.train_attention(attention, fxquant.default_dynamic_qconfig)
    x = torch.randn(4, 2, 24)
    for need_weights in (True, False):
        assert not torch.equal(trained.train()(x, x, x, need_weights=need_weights)[0], trained(x, x, x)[0])
        same = [trained.eval()(x, x, x, need_weights=need_weights)[0] for _ in range(2)]
        assert torch.equal(*same)
