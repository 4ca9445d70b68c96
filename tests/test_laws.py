"""The laws of the design, over random models, batches, lengths and splits. Law 6 is in test_structure.py.

Law 5 (reference and native agree) is in tests/native; law 7 (with and without the native library) is CI's two runs.
"""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fxquant import (
    QConfigMapping,
    convert_fx,
    explain,
    fuse_fx,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    quantize_dynamic,
)
from tests.samples import WordLM, everything, leaves, lm_inputs, prepare, quantize, same_bits


class RandomNet(nn.Module):
    """A few layers of random kinds over rows of 8 values, some of them functional, some followed by a ReLU."""

    def __init__(self, seed):
        super().__init__()
        generator = random.Random(seed)
        self.plan = [generator.choice(["linear", "functional", "relu", "skip", "norm"]) for _ in range(7)]
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=generator.random() < 0.7) for _ in self.plan)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in self.plan)

    def forward(self, x):
        for kind, layer, norm in zip(self.plan, self.layers, self.norms, strict=True):
            if kind == "linear":
                x = layer(x)
            elif kind == "functional":
                x = F.linear(x, layer.weight, layer.bias)
            elif kind == "relu":
                x = F.relu(layer(x))
            elif kind == "skip":
                x = x + layer(x)
            else:
                x = norm(x)
        return x


def snapshot(model):
    """Return all that a model is: types, modes, tensors and where they live, hooks and other attributes."""
    places = ("_modules", "_parameters", "_buffers")
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        tensors = {n: t for n, t in {**module._parameters, **module._buffers}.items() if t is not None}
        found[name] = (
            type(module),
            module.training,
            {n: (id(t), t.clone(), t.requires_grad) for n, t in tensors.items()},
            {key: str(value) for key, value in vars(module).items() if key not in places},
        )
    return found


def same_snapshot(a, b):
    if a.keys() != b.keys():
        return False
    for name in a:
        (kind, mode, tensors, rest), (kind2, mode2, tensors2, rest2) = a[name], b[name]
        if (kind, mode, rest) != (kind2, mode2, rest2) or tensors.keys() != tensors2.keys():
            return False
        for key in tensors:
            (place, value, grad), (place2, value2, grad2) = tensors[key], tensors2[key]
            if place != place2 or grad != grad2 or not torch.equal(value, value2):
                return False
    return True


# Law 1: outputs are kept bit for bit up to convert.


@pytest.mark.parametrize("seed", range(6))
def test_law_1_prepare_and_fuse_keep_random_models_bit_for_bit(seed):
    model, x = RandomNet(seed).eval(), torch.randn(3, 8)
    expected = model(x)
    assert torch.equal(prepare(model, x)(x), expected)
    assert torch.equal(fuse_fx(model, x)(x), expected)


def test_law_1_prepare_keeps_the_language_model_bit_for_bit():
    model = WordLM().eval()
    inputs = lm_inputs(model)
    assert same_bits(prepare(model, *inputs)(*inputs), model(*inputs))


def test_running_data_through_a_prepared_model_changes_nothing():
    model, x = RandomNet(1).eval(), torch.randn(3, 8)
    prepared = prepare(model, x)
    before = {n: t.clone() for n, t in prepared.state_dict().items()}
    at_once = convert_fx(prepared)(x)
    for _ in range(3):
        prepared(torch.randn(5, 8) * 100)
    assert all(torch.equal(t, before[n]) for n, t in prepared.state_dict().items())
    assert torch.equal(convert_fx(prepared)(x), at_once)


# Law 2: the user's model is never changed.


def abuses():
    """Yield things that a user may do with the results, each of which must not reach the float model."""
    yield "half", lambda p, q: (p.half(), q.half())
    yield "double", lambda p, q: (p.double(), q.double())
    yield "zero", lambda p, q: [t.detach().zero_() for t in q.state_dict().values()]
    yield "load", lambda p, q: q.load_state_dict({n: torch.zeros_like(t) for n, t in q.state_dict().items()})
    yield "assign", lambda p, q: q.load_state_dict({n: t.clone() for n, t in q.state_dict().items()}, assign=True)
    yield "train", lambda p, q: (p.train(), q.train())
    yield "requires_grad", lambda p, q: (p.requires_grad_(False), q.requires_grad_(False))
    yield "meta", lambda p, q: (p.to("meta"), q.to("meta"))
    yield "hooks", lambda p, q: [m.register_forward_hook(lambda *a: None) for m in (*p.modules(), *q.modules())]
    yield "delete", lambda p, q: [m._modules.clear() for m in (*p.modules(), *q.modules())]
    yield "init", lambda p, q: q.apply(lambda m: [nn.init.zeros_(t) for t in m.parameters(recurse=False)])
    yield "attributes", lambda p, q: [setattr(m, "mine", 1) for m in (*p.modules(), *q.modules())]


