"""Runs give the bits of their nodes called one by one, and give way wherever somebody looks, or changes something."""

import copy
import gc
import io
import pickle
import threading
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxquant
from fxquant.graph import runs
from fxquant.graph.runs import RUNS
from fxquant.ops import library
from tests.native.static_cases import same_places
from tests.samples import leaves, quantize, same_bits

needs_library = pytest.mark.skipif(not library.available(), reason="runs are the library's")


class Sum(nn.Module):
    """Residuals, pools and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 10, 3, 2, 1), nn.BatchNorm2d(10)
        self.first, self.second = nn.Conv2d(10, 10, 3, padding=1), nn.Conv2d(10, 10, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(10, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.stem(x))))
        x = F.relu(self.second(F.relu(self.first(x))) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Gate(nn.Module):
    """Depthwise convolutions, curves, and a gate of one value a channel; several outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.gate, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x):
        x = F.hardswish(self.deep(F.relu6(self.stem(x))))
        gated = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.last(gated), {"gated": F.avg_pool2d(gated, 2)}


class Squeeze(nn.Module):
    """A gate as most squeeze-and-excitation networks write it: by sizes of the input, and expanded to them."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid())

    def forward(self, x):
        x = F.relu(self.stem(x))
        b, c, h, w = x.size()
        y = self.gate(self.pool(x).view(b, c)).view(b, c, 1, 1)
        x = self.last(x * y.expand_as(x))
        return x.view(b, -1, h * w), x.shape[0]


class Join(nn.Module):
    def __init__(self, middle=lambda x: x):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1), nn.Conv2d(9, 4, 1)
        self.middle = middle

    def forward(self, x):
        x = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.c(self.middle(x)).flatten(1)


class Resize(nn.Module):
    """To a size, with aligned corners, between convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = F.interpolate(self.first(x), size=(5, 7), mode="bilinear", align_corners=True)
        return self.last(x)


def image(*batch):
    return torch.randn(*(batch or (2,)), 3, 8, 12)


def chain(*modules):
    return nn.Sequential(*modules)


LINEARS = (nn.Linear, 6)
MODELS = {
    "residual": (Sum, image),
    "gate": (Gate, image),
    "squeeze": (Squeeze, image),
    "join": (Join, image),
    "two runs": (lambda: Join(lambda x: F.softmax(x, 1)), image),
    "integers leave": (lambda: Join(lambda x: x.flip(2)), image),
    "integers are cut": (lambda: Join(lambda x: x[:, :, 1:]), image),
    "turned": (lambda: Join(lambda x: x.transpose(2, 3)), image),
    "dropout first": (
        lambda: chain(nn.Dropout(), nn.Identity(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        image,
    ),
    "dropout last": (
        lambda: chain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(240, 3)),
        image,
    ),
    "reflected": (lambda: chain(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), image),
    "transposed": (
        lambda: chain(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.Conv2d(6, 3, 1)),
        image,
    ),
    "curves": (
        lambda: chain(
            *(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.ConvTranspose2d(4, 5, 3, 2, 1), nn.LeakyReLU(0.3)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6), nn.Hardswish(), nn.Linear(6, 3)),
        ),
        image,
    ),
    "transposed last": (
        lambda: chain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, (3, 1), dilation=2)),
        image,
    ),
    "padded": (
        lambda: chain(
            nn.Conv2d(3, 4, 3), nn.ZeroPad2d((1, 0, 2, -1)), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)
        ),
        image,
    ),
    "resized": (
        lambda: chain(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.Conv2d(4, 4, 3), Resize()),
        image,
    ),
    "of each channel": (lambda: chain(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 3, 1)), image),
    "padded, of rank 1": (
        lambda: chain(nn.Conv1d(3, 4, 3), nn.ConstantPad1d((2, 1), 0.0), nn.Conv1d(4, 4, 1)),
        lambda *batch: torch.randn(*(batch or (2,)), 3, 12),
    ),
    "of rank 1": (
        lambda: chain(
            nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(20, 3)
        ),
        lambda *batch: torch.randn(*(batch or (2,)), 3, 12),
    ),
    "of rank 1, values out": (
        lambda: chain(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 1)),
        lambda *b: torch.randn(*(b or (2,)), 3, 12),
    ),
    "of rank 3": (
        lambda: chain(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(4, 4, 1)),
        lambda *batch: torch.randn(*(batch or (2,)), 3, 4, 6, 4),
    ),
    "linears": (
        lambda: chain(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 5)),
        lambda *batch: torch.randn(*(batch or (3,)), 7),
    ),
    "linears on tokens": (
        lambda: chain(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 5)),
        lambda *batch: torch.randn(*(batch or (3,)), 4, 7),
    ),
    "one channel": (lambda: chain(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 1)), image),
    "one pixel": (lambda: chain(nn.Conv2d(3, 4, (8, 12)), nn.ReLU(), nn.Conv2d(4, 4, 1)), image),
}
REFUSED = ("linears on tokens",)  # a linear on values of more than two dimensions is called by itself


