"""The plan: sites and reasons, in the graph's order, decided once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    OPERATORS,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    default_dynamic_qconfig_mapping,
    explain,
    prepare_fx,
    quantize_dynamic,
)
from fxquant.graph.plan.planner import replay
from fxquant.graph.record import Coverage
from fxquant.graph.trace.trace import trace
from tests.samples import WordLM, everything, lm_inputs, prepare, quantize


def test_a_site_says_what_where_and_why():
    model = WordLM()
    mapping = everything().set_module_name_regex("dec.*", default_dynamic_qconfig)
    sites = prepare(model, *lm_inputs(model), mapping=mapping).record.sites
    assert [(s.path, s.kind, s.operator, s.rule) for s in sites] == [
        ("encoder", "nn.Embedding", "embedding", "global"),
        ("rnn", "nn.LSTM", "lstm", "global"),
        ("decoder", "nn.Linear", "linear", "module_name_regex 'dec.*'"),
    ]
    for site in sites:
        parameters = model.get_submodule(site.path).parameters()
        assert site.float_bytes == sum(4 * p.numel() for p in parameters)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.child = nn.Module()
        self.child.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = F.linear(x, self.weight)
        x = F.linear(x, self.child.weight)
        return F.linear(x, self.weight)


def test_functional_sites_are_known_by_their_weight_and_call():
    sites = prepare(Functional(), torch.randn(2, 4)).record.sites
    assert [(s.path, s.kind, s.call) for s in sites] == [
        ("weight", "F.linear", "linear"),
        ("child.weight", "F.linear", "linear_1"),
        ("weight", "F.linear", "linear_2"),
    ]


def test_one_call_of_a_weight_may_stay_float():
    model, x = Functional(), torch.randn(2, 4)
    mapping = everything().set_module_name_object_type_order("", F.linear, 1, None)
    quantized = quantize(model, x, mapping=mapping)
    targets = [n.target for n in quantized.graph.nodes if n.op == "call_function"]
    assert targets.count(F.linear) == 1
    assert (quantized(x) - model(x)).norm() < 0.1 * model(x).norm()


def test_a_tensor_may_be_read_both_ways():
    class Model(Functional):
        def forward(self, x):
            return F.linear(x, self.weight) * self.weight[0]

    model, x = Model(), torch.randn(2, 4)
    quantized = quantize(model, x)
    assert (len(quantized.record.sites), len(quantized.record.skipped)) == (1, 1)
    assert torch.equal(dict(quantized.named_parameters())["weight"], model.weight)


def test_a_container_leaf_with_a_hook_is_planned_inside():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x) * 2

    model = nn.Sequential(Block())
    model[0].register_forward_hook(lambda *_: None)
    assert [site.path for site in prepare(model, torch.randn(2, 4)).record.sites] == ["0.inner"]


def test_a_module_in_training_mode_inside_an_eval_model_stays_float():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].train()
    from fxquant import prepare_fx

    prepared = prepare_fx(model, everything(), torch.randn(2, 4))
    assert [left.reason for left in prepared.record.skipped] == ["it is in training mode; call .eval() on it"]


def test_modules_that_forward_does_not_call_are_no_candidates():
    model = WordLM()
    model.unused = nn.Linear(3, 3)
    prepared = prepare(model, *lm_inputs(model), mapping=everything().set_module_name("unused", None))
    assert "unused" not in {left.path for left in prepared.record.skipped}
    assert not hasattr(prepared, "unused")


def test_layers_without_matrices_are_no_candidates():
    model = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.PReLU())
    record = prepare(model, torch.randn(2, 4)).record
    assert (record.sites, record.skipped) == ((), ())


def test_replay_finds_the_sites_of_another_copy():
    model = Functional().eval()
    sites = prepare(model, torch.randn(2, 4)).record.sites
    again = replay(trace(Functional().eval(), OPERATORS).module, sites, OPERATORS)
    assert [(i, target.node.name, target.weight.target) for i, target in again.targets.items()] == [
        (i, site.call, site.path) for i, site in enumerate(sites)
    ]


def test_replay_says_what_is_missing():
    sites = prepare(Functional(), torch.randn(2, 4)).record.sites
    with pytest.raises(LookupError, match=r"no call 'linear' of F.linear on 'weight'"):
        replay(trace(nn.Sequential(nn.Linear(4, 4)).eval(), OPERATORS).module, sites, OPERATORS)


def test_an_order_entry_may_name_a_fused_pair():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    mapping = QConfigMapping().set_module_name_object_type_order("", nn.Linear, 0, default_dynamic_qconfig)
    assert [site.path for site in prepare(model, torch.randn(2, 4), mapping=mapping).record.sites] == ["0"]


def test_a_weight_beside_submodules_counts_its_own_bytes():
    model = nn.Sequential(nn.Linear(4, 8))
    model.register_parameter("positions", nn.Parameter(torch.zeros(2, 8)))
    found = {row.path: row.float_bytes for row in explain(quantize_dynamic(model.eval())).rows}
    assert found == {"": 4 * 2 * 8, "0": 4 * (4 * 8 + 8)}


@pytest.mark.parametrize("way", ["fx", "in a graph", "eager"])
def test_an_adaptive_softmax_calls_its_children(way):
    torch.manual_seed(0)
    loss, inputs = nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 10]).eval(), (torch.randn(6, 16), torch.arange(0, 18, 3))

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = loss

        def forward(self, x, labels):
            return self.loss(x, labels)

    model = Holder().eval() if way == "in a graph" else loss
    mapping = default_dynamic_qconfig_mapping()
    if way == "eager":
        quantized = quantize_dynamic(model)
    elif way == "fx":
        with pytest.warns(UserWarning, match="AdaptiveLogSoftmaxWithLoss does not trace"):
            quantized = convert_fx(prepare_fx(model, mapping, inputs))
    else:
        quantized = convert_fx(prepare_fx(model, mapping, inputs))
    assert quantized._fxquant_record.coverage.share == 1
    got, expected = quantized(*inputs), model(*inputs)
    assert 0 < (got.output - expected.output).abs().max() < 0.05 * expected.output.abs().max()


def test_a_weight_that_stays_float_says_what_keeps_it_quantized_too():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(20, 16), nn.Linear(16, 16)
            self.weight = self.table.weight

        def forward(self, x):
            y = self.out(self.table(x))
            return F.linear(y, self.weight) if y.sum() < 1e9 else y

    quantized = quantize_dynamic(Tied().eval())
    (left,) = quantized._fxquant_record.skipped
    assert left.reason.endswith("; its weight is that of 'table' too, which is quantized: both are kept")
    assert left.float_bytes == 20 * 16 * 4
    assert quantized._fxquant_record.coverage == Coverage(16 * 16 * 4, (20 + 16) * 16 * 4)
    mapping = everything().set_module_name("table", None)
    record = quantize_dynamic(Tied().eval(), mapping)._fxquant_record
    assert not any("both are kept" in left.reason for left in record.skipped)
