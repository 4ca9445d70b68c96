"""preserved_attributes: what is kept is read, set and called as on the float model, and counts for forward."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import AttributeNameError, FixedAttributeError, explain, fuse_fx, graph_diff
from fxquant.graph.record import Fusion, Unfused
from fxquant.graph.why import NotFused, because
from fxquant.nn import DynamicQuantizedLinear
from tests.samples import prepare, quantize, same_bits, sqnr


@pytest.fixture
def x():
    return torch.randn(4, 64)


# Methods that call modules.


class Side(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.rnn, self.out = nn.Embedding(50, 32), nn.GRU(32, 32), nn.Linear(32, 50)
        self.spare, self.gain = nn.Linear(32, 8), 2.0

    def forward(self, words, state=None):
        y, state = self.rnn(self.table(words), state)
        return self.out(y) * self.gain, state

    def summary(self, words):
        return self.spare(self.table(words))

    def set_gain(self, gain):
        self.gain = gain


class Translator(nn.Module):
    """A seq2seq model: forward learns, generate decodes step by step."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Side(), Side()
        self.reward = self.value = nn.Linear(50, 4)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.unused = nn.Linear(8, 8)

    def forward(self, words, target):
        return self.decoder(target, self.encoder(words)[1])[0]

    def generate(self, words, steps=3):
        state, word, given = self.encoder(words)[1], words[:1], []
        for _ in range(steps):
            y, state = self.decoder(word, state)
            word = y.argmax(-1)
            given.append((self.value(y) + self.reward(y)) @ self.mix)
        return torch.cat(given)

    def summary(self, words):
        return self.encoder.summary(words)

    def set_gain(self, gain):
        self.decoder.set_gain(gain)
        return self

    @property
    def gain(self):
        return self.decoder.gain

    @gain.setter
    def gain(self, gain):
        self.decoder.gain = gain

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return (self.encoder, self.decoder)[index]

    def __iter__(self):
        return iter((self.encoder, self.decoder))

    def __contains__(self, side):
        return any(side is own for own in self)


KEPT = ("generate", "summary", "set_gain", "gain", "__len__", "__getitem__", "__iter__", "__contains__")
WORDS = torch.arange(12).view(6, 2)


def translator(model, make=quantize):
    return make(model, WORDS, WORDS, preserved_attributes=KEPT)


def twins(model, folder):
    yield model
    yield copy.copy(model)
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    if model.record.stage == "quantized":
        fxquant.save(model, folder / "model.safetensors")
        with torch.device("meta"):
            skeleton = Translator().eval()
        yield fxquant.load(skeleton, folder / "model.safetensors")


def test_a_method_that_decodes_runs_its_modules_quantized_in_every_twin(tmp_path):
    model = Translator().eval()
    expected = model.generate(WORDS)
    for twin in twins(translator(model), tmp_path):
        assert type(twin.decoder).__name__ == "Side"
        assert type(twin.decoder.out) is type(twin.value) is type(twin.encoder.spare) is DynamicQuantizedLinear
        assert twin.reward is twin.value
        assert sqnr(expected, twin.generate(WORDS)) > 30
        assert sqnr(model.summary(WORDS), twin.summary(WORDS)) > 30
    for twin in twins(translator(model, prepare), tmp_path):
        assert same_bits(twin.generate(WORDS), expected)


def test_what_only_a_method_uses_is_counted():
    explained = explain(translator(Translator().eval()))
    rows = {row.path: row for row in explained.rows}
    assert rows["encoder.spare"].is_quantized
    assert sum(path in rows for path in ("value", "reward")) == 1  # one module of two names
    assert rows["mix"].decision == "float: code beside the graph uses it as it is"
    assert "unused" not in rows
    assert explained.coverage.total_bytes - explained.coverage.quantized_bytes == 4 * 4 * 4


def test_what_nothing_uses_stays_behind():
    quantized = translator(Translator().eval())
    with pytest.raises(AttributeError, match=r"no attribute 'unused'.*preserved_attributes=\('unused',\)"):
        _ = quantized.unused


