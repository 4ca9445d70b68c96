"""The check on the example inputs: what it finds, what it names, and that it leaves nothing behind."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from torch import nn

import fxquant
from fxquant import CheckError, CheckpointError, QConfigMapping, convert_fx, prepare_fx, quantize_dynamic
from fxquant.graph.why import Why
from tests.samples import everything, prepare

LAYERS, FLOATS = {}, {}
X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


class Untraced(nn.Module):
    """A model whose forward branches on a value: its own code runs on."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 8)
        self.set_up()

    def set_up(self):
        pass

    def forward(self, x):
        if x.sum() > 1e9:
            x = 2 * x
        return self.run(x)


class Global(Untraced):
    def set_up(self):
        LAYERS["head"] = self.head

    def run(self, x):
        return LAYERS["head"](self.body(x))


class Both(Global):
    def run(self, x):
        return self.head(x) + LAYERS["head"](self.body(x))


class LocalClass(Untraced):
    def set_up(self):
        outer = self

        class Task:
            def __call__(self, x):
                return outer.head(x)

        self.task = Task()

    def run(self, x):
        return self.task(self.body(x))


class Later(Global):
    def run(self, x):
        yield LAYERS["head"](self.body(x))


class ByType(Untraced):
    def run(self, x):
        for layer in (self.body, self.head):
            if type(layer) is nn.Linear:
                x = layer(x)
        return x


def unwarned(model, x=X, mapping=None, **options):
    """Return a model's quantized form, made without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* does not trace.*")
        prepared = prepare_fx(model.eval(), mapping or fxquant.default_dynamic_qconfig_mapping(), x)
    return convert_fx(prepared, **options)


def warned(model, match, x=X, **options):
    """Return the same where one warning says so."""
    with pytest.warns(UserWarning, match=match) as told:
        quantized = unwarned(model, x, **options)
    assert len(told) == 1
    return quantized


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (Global, {"head": Why.PASSED_BY}),
        (Both, {"head": Why.PASSED_BY}),
        (LocalClass, {"head": Why.PASSED_BY}),
        (ByType, {"body": Why.UNCALLED, "head": Why.UNCALLED}),
        (Later, {"head": Why.PASSED_BY}),
    ],
)
def test_a_site_that_is_not_run_is_named_and_counts_as_float(kind, left):
    model = kind()
    quantized = warned(model, rf"this {kind.__name__} was checked on its example inputs:\n  - {next(iter(left))} ")
    told = fxquant.explain(quantized)
    sizes = {"body": 32 * 32 * 4, "head": 8 * 32 * 4}
    assert {row.path: row.decision for row in told.rows if not row.is_quantized} == {
        path: f"float: {why.value}" for path, why in left.items()
    }
    assert told.coverage.quantized_bytes == sum(size for path, size in sizes.items() if path not in left)
    assert told.coverage.total_bytes == sum(sizes.values())
    assert {type(quantized.get_submodule(path)) for path in left} == {nn.Linear}
    notes = {row.path: row.note for row in fxquant.graph_diff(model, quantized).rows}
    assert all(why.value in notes[path] for path, why in left.items())


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.LSTM(32, 32, batch_first=True),
        lambda: nn.GRUCell(32, 32),
        lambda: nn.MultiheadAttention(32, 4),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
        lambda: nn.Sequential(nn.Linear(32, 32, bias=False)),
    ],
    ids=["LSTM", "GRUCell", "attention", "weight_norm", "inside"],
)
def test_every_kind_of_layer_is_found(layer):
    class Other(Untraced):
        def set_up(self):
            self.layer = LAYERS["layer"] = layer()

        def run(self, x):
            is_attention = isinstance(LAYERS["layer"], nn.MultiheadAttention)
            found = LAYERS["layer"](*[x] * (3 if is_attention else 1))
            return self.head(self.body(found[0] if isinstance(found, tuple) else found))

    left = [row.path for row in fxquant.explain(warned(Other(), "layer.* stays float")).rows if not row.is_quantized]
    assert [path.partition(".")[0] for path in left] == ["layer"]


def test_layers_picked_by_their_type_run_again():
    model = ByType().eval()
    assert torch.equal(warned(model, "body .*, head .* stay float")(X), model(X))


def test_a_model_that_calls_layers_outside_of_it_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="forward calls 'head' by a reference from outside"):
        fxquant.save(warned(Global(), "head"), tmp_path / "file")


def test_without_the_check_nothing_is_said():
    assert fxquant.explain(unwarned(Global(), check=False)).coverage.share == 1


def test_quantize_dynamic_is_checked_where_it_has_inputs():
    assert fxquant.explain(quantize_dynamic(Global().eval())).coverage.share == 1
    with pytest.warns(UserWarning, match=r"head \(nn.Linear\) stays float"):
        quantized = quantize_dynamic(Global().eval(), example_inputs=X)
    assert fxquant.explain(quantized).coverage.share == 32 / 40


def test_a_branch_that_the_example_does_not_take_is_not_accused():
    class Branching(Untraced):
        def run(self, x):
            return self.head(x) if x.shape[0] == 6 else self.body(x)

    assert fxquant.explain(unwarned(Branching())).coverage.share == 1


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    label: torch.Tensor


class Changed(Untraced):
    """Gives what `change` makes of its scores once a layer is quantized."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def run(self, x):
        scores = self.head(self.body(x))
        changed = scores if type(self.head) is nn.Linear else self.change(scores)
        return Answer(changed, scores.argmax(-1))


