"""prepare_qat_fx: what it takes and refuses, training, and the law that the converted model does what was trained."""

import copy
import dataclasses
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant import (
    ArgumentError,
    CalibrationError,
    ModelStateError,
    QConfigError,
    QConfigMapping,
    convert_fx,
    default_qat_qconfig,
    prepare_fx,
    prepare_qat_fx,
)
from tests.samples import WordLM, lm_inputs, sqnr


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.deep(x) + x)
        return self.fc(self.drop(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).flatten(1)))


def batch(seed, count=16):
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def prepare(model=None, mapping=None, **options):
    torch.manual_seed(0)
    mapping = mapping or fxquant.default_qat_qconfig_mapping()
    return prepare_qat_fx(model or Net().train(), mapping, (batch(0, 2),), **options)


def step(model, optimizer, seed):
    torch.manual_seed(seed)  # dropout
    optimizer.zero_grad()
    x = batch(seed)
    loss = F.cross_entropy(model(x), x.flatten(1).argmax(1) % 4)
    loss.backward()
    optimizer.step()
    return loss


def train(model, steps=4, first=0, rate=0.05):
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for seed in range(first, first + steps):
        step(model, optimizer, seed)
    return model


def test_the_converted_model_gives_what_the_trained_one_does():
    prepared = train(prepare()).eval()
    quantized = convert_fx(prepared)
    with torch.no_grad():
        assert sqnr(prepared(batch(9)), quantized(batch(9))) > 60  # but for the order of sums, the same
    assert convert_fx(prepared.train())(batch(9)).equal(quantized(batch(9)))  # whatever the mode


def test_a_mapping_for_calibration_is_refused():
    with pytest.raises(QConfigError, match=r"'stem.0' .* qconfig for calibration, .*default_qat_qconfig_mapping\(\)"):
        prepare(mapping=fxquant.default_static_qconfig_mapping())


def test_ranges_that_follow_training_are_taken():
    for way in (fxquant.ranges.MinMax(), fxquant.ranges.Fixed(-1.0, 3.0), None):
        activation = dataclasses.replace(default_qat_qconfig.activation, range=way)
        mapping = QConfigMapping().set_global(dataclasses.replace(default_qat_qconfig, activation=activation))
        prepared = train(prepare(mapping=mapping), 1).eval()
        assert sqnr(prepared(batch(9)), convert_fx(prepared)(batch(9))) > 30


def test_a_mapping_for_training_calibrates_too():
    prepared = prepare_fx(Net().eval(), fxquant.default_qat_qconfig_mapping(), (batch(0),))
    assert convert_fx(prepared, data=[(batch(1),)]).record.sites


def test_eval_mode_is_refused():
    with pytest.raises(ModelStateError, match=r"model\.train\(\)"):
        prepare(Net().eval())
    with pytest.raises(ModelStateError, match="prepared already"):
        prepare(prepare())


def test_nothing_to_quantize_is_told():
    with pytest.warns(UserWarning, match="nothing in this ReLU is to be quantized"):
        prepare(nn.ReLU().train())


def test_before_any_batch_there_is_nothing_to_convert():
    with pytest.raises(CalibrationError, match="not calibrated"):
        convert_fx(prepare())


def test_data_has_no_place_in_its_conversion():
    with pytest.raises(ArgumentError, match="leave data out"):
        convert_fx(train(prepare(), 1), data=[(batch(0),)])


def test_a_model_that_does_not_trace_trains_in_its_own_class():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.fc = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            y = self.rnn(self.embed(x))[0]
            return self.fc(y if y.sum() > 0 else -y)

    x, model = torch.randint(20, (4, 5)), Branches().train()
    with pytest.warns(UserWarning, match="does not trace"):
        prepared = prepare_qat_fx(model, QConfigMapping().set_global(fxquant.default_dynamic_qconfig), (x,))
    assert type(prepared) is Branches
    assert prepared.training
    assert dict(prepared.named_parameters()).keys() == dict(model.named_parameters()).keys()
    before = prepared.fc.weight.detach().clone()
    prepared(x).square().sum().backward()
    torch.optim.SGD(prepared.parameters(), 0.1).step()
    assert not torch.equal(prepared.fc.weight, before)
    assert torch.equal(model.fc.weight, before)
    quantized = convert_fx(prepared.eval())
    assert {site.path for site in quantized._fxquant_record.sites} == {"embed", "rnn", "fc"}
    assert sqnr(prepared(x), quantized(x)) > 45