def test_dunder_methods_and_properties_are_the_models():
    quantized = translator(Translator().eval())
    assert len(quantized) == 2
    assert quantized[1] is quantized.decoder
    assert list(quantized) == [quantized.encoder, quantized.decoder]
    assert quantized.encoder in quantized
    assert quantized not in quantized
    assert quantized.gain == 2.0


def test_the_views_take_such_a_model(tmp_path):
    model = Translator().eval()
    quantized = translator(model)
    rows = {row.name: row for row in graph_diff(model, quantized, fold=False).rows}
    assert rows["decoder_out"].sign == "~"
    assert rows["decoder_gain"].sign == " "
    compared = {row.path for row in fxquant.compare(model, quantized, [(WORDS, WORDS)]).rows}
    assert "decoder.out" in compared


# Setters count.


def test_a_setter_counts_in_every_twin(tmp_path):
    model = Translator().eval()
    for twin in (*twins(translator(model), tmp_path), *twins(translator(model, prepare), tmp_path)):
        before = twin(WORDS, WORDS)
        assert twin.set_gain(4.0) is twin
        assert same_bits(twin(WORDS, WORDS), 2 * before)
        twin.gain = 1.0
        assert same_bits(twin(WORDS, WORDS), before / 2)
        twin.gain = 2.0  # a shallow copy shares it
    assert model.gain == 2.0


def test_a_file_holds_what_was_set(tmp_path):
    quantized = translator(Translator().eval()).set_gain(8.0)
    fxquant.save(quantized, tmp_path / "model.safetensors")
    loaded = fxquant.load(Translator().eval(), tmp_path / "model.safetensors")
    assert loaded.gain == 8.0
    assert same_bits(loaded(WORDS, WORDS), quantized(WORDS, WORDS))


class Base(nn.Module):
    temperature = 1.0
    STEP = 0.5

    def __init__(self):
        super().__init__()
        self.score, self.mode, self._gain, self.width = nn.Linear(64, 10), "soft", 1.0, 10
        self.register_buffer("shift", torch.zeros(10))
        self.head = Head()
        self.activation = F.relu
        self.names = ["a"]

    def colder(self):
        self.temperature = self.temperature * self.STEP


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.normalized, self.scale = True, 3.0

    def forward(self, y):
        return F.normalize(y) * self.scale if self.normalized else y


class Ranker(Base):
    def colder(self):
        super().colder()
        return type(self).__name__

    def set_mode(self, mode):
        self.mode = mode

    @property
    def gain(self):
        return self._gain

    @gain.setter
    def gain(self, gain):
        self._gain = float(gain)

    @property
    def size(self):
        return self.width * 2

    def move(self, by):
        self.shift.fill_(by)

    def set_head(self, name, value):
        setattr(self.head, name, value)

    def turn(self, normalized):
        self.head.normalized = normalized

    @classmethod
    def make(cls):
        return cls()

    def forward(self, x):
        y = self.score(x).view(-1, self.width) / self.temperature * self.gain
        y = self.activation(y + self.shift.exp() * len(self.names))
        return self.head(y if self.mode == "soft" else -y)


def ranker(x, *names):
    return quantize(Ranker().eval(), x, preserved_attributes=names)


def test_a_class_attribute_and_super_work(x):
    quantized = ranker(x, "colder", "temperature")
    before = quantized(x)
    assert quantized.colder() == "Ranker"
    assert quantized.temperature == 0.5
    assert not same_bits(quantized(x), before)
    quantized.temperature = 1.0
    assert same_bits(quantized(x), before)
    assert Ranker.temperature == 1.0


def test_a_propertys_setter_counts_and_one_without_is_refused(x):
    quantized = ranker(x, "gain", "size")
    before = quantized(x)
    quantized.gain = 3
    assert quantized.gain == 3.0
    assert not same_bits(quantized(x), before)
    assert quantized.size == 20
    with pytest.raises(AttributeError):
        quantized.size = 3


def test_a_buffer_that_a_method_writes_into_counts(x):
    quantized = ranker(x, "move")
    before = quantized(x)
    quantized.move(2.0)
    assert not same_bits(quantized(x), before)  # though exp() of a buffer could be computed once