def make(name):
    torch.manual_seed(0)
    module, inputs = MODELS[name]
    model = module().eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
    x = inputs()
    return quantize(model, x, mapping=fxquant.default_static_qconfig_mapping()), x


def one_by_one(model, *inputs):
    """Return what the model's nodes give, called one by one, with no run."""
    return fx.Interpreter(model).run(*inputs)


def check(model, *inputs):
    with torch.no_grad():
        got, expected = model(*inputs), one_by_one(model, *inputs)
    assert same_bits(got, expected)
    assert all(same_places(a, b) for a, b in zip(leaves(got), leaves(expected), strict=True))


@pytest.fixture
def native(monkeypatch):
    """Return a list of the runs that are called: whether the library took each."""
    took, function = [], library.function

    def spy(name):
        run = function(name)

        def spied(*args):
            result = run(*args)
            took.append(result is not None)
            return result

        return spied if name == "run" and run is not None else run

    monkeypatch.setattr(library, "function", spy)
    return took


@pytest.mark.parametrize("name", MODELS)
def test_a_run_gives_the_bits_of_its_nodes(name, native):
    model, x = make(name)
    check(model, x)
    if x.dim() == 4:
        check(model, x.contiguous(memory_format=torch.channels_last))
    if library.available():
        assert native
        assert all(taken is (name not in REFUSED) for taken in native)
    if x.dim() == 4:  # with gaps: one by one
        check(model, x.transpose(2, 3).contiguous().transpose(2, 3))


def test_sizes_of_a_value_cut_no_run(native):
    model, x = make("squeeze")
    with torch.no_grad():
        model(x)
    assert len(native) == (3 if library.available() else 0)  # cut by the two views alone


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dropout last"])
def test_sizes_may_change_from_call_to_call(name):
    model, x = make(name)
    make_x = MODELS[name][1]
    for batch in (1, 5, 2):
        check(model, make_x(batch))
    if x.dim() == 4 and name != "one pixel" and "flatten" not in str(model.graph):
        for size in ((9, 13), (8, 12), (16, 9), (31, 40)):
            check(model, torch.randn(1, 3, *size))
            check(model, torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last))
    check(model, torch.cat([x, x])[:0] if name == "linears" else x)


@needs_library
@pytest.mark.parametrize("name", ["residual", "gate", "transposed", "of rank 1, values out"])
def test_threads_share_a_run_as_one_job_and_give_the_same_bits(name):
    model, x = make(name)
    expected = model(x)
    torch.set_num_threads(2)
    native = library._library
    native.set_least_share(1)
    native.use_way("waking")
    try:
        before = native.pool_counts()["waking"]
        assert all(same_bits(model(x), expected) for _ in range(10))
        assert native.pool_counts()["waking"] - before == 10
    finally:
        native.set_least_share(1 << 17)
        native.use_way(None)