def test_the_users_model_is_left_alone():
    model = Net().train()
    model.deep.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    prepared = train(prepare(model), 2)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in prepared.parameters()}
    assert prepared.training
    assert not prepared.deep.get_submodule("1").training
    assert prepared.stem.get_submodule("1").training


def test_names_and_order_are_the_users():
    model = Net().train()
    prepared = prepare(model)
    assert dict(model.named_parameters()).keys() == dict(prepared.named_parameters()).keys()
    state = {name: torch.rand_like(value.float()).to(value.dtype) for name, value in model.state_dict().items()}
    prepared.load_state_dict(state)  # a float checkpoint
    assert all(torch.equal(prepared.state_dict()[name], value) for name, value in state.items())


def test_training_resumes_bit_for_bit():
    first, second = prepare(), prepare(Net().train())
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (first, second)]
    for seed in range(3):
        step(first, optimizers[0], seed)
    first.apply(fxquant.disable_observer)
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizers[0].state_dict()), file)
    file.seek(0)
    model_state, optimizer_state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in model_state.values())
    second.load_state_dict(model_state)
    optimizers[1].load_state_dict(optimizer_state)
    for seed in range(3, 6):
        losses = [step(model, optimizer, seed) for model, optimizer in zip((first, second), optimizers, strict=True)]
        assert torch.equal(*losses)
    a, b = first.state_dict(), second.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_copy_is_the_same_model(way):
    prepared = train(prepare(), 2)
    if way == "deepcopy":
        twin = copy.deepcopy(prepared)
    else:
        file = io.BytesIO()
        torch.save(prepared, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.training
    x = batch(7)
    assert torch.equal(copy.deepcopy(prepared).eval()(x), copy.deepcopy(twin).eval()(x))
    train(twin, 1, 5), train(prepared, 1, 5)
    assert torch.equal(convert_fx(twin)(x), convert_fx(prepared)(x))


def test_an_average_of_the_weights_converts():
    prepared = prepare()
    average = AveragedModel(prepared)
    for seed in range(3):
        train(prepared, 1, seed)
        average.update_parameters(prepared)
    average.eval()
    quantized = convert_fx(average.module)
    assert sqnr(average(batch(9)), quantized(batch(9))) > 60


def test_bfloat16_autocast_trains():
    prepared = prepare()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(prepared(batch(0)), torch.zeros(16, dtype=torch.long))
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in prepared.parameters() if p.dim() > 1)
    assert sqnr(prepared.eval()(batch(1)), convert_fx(prepared)(batch(1))) > 60


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    plain = prepare()
    for norm in (plain.stem.get_submodule("1"), plain.deep.get_submodule("1")):
        norm.momentum = 0.0  # torch itself counts a recomputed batch twice
    plain.drop.p = 0.0
    twin, x = copy.deepcopy(plain), batch(0).requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=use_reentrant).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    ranges = [[m.high for m in model.modules() if isinstance(m, fxquant.FakeQuantize)] for model in (plain, twin)]
    assert ranges[0] == ranges[1]


def test_gradients_accumulate():
    prepared = prepare()
    prepared.drop.p = 0.0
    prepared.apply(fxquant.freeze_bn_stats)
    prepared(batch(0)).sum().backward()
    prepared.apply(fxquant.disable_observer)
    prepared.zero_grad()
    prepared(batch(1)).sum().backward()
    once = prepared.fc.weight.grad.clone()
    prepared(batch(1)).sum().backward()
    assert torch.equal(prepared.fc.weight.grad, 2 * once)