def test_a_classmethod_makes_a_float_model(x):
    made = ranker(x, "make").make()
    assert type(made) is Ranker
    assert made(x).shape == (4, 10)


@pytest.mark.parametrize(
    ("name", "value"), [("mode", "hard"), ("width", 5), ("activation", F.gelu), ("names", ["a", "b"])]
)
def test_setting_what_forward_was_traced_with_is_an_error(x, name, value):
    quantized = ranker(x, "mode", "set_mode", "activation", "size", "names")
    before, held = quantized(x), getattr(quantized, name)
    with pytest.raises(FixedAttributeError, match=f"'{name}' was read when forward was traced.*prepare that"):
        setattr(quantized, name, value)
    assert getattr(quantized, name) is held
    setattr(quantized, name, held)  # the same is fine
    assert same_bits(quantized(x), before)


def test_a_method_that_sets_it_says_so(x):
    quantized = ranker(x, "set_mode")
    with pytest.raises(FixedAttributeError, match=r"'mode' was read when forward was traced \('soft'\).*'hard' would"):
        quantized.set_mode("hard")
    quantized.set_mode("soft")


def test_changing_a_list_in_place_is_found_at_the_next_call(x):
    for quantized in (ranker(x, "names"), pickle.loads(pickle.dumps(ranker(x, "names")))):
        quantized(x)
        quantized.names.append("b")
        with pytest.raises(FixedAttributeError, match=r"'names' was read.*\['a'\]"):
            quantized(x)


def test_an_attribute_of_an_inner_module_counts_or_is_found_at_the_next_call(x):
    for quantized in (ranker(x, "head"), ranker(x, "turn", "set_head"), pickle.loads(pickle.dumps(ranker(x, "head")))):
        before = quantized(x)
        quantized.head.scale = 6.0
        assert same_bits(quantized(x), 2 * before)
        quantized.head.normalized = False
        with pytest.raises(FixedAttributeError, match=r"'head.normalized' was read when forward was traced \(True\)"):
            quantized(x)


def test_an_attribute_that_no_kept_code_sets_is_checked(x):
    class Model(Ranker):
        def logits(self, x):
            return self.head(self.score(x))

    quantized = quantize(Model().eval(), x, preserved_attributes=("logits",))
    quantized(x)
    quantized.head.scale = 6.0
    with pytest.raises(FixedAttributeError, match=r"'head.scale' was read when forward was traced \(3.0\)"):
        quantized(x)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def rows(self, ids):
        return F.embedding(ids, self.weight)

    def scale(self, by):
        self.weight.data.mul_(by)

    def forward(self, x):
        return F.linear(x, self.weight)


def test_a_calls_weight_that_a_method_reads_is_quantized_and_kept(x):
    model, ids = Table().eval(), torch.arange(3)
    quantized = quantize(model, x, preserved_attributes=("rows",))
    assert same_bits(quantized.rows(ids), model.rows(ids))
    assert [site.path for site in quantized.record.sites] == ["weight"]


def test_a_calls_weight_that_a_method_writes_into_stays_float_and_counts(x):
    model = Table().eval()
    with pytest.warns(UserWarning, match="nothing in this Table .*: preserved code may write into it"):
        quantized = quantize(model, x, preserved_attributes=("scale",))
    with torch.no_grad():
        quantized.scale(2.0)
    assert sqnr(model(2 * x), quantized(x)) > 100


def test_a_modules_weight_that_a_method_writes_into_stays_float_and_counts(x):
    class Model(Ranker):
        def scale(self, by):
            self.score.weight.data.mul_(by)

        def scores(self, x):
            return self.score(x).relu_()

    model = Model().eval()
    with pytest.warns(UserWarning, match="nothing in this Model .*: preserved code may write into it"):
        quantized = quantize(model, x, preserved_attributes=("scale",))
    before = quantized(x)
    quantized.scale(2.0)
    assert not same_bits(quantized(x), before)
    quantized = quantize(model, x, preserved_attributes=("scores",))  # writes, and into no weight
    assert type(quantized.score) is DynamicQuantizedLinear


