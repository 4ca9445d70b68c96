"""Rounding with error feedback: errors by their equation, integers by the paper's own, slower steps."""

import pytest
import torch

from fxquant import gptq, int4_dynamic_qconfig
from fxquant.gptq import DAMPING, round_with_gptq
from fxquant.numerics import dequantize

SPEC = int4_dynamic_qconfig.with_group_size(32).weight


def correlated(columns, rows=400, rank=6):
    """Return the Hessian of inputs that mostly lie in a few directions."""
    x = torch.randn(rows, rank) @ torch.randn(rank, columns) + 0.1 * torch.randn(rows, columns)
    return x.t() @ x


def real(quantized):
    return dequantize(quantized).double()


def nearest(weight):
    return int4_dynamic_qconfig.with_group_size(32).quantize_weight(weight)


def errors(weight, quantized, hessian):
    """Return (w - ŵ) H (w - ŵ)ᵀ of each row, in float64."""
    off = weight.double() - real(quantized)
    return torch.einsum("ni,ij,nj->n", off, hessian.double(), off)


@pytest.mark.parametrize("columns", [16, 64, 75])
def test_products_with_correlated_inputs_err_far_less_and_no_row_errs_more(columns):
    weight, hessian = torch.randn(200, columns), correlated(columns)
    fed, plain = (errors(weight, q, hessian) for q in (round_with_gptq(weight, hessian, SPEC), nearest(weight)))
    assert (fed <= plain * (1 + 1e-4)).all()  # compared in float32
    assert fed.sum() < plain.sum() / 3