class Ends(Untraced):
    """Gives what `end` makes of its scores and of whether its layers are quantized."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def run(self, x):
        return self.end(self.head(self.body(x)), type(self.head) is not nn.Linear)


ENDS = {
    "both infinite": lambda y, _: y.masked_fill(torch.arange(8) < 2, -torch.inf),
    "zero in float": lambda y, is_quantized: {"y": y, "zero": torch.full((3,), 1e-3 * is_quantized)},
    "numpy": lambda y, _: torch.from_numpy(y.numpy()),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_these_outputs_are_no_fault(end):
    unwarned(Ends(end))


@pytest.mark.parametrize(
    ("end", "match"),
    [
        (lambda y, is_quantized: {"a": y, "b": -y if is_quantized else y}, "output 'b' has an SQNR of "),
        (
            lambda y, is_quantized: {"a": y, **({"b": y} if is_quantized else {})},
            "gives 'b', which float does not",
        ),
    ],
    ids=["the worst", "another"],
)
def test_each_of_several_outputs_counts(end, match):
    warned(Ends(end), match)


class Chaos(Untraced):
    """Its outputs are other ones for a little noise; its head has a column that int4 has no step beside."""

    def set_up(self):
        with torch.no_grad():
            self.head.weight[:, 0] = 1e4
            self.body.weight[0], self.body.bias[0] = 0, 0

    def run(self, x):
        return torch.sin(1e3 * self.head(self.body(x)))


def test_a_coarse_site_is_named_where_values_select_too():
    match = r"has an SQNR of .*; the worst sites: head \(nn.Linear\) "
    warned(Chaos(), match, mapping=everything(fxquant.int4_dynamic_qconfig))


class Shorter(Untraced):
    """Calls its head with fewer rows once it is quantized, and writes into what its body gave."""

    def run(self, x):
        y, is_float = self.body(x), type(self.head) is nn.Linear
        z = self.head(y[: 3 if is_float else 2]).sum(0)
        y.zero_()
        return z if is_float else -z


def test_sites_are_judged_by_what_they_gave_where_their_calls_have_one_shape():
    warned(Shorter(), r"the worst sites: body \(nn.Linear\) \d\d\.\d dB\. ")


class Encoder(Untraced):
    def set_up(self):
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def run(self, x):
        y = self.layer(x[None])
        return y if type(self.layer.linear1) is nn.Linear else -y


def test_the_sites_inside_a_transformer_layer_are_judged():
    warned(Encoder(), r"the worst sites: (?=.*layer\.self_attn )(?=.*layer\.linear1 )(?=.*layer\.linear2 )")


def test_an_input_that_forward_writes_into_is_given_anew_to_each_run():
    class Negating(Untraced):
        def run(self, x):
            return self.head(self.body(x.neg_()))

    unwarned(Negating())


def test_a_shape_that_exact_zeros_decide_on_is_not_excused_by_noise():
    class NotZero(Untraced):
        def set_up(self):
            with torch.no_grad():
                self.head.weight[0], self.head.bias[0] = 0, 0

        def run(self, x):
            y = self.head(self.body(x))
            kept = y[:, (y != 0).any(0)]
            return kept if type(self.head) is nn.Linear else kept[:, :3]

    warned(NotZero(), r"the output is \(6, 3\) float32, in float \(6, 7\) float32")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_no_outputs_is_not_taken_for_another_empty_parameter():
    class Empty(Untraced):
        def set_up(self):
            self.none, self.prompt = nn.Linear(32, 0), nn.Parameter(torch.empty(0, 32))

        def run(self, x):
            x = torch.cat([self.prompt, x])
            return self.head(self.body(x)), self.none(x)

    unwarned(Empty())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda y: y[:, :3], r"output 'scores' is \(6, 3\) float32, in float \(6, 8\) float32"),
        (lambda y: y.double(), r"output 'scores' is \(6, 8\) float64, in float \(6, 8\) float32"),
        (lambda y: y / (y > y.mean()), r"output 'scores' has \d+ NaN or infinite values where float has none"),
        (lambda y: None, r"output 'scores', \(6, 8\) float32 in float, is missing"),
        (lambda y: y + y.abs(), r"output 'scores' has an SQNR of .* dB against float, less than 10; the worst sites: "),
    ],
    ids=["shape", "dtype", "NaN", "missing", "SQNR"],
)
def test_other_outputs_are_told(change, match):
    warned(Changed(change), match)


def test_random_inputs_of_a_layer_are_no_fault_of_it():
    powers = (3.0**n for n in range(99))  # numbers that no seed fixes

    class Random(Untraced):
        def run(self, x):
            return self.head(self.body(x) + next(powers))

    unwarned(Random())


WRITES = {
    "setitem": lambda p: p.data.__setitem__(0, 7.0),
    "add_": lambda p: p.data.add_(1),
    "iadd": lambda p: p.data.__iadd__(1),
    "out": lambda p: torch.add(p, 1, out=p.data),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_quantized_forward_that_writes_into_its_weights_leaves_no_trace(write):
    class Writing(Untraced):
        def set_up(self):
            self.scale = nn.Parameter(torch.ones(8))

        def run(self, x):
            y = self.head(self.body(x)) * self.scale
            if type(self.head) is not nn.Linear:  # so that prepare_fx sees nothing of it
                write(self.scale)
            return y

    assert torch.equal(unwarned(Writing()).scale, torch.ones(8))


def test_a_batch_of_none_is_taken():
    unwarned(nn.Sequential(nn.Linear(32, 8)), X[:0])


class Fails(Untraced):
    def run(self, x):
        y = self.head(self.body(x))
        if type(self.head) is not nn.Linear:
            raise TypeError("not my layer")
        return y


def test_a_model_that_fails_once_it_is_quantized_is_an_error():
    with pytest.raises(CheckError, match=r"(?s)Fails .* fails once it is quantized, at .*not my layer.*check=False"):
        unwarned(Fails())
    unwarned(Fails(), check=False)


@pytest.fixture
def prepared():
    return prepare(nn.Sequential(nn.Linear(32, 8)), X)


def test_the_example_inputs_go_into_copies_and_not_into_pickles(prepared):
    inputs = prepared.record.example.inputs
    assert inputs.args[0] is not X
    assert copy.deepcopy(prepared).record.example.inputs is inputs
    restored = pickle.loads(pickle.dumps(prepared))
    assert restored.record.example.inputs is None
    assert convert_fx(prepared).record.example is None
    assert "not checked on example inputs: the prepared model came from a pickle" in str(
        fxquant.explain(convert_fx(restored))
    )


def test_inputs_that_are_written_into_afterwards_do_not_matter():
    x = X.clone()
    prepared = prepare(nn.Sequential(nn.Linear(32, 8)), x)
    x.fill_(float("nan"))
    convert_fx(prepared)


def test_a_model_on_meta_is_not_checked():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(6, 32)
    assert "it was on the meta device" in str(fxquant.explain(convert_fx(prepare(model, x))))


def test_a_prepared_model_that_was_cast_is_told_to_be_unchecked(prepared):
    with pytest.warns(UserWarning, match="converted without a check: prepared, it fails on its example inputs now"):
        convert_fx(prepared.double())


def test_a_tied_weight_that_was_float_already_is_not_counted_twice():
    class Tied(Global):
        def set_up(self):
            super().set_up()
            self.other = nn.Linear(32, 8)
            self.other.weight = self.head.weight

        def run(self, x):
            return super().run(x) + self.other(x)

    mapping = QConfigMapping().set_global(fxquant.default_dynamic_qconfig).set_module_name("other", None)
    assert fxquant.explain(warned(Tied(), "head", mapping=mapping)).coverage.quantized_bytes == 32 * 32 * 4


def test_a_tied_matrix_that_was_float_already_is_not_counted_twice():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Global()
            self.table = self.inner.head.weight

        def forward(self, x):
            return self.inner(x) + nn.functional.linear(x, self.table)

    mapping = everything().set_module_name("table", None)
    told = fxquant.explain(warned(Root(), "inner.head", mapping=mapping))
    assert {row.path for row in told.rows if not row.is_quantized} >= {"inner.head", "table"}
    assert told.coverage.quantized_bytes == 32 * 32 * 4


class Read(Untraced):
    """Reads a layer's weight and never calls the layer."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def run(self, x):
        return self.read(self.body(x), self.head)


