"""Under torch.autocast a quantized layer gives the dtype that the float layer gives there."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant import convert_fx, prepare_fx, quantize_dynamic
from fxquant.nn import DynamicQuantizedConv
from fxquant.ops.autocast import cast_dtype
from tests.samples import Call, everything, leaves, sqnr

X = torch.randn(5, 2, 32)
LAYERS = {
    "Linear": (nn.Linear(32, 8), (X,)),
    "LSTM": (nn.LSTM(32, 16, 2), (X,)),
    "GRU": (nn.GRU(32, 16), (X,)),
    "RNN": (nn.RNN(32, 16), (X,)),
    "LSTMCell": (nn.LSTMCell(32, 16), (X[0],)),
    "GRUCell": (nn.GRUCell(32, 16), (X[0],)),
    "RNNCell": (nn.RNNCell(32, 16), (X[0],)),
    "Embedding": (nn.Embedding(10, 32), (torch.arange(3),)),
    "EmbeddingBag": (nn.EmbeddingBag(10, 32), (torch.arange(4).view(2, 2),)),
    "MultiheadAttention": (nn.MultiheadAttention(32, 4), (X, X, X)),
}


def under_autocast(module, inputs, dtype=torch.bfloat16):
    with torch.no_grad(), torch.autocast("cpu", dtype):
        return leaves(module(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_module_gives_the_float_modules_dtype(name, dtype):
    module, inputs = LAYERS[name]
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    quantized = quantize_dynamic(nn.Sequential(module).eval())[0]
    ours, theirs = under_autocast(quantized, inputs), under_autocast(module.eval(), inputs)
    assert type(quantized) is not type(module)
    assert [out.dtype for out in ours] == [out.dtype for out in theirs]
    assert all(sqnr(b.float(), a.float()) > 20 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("function", [F.linear, torch.matmul, F.embedding])
def test_a_call_gives_the_float_calls_dtype(function):
    x = torch.arange(3) if function is F.embedding else X
    model = Call(function, 32, 32).eval()
    quantized = convert_fx(prepare_fx(model, everything(), x))
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = under_autocast(quantized, (x,), dtype), under_autocast(model, (x,), dtype)
        assert ours[0].dtype == theirs[0].dtype


def test_a_convolution_gives_the_float_ones_dtype():
    conv, x = nn.Conv2d(8, 16, 3), torch.randn(2, 8, 6, 6)
    (out,) = under_autocast(DynamicQuantizedConv.from_float(conv), (x,))
    assert out.dtype == torch.bfloat16
    assert out.shape == conv(x).shape


def test_states_of_an_autocast_step_are_taken_by_the_next():
    lstm = nn.LSTM(32, 16).eval()
    quantized = quantize_dynamic(nn.Sequential(lstm))[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, state = quantized(X[:2])
        out, _ = quantized(X[2:], state)
    assert out.dtype == torch.bfloat16
    assert sqnr(lstm(X)[0][2:], out.float()) > 20


def test_float64_is_not_cast_and_nothing_is_outside():
    quantized = quantize_dynamic(nn.Sequential(nn.Linear(32, 8)).eval())
    linear, x = nn.Linear(32, 8).double(), X.double()
    assert under_autocast(quantized, (x,))[0].dtype == under_autocast(linear, (x,))[0].dtype == torch.float64
    assert quantized(X).dtype == torch.float32


def test_on_meta_and_for_stand_ins_nothing_is_asked():
    quantized = quantize_dynamic(nn.Sequential(nn.Linear(32, 8)).eval())
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_dtype(torch.empty(2, device="meta")) is None
        traced = fx.symbolic_trace(quantized)
    assert torch.equal(traced(X), quantized(X))


def test_a_state_widens_the_dtype_on_the_cpu_alone():
    """torch.float16 on a GPU that is not there: as torch's kernels do it there, joined states are cast too."""
    with torch.autocast("cpu", torch.bfloat16), FakeTensorMode():
        assert cast_dtype(torch.empty(2), promotes=True) == torch.float32
        assert cast_dtype(torch.empty(2)) == torch.bfloat16
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.float16)
        try:
            assert cast_dtype(torch.empty(2, device="cuda"), promotes=True) == torch.float16
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