# Names.


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head_a, self.head_b = nn.Linear(64, 64), nn.Linear(64, 3), nn.Linear(64, 3)
        self.code = "a"

    def read(self, name, x):
        return getattr(self, f"head_{name}")(x)

    def again(self, x):
        return helper(self, self(x)), self.forward(x)

    def coded(self):
        return self.code

    def train(self, mode=True):
        return super().train(mode)

    def forward(self, x):
        return self.net(x).tanh()


def helper(model, x):
    return model.head_b(x)


def test_code_that_takes_any_name_keeps_all(x):
    model = Reader().eval()
    del model.code
    quantized = quantize(model, x, preserved_attributes=("read",))
    assert sqnr(model.read("b", x), quantized.read("b", x)) > 30
    assert type(quantized.head_b) is DynamicQuantizedLinear


def test_a_method_may_call_the_graph_and_the_users_functions(x):
    model, calls = Reader().eval(), []
    quantized = quantize(model, x, preserved_attributes=("again",))
    quantized.register_forward_hook(lambda *_: calls.append(1))
    first, second = quantized.again(x)
    assert len(calls) == 1
    assert same_bits(second, quantized(x))
    assert sqnr(model.again(x)[0], first) > 30


class Rectified(nn.Module):
    """Has one ReLU for forward, which fusing takes in, and for a method. calls: of its layer."""

    def __init__(self, calls):
        super().__init__()
        self.fc, self.act, self.calls = nn.Linear(8, 8), nn.ReLU(), calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.act(self.fc(x))
        return x

    def post(self, x):
        return self.act(x)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_relu_that_is_fused_and_that_a_method_uses_is_in_a_loaded_model(calls, tmp_path):
    x = torch.randn(2, 8)
    quantized = quantize(Rectified(calls).eval(), x, preserved_attributes=("post",))
    fxquant.save(quantized, tmp_path / "model")
    loaded = fxquant.load(Rectified(calls).eval(), tmp_path / "model")
    assert loaded._fxquant_record.fusions
    assert same_bits(loaded(x), quantized(x))
    assert torch.equal(loaded.post(x), x.relu())


@pytest.mark.parametrize("name", ["train", "code", "coded"])
def test_a_name_that_a_graph_has_of_its_own_is_refused(x, name):
    own = name.removesuffix("d")
    with pytest.raises(
        AttributeNameError, match=f"Reader.{own} cannot be preserved: the graph module that .* has '{own}'"
    ):
        prepare(Reader().eval(), x, preserved_attributes=(name,))


def test_a_dunder_method_that_every_object_has_may_be_the_users(x):
    kind = type("Model", (nn.Sequential,), {"__lt__": lambda self, other: ("less", len(self), other)})
    quantized = quantize(kind(nn.Linear(64, 8)).eval(), x, preserved_attributes=("__lt__",))
    assert (quantized < 3) == ("less", 1, 3)


def test_a_sequentials_own_dunder_methods_see_its_layers(x):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    quantized = quantize(model, x, preserved_attributes=("__len__", "__getitem__", "__iter__"))
    assert len(quantized) == 3
    assert [type(layer) for layer in quantized] == [DynamicQuantizedLinear, nn.ReLU, DynamicQuantizedLinear]
    assert sqnr(model[0](x), quantized[0](x)) > 30


# Fusion leaves alone what preserved code uses.


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.gate, self.free, self.relu = nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.2, 3)

    def embed(self, x):
        return self.conv(x)

    def normed(self, x):
        return self.norm(self.embed(x))

    def gated(self, x):
        return self.gate(x)

    def forward(self, x):
        y = self.relu(self.norm(self.conv(x))).mean(-1)
        return self.relu(self.gate(y)) + self.relu(self.free(y))


