"""Tracing: leaves, errors that name the user's line, example inputs that are really run."""

import copy
import pathlib
import pickle
import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    OPERATORS,
    ExampleInputsError,
    ModelStateError,
    TraceError,
    convert_fx,
    explain,
    fuse_fx,
    prepare_fx,
    quantize_dynamic,
)
from fxquant.graph.trace.trace import trace
from tests.samples import WordLM, everything, lm_inputs, prepare, quantize, same_bits

HERE = pathlib.Path(__file__).name


def line_of(text):
    """Return the number of the first line of this file that holds a text."""
    lines = pathlib.Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


class BranchOnValue(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the branch
            return x
        return -x


class LoopOverTensor(nn.Module):
    def forward(self, x):
        return sum(row for row in x)  # the loop


class ToNumber(nn.Module):
    def forward(self, x):
        return x * float(x.max())  # the conversion


class Bug(nn.Module):
    def forward(self, x):
        return x + self.absent  # the bug


@pytest.mark.parametrize(
    ("kind", "marker"),
    [
        (BranchOnValue, "# the branch"),
        (LoopOverTensor, "# the loop"),
        (ToNumber, "# the conversion"),
    ],
)
def test_a_model_that_does_not_trace_names_the_users_line(kind, marker):
    model = kind()
    with pytest.raises(TraceError, match=rf"does not trace: .+\n.*{HERE}:{line_of(marker)}, in forward") as caught:
        prepare(model, torch.ones(2, 2))
    assert "torch.fx.wrap" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("kind", "marker"),
    [(BranchOnValue, "# the branch"), (LoopOverTensor, "# the loop"), (ToNumber, "# the conversion")],
)
def test_a_submodule_that_does_not_trace_is_called_as_it_is_and_told(kind, marker):
    model, x = nn.Sequential(nn.Linear(2, 2), kind()), torch.ones(2, 2)
    quantized = quantize(model, x)
    assert list(quantized.record.untraced) == ["1"]
    assert f"{HERE}:{line_of(marker)}, in forward" in quantized.record.untraced["1"]
    assert "not traced: 1: " in str(explain(quantized))
    assert type(quantized.get_submodule("1")) is kind


def test_a_submodule_with_a_bug_is_an_error():
    with pytest.raises(ExampleInputsError, match=rf"fails on example_inputs at .*{HERE}:{line_of('# the bug')}, in"):
        prepare(nn.Sequential(nn.Linear(2, 2), Bug()), torch.ones(2, 2))