ABUSES = dict(abuses())


@pytest.mark.filterwarnings("ignore:.*its quantized weights are integers and do not train")
@pytest.mark.parametrize("abuse", list(ABUSES.values()), ids=list(ABUSES))
def test_law_2_nothing_done_to_the_results_reaches_the_model(abuse):
    class Model(RandomNet):
        def __init__(self):
            super().__init__(3)
            self.batch_norm = nn.BatchNorm1d(8)
            self.conv = nn.Conv1d(3, 3, 1)

        def forward(self, x):
            return self.batch_norm(super().forward(self.conv(x)).sum(1))

    model, x = Model().eval(), torch.randn(2, 3, 8)
    before, expected = snapshot(model), model(x)
    prepared = prepare(model, x)
    quantized = convert_fx(prepared)
    assert same_snapshot(snapshot(model), before)
    abuse(prepared, quantized)
    assert same_snapshot(snapshot(model), before)
    assert torch.equal(model(x), expected)


def test_law_2_the_prepared_model_is_not_changed_by_convert():
    model, x = RandomNet(2).eval(), torch.randn(3, 8)
    prepared = prepare(model, x)
    before, code = snapshot(prepared), prepared.code
    convert_fx(prepared)
    assert same_snapshot(snapshot(prepared), before)
    assert prepared.code == code
    assert torch.equal(prepared(x), model(x))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_law_2_a_table_that_rescales_its_rows_when_called_is_not_the_models(kind):
    model, x = nn.Sequential(kind(9, 4, max_norm=0.1), nn.Linear(4, 4)).eval(), torch.randint(9, (3, 4))
    before = model[0].weight.detach().clone()
    prepared = prepare(model, x)
    for module in (prepared, convert_fx(prepared), quantize_dynamic(model)):
        module(x)
    assert torch.equal(model[0].weight, before)


def test_law_2_the_example_inputs_are_not_changed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x):
            return self.net(x.add_(1))

    x = torch.randn(2, 4)
    before = x.clone()
    prepare(Model(), x)
    assert torch.equal(x, before)


def test_law_2_a_failing_prepare_leaves_no_trace():
    model = WordLM().eval()
    before = snapshot(model)
    for inputs in ((torch.zeros(2, 1),), (torch.zeros(2, 1), model.init_hidden(1)), ("x", 3)):
        with pytest.raises(Exception, match="example_inputs"):
            prepare(model, *inputs)
    assert same_snapshot(snapshot(model), before)


# Law 3: nothing is left float silently.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mapping", [everything(), QConfigMapping(), everything().set_object_type(nn.Linear, None)])
def test_law_3_every_weight_is_a_site_or_has_a_reason(seed, mapping):
    model, x = RandomNet(seed).eval(), torch.randn(3, 8)
    called = {
        f"layers.{i}" + (".weight" if kind == "functional" else "")
        for i, kind in enumerate(model.plan)
        if kind != "norm"
    }
    if not any(kind in ("linear", "relu", "skip") for kind in model.plan):
        pytest.skip("no nn.Linear is called")
    rows = explain(convert_fx(prepare(model, x, mapping=mapping))).rows
    assert {row.path for row in rows} == called
    assert all(row.is_quantized or row.decision.startswith("float: ") for row in rows)


# Law 4: a row's result depends on that row alone; step by step equals the sequence.


@pytest.mark.parametrize("seed", range(3))
def test_law_4_rows_of_random_models(seed):
    torch.manual_seed(seed)
    model, x = RandomNet(seed).eval(), torch.randn(9, 8) * torch.logspace(-3, 3, 9).unsqueeze(1)
    for layer in model.norms:  # LayerNorm is torch's own, float
        layer.forward = nn.Identity().forward
    quantized = quantize(model, x)
    together = quantized(x)
    order = torch.randperm(9)
    assert torch.equal(quantized(x[order]), together[order])
    for size in (1, 2, 5):
        assert torch.equal(torch.cat([quantized(part) for part in x.split(size)]), together)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"nlayers": 1}, {"nlayers": 3, "ninp": 33, "nhid": 17}])