def test_what_methods_use_is_not_fused_and_the_record_says_so():
    model, x, y = Fused().eval(), torch.randn(2, 8, 12), torch.randn(3, 16)
    for make in (prepare, quantize):
        made = make(model, x, preserved_attributes=("embed", "normed", "gated"))
        for name, given in (("embed", x), ("normed", x), ("gated", y), ("forward", x)):
            assert sqnr(getattr(model, name)(given), getattr(made, name)(given)) > 30
        assert made.record.unfused == (
            Unfused(chain=("conv", "norm"), why=because(NotFused.USED_BESIDE, "conv")),
            Unfused(chain=("gate", "relu"), why=because(NotFused.USED_BESIDE, "gate")),
        )
        assert made.record.fusions == (Fusion(path="free", chain=("free", "relu")),)
    assert "not fused: conv → norm: code beside the graph uses conv" in explain(made).footer


def test_a_norm_that_a_method_uses_is_not_folded():
    class Model(Fused):
        def embed(self, x):
            return self.norm(x)

    model, x = Model().eval(), torch.randn(2, 8, 12)
    made = prepare(model, x, preserved_attributes=("embed",))
    assert made.record.unfused == (Unfused(chain=("conv", "norm"), why=because(NotFused.USED_BESIDE, "norm")),)
    assert same_bits(made(x), model(x))


def test_a_layer_that_nothing_else_uses_is_fused_as_ever():
    model, x = Fused().eval(), torch.randn(2, 8, 12)
    made = prepare(model, x)
    assert [fusion.chain for fusion in made.record.fusions] == [
        ("conv", "norm", "relu"),
        ("gate", "relu"),
        ("free", "relu"),
    ]
    assert not hasattr(made, "norm")


@pytest.mark.parametrize("given", [(), (torch.randn(2, 8, 12),)])
def test_fuse_fx_leaves_it_alone_too(given):
    model, x = Fused().eval(), torch.randn(2, 8, 12)
    fused = fuse_fx(model, *given, preserved_attributes=("embed",))
    assert same_bits(fused.embed(x), model.embed(x))
    assert sqnr(model(x), fused(x)) > 100