@pytest.mark.parametrize(
    "read",
    [
        lambda h, layer: nn.functional.linear(h, layer.weight, layer.bias),
        lambda h, layer: h @ layer.weight.t(),
        lambda h, layer: torch.cat([h @ part.t() for part in layer.weight.chunk(2)], -1),
        lambda h, layer: h @ torch.stack(layer.weight.unbind()).t(),
        lambda h, layer: h @ layer.weight.clone().t(),
        lambda h, layer: nn.functional.embedding(torch.cdist(h, layer.weight).argmin(-1), layer.weight),
    ],
    ids=["linear", "matmul", "chunk", "unbind", "clone", "embedding"],
)
def test_a_layer_of_which_only_the_weight_is_read_is_quantized(read):
    quantized = unwarned(Read(read))
    assert fxquant.explain(quantized).coverage.share == 1
    assert isinstance(quantized.head, fxquant.nn.DynamicQuantizedLinear)


@pytest.mark.parametrize("head_of", [lambda model: model.head, lambda model: model.held[0]], ids=["itself", "held"])
def test_a_layer_that_a_router_passes_by_on_quantized_values_stays_quantized(head_of):
    class Routed(Untraced):
        def set_up(self):
            self.held = (self.head,)

        def run(self, x):
            y = self.body(x)
            is_float = bool((y == nn.functional.linear(x, FLOATS["weight"], FLOATS["bias"])).all())
            return head_of(self)(y) if is_float else y[:, :8]

    model = Routed().eval()
    FLOATS.update(weight=model.body.weight.detach().clone(), bias=model.body.bias.detach().clone())
    assert fxquant.explain(unwarned(model)).coverage.share == 1


