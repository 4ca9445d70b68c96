"""The tools that the passes share."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

from fxquant.graph import edit


def test_a_mirror_shares_parameters_and_nothing_else():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.log = []
    twin = edit.mirror(model)
    assert twin[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert twin[0].weight is not model[0].weight
    assert twin[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()
    twin.log.append(1)
    twin[0].extra = 1
    twin.double()
    assert model.log == []
    assert not hasattr(model[0], "extra")
    assert model[0].weight.dtype == torch.float32


def test_a_mirror_keeps_ties_of_modules_and_tensors():
    model = nn.Module()
    model.a, model.c = nn.Linear(2, 2), nn.Linear(2, 2)
    model.b, model.c.weight = model.a, model.a.weight
    twin = edit.mirror(model)
    assert twin.a is twin.b
    assert twin.a.weight is twin.c.weight


def test_a_mirror_on_meta_holds_no_data():
    twin = edit.mirror(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), device="meta")
    assert {t.device.type for t in twin.state_dict().values()} == {"meta"}
    assert isinstance(twin[0].weight, nn.Parameter)


def test_a_mirror_without_hooks():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_pre_hook(lambda *_: None)
    assert edit.has_hooks(edit.mirror(model)[0])
    assert not edit.has_hooks(edit.mirror(model, hooks=False)[0])
    assert edit.has_hooks(model[0])


def test_a_mirror_of_what_cannot_be_copied():
    model = nn.Sequential(nn.Linear(2, 2))
    model.lock = threading.Lock()
    assert edit.mirror(model).lock is model.lock


def test_a_mirror_of_a_graph_module():
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    x = torch.randn(1, 2)
    assert torch.equal(edit.mirror(model)(x), model(x))


def test_free_name():
    model = nn.Sequential(nn.Linear(2, 2))
    assert edit.free_name(model, "0.weight") == "0.weight_1"
    assert edit.free_name(model, "0.other") == "0.other"
    assert edit.free_name(model, "x") == "x"


def test_get_tensor():
    model = nn.Sequential(nn.Linear(2, 2))
    assert edit.get_tensor(model, "0.weight") is model[0].weight
    assert edit.get_tensor(model, "0.absent.x") is None
    assert edit.get_tensor(model, "0") is None


def test_set_tensor_replaces_whatever_is_there():
    model = nn.Sequential(nn.Linear(2, 2))
    edit.set_tensor(model, "0.weight", torch.ones(1))
    assert "weight" in model[0]._buffers
    assert "weight" not in model[0]._parameters
    edit.set_tensor(model, "0.weight", nn.Parameter(torch.ones(1)))
    assert "weight" in model[0]._parameters
    assert "weight" not in model[0]._buffers


def test_byte_count_counts_ties_once_and_views_apart():
    model = nn.Module()
    model.a, model.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    model.b.weight = model.a.weight
    assert edit.byte_count(model) == 24
    model.register_buffer("part", model.a.weight.detach()[:1])
    assert edit.byte_count(model) == 24 + 12


def test_byte_count_on_meta():
    with torch.device("meta"):
        assert edit.byte_count(nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))) == 2 * (24 + 8)


def test_erase_dead_leaves_the_users_calls():
    graph = fx.Graph()
    x = graph.placeholder("x")
    mine = graph.get_attr("weight")
    users = graph.call_function(torch.add, (x, 1))
    graph.output(x)
    edit.erase_dead(graph, [mine, users])
    assert [n.name for n in graph.nodes] == ["x", "add", "output"]


def test_a_notebooks_line_is_told_by_its_cell(monkeypatch):
    compiler = pytest.importorskip("IPython.core.compilerop").CachingCompiler()
    shell = SimpleNamespace(compile=compiler)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    source = "def forward(x):\n    return 1 / x\n"
    names: dict = {}
    exec(compile(source, compiler.cache(source, number=7), "exec"), names)
    with pytest.raises(ZeroDivisionError) as caught:
        names["forward"](0)
    assert edit.user_frame(caught.value) == "Cell In[7], line 2, in forward: `return 1 / x`"

    graph = fx.Graph()
    node = graph.placeholder("x")
    node.stack_trace = f'  File "{names["forward"].__code__.co_filename}", line 2, in forward\n    return 1 / x\n'
    assert edit.node_frame(node) == "Cell In[7], line 2"

    with pytest.raises(TypeError) as elsewhere:
        len(0)
    assert edit.user_frame(elsewhere.value).startswith(f"{__file__}:")