class Gained(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head, self.gain = nn.Linear(8, 8), nn.Linear(8, 8), 1.0

    def forward(self, x):
        return self.fc(x) * self.gain

    def post(self, x):
        return self.head(x) * self.gain

    def set_gain(self, gain):
        self.gain = gain


@pytest.mark.parametrize("again", [(), ("post",), ("gain", "fc")])
def test_what_fuse_fx_kept_stays_when_its_model_is_prepared(again, tmp_path):
    model, x = Gained().eval(), torch.randn(4, 8)
    names = ("post", "set_gain")
    quantized = quantize(fuse_fx(model, x, preserved_attributes=names), x, preserved_attributes=again)
    fxquant.save(quantized, tmp_path / "model")
    for twin in (quantized, fxquant.load(Gained().eval(), tmp_path / "model")):
        assert twin._fxquant_record.preserved.names == tuple(dict.fromkeys((*names, *again)))
        assert type(twin.head) is DynamicQuantizedLinear
        twin.set_gain(2.0)
        assert sqnr(2 * model(x), twin(x)) > 30
        assert sqnr(2 * model.post(x), twin.post(x)) > 30
        assert isinstance(twin._fxquant_record.preserved.owner(), Gained)


class Held(nn.Module):
    """A model whose methods find layers by a closure, and in lists and dicts of containers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        self.named, self.listed, self.call = {"b": self.b}, [self.b], lambda x: self.a(x)

    def forward(self, x):
        return self.b(self.a(x))

    def by_closure(self, x):
        return self.call(x)

    def by_name(self, x):
        return self.named["b"](x)

    def by_place(self, x):
        return self.listed[0](x)


@pytest.mark.parametrize("name", ["by_closure", "by_name", "by_place"])
def test_what_kept_attributes_hold_leads_to_the_quantized_layers(name, tmp_path):
    model, x = Held().eval(), torch.randn(4, 32)
    expected = getattr(fxquant.quantize_dynamic(model), name)(x)
    assert not torch.equal(expected, getattr(model, name)(x))
    quantized = quantize(model, x, preserved_attributes=(name,))
    fxquant.save(quantized, tmp_path / "file")
    loaded = fxquant.load(Held().eval(), tmp_path / "file")
    for kept in (quantized, copy.copy(quantized), copy.deepcopy(quantized), loaded):
        torch.testing.assert_close(getattr(kept, name)(x), expected)
    assert fxquant.explain(quantized).coverage.share == 1


class Scaled(nn.Module):
    """A model whose method reads weights, and an attribute that is named as scikit-learn names them."""

    def __init__(self):
        super().__init__()
        self.a, self.scale_ = nn.Linear(32, 32), 2.0

    def forward(self, x):
        return self.a(x)

    def scaled(self, x):
        return F.linear(x, self.a.weight) * self.scale_

    def frozen(self, x):
        return F.linear(x.requires_grad_(False), self.a.weight)

    def cleared(self, x):
        self.a.weight.zero_()
        return x


@pytest.mark.parametrize(("name", "share"), [("scaled", 1), ("frozen", 1), ("cleared", 0)])
def test_a_name_that_ends_in_an_underscore_writes_only_if_it_is_torchs(name, share):
    prepared = prepare(Scaled().eval(), torch.randn(4, 32), preserved_attributes=(name,))
    assert fxquant.explain(prepared).coverage.share == share


class Owner(nn.Module):
    """A model whose methods set things in other ways than by name of its own."""

    NAMES = ["a"]  # noqa: RUF012 - a value of the class is what is tested

    def __init__(self):
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(32, 32), nn.Linear(32, 32), Loud()
        self.register_buffer("seen", torch.zeros(3), persistent=False)
        self.rate = self.level = 1.0

    def forward(self, x):
        return self.inner(self.b(self.a(x))) * self.rate * self.level

    def replaced(self):
        self.a.weight = nn.Parameter(torch.zeros(32, 32))

    def drawn(self):
        nn.init.zeros_(self.a.weight)

    def louder(self):
        self.inner.louder()

    def nested(self):
        def turn(value):
            self.rate = value

        turn(2.0)

    def named(self):
        self.NAMES.append("b")
        return self.NAMES

    def count(self):
        return self.seen.sum()

    @functools.cached_property
    def table(self):
        return self.b.bias.sum() * self.count()

    @property
    def loudness(self):
        return self.level

    @loudness.deleter
    def loudness(self):
        self.level = 0.0


class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def louder(self):
        self.scale = self.scale * 2

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("name", ["replaced", "drawn"])
def test_the_weight_that_a_method_sets_stays_float_and_others_do_not(name):
    prepared = prepare(Owner().eval(), torch.randn(4, 32), preserved_attributes=(name,))
    assert [site.path for site in prepared.record.sites] == ["b"]
    assert [left.path for left in prepared.record.skipped] == ["a"]


@pytest.mark.parametrize("name", ["louder", "nested"])
def test_what_a_method_sets_elsewhere_counts(name):
    x = torch.randn(4, 32)
    quantized = quantize(Owner().eval(), x, preserved_attributes=(name,))
    before = quantized(x)
    getattr(quantized, name)()
    assert same_bits(quantized(x), 2 * before)


def test_a_deleter_counts():
    x = torch.randn(4, 32)
    quantized = quantize(Owner().eval(), x, preserved_attributes=("loudness",))
    assert quantized.loudness == 1.0
    del quantized.loudness
    assert not quantized(x).any()


def test_a_value_of_the_class_is_the_models_own():
    quantized = quantize(Owner().eval(), torch.randn(4, 32), preserved_attributes=("named",))
    assert quantized.named() == ["a", "b"]
    assert Owner.NAMES == ["a"]


def test_a_cached_property_and_a_buffer_that_no_file_holds(tmp_path):
    model, x = Owner().eval(), torch.randn(4, 32)
    model.seen += 1
    prepared = prepare(model, x, preserved_attributes=("table",))
    assert "table" not in vars(model)
    quantized = fxquant.convert_fx(prepared)
    fxquant.save(quantized, tmp_path / "model")
    skeleton = Owner().eval()
    skeleton.seen += 1  # as its __init__ computes it
    loaded = fxquant.load(skeleton, tmp_path / "model")
    for made in (prepared, quantized):
        for twin in (made, copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
            assert "seen" not in twin.state_dict()
            assert torch.equal(twin.table, model.b.bias.sum() * 3)