def test_small_batches_train_with_frozen_statistics():
    """Images of other offsets, one a batch: normalized by its own statistics, an image loses what tells it apart."""
    losses = {}
    for is_frozen in (True, False):
        prepared = train(prepare(), 5)
        prepared.drop.p = 0.0
        if is_frozen:
            prepared.apply(fxquant.freeze_bn_stats)
        optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
        for seed in range(60):
            optimizer.zero_grad()
            F.cross_entropy(prepared(batch(seed, 1) + seed % 2), torch.tensor([seed % 2])).backward()
            optimizer.step()
        prepared.eval()
        with torch.no_grad():
            pairs = [F.cross_entropy(prepared(batch(0) + label), torch.full((16,), label)) for label in (0, 1)]
        losses[is_frozen] = sum(pairs).item() / 2
        assert sqnr(prepared(batch(9)), convert_fx(prepared)(batch(9))) > 30
    assert losses[True] < 0.5 < losses[False]


def test_a_loss_that_became_nan_names_the_first_value():
    prepared = train(prepare(), 1)
    with torch.no_grad():
        prepared.deep.get_submodule("0").weight[0] = float("nan")
    with pytest.raises(fxquant.DivergedError, match=r"'deep\.0' became NaN in training"):
        prepared(batch(0))


@pytest.mark.parametrize("layer", [nn.LSTM(6, 8), nn.MultiheadAttention(6, 1), nn.Linear(6, 8)], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_became_nan_are_named_at_convert(layer, number):
    class Of(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(6, 6), copy.deepcopy(layer)

        def forward(self, x):
            x = self.first(x)
            return self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)

    mapping = QConfigMapping().set_global(fxquant.default_dynamic_qconfig)
    prepared = prepare_qat_fx(Of().train(), mapping, (torch.randn(3, 2, 6),))
    name, weight = next(iter(prepared.layer.named_parameters()))
    with torch.no_grad():
        weight[0, 0] = number
    with pytest.raises(fxquant.DivergedError, match=rf"'{name}' of 'layer' \(nn\.\w+\) became NaN or infinite"):
        convert_fx(prepared)


@pytest.mark.parametrize("learns", [False, True])
def test_calls_with_weights_of_their_own_train(learns):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(4, 1, 3, 3) / 3), nn.Parameter(torch.rand(4, 3))
            self.bias, self.norm = nn.Parameter(torch.zeros(4)), nn.BatchNorm2d(4)

        def forward(self, x):
            x = F.relu(self.norm(F.conv2d(x, self.first, self.bias, padding=1)))
            return F.relu(F.linear(x.mean((2, 3)), self.second.t()))

    qconfig = default_qat_qconfig
    if learns:
        weight = dataclasses.replace(qconfig.weight, range=fxquant.ranges.Learned())
        qconfig = dataclasses.replace(qconfig, weight=weight)
    prepared = prepare(Calls().train(), QConfigMapping().set_global(qconfig))
    prepared(batch(0)).square().mean().backward()
    assert all(parameter.grad.any() for name, parameter in prepared.named_parameters() if name != "bias")  # normed away
    torch.optim.SGD(prepared.parameters(), 0.01).step()
    prepared(batch(1))
    quantized = convert_fx(prepared.eval())
    assert [site.operator for site in quantized.record.sites] == ["static convolution", "static linear"]
    assert sqnr(prepared(batch(2)), quantized(batch(2))) > 30


def test_a_shared_module_trains_and_converts():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    prepared = prepare(Shared().train())
    train_once = prepared(batch(0)).square().mean()
    train_once.backward()
    assert prepared.conv.weight.grad.any()
    prepared.eval()
    assert sqnr(prepared(batch(1)), convert_fx(prepared)(batch(1))) > 60


def test_what_stays_float_trains_in_float():
    mapping = fxquant.default_qat_qconfig_mapping().set_module_name("stem.0", None)
    prepared = train(prepare(mapping=mapping), 2)
    assert type(prepared.stem.get_submodule("0")) is nn.Conv2d
    quantized = convert_fx(prepared.eval())
    assert {site.path for site in quantized.record.sites} == {"deep.0", "fc"}
    assert sqnr(prepared(batch(1)), quantized(batch(1))) > 60
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quantized.modules())


