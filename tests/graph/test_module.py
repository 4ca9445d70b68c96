"""FxModule: copies, pickles and torch.save keep all of it; its attributes and its state_dict."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import FxQuantError, convert_fx, default_static_qconfig_mapping, explain, fuse_fx, prepare_fx
from fxquant.graph.module import FxModule
from fxquant.graph.record import record_of
from tests.samples import WordLM, everything, lm_inputs, prepare, quantize, same_bits


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


TWINS = {
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle of a pickle": lambda m: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(m)))),
    "pickle of a copy": lambda m: pickle.loads(pickle.dumps(copy.deepcopy(m))),
    "torch.save": through_torch_save,
}


class Busy(nn.Module):
    """Modules, functionals, a tie, methods of the same name: what node names are hard to keep for."""

    def __init__(self):
        super().__init__()
        self.encoder, self.linear, self.drop = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Dropout()
        self.add_module("a|b", nn.Linear(8, 8))

    def forward(self, ids, scale: float = 2.0):
        x = self.drop(self.encoder(ids))
        x = F.linear(F.relu(self.linear(x)), self.linear.weight) * scale
        x = F.linear(getattr(self, "a|b")(x), self.encoder.weight)
        torch._assert(x.shape[-1] == 20, "columns")
        return {"logits": x, "none": None, "pair": (x + 1, 3)}


@pytest.fixture(params=["fused", "prepared", "quantized"])
def model(request):
    float_model, ids = Busy().eval(), torch.arange(5)
    if request.param == "fused":
        return fuse_fx(float_model, ids)
    prepared = prepare(float_model, ids)
    return prepared if request.param == "prepared" else convert_fx(prepared)


@pytest.mark.parametrize("twin_of", TWINS.values(), ids=TWINS)
def test_a_twin_computes_the_same_and_goes_on(model, twin_of):
    ids = torch.arange(7)
    twin = twin_of(model)
    assert isinstance(twin, FxModule)
    assert same_bits(twin(ids), model(ids))
    assert twin.record == model.record
    assert not twin.training
    assert twin.__class__.__name__ == "Busy"
    if model.record.stage == "prepared":
        assert same_bits(convert_fx(twin)(ids), convert_fx(model)(ids))
    if model.record.stage != "fused":
        assert str(explain(twin)) == str(explain(model))


@pytest.mark.parametrize("twin_of", TWINS.values(), ids=TWINS)
def test_a_twin_keeps_names_targets_shapes_and_stack_traces(model, twin_of):
    twin = twin_of(model)
    for a, b in zip(model.graph.nodes, twin.graph.nodes, strict=True):
        assert (a.name, a.op, str(a.target)) == (b.name, b.op, str(b.target))
        assert a.stack_trace == b.stack_trace
        assert ("tensor_meta" in a.meta) == ("tensor_meta" in b.meta)
    assert any(node.stack_trace for node in twin.graph.nodes)


@pytest.mark.parametrize("twin_of", TWINS.values(), ids=TWINS)
def test_a_twin_shares_no_tensor(model, twin_of):
    twin = twin_of(model)
    mine = {t.data_ptr() for t in model.state_dict().values()}
    assert mine.isdisjoint(t.data_ptr() for t in twin.state_dict().values())


def test_a_shallow_copy_is_one_of_ours(model):
    twin, ids = copy.copy(model), torch.arange(7)
    assert isinstance(twin, FxModule)
    assert twin.record is model.record
    assert same_bits(twin(ids), model(ids))


def test_tied_tables_stay_tied_in_twins():
    quantized = quantize(WordLM(ninp=8, tie=True), *lm_inputs(WordLM()))
    assert quantized.encoder.weight is quantized.decoder.weight
    for twin_of in TWINS.values():
        twin = twin_of(quantized)
        assert twin.encoder.weight_int8 is twin.decoder.weight_int8
        assert twin.encoder.weight is twin.decoder.weight


def test_a_state_dict_of_the_float_model_is_refused_and_nothing_is_changed():
    model = WordLM().eval()
    quantized = quantize(model, *lm_inputs(model))
    before = {n: t.clone() for n, t in quantized.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"encoder.weight is a weight that is not quantized.*: here it is weight_int8"
    ):
        quantized.load_state_dict(model.state_dict())
    assert all(torch.equal(t, before[n]) for n, t in quantized.state_dict().items())


def test_a_functionals_integers_are_refused_as_floats():
    from tests.samples import Call

    quantized = quantize(Call(F.linear, 4, 6), torch.randn(2, 6))
    state = {n: t.float() for n, t in quantized.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight_int8 holds torch.int8, the state_dict has torch.float32"):
        quantized.load_state_dict(state)


def test_a_state_dict_of_another_shape_is_torchs_error():
    small, big = WordLM().eval(), WordLM(nhid=9).eval()
    quantized, other = quantize(small, *lm_inputs(small)), quantize(big, *lm_inputs(big))
    with pytest.raises(RuntimeError, match="size mismatch"):
        quantized.load_state_dict(other.state_dict())


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)])
def test_another_dtype_keeps_int8_and_scales(move):
    model = WordLM().eval()
    inputs = lm_inputs(model)
    quantized = quantize(model, *inputs)
    before = {n: t.clone() for n, t in quantized.state_dict().items()}
    move(quantized)
    for name, tensor in quantized.state_dict().items():
        if not name.split(".")[-1].startswith("bias"):
            assert torch.equal(tensor, before[name])
            assert tensor.dtype == before[name].dtype


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.double()])
def test_another_dtype_keeps_the_scales_of_functionals(move):
    from tests.samples import Call

    quantized = quantize(Call(F.linear, 4, 6), torch.randn(2, 6))
    scale = quantized.weight_scale.clone()
    move(quantized)
    assert quantized.weight_scale.dtype == torch.float32
    assert torch.equal(quantized.weight_scale, scale)


def test_an_unknown_attribute_says_how_to_keep_it():
    model = WordLM()
    for result in (prepare(model, *lm_inputs(model)), quantize(model, *lm_inputs(model))):
        with pytest.raises(
            AttributeError, match=r"no attribute 'init_hidden'.*preserved_attributes=\('init_hidden',\)"
        ):
            result.init_hidden(3)
        assert not hasattr(result, "init_hidden")


def test_a_method_moved_by_dtype_is_still_the_models():
    model = WordLM()
    quantized = quantize(model, *lm_inputs(model), preserved_attributes=("init_hidden", "nlayers", "nhid"))
    assert quantized.half().init_hidden(2)[0].shape == (2, 2, 8)


def test_what_the_user_hangs_on_a_result_is_kept_in_twins(model):
    model.vocabulary = {"<eos>": 0}
    for name, twin_of in TWINS.items():
        twin = twin_of(model)
        assert twin.vocabulary == {"<eos>": 0}, name
        assert twin.vocabulary is not model.vocabulary


def test_every_error_of_ours_is_caught_by_one_name():
    with pytest.raises(FxQuantError, match="convert_fx needs the result of prepare_fx"):
        convert_fx(nn.Linear(2, 2))


def test_stages():
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    prepared = prepare(model, x, mapping=everything())
    stages = [record_of(m).stage for m in (fuse_fx(model, x), prepared, convert_fx(prepared))]
    assert stages == ["fused", "prepared", "quantized"]
    assert record_of(model) is None


def test_a_users_module_may_be_named_record():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.record = nn.Linear(4, 4)

        def forward(self, x):
            return self.record(x)

    x = torch.randn(2, 4)
    quantized = convert_fx(prepare(Model().eval(), x))
    assert type(quantized.record).__name__ == "DynamicQuantizedLinear"
    assert [site.path for site in record_of(copy.deepcopy(quantized)).sites] == ["record"]


def test_inside_a_larger_model_floats_are_not_loaded_into_integers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    outer = nn.Sequential(convert_fx(prepare(Model().eval(), torch.randn(2, 4))))
    state = {name: tensor.float() for name, tensor in outer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight_int8 holds torch\.int8, the state_dict has torch\.float32"):
        outer.load_state_dict(state)


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_the_twin_of_a_module_compiled_in_place_runs_itself(twin):
    quantized, x = quantize(nn.Sequential(nn.Linear(8, 8, bias=False)).eval(), torch.randn(3, 8)), torch.randn(3, 8)
    quantized.compile(backend="eager")
    copied = twin(quantized)
    copied.get_submodule("0").weight_int8.zero_()
    assert not copied(x).any()
    assert quantized(x).all()


class Viewed(nn.Module):
    """Its view has a size that only some inputs can take."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x).view(8, -1)