class TwiceByType(Untraced):
    def run(self, x):
        y = self.body(x)
        return self.head(self.body(y) if type(self.body) is nn.Linear else y)


@pytest.mark.filterwarnings("ignore:TwiceByType does not trace")
def test_a_layer_that_is_called_less_often_once_it_is_quantized_stays_float():
    model = TwiceByType().eval()
    with pytest.warns(
        UserWarning, match=r"body \(nn.Linear\) stays float: the example calls it 2 times in float, but 1"
    ):
        quantized = convert_fx(prepare(model, X))
    (left,) = quantized._fxquant_record.skipped
    assert (left.path, left.reason) == ("body", Why.CALLED_LESS.value.format(2, 1))
    assert [site.path for site in quantized._fxquant_record.sites] == ["head"]
    assert quantized._fxquant_record.coverage.quantized_bytes == 8 * 32 * 4


class TwiceByValues(Untraced):
    def set_up(self):
        self.exact = self.body(X).detach()

    def run(self, x):
        y = self.body(x)
        return self.head(self.body(y) if torch.equal(y, self.exact) else y)


class Reads(Untraced):
    """Calls a layer twice in float, and once besides a read of its weight where it is quantized."""

    def run(self, x):
        y = self.body(x)
        again = self.body(y) if type(self.body) is nn.Linear else y @ self.body.weight.t() + self.body.bias
        return self.head(again)


@pytest.mark.parametrize("kind", [TwiceByValues, Reads])
def test_one_that_values_or_a_read_of_its_weight_decide_on_is_not_accused(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = convert_fx(prepare(kind().eval(), X))
    assert [site.path for site in quantized._fxquant_record.sites] == ["body", "head"]
