"""Models opened up: every site is a module, and the right one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import ModelStateError, compare, quantize_dynamic
from tests.debug.measure.test_compare import Counting, Loop, TwiceLinear, accumulated, by_path, errors, local
from tests.samples import Call, quantize
from tests.test_laws import same_snapshot, snapshot


def test_a_fused_relu_is_compared_with_the_float_relu():
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval(), torch.randn(5, 8)
    quantized = quantize(model, x)
    assert type(quantized.get_submodule("0")).__name__ == "DynamicQuantizedLinearReLU"
    row = by_path(compare(model, quantized, [x]))["0"]
    assert accumulated(row) == local(row) == errors([(model[:2](x), quantized.get_submodule("0")(x))])


def test_a_folded_normalization_is_compared_with_the_folded_float_layer():
    model, x = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()), torch.randn(50, 8)
    model(x * 3 + 1)  # statistics worth folding
    quantized = quantize(model.eval(), x)
    row = by_path(compare(model, quantized, [x]))["0"]
    assert row.sqnr_db == pytest.approx(errors([(model(x), quantized(x))]).expected[0], abs=1e-3)  # folding rounds


def test_functional_calls_are_sites_of_their_own():
    model, x = TwiceLinear().eval(), torch.randn(3, 6)
    quantized = quantize(model, x)
    rows = by_path(compare(model, quantized, [x]))
    assert {(row.path, row.call, row.kind) for row in rows.values()} == {
        ("weight", "linear", "F.linear"),
        ("weight", "linear_1", "F.linear"),
    }

    def step(x, bias, relu):
        weight, scale = quantized.weight_int8, quantized.weight_scale
        return torch.ops.fxquant.linear(x, weight, scale, bias, relu, True, 255)

    first, expected = F.linear(x, model.weight), model(x)
    assert accumulated(rows["linear"]) == errors([(first, step(x, None, False))])
    assert local(rows["linear_1"]) == errors([(expected, step(first, model.bias * 2, True))])
    assert accumulated(rows["linear_1"]) == errors([(expected, quantized(x))])


def test_sites_inside_submodules_kept_whole():
    model, x = nn.Sequential(Loop(), nn.Linear(4, 3)).eval(), torch.randn(5, 2, 4)
    quantized = quantize(model, x)
    assert quantized.record.untraced.keys() == {"0"}
    row = by_path(compare(model, quantized, [x, x]))["0.cell"]
    assert (row.calls, row.unpaired) == (10, 0)
    states, ours = [torch.zeros(2, 4)], [torch.zeros(2, 4)]
    cell = quantized.get_submodule("0.cell")
    for step in x:
        states.append(model[0].cell(step, states[-1]))
        ours.append(cell(step, ours[-1]))
    assert accumulated(row) == errors(list(zip(states[1:], ours[1:], strict=True)))
    assert local(row) == errors([(b, cell(step, a)) for step, a, b in zip(x, states, states[1:], strict=False)])


@pytest.mark.parametrize("make", [quantize, lambda model, *_: quantize_dynamic(model)], ids=["graph", "eager"])
def test_neither_model_is_changed(make):
    model, x = Counting().eval(), torch.randn(3, 4)
    quantized = make(model, x)
    before = snapshot(model), snapshot(quantized)
    compare(model, quantized, [x, x])
    with pytest.raises(RuntimeError, match=r"mat1 and mat2"):
        compare(model, quantized, [x, torch.randn(3, 5)])
    assert same_snapshot(before[0], snapshot(model))
    assert same_snapshot(before[1], snapshot(quantized))


def test_transformers_are_compared_without_the_fast_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    found = compare(model, quantize_dynamic(model), [{"src": x, "src_key_padding_mask": padding}])
    assert {(row.path.rpartition(".")[2], row.calls, row.unpaired) for row in found.rows} == {
        ("self_attn", 1, 0),
        ("linear1", 1, 0),
        ("linear2", 1, 0),
    }
    assert found.output_sqnr_db > 30


def test_models_that_do_not_belong_together_are_an_error():
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(3, 4)
    quantized = quantize(model, x)
    with pytest.raises(ModelStateError, match=r"compare needs the result of convert_fx"):
        compare(quantized, model, [x])
    with pytest.raises(ModelStateError, match=r"the float model from which .* got a quantized one"):
        compare(quantized, quantized, [x])
    with pytest.raises(ModelStateError, match=r"the float model from which .* got str"):
        compare("model", quantized, [x])
    with pytest.raises(ModelStateError, match=r"from another model than this Identity, which has no nn.Linear at '0'"):
        compare(nn.Identity().eval(), quantized, [x])
    call = Call(F.linear, 4, 4).eval()
    with pytest.raises(
        ModelStateError, match=r"from another model than this Sequential, which has no F.linear at 'lin"
    ):
        compare(model, quantize(call, x), [x])