@pytest.mark.parametrize("twin_of", [lambda q: q, *TWINS.values()], ids=["itself", *TWINS])
def test_an_error_in_the_graph_keeps_its_traceback_and_prints_nothing(capsys, twin_of):
    twin = twin_of(quantize(Viewed(), torch.randn(2, 4)))
    with pytest.raises(RuntimeError) as caught:
        twin(torch.randn(3, 4))
    assert "view" in str(caught.traceback[-1].statement)
    assert capsys.readouterr().err == ""


def test_the_old_name_of_what_was_skipped_warns():
    record = prepare(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), mapping=everything(None)).record
    with pytest.warns(DeprecationWarning, match=r"record\.left is now record\.skipped"):
        assert record.left == record.skipped != ()


class Segmenter(nn.Module):
    """What stands between static layers: sums, products, pools, padding, interpolations to computed sizes."""

    def __init__(self):
        super().__init__()
        self.down, self.side = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        size = x.shape[-2:]
        y = F.avg_pool2d(F.pad(F.gelu(self.down(x)), (1, 1, 1, 1)), 3, 1)
        z = self.norm(F.adaptive_avg_pool2d(y, 3) * torch.sigmoid(self.side(y).mean((2, 3), keepdim=True)))
        z = F.interpolate(F.max_pool2d(z, 2), size=y.shape[-2:], mode="bilinear")
        z = torch.cat([z + y, y.softmax(1)], 1)
        return {"out": F.interpolate(self.head(z), size=size, mode="bilinear")}


@pytest.mark.parametrize("twin_of", TWINS.values(), ids=TWINS)
def test_a_static_twin_calls_the_same_functions(twin_of):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    prepared = prepare_fx(Segmenter().eval(), default_static_qconfig_mapping(), x)
    model = convert_fx(prepared, data=[x])
    twin = twin_of(model)
    called = {node.target for node in model.graph.nodes if getattr(node.target, "__module__", "") == "fxquant.ops"}
    assert len(called) >= 7
    for a, b in zip(model.graph.nodes, twin.graph.nodes, strict=True):
        assert (a.name, a.op, a.target) == (b.name, b.op, b.target)
    assert same_bits(twin(x), model(x))