@needs_library
def test_a_model_whose_middle_the_library_does_not_know_has_several_runs(native):
    model, x = make("two runs")
    model(x)
    assert native == [True, True]


@needs_library
def test_runs_can_be_switched_off(monkeypatch, native):
    monkeypatch.setenv("FXQUANT_RUNS", "0")
    model, x = make("residual")
    y = model(x)
    assert not native
    monkeypatch.setenv("FXQUANT_RUNS", "1")
    model.recompile()
    assert same_bits(model(x), y)
    assert native == [True]


def test_a_part_is_never_longer_than_a_plan_can_be(monkeypatch, native):
    monkeypatch.setattr(runs, "_MOST_NODES", 3)
    model, x = make("residual")
    check(model, x)
    assert len(native) > 1 or not library.available()
    assert all(native)


def test_more_inputs_than_a_plan_takes_are_called_one_by_one(native):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(17 * 4, 3, 1)

        def forward(self, a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q, r):
            images = (a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q, r)
            return self.last(torch.cat([F.relu(self.conv(x)) for x in images], 1))

    inputs = [torch.randn(1, 3, 4, 4) for _ in range(17)]
    model = quantize(Many().eval(), *inputs, mapping=fxquant.default_static_qconfig_mapping())
    check(model, *inputs)
    assert not native


# Somebody looks.


@needs_library
@pytest.mark.parametrize("kind", ["forward", "pre", "global forward", "global pre"])
def test_hooks_see_each_call(kind, native):
    model, x = make("residual")
    expected, seen = model(x), []
    register = {
        "forward": lambda: model.first.register_forward_hook(lambda module, *_: seen.append(module)),
        "pre": lambda: model.first.register_forward_pre_hook(lambda module, *_: seen.append(module)),
        "global forward": lambda: nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m)),
        "global pre": lambda: nn.modules.module.register_module_forward_pre_hook(lambda m, *_: seen.append(m)),
    }
    handle = register[kind]()
    try:
        assert same_bits(model(x), expected)
    finally:
        handle.remove()
    assert model.first in seen
    model(x)
    assert native == [True, False, True]


@needs_library
def test_a_hook_may_change_an_output():
    model, x = make("residual")
    y = model(x)
    with_hook = model.first.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert not torch.equal(model(x), y)
    with_hook.remove()
    assert torch.equal(model(x), y)


@needs_library
def test_a_forward_of_its_own_is_called():
    model, x = make("residual")
    y, calls = model(x), []

    def forward(self, *args, **kwargs):
        calls.append(self)
        return type(self).forward(self, *args, **kwargs)

    model.first.forward = types.MethodType(forward, model.first)
    assert torch.equal(model(x), y)
    assert calls == [model.first]
    del model.first.forward
    assert torch.equal(model(x), y)
    assert len(calls) == 1


def test_a_module_that_is_replaced_is_called():
    model, x = make("residual")
    model(x)
    other = copy.deepcopy(model.first)
    other.bias.data.add_(1)
    model.first = other
    check(model, x)


