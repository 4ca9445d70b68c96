"""What calls of quantized modules refuse, in words of ours: gradients, odd tensors, TorchScript, freed memory."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import DTypeError, ModelStateError, quantize_dynamic
from tests.samples import Call, prepare, quantize

LINEARS = {
    "linear": lambda: quantize_dynamic(nn.Sequential(nn.Linear(8, 8))),
    "function": lambda: quantize(Call(F.linear, 8, 8), torch.randn(3, 8)),
}
FLOATS = {
    "lstm": lambda: quantize_dynamic(nn.Sequential(nn.LSTM(8, 4))),
    "gru": lambda: quantize_dynamic(nn.Sequential(nn.GRU(8, 4))),
    "cell": lambda: quantize_dynamic(nn.Sequential(nn.LSTMCell(8, 4))),
}
TABLES = {
    "embedding": lambda: quantize_dynamic(nn.Sequential(nn.Embedding(9, 4))),
    "bag": lambda: quantize_dynamic(nn.Sequential(nn.EmbeddingBag(9, 4))),
}
KINDS = LINEARS | FLOATS | TABLES


@pytest.mark.parametrize("kind", FLOATS)
def test_a_gradient_is_refused_and_never_lost(kind):
    model, x = FLOATS[kind](), torch.randn(3, 8).requires_grad_()
    output = model(x)
    while isinstance(output, tuple):
        output = output[0]
    told = r"a gradient came back to torch\.ops\.fxquant\.\w+, which has none: .* train the float model"
    with pytest.raises(ModelStateError, match=told):
        output.sum().backward()
    with torch.no_grad():
        expected = model(x)
    while isinstance(expected, tuple):
        expected = expected[0]
    assert torch.equal(output, expected)


ODD = {
    "sparse": (lambda: torch.eye(8).to_sparse(), r"a dense tensor, got a torch\.sparse_coo one; call x\.to_dense\(\)"),
    "csr": (lambda: torch.eye(8).to_sparse_csr(), r"a dense tensor, got a torch\.sparse_csr one"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)], layout=torch.jagged),
        r"a dense tensor, got a nested one; call x\.to_padded_tensor\(0\.0\) before it",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_and_nested_tensors_are_refused(kind, odd):
    make, told = ODD[odd]
    with pytest.raises(DTypeError, match=f"a quantized .* takes {told}"):
        KINDS[kind]()(make())


@pytest.mark.parametrize("given", [None, [1.0]], ids=["None", "list"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_tensor_is_refused(kind, given):
    with pytest.raises(
        DTypeError, match=rf"a quantized .* takes (a tensor|float tensors), got .*{type(given).__name__}"
    ):
        KINDS[kind]()(given)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", KINDS)
def test_torchscript_is_refused_and_the_successor_named(kind):
    with pytest.raises(ModelStateError, match=re.escape("use torch.export.export(quantized, inputs)")):
        torch.jit.script(KINDS[kind]())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_prepared_model_is_still_torchs_to_script():
    x = torch.randn(3, 8)
    prepared = prepare(nn.Sequential(nn.Linear(8, 8)), x)
    assert torch.allclose(torch.jit.script(prepared)(x), prepared(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "lstm", "gru", "cell", "embedding"])
def test_freed_memory_is_named(kind):
    model = KINDS[kind]()
    weight = next(tensor for name, tensor in model.named_buffers() if tensor.dtype == torch.int8)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ModelStateError, match=r"weight.* has no memory: its storage was freed"):
        model(torch.tensor([[1, 2]]) if kind in TABLES else torch.randn(3, 8))