@pytest.mark.parametrize("schemes", [{}, {"ih_l0": int4_dynamic_qconfig, "hh_l0": int16_dynamic_qconfig}])
def test_law_4_the_language_model_alone_in_batches_and_split(seed, options, schemes):
    torch.manual_seed(seed)
    model = WordLM(**options).eval()
    time, batch = 11, 5
    ids = torch.randint(50, (time, batch))
    hidden = tuple(torch.randn_like(h) for h in model.init_hidden(batch))
    mapping = everything()
    for name, qconfig in schemes.items():
        mapping.set_module_name(f"rnn.weight_{name}", qconfig)
    quantized = quantize(model, ids, hidden, mapping=mapping)
    whole, final = quantized(ids, hidden)
    for b in range(batch):
        alone, state = quantized(ids[:, b : b + 1], tuple(h[:, b : b + 1] for h in hidden))
        assert torch.equal(alone, whole[:, b : b + 1])
        assert same_bits(state, tuple(h[:, b : b + 1] for h in final))
    cuts = sorted(random.Random(seed).sample(range(1, time), 3))
    parts, state = [], hidden
    for part in torch.tensor_split(ids, cuts):
        out, state = quantized(part, state)
        parts.append(out)
    assert torch.equal(torch.cat(parts), whole)
    assert same_bits(state, final)


@pytest.mark.parametrize("seed", range(3))
def test_law_4_random_lengths_in_a_packed_batch(seed):
    torch.manual_seed(seed)
    lengths = torch.randint(1, 8, (5,))
    x = torch.randn(int(lengths.max()), 5, 6)
    quantized = convert_fx(prepare(nn.Sequential(nn.LSTM(6, 5, 2, bidirectional=True)), x))
    output, _ = pad_packed_sequence(quantized(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])
    for b, length in enumerate(lengths.tolist()):
        assert torch.equal(output[:length, b : b + 1], quantized(x[:length, b : b + 1])[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_law_4_does_not_depend_on_threads(threads):
    model = WordLM(ntoken=300, ninp=64, nhid=48).eval()
    inputs = lm_inputs(model, 7, 16)
    quantized = quantize(model, *inputs)
    expected = quantized(*inputs)
    torch.set_num_threads(threads)
    for size in (1, 16):
        got = [quantized(ids, model.init_hidden(size))[0] for ids in inputs[0].split(size, dim=1)]
        assert torch.equal(torch.cat(got, 1), expected[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_law_4_a_bad_row_spoils_only_itself(bad):
    quantized = quantize(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(1, 8))
    x = torch.randn(5, 8)
    clean = quantized(x)
    x[3, 5] = bad
    output = quantized(x)
    keep = [0, 1, 2, 4]
    assert torch.equal(output[keep], clean[keep])
    assert output[3].isnan().all() == (bad != bad)


# The quantized model is one for torch.compile and torch.export, and for copies.


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, inside dynamo and export
@pytest.mark.parametrize("way", ["compile", "export", "export with dynamic time"])
def test_the_language_model_goes_through_whole(way):
    model = WordLM().eval()
    inputs = lm_inputs(model, 5, 3)
    quantized = quantize(model, *inputs)
    with torch.no_grad():
        if way == "compile":
            run = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        elif way == "export":
            run = torch.export.export(quantized, inputs).module()
        else:
            time = torch.export.Dim("time", min=2, max=64)
            shapes = ({0: time}, ({}, {}))
            run = torch.export.export(quantized, inputs, dynamic_shapes=shapes).module()
            inputs = lm_inputs(model, 9, 3)
        assert same_bits(run(*inputs), quantized(*inputs))


def test_autograd_stops_at_quantized_weights_without_an_error():
    quantized = quantize(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    x = torch.randn(2, 4, requires_grad=True)
    with torch.inference_mode():
        expected = quantized(x)
    assert torch.equal(quantized(x).detach(), expected)


def test_two_results_of_one_prepared_model_are_independent():
    model, x = RandomNet(4).eval(), torch.randn(3, 8)
    prepared = prepare(model, x)
    first, second = convert_fx(prepared), convert_fx(prepared)
    expected = copy.deepcopy(second)(x)
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.zero_()
    assert torch.equal(second(x), expected)
    assert not leaves(first(x))[0].isnan().any()