class Loop(nn.Module):
    """A decoder as people write it: a Python loop over a cell, with an early end."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        state, outputs = None, []
        for step in x.unbind(0):
            state = self.cell(step, state)
            outputs.append(self.out(state[0]))
            if bool(state[0].abs().max() > 1e6):
                break
        return torch.stack(outputs)


def test_the_modules_inside_one_that_does_not_trace_are_quantized(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), Loop()).eval(), torch.randn(4, 3, 6)
    quantized = quantize(model, x)
    assert [site.path for site in quantized.record.sites] == ["0", "1.cell", "1.out"]
    assert (quantized(x) - model(x)).norm() <= 0.05 * model(x).norm()
    fxquant.save(quantized, tmp_path / "m.safetensors")
    assert same_bits(fxquant.load(model, tmp_path / "m.safetensors")(x), quantized(x))


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.rand(4)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        before, self.last = self.last, x
        return x if before is None else x + before


@pytest.mark.parametrize(("kind", "call"), [(Draws, "first"), (Remembers, "second")])
def test_what_a_graph_cannot_hold_is_found_by_running_it(kind, call):
    with pytest.raises(TraceError, match=f"the graph's {call} call does not give what the model's does"):
        prepare(kind(), torch.randn(2, 3, 4))


@pytest.mark.parametrize("kind", [Draws, Remembers])
def test_a_submodule_that_a_graph_cannot_hold_is_called_as_it_is(kind):
    model, x = nn.Sequential(nn.Linear(4, 4), kind(), nn.ReLU()).eval(), torch.randn(2, 3, 4)
    prepared = prepare(model, x)
    assert list(prepared.record.untraced) == ["1"]
    assert "keeps state in Python attributes" in prepared.record.untraced["1"]
    twin = copy.deepcopy(model)
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = twin(x)
            torch.manual_seed(seed)
            assert torch.equal(prepared(x), expected)


@pytest.mark.parametrize(
    ("wrap", "inner"),
    [(lambda m: torch.compile(m, backend="eager"), "_orig_mod"), (nn.DataParallel, "module")],
)
def test_a_wrapper_is_an_error_that_names_the_model_inside(wrap, inner):
    wrapped = wrap(nn.Sequential(nn.Linear(2, 2)).eval()).eval()
    with pytest.raises(ModelStateError, match=rf"pass the model inside it: model\.{inner}"):
        prepare_fx(wrapped, everything(), torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:.*torch.jit.*is not supported")
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (
            lambda m: torch.compile(m, backend="eager"),
            r"OptimizedModule is a wrapper; put what it holds, its ._orig_mod",
        ),
        (nn.DataParallel, r"DataParallel is a wrapper; put what it holds, its .module,"),
        (torch.jit.script, "it is compiled to TorchScript; put the nn.Module that it was made from"),
    ],
)
@pytest.mark.parametrize("way", [quantize, lambda m, x: quantize_dynamic(m)])
def test_a_wrapped_part_stays_float_with_the_reason(monkeypatch, wrap, reason, way):
    data_parallel = sys.modules[nn.DataParallel.__module__]
    monkeypatch.setattr(data_parallel, "_get_available_device_type", lambda: None)  # else it wants a GPU's tensors
    x = torch.randn(2, 4)
    model = nn.Sequential(wrap(nn.Sequential(nn.Linear(4, 4)).eval()), nn.Linear(4, 4)).eval()
    quantized = way(model, x)
    assert torch.equal(quantized.get_submodule("0")(x), model[0](x))
    (left,) = quantized._fxquant_record.skipped
    assert re.match(reason, left.reason)
    assert [site.path for site in quantized._fxquant_record.sites] == ["1"]


@pytest.mark.parametrize("call", [lambda m: prepare_fx(m, everything(), torch.ones(2, 2)), fuse_fx])
def test_training_mode_is_an_error(call):
    with pytest.raises(ModelStateError, match=r"Linear is in training mode; call model.eval\(\) first"):
        call(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:.*torch.jit.*is not supported")
def test_a_torchscript_model_is_an_error():
    with pytest.raises(ModelStateError, match="TorchScript models cannot be quantized"):
        prepare_fx(torch.jit.script(nn.Linear(2, 2)).eval(), everything(), torch.ones(2, 2))


@pytest.mark.parametrize("thing", [None, lambda x: x, {"a": 1}, nn.Linear])
def test_something_that_is_no_module_is_an_error(thing):
    with pytest.raises(ModelStateError, match=r"expected a torch.nn.Module, got"):
        prepare_fx(thing, everything(), torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_is_an_error():
    with pytest.raises(ModelStateError, match=r"'0.weight' is lazy and has no shape yet"):
        prepare(nn.Sequential(nn.LazyLinear(3)), torch.ones(2, 2))


def test_example_inputs_may_be_one_tensor_or_a_list():
    model, x = nn.Sequential(nn.Linear(2, 2)).eval(), torch.ones(3, 2)
    for inputs in (x, (x,), [x]):
        assert torch.equal(prepare_fx(model, everything(), inputs)(x), model(x))


@pytest.mark.parametrize("inputs", [None, {1, 2}, "x", 3])
def test_example_inputs_of_another_kind_are_an_error(inputs):
    with pytest.raises(ExampleInputsError, match=f"or one tensor, got {type(inputs).__name__}"):
        prepare_fx(nn.Linear(2, 2).eval(), everything(), inputs)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_example_inputs_is_an_error(count):
    with pytest.raises(ExampleInputsError, match=rf"has {count} arguments, but forward is Linear\(input"):
        prepare_fx(nn.Linear(2, 2).eval(), everything(), (torch.ones(3, 2),) * count)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x):
        return self.net(x)  # the line that fails


@pytest.mark.parametrize("x", [torch.ones(3, 5), torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4).double()])
def test_example_inputs_that_do_not_run_name_node_line_and_what_came(x):
    message = (
        rf"the model fails on example_inputs at 'net'.*{HERE}:{line_of('# the line that fails')}, "
        rf"which got \[\({', '.join(map(str, x.shape))}\) {x.dtype}\]"
    )
    with pytest.raises(ExampleInputsError, match=message):
        prepare(Named(), x)


def test_shapes_and_dtypes_of_every_node_are_recorded():
    model = WordLM()
    prepared = prepare(model, *lm_inputs(model, 5, 3))
    found = {n.name: n.meta["tensor_meta"] for n in prepared.graph.nodes if n.op == "call_module"}
    assert (found["encoder"].shape, found["encoder"].dtype) == ((5, 3, 12), torch.float32)
    assert found["rnn"][1][0].shape == (2, 3, 8)
    assert all("tensor_meta" in n.meta for n in prepared.graph.nodes if n.op not in ("output", "get_attr"))


def test_nodes_have_stack_traces_of_the_users_lines():
    model = WordLM()
    quantized = convert_fx(prepare(model, *lm_inputs(model)))
    for node in quantized.graph.nodes:
        if node.op == "call_module":
            assert re.search(r'samples\.py", line \d+, in forward', node.stack_trace)


def test_leaves_are_the_tables_modules_and_torchs_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return torch.tanh(self.inner(x))

    graph = trace(nn.Sequential(Own(), nn.LayerNorm(2)).eval(), OPERATORS).module.graph
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["0.inner", "1"]


def test_a_users_subclass_with_a_forward_of_its_own_is_traced_through():
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight) * 2

    model, x = nn.Sequential(Scaled(4, 4)), torch.randn(3, 4)
    prepared = prepare(model, x)
    assert [site.path for site in prepared.record.sites] == ["0.weight"]
    assert torch.equal(prepared(x), model(x))


@pytest.mark.parametrize("name", ["a|b", "3", "a b", "é", "a-b"])
def test_odd_submodule_names(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(4, 4))
            self.inner = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4), nn.ReLU())})

        def forward(self, x):
            x = F.linear(getattr(self, name)(x), getattr(self, name).weight)
            return self.inner[name](x)

    model, x = Model(), torch.randn(3, 4)
    prepared = prepare(model, x)
    assert torch.equal(prepared(x), model(x))
    assert len(prepared.record.sites) == 3
    quantized = convert_fx(prepared)
    assert (quantized(x) - model(x)).norm() < 0.1 * model(x).norm()


def test_a_model_that_sets_attributes_in_forward():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls, self.last, self.log = nn.Linear(4, 4), 0, None, []

        def forward(self, x):
            self.calls += 1
            self.last = self.net(x)
            self.log.append("called")
            return self.last

    model, x = Model(), torch.randn(3, 4)
    quantized = quantize(model, x)
    assert (model.calls, model.last, model.log) == (0, None, [])
    assert quantized(x).shape == (3, 4)


def test_a_model_that_appends_to_a_global_like_list_of_its_child():
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = nn.Linear(4, 4), {"shapes": []}

        def forward(self, x):
            self.seen["shapes"].append(1)
            return self.net(x)

    model = nn.Sequential(Child())
    quantize(model, torch.randn(3, 4))
    assert model[0].seen == {"shapes": []}


def test_a_buffer_written_in_forward_is_the_prepared_models_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return self.net(x) + self.count

    model, x = Model().eval(), torch.randn(3, 4)
    prepared = prepare(model, x)
    quantized = convert_fx(prepared)
    assert (prepared.count.item(), quantized.count.item()) == (0, 0)
    assert torch.equal(prepared(x), copy.deepcopy(model)(x))
    for module, counts in ((prepared, (1, 0)), (quantized, (0, 1))):
        for other in (prepared, quantized):
            other.count.zero_()
        module(x)
        assert (prepared.count.item(), quantized.count.item()) == counts
    assert model.count == 0


def test_a_graph_module_can_be_prepared():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
    graph = torch.fx.symbolic_trace(model)
    assert same_bits(quantize(graph, x)(x), quantize(model, x)(x))


def test_a_module_with_a_lock_can_be_prepared():
    import threading

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    model.lock = threading.Lock()
    assert quantize(model, x)(x).shape == (3, 4)


def test_shape_arithmetic_stays_dynamic():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 6)

        def forward(self, x):
            b, t, _ = x.shape
            return self.net(x).view(b, t, 2, 3).reshape(b * t, -1)

    quantized = quantize(Model(), torch.randn(2, 3, 4))
    assert quantized(torch.randn(5, 7, 4)).shape == (35, 6)


def test_tracing_fires_no_autograd():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    prepare(model, x)
    assert all(p.grad is None and p.is_leaf for p in model.parameters())


class PositionalEncoding(nn.Module):
    """A buffer sliced by the input's length, as in the transformer tutorial."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("pe", torch.randn(50, 1, 4))

    def forward(self, x):
        return self.net(x + self.pe[: x.size(0)])