@pytest.mark.parametrize("norm", ["parametrizations", "hook"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_computed_trains_in_float(norm, tmp_path):
    of = nn.utils.parametrizations.weight_norm if norm == "parametrizations" else nn.utils.weight_norm

    def make():
        torch.manual_seed(0)
        return nn.Sequential(of(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))

    x, model = torch.randn(3, 8), make().train()
    prepared = prepare_qat_fx(model, QConfigMapping().set_global(fxquant.default_dynamic_qconfig), (x,))
    assert dict(prepared.named_parameters()).keys() == dict(model.named_parameters()).keys()
    prepared(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in prepared.parameters())
    torch.optim.SGD(prepared.parameters(), 0.1).step()
    quantized = convert_fx(prepared.eval())
    assert {site.path for site in quantized.record.sites} == {"2"}
    assert sqnr(prepared(x), quantized(x)) > 45
    fxquant.save(quantized, tmp_path / "q")
    assert torch.equal(fxquant.load(make().eval(), tmp_path / "q")(x), quantized(x))


def test_tied_weights_stay_tied():
    model = WordLM(ninp=8, tie=True).train()
    inputs = lm_inputs(model)
    prepared = prepare_qat_fx(model, QConfigMapping().set_global(fxquant.default_dynamic_qconfig), inputs)
    prepared(*inputs)[0].square().mean().backward()
    torch.optim.SGD(prepared.parameters(), 0.1).step()
    assert prepared.decoder.weight is prepared.encoder.weight
    quantized = convert_fx(prepared.eval())
    assert quantized.decoder.weight_int8 is quantized.encoder.weight_int8
    assert sqnr(prepared(*inputs)[0], quantized(*inputs)[0]) > 45


def test_what_the_user_keeps_is_kept():
    class Kept(Net):
        def classify(self, x):
            return self(x).argmax(1)

    prepared = prepare(Kept().train(), preserved_attributes=("classify",))
    assert prepared.classify(batch(0)).shape == (16,)
    quantized = convert_fx(prepared.eval())
    assert torch.equal(quantized.classify(batch(1)), prepared.classify(batch(1)))


def test_normalization_over_processes_takes_a_batchnorms_place():
    prepared = train(prepare(), 1)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(prepared).eval()
    assert type(synchronized.stem.get_submodule("1")) is nn.SyncBatchNorm
    assert sqnr(synchronized(batch(1)), convert_fx(synchronized)(batch(1))) > 30


def test_a_file_holds_what_was_trained(tmp_path):
    quantized = convert_fx(train(prepare(), 2))
    fxquant.save(quantized, tmp_path / "q")
    assert torch.equal(fxquant.load(Net().eval(), tmp_path / "q")(batch(1)), quantized(batch(1)))


def test_it_compiles():
    prepared = prepare()
    prepared(batch(0))
    prepared.drop.p = 0.0
    twin = copy.deepcopy(prepared)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        for each in (prepared, compiled):
            each(batch(seed)).square().sum().backward()
    for (name, one), other in zip(prepared.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-4), name
    highs = [[m.high for m in model.modules() if isinstance(m, fxquant.FakeQuantize)] for model in (prepared, twin)]
    assert all(map(torch.allclose, *highs))


def test_reports_know_it():
    prepared = train(prepare(), 1)
    assert "stem.0" in str(fxquant.explain(prepared))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = convert_fx(prepared)
    assert "fc" in str(fxquant.explain(quantized))
    assert "stem.0" in str(fxquant.graph_diff(Net().eval(), quantized))
    rows = {row.path: row for row in fxquant.compare(prepared, quantized, [(batch(1),)]).rows}
    assert rows.keys() == {"stem.0", "deep.0", "fc"}
    assert all(row.sqnr_db > 20 for row in rows.values())
