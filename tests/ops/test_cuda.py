"""What only a CUDA device can show: models there and back, graphs, streams, torch.compile, other devices, memory.

That each kernel gives the reference's bits is in tests/ops/test_triton_*.py, which use the device where there is one.
"""

import copy

import pytest
import torch
from torch import nn

from fxquant import (
    QConfigMapping,
    default_dynamic_qconfig,
    explain,
    int4_dynamic_qconfig,
    kernel_info,
    profile,
    quantize_dynamic,
)
from fxquant.ops import KERNELS, gpu
from tests.ops.kernels_on_gpu import needs_cuda, needs_triton

pytestmark = [needs_cuda, needs_triton]


class Words(nn.Module):
    """An embedding, an LSTM and two Linears."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(50, 64), nn.LSTM(64, 96)
        self.narrow, self.wide = nn.Linear(96, 80), nn.Linear(80, 50)

    def forward(self, words):
        return self.wide(torch.relu(self.narrow(self.rnn(self.embed(words))[0])))


@pytest.fixture(scope="module")
def model():
    mapping = QConfigMapping().set_global(default_dynamic_qconfig).set_module_name("wide", int4_dynamic_qconfig)
    return quantize_dynamic(Words().eval(), mapping)


@pytest.fixture
def words():
    return torch.randint(50, (7, 3))


def captured(call):
    """Return the graph of a call that has run before, and the graph's output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@torch.no_grad()
def test_a_model_gives_the_cpus_bits_there_and_back(model, words):
    expected = model(words)
    there = copy.deepcopy(model).cuda()
    assert torch.equal(there(words.cuda()).cpu(), expected)
    assert torch.equal(there.cpu()(words), expected)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_call_runs_on_triton_and_says_so(tokens):
    model = quantize_dynamic(nn.Sequential(nn.Linear(64, 32)).eval(), None).cuda()
    x = torch.randn(tokens, 64, device="cuda")
    assert "linear (Triton)" in {row.kernel for row in profile(model, x, rounds=1).rows}
    assert explain(model).on_gpu[0].startswith("runs on cuda:0: Triton")
    assert "Triton" in kernel_info().gpu


@torch.no_grad()
def test_a_graph_replays_other_inputs(model, words):
    there, static = copy.deepcopy(model).cuda(), words.cuda()
    graph, out = captured(lambda: there(static))
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = torch.randint(50, (7, 3))
        static.copy_(other)
        graph.replay()
        assert torch.equal(out.cpu(), model(other))


@torch.no_grad()
def test_a_graph_of_a_shape_that_is_new(words):
    model = quantize_dynamic(nn.Sequential(nn.Linear(72, 40)).eval(), None)
    there, x = copy.deepcopy(model).cuda(), torch.randn(5, 72)
    there(x.cuda())  # compiles; another number of tokens is not measured before it is captured
    static = torch.randn(9, 72, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = there(static)
    graph.replay()
    assert torch.equal(out.cpu(), model(static.cpu()))


@torch.no_grad()
def test_a_stream_of_its_own(model, words):
    there, stream = copy.deepcopy(model).cuda(), torch.cuda.Stream()
    here = words.cuda()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = there(here)
    stream.synchronize()
    assert torch.equal(out.cpu(), model(words))


@torch.no_grad()
@pytest.mark.long
def test_compiled_with_reduced_overhead():
    model = quantize_dynamic(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval(), None)
    compiled = torch.compile(copy.deepcopy(model).cuda(), mode="reduce-overhead")
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(6, 64)
        assert torch.equal(compiled(x.cuda()).cpu(), model(x))


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_another_device_than_the_current_one(model, words):
    there = copy.deepcopy(model).to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(there(words.to("cuda:1")).cpu(), model(words))
    assert torch.cuda.current_device() == 0


@torch.no_grad()
def test_a_product_allocates_its_result_and_the_integers():
    tokens, inputs, outputs = 512, 1024, 2048
    model = quantize_dynamic(nn.Sequential(nn.Linear(inputs, outputs)).eval(), None).cuda()
    x = torch.randn(tokens, inputs, device="cuda")
    model(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = model(x)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4 * out.numel() + (tokens + 1) * inputs + 8 * tokens + 4096


@torch.no_grad()
def test_weights_take_a_quarter():
    torch.cuda.synchronize()
    sizes = []
    for make in (lambda layer: layer, lambda layer: quantize_dynamic(layer, None)):
        before = torch.cuda.memory_allocated()
        there = make(nn.Sequential(nn.Linear(2048, 2048)).eval()).cuda()
        sizes.append(torch.cuda.memory_allocated() - before)
        del there
    assert sizes[1] <= 0.26 * sizes[0]


def test_gradients_pass_to_the_input(model):
    linear = KERNELS["linear"]
    layer = quantize_dynamic(nn.Sequential(nn.Linear(64, 32)).eval(), None)
    x = torch.randn(4, 64)
    grads = []
    for device in ("cpu", "cuda"):
        here = x.detach().to(device).requires_grad_()
        layer.to(device)(here).sum().backward()
        grads.append(here.grad.cpu())
    torch.testing.assert_close(*grads)
    assert linear.on_gpu is not None


def test_the_device_is_right():
    assert gpu.why_not(torch.cuda.current_device()) == ""