def test_a_module_in_training_mode_does_as_its_nodes_do():
    model, x = make("dropout last")
    model(x)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.train()
            part.p = 1.0
    outcomes = []
    for call in (model, lambda x: one_by_one(model, x)):
        try:
            outcomes.append(call(x).tolist())
        except (RuntimeError, TypeError, NotImplementedError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def change_weight(model):
    model.first.weight_int8.neg_()


def replace_weight(model):
    model.first.weight_int8.data = model.first.weight_int8.neg()


def set_buffer(model):
    model.first.weight_scale = model.first.weight_scale * 2


def change_bias(model):
    model.first.bias.data.add_(1)


def set_bias(model):
    model.first.bias = nn.Parameter(model.first.bias.detach() + 1, requires_grad=False)


def change_scales(model):
    for name, buffer in model.named_buffers():
        if name.endswith("scale") and buffer.dim() == 0:
            buffer.mul_(1.5)


def load(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["first.bias"] += 1
    model.load_state_dict(state)


def load_assigned(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["first.bias"] += 1
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "change",
    [change_weight, replace_weight, set_buffer, change_bias, set_bias, change_scales, load, load_assigned],
    ids=lambda f: f.__name__,
)
@torch.no_grad()
def test_changed_tensors_are_heard(change, native):
    model, x = make("residual")
    y = model(x)
    change(model)
    assert not torch.equal(model(x), y)
    check(model, x)
    assert all(native)


def test_a_graph_that_is_changed_is_planned_again():
    model, x = make("residual")
    y = model(x)
    for node in model.graph.nodes:
        if node.target == "head":
            node.kwargs = {**node.kwargs, "low": 0.0}
    model.recompile()
    assert (model(x) >= 0).all()
    assert not torch.equal(model(x), y)
    check(model, x)


def test_a_gradient_is_refused_as_by_the_nodes():
    model, x = make("residual")
    y = model(x)
    x.requires_grad_()
    outcomes = []
    for call in (model, lambda x: one_by_one(model, x)):
        out = call(x)
        assert torch.equal(out, y)
        outcomes.append(out.requires_grad)
    assert outcomes[0] == outcomes[1]


# Compilers, copies and pickles.


def test_compilers_and_tracers_see_the_nodes():
    model, x = make("residual")
    with torch.no_grad():
        y = model(x)
        assert same_bits(torch.compile(model, fullgraph=True, backend="eager")(x), y)
        assert same_bits(torch.export.export(model, (x,)).module()(x), y)
        traced = fx.symbolic_trace(model)
        assert same_bits(traced(x), y)
    assert torch.ops.fxquant.static_convolution.default in {node.target for node in traced.graph.nodes}
    assert same_bits(model(x), y)


def test_function_transforms_give_the_same_bits():
    model, x = make("residual")
    with torch.no_grad():
        assert same_bits(torch.func.vmap(model)(x[None])[0], model(x))


@pytest.mark.parametrize("is_called", [False, True])
def test_copies_and_pickles_have_runs_of_their_own(is_called):
    model, x = make("residual")
    y = model(x) if is_called else one_by_one(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert RUNS not in vars(twin)
        assert same_bits(twin(x), y)
        twin.first.bias.data.add_(1)
        assert not torch.equal(twin(x), y)
    shallow = copy.copy(model)
    assert same_bits(shallow(x), y)
    shallow.first.bias.data.add_(1)
    assert same_bits(shallow(x), model(x))
    assert not torch.equal(model(x), y)


def test_a_model_inside_another_runs():
    model, x = make("gate")
    assert same_bits(chain(model, nn.Identity())(x), model(x))


def test_python_threads_may_share_a_model():
    model, _ = make("gate")
    inputs = [torch.randn(1 + i % 3, 3, 8, 10 + i) for i in range(4)]
    expected = [one_by_one(model, x) for x in inputs]
    wrong = []

    def work(numbers):
        for i in numbers * 10:
            if not same_bits(model(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=([n, (n + 1) % 4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_runs_keep_no_weights_alive():
    """Without the cycle that torch.fx makes of graph and module, the weights go with the model."""
    model, x = make("residual")
    model(x)
    weight = weakref.ref(model.first.weight_int8)
    gc.collect()
    gc.disable()
    try:
        model.graph._owning_module = None
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_model_that_refers_to_itself_is_collected():
    model, x = make("residual")
    model(x)
    model.first.register_forward_hook(lambda *_, owner=model: None)
    model.first.owners = (model,)
    weight = weakref.ref(model.first.weight_int8)
    del model
    gc.collect()
    assert weight() is None


@needs_library
def test_what_a_run_refuses_for_a_while_it_takes_again(native):
    model, x = make("residual")
    model(x)
    with torch.no_grad():
        handle = model.first.register_forward_hook(lambda *_: None)
        for _ in range(5):
            model(x)
        handle.remove()
        model(x)
    assert native == [True, False, False, False, False, False, True]