def test_a_buffer_sliced_by_the_inputs_length():
    model = PositionalEncoding().eval()
    prepared = prepare(model, torch.randn(3, 2, 4))
    x = torch.randn(7, 2, 4)
    assert torch.equal(prepared(x), model(x))
    assert convert_fx(prepared)(x).shape == (7, 2, 4)


def test_a_buffer_that_forward_branches_on():
    class Model(PositionalEncoding):
        def __init__(self):
            super().__init__()
            self.register_buffer("times", torch.tensor(2))

        def forward(self, x):
            for _ in range(int(self.times)):
                x = self.net(x)
            return x

    model, x = Model().eval(), torch.randn(3, 2, 4)
    assert torch.equal(prepare(model, x)(x), model(x))


class Counts(Named):
    """Counts its calls in a buffer, by an assignment."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.how == "+=":
            self.calls += 1
        elif self.how == "+":
            self.calls = self.calls + 1
        else:
            self.calls = self.calls + x.sum() * 0 + 1
        return self.net(x)


@pytest.mark.parametrize("how", ["+=", "+", "of the input"])
@pytest.mark.parametrize("is_root", [False, True])
def test_a_buffer_set_in_forward_is_kept_up_and_told(how, is_root):
    part, x = Counts(how).eval(), torch.randn(3, 4)
    model = part if is_root else nn.Sequential(part, nn.Linear(4, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the root's: its own code runs on
        quantized = quantize(model, x)
    for _ in range(3):
        quantized(x)
    counter = quantized if is_root else quantized.get_submodule("0")
    assert (counter.calls, part.calls) == (3, 0)
    assert "forward sets the buffer 'calls'" in explain(quantized).untraced[0]
    assert len(quantized._fxquant_record.sites) == (1 if is_root else 2)
    assert pickle.loads(pickle.dumps(quantized))(x).equal(quantized(x))


def test_the_reason_is_of_the_attempt_that_got_further():
    """A slice of a buffer by the input's size is not what stands in the way: the conversion, behind it, is."""

    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("positions", torch.randn(1, 8, 4))
            self.part = ToNumber()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(self.part(x + self.positions[:, : x.size(1)]), self.weight)

    quantized = quantize(Positioned().eval(), torch.randn(2, 3, 4))
    (told,) = explain(quantized).untraced
    assert re.match(rf"part: .*{HERE}:{line_of('# the conversion')}", told)
    assert [site.path for site in quantized.record.sites] == ["weight"]


