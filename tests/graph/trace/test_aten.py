"""ATen calls become torch's modules and functions."""

import warnings

import pytest
import torch
from torch import nn

from fxquant import (
    default_dynamic_qconfig_mapping,
    prepare_fx,
)
from fxquant.graph.trace.exported import adopt
from fxquant.nn.fused import expanded_bmm
from tests.graph.trace.test_exported import CASES, WORDS, by_fx, export, exported, leaves

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self", "ignore:.*LeafSpec.*:FutureWarning")


def test_modules_stand_at_their_paths_again():
    model, program = exported("layers")
    parts, kinds = dict(adopt(program).named_modules()), (nn.Linear, nn.LSTM, nn.GRU, nn.RNN, nn.Embedding)
    for path, own in model.named_modules():
        assert type(own) not in kinds or repr(parts[path]) == repr(own)
    assert type(program.get_submodule("lstm")) is nn.Module  # the user's is as it was
    mapping = default_dynamic_qconfig_mapping().set_module_name("lstm", None).set_module_name("attention", None)
    left = {part.path for part in prepare_fx(program, mapping, WORDS)._fxquant_record.skipped}
    assert left == {"lstm", "attention.in_proj_weight", "attention.out_proj"}


@pytest.mark.parametrize("case", ["layers", "calls"])
def test_decompositions_too(case):
    (model, program), x = exported(case, "decomposed"), CASES[case][1]
    quantized, expected = by_fx(program, x), by_fx(model, x)
    for part in quantized._fxquant_record.skipped:  # a first step from a state of zeros is a product of two constants
        assert "only a form of one constant" in part.reason or part.kind == "torch.unsqueeze"
    for got, wanted in zip(leaves(quantized(x)), leaves(expected(x)), strict=True):
        got = got.reshape(wanted.shape)  # torch 2.11's decomposed LSTM gives its states a dimension more
        assert (got - wanted).norm() <= 0.05 * wanted.norm()  # some products are float in the one and not in the other


@pytest.mark.filterwarnings(r"ignore:UnflattenedModule was traced for 1 \*args")
def test_unflattened_programs_and_aten_calls_of_a_user():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return torch.ops.aten.linear.default(x, self.weight)

    x = torch.randn(2, 8)
    unflattened = torch.export.unflatten(export(nn.Sequential(nn.Linear(8, 8)), x)).eval()
    for model in (unflattened, Own().eval()):
        (site,) = by_fx(model, x)._fxquant_record.sites
        assert site.kind == "F.linear"


def test_a_product_with_an_expanded_matrix_is_bmm():
    x, weight = torch.randn(3, 4, 5), torch.randn(5, 6)
    assert torch.equal(expanded_bmm(x, weight), torch.bmm(x, weight.expand(3, 5, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adopt(nn.Linear(2, 2)).weight.shape == (2, 2)