def test_the_shapes_are_those_of_rounding_to_nearest():
    weight = torch.randn(5, 75)
    fed, plain = round_with_gptq(weight, correlated(75), SPEC), nearest(weight)
    for ours, theirs in zip(fed.tensors[:2], plain.tensors[:2], strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("shape", [(1, 75), (5, 1), (5, 75)])
def test_the_weight_is_not_written_to(shape):
    weight, hessian = torch.randn(shape), correlated(shape[1])
    before = weight.clone()
    fed = errors(before, round_with_gptq(weight, hessian, SPEC), hessian)
    assert torch.equal(weight, before)
    assert (fed <= errors(before, nearest(before), hessian) * (1 + 1e-4)).all()


def test_inputs_that_do_not_go_together_leave_nothing_to_make_up_for(monkeypatch):
    monkeypatch.setattr(gptq, "RANGE_SHARES", (1,))
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    weight, hessian = torch.randn(30, 75), torch.diag(torch.rand(75) + 0.5)
    fed, plain = round_with_gptq(weight, hessian, SPEC), nearest(weight)
    for ours, theirs in zip(fed.tensors[:2], plain.tensors[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_the_search_for_a_scale_lowers_the_error_where_inputs_do_not_go_together():
    weight, hessian = torch.randn(30, 64), torch.diag(torch.rand(64) + 0.5)
    fed, plain = (errors(weight, q, hessian) for q in (round_with_gptq(weight, hessian, SPEC), nearest(weight)))
    assert (fed <= plain * (1 + 1e-5)).all()
    assert fed.sum() < 0.95 * plain.sum()


def test_the_integers_are_those_of_the_paper_s_first_algorithm(monkeypatch):
    """Column by column: the rest makes up for each error, and H⁻¹ loses that column (its eq. 2 and 3)."""
    monkeypatch.setattr(gptq, "RANGE_SHARES", (1,))
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    weight, hessian = torch.randn(20, 75), correlated(75)
    left, h = weight.double(), hessian.double()
    inverse = torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(75))
    expected = torch.empty_like(left)
    for i in range(75):
        if i % 32 == 0:
            group = left[:, i : i + 32]
            end = torch.where(group.amax(1) > -group.amin(1), group.amax(1), group.amin(1))
            scale = (end.float() / -8).bfloat16().double()
        expected[:, i] = (left[:, i] / scale).round().clamp(-8, 7) * scale
        left = left - torch.outer((left[:, i] - expected[:, i]) / inverse[i, i], inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    got = real(round_with_gptq(weight, hessian, SPEC))
    better = errors(weight, nearest(weight), hessian) > torch.einsum(
        "ni,ij,nj->n", weight - expected, hessian.double(), weight - expected
    )
    assert better.sum() > 15
    # A value halfway between two integers may go the other way in float32, and all after it in that row with it.
    assert ((got - expected).abs() < 1e-6).all(1)[better].float().mean() > 0.7


def test_choosing_once_more_lowers_the_error(monkeypatch):
    weight, hessian = torch.randn(200, 64), correlated(64)
    refined = errors(weight, round_with_gptq(weight, hessian, SPEC), hessian)
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    once = errors(weight, round_with_gptq(weight, hessian, SPEC), hessian)
    assert refined.sum() < 0.9 * once.sum()


def test_in_the_end_no_single_integer_can_do_better(monkeypatch):
    monkeypatch.setattr(gptq, "SWEEPS", 60)
    weight, hessian = torch.randn(40, 75), correlated(75)
    fed = round_with_gptq(weight, hessian, SPEC)
    scale = fed.scale.double().repeat_interleave(32, 1)[:, :75]
    h = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(75)
    slope = (weight.double() - real(fed)) @ h
    for change in (-1, 1):
        integers = (real(fed) / scale).round() + change
        gain = 2 * change * scale * slope - scale**2 * h.diagonal()  # of (25), were that one changed alone
        assert (gain <= 1e-4 * scale**2 * h.diagonal())[(integers >= -8) & (integers <= 7)].all()


@pytest.mark.parametrize(
    "hessian",
    [torch.zeros(40, 40), torch.ones(40, 40), torch.ones(40, 40) - 1e-3 * torch.eye(40), torch.ones(40, 40) * 1e-30],
    ids=["zero", "one direction", "not quite positive", "tiny"],
)
def test_a_hessian_without_an_inverse_is_damped(hessian):
    weight = torch.randn(30, 40)
    fed = round_with_gptq(weight, hessian, SPEC)
    assert real(fed).isfinite().all()
    assert errors(weight, fed, hessian).sum() <= errors(weight, nearest(weight), hessian).sum() + 1e-9


def test_a_column_whose_input_was_always_zero_is_rounded_to_nearest():
    weight, hessian = torch.randn(30, 64), correlated(64)
    hessian[5], hessian[:, 5] = 0, 0
    fed = round_with_gptq(weight, hessian, SPEC)
    off = (real(fed) - weight)[:, 5].abs()
    scale = fed.scale[:, 0].float().abs()
    end = weight[:, 5] / fed.scale[:, 0].float()
    inside = (end > -8.5) & (end < 7.5)
    assert (off <= scale / 2 * 1.0001)[inside].all()


def test_the_same_data_gives_the_same_integers():
    weight, hessian = torch.randn(100, 64), correlated(64)
    first, second = (round_with_gptq(weight, hessian, SPEC) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.scale, second.scale)


def test_rows_do_not_depend_on_how_many_are_rounded_at_once(monkeypatch):
    weight, hessian = torch.randn(100, 64), correlated(64)
    whole = errors(weight, round_with_gptq(weight, hessian, SPEC), hessian)
    monkeypatch.setattr(gptq, "_ROWS_AT_ONCE", 7)
    parts = errors(weight, round_with_gptq(weight, hessian, SPEC), hessian)
    assert (parts.sum() - whole.sum()).abs() < 0.02 * whole.sum()


def test_a_weight_in_half_precision_is_rounded_as_its_float32_values():
    weight, hessian = torch.randn(20, 64).to(torch.bfloat16), correlated(64)
    ours, theirs = (round_with_gptq(w, hessian, SPEC) for w in (weight, weight.float()))
    assert torch.equal(ours.values, theirs.values)