def test_a_root_whose_forward_was_replaced_on_the_instance_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model.forward = lambda x: x
    with pytest.raises(ModelStateError, match="the forward of this Sequential was replaced on the instance"):
        prepare(model, torch.randn(2, 4))


@pytest.mark.parametrize("is_hooked", [False, True])
@pytest.mark.parametrize("is_container", [False, True])
def test_a_part_whose_forward_was_replaced_on_the_instance_keeps_it(is_hooked, is_container):
    linear = nn.Linear(4, 4)
    part = nn.Sequential(linear) if is_container else linear
    model, x = nn.Sequential(part, nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    if is_hooked:
        part.register_forward_hook(lambda *_: None)
    part.forward = lambda x: F.linear(x, linear.weight) * 3
    prepared = prepare(model, x)
    assert torch.equal(prepared(x), model(x))
    assert [site.path for site in prepared.record.sites] == ["1"]
    assert [left.reason for left in prepared.record.skipped] == ["its forward was replaced on the instance"]
    assert (convert_fx(prepared)(x) - model(x)).norm() < 0.1 * model(x).norm()


class Autocast(Named):
    def __init__(self, enabled):
        super().__init__()
        self.enabled = enabled

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.net(x)  # under autocast


def test_autocast_inside_forward_is_left_to_the_models_own_code():
    model, x = Autocast(True).eval(), torch.randn(2, 4)
    with pytest.warns(UserWarning, match=rf"enters torch.autocast, which a graph.*{line_of('# under autocast')}, in"):
        prepared = prepare(model, x)
    assert same_bits(prepared(x), model(x))


def test_autocast_that_changes_nothing_is_none():
    model, x = Autocast(False).eval(), torch.randn(2, 4)
    assert torch.equal(prepare(model, x)(x), model(x))


def test_autocast_around_the_call_is_in_force():
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prepared = prepare(model, x)
        assert same_bits(prepared(x), model(x))


class WritesIntoFresh(Named):
    def forward(self, x):
        total = torch.zeros(2, 4)
        total += self.net(x)  # written into
        return total


def test_writing_into_a_tensor_made_in_forward_is_left_to_the_models_own_code():
    model, x = WritesIntoFresh().eval(), torch.randn(2, 4)
    with pytest.warns(UserWarning, match=rf"a tensor that it makes itself.*{line_of('# written into')}, in forward"):
        prepared = prepare(model, x)
    for _ in range(2):
        assert torch.equal(prepared(x), model(x))


def test_writing_into_a_tensor_made_from_an_input_is_fine():
    class Model(Named):
        def forward(self, x):
            total = x.new_zeros(2, 4)
            total += self.net(x)
            return total.add_(torch.ones(4))

    model, x = Model().eval(), torch.randn(2, 4)
    prepared = prepare(model, x)
    for _ in range(2):
        assert torch.equal(prepared(x), model(x))


class Masked(nn.Module):
    """Scores masked with the least number of their dtype, as transformers do."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(8, 8)

    def forward(self, x, mask):
        scores = self.scores(x)
        steps = torch.iinfo(mask.dtype).bits // 8
        return scores.masked_fill(mask == steps, torch.finfo(scores.dtype).min).softmax(-1)


def test_the_limits_of_a_dtype_are_calls_in_the_graph(tmp_path):
    model, x, mask = Masked().eval(), torch.randn(3, 8), torch.randint(9, (3, 8))
    prepared = prepare(model, x, mask)
    assert same_bits(prepared(x, mask), model(x, mask))
    assert same_bits(prepared.double()(x.double(), mask), copy.deepcopy(model).double()(x.double(), mask))
    quantized = quantize(model, x, mask)
    fxquant.save(quantized, tmp_path / "q")
    for twin in (
        copy.deepcopy(quantized),
        pickle.loads(pickle.dumps(quantized)),
        fxquant.load(model, tmp_path / "q"),
        torch.compile(quantized, fullgraph=True, backend="aot_eager"),
    ):
        with torch.no_grad():
            assert same_bits(twin(x, mask), quantized(x, mask))
    assert torch.finfo.__module__ == torch.iinfo.__module__ == "torch"
    assert isinstance(torch.finfo(torch.half), torch.finfo)  # nothing of the trace stays


class LoopsAndBranches(nn.Module):
    """Needs both: an argument to be fixed, and a part that does not trace."""

    def __init__(self):
        super().__init__()
        self.weight, self.part = nn.Parameter(torch.randn(6, 6) / 4), Loop()

    def forward(self, x, count=2):
        for _ in range(count):
            x = F.linear(x, self.weight)
        return self.part(x)


def test_a_model_that_needs_both_keeps_its_own_class_and_all_its_arguments():
    model, x = LoopsAndBranches().eval(), torch.randn(4, 3, 6)
    with pytest.warns(UserWarning, match="the model's own code runs on"):
        prepared = prepare(model, x)
    assert isinstance(prepared, LoopsAndBranches)
    for count in (2, 3):
        assert same_bits(prepared(x, count), model(x, count))
