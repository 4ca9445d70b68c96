"""DynamicQuantizedLSTM: nn.LSTM's every form, within an error bound derived step by step."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fxquant import DTypeError, ShapeError, float16_dynamic_qconfig, per_tensor_dynamic_qconfig
from fxquant.nn import DynamicQuantizedLSTM
from fxquant.numerics import quantize_tokens
from tests.samples import leaves, same_bits

# torch's own float LSTM warns that it takes its slower path.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True},
    {"proj_size": 5},
    {"proj_size": 5, "num_layers": 2, "bidirectional": True, "bias": False},
    {"dropout": 0.5, "num_layers": 2},
]
ROUNDING = 2e-6  # float32 in the cell: see tests/ops/test_elementwise.py


def project(x, error, weight):
    """Return x @ weight.T and how far the quantized product may lie from it, x itself being off by up to `error`.

    As tests.samples.linear_bound, with |x̂ - x| ≤ error + step and a range that may be wider by twice the error.
    """
    span = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
    off = error + (span + 2 * error.amax(-1, keepdim=True)) / 255
    return x @ weight.t(), off @ weight.abs().t() + (x.abs() + off).sum(-1, keepdim=True) * weight.abs().amax(-1) / 254


def cell_bound(module, name, x, error, h, c, backward):
    """Run one direction of one layer in float64; return its outputs, h, c, each with its error bound."""
    weight = {kind: getattr(module, f"weight_{kind}_{name}", None) for kind in ("ih", "hh", "hr")}
    bias = sum(getattr(module, f"bias_{kind}_{name}") for kind in ("ih", "hh")) if module.bias else 0.0
    e_h, e_c, outputs = torch.zeros_like(h), torch.zeros_like(c), []
    steps = range(x.shape[0])
    for t in reversed(steps) if backward else steps:
        from_x, e_x = project(x[t], error[t], weight["ih"])
        from_h, e_hh = project(h, e_h, weight["hh"])
        i, f, g, o = (from_x + from_h + bias).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        slopes = torch.tensor([0.25, 0.25, 1.0, 0.25]).repeat_interleave(c.shape[-1])  # of σ, σ, tanh, σ
        e_i, e_f, e_g, e_o = ((e_x + e_hh) * slopes + ROUNDING).chunk(4, -1)
        e_c = (f + e_f) * e_c + c.abs() * e_f + (i + e_i) * e_g + g.abs() * e_i + ROUNDING
        c = f * c + i * g
        h, e_h = o * c.tanh(), (o + e_o) * e_c + c.tanh().abs() * e_o + ROUNDING
        if weight["hr"] is not None:
            h, e_h = project(h, e_h, weight["hr"])
        outputs.append((h, e_h))
    outputs = outputs[::-1] if backward else outputs
    return torch.stack([o for o, _ in outputs]), torch.stack([e for _, e in outputs]), (h, e_h), (c, e_c)


def lstm_bound(module, x, h0, c0):
    """Return [(value, bound)] of output, h and c for time-major input, all in float64."""
    module, x = module.double(), x.double()
    error, states, cell = torch.zeros_like(x), [], 0
    for layer in range(module.num_layers):
        parts = []
        for side in ("", "_reverse")[: 1 + module.bidirectional]:
            out, e, h, c = cell_bound(
                module, f"l{layer}{side}", x, error, h0[cell].double(), c0[cell].double(), bool(side)
            )
            parts.append((out, e))
            states.append((h, c))
            cell += 1
        x, error = (torch.cat([part[i] for part in parts], -1) for i in range(2))
    stacked = [tuple(torch.stack([state[k][i] for state in states]) for i in range(2)) for k in range(2)]
    return [(x, error), *stacked]


def states(module, batch):
    cells = module.num_layers * (2 if module.bidirectional else 1)
    return torch.randn(cells, batch, module.proj_size or module.hidden_size), torch.randn(
        cells, batch, module.hidden_size
    )


def make(**options):
    return nn.LSTM(9, 7, **options).eval()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_every_option_stays_within_the_bound(options):
    module = make(**options)
    x, hx = torch.randn(2, 4, 9), states(module, 4)
    got = leaves(DynamicQuantizedLSTM.from_float(module)(x, hx))
    floats = leaves(module(x, hx))
    for result, expected, (value, bound) in zip(got, floats, lstm_bound(module, x, *hx), strict=True):
        assert torch.allclose(value.float(), expected, atol=1e-5)  # the bound's own run is nn.LSTM's
        assert bool(((result - value).abs() <= bound).all())
        assert bound.mean() < 0.15  # and says something


@torch.no_grad()
def test_one_step_is_its_equation():
    module = make()
    quantized = DynamicQuantizedLSTM.from_float(module)
    x, hx = torch.randn(1, 4, 9), states(module, 4)
    pre = module.bias_ih_l0.double() + module.bias_hh_l0.double()
    for name, rows in (("ih", x[0]), ("hh", hx[0][0])):
        q, scale, zero_point = quantize_tokens(rows, 255)
        weight, weight_scale = (
            getattr(quantized, f"weight_{name}_l0_int8"),
            getattr(quantized, f"weight_{name}_l0_scale"),
        )
        pre = pre + (q - zero_point).double() @ weight.double().t() * scale.double() * weight_scale.double()
    i, f, g, o = pre.chunk(4, -1)
    c = f.sigmoid() * hx[1][0] + i.sigmoid() * g.tanh()
    expected = o.sigmoid() * c.tanh()
    output, (h, got_c) = quantized(x, hx)
    assert (got_c[0] - c).abs().max() < 4 * ROUNDING
    assert (h[0] - expected).abs().max() < 4 * ROUNDING
    assert torch.equal(output, h)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_half_weights_are_nearly_nn_lstm(options):
    module = make(**options)
    x, hx = torch.randn(3, 4, 9), states(module, 4)
    quantized = DynamicQuantizedLSTM.from_float(module, float16_dynamic_qconfig)
    for got, expected in zip(leaves(quantized(x, hx)), leaves(module(x, hx)), strict=True):
        assert (got - expected).abs().max() < 5e-3  # 2⁻¹¹ |w| |x|, over 3 steps and up to 3 layers


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_initial_state_is_zeros(options):
    module = DynamicQuantizedLSTM.from_float(make(**options))
    x = torch.randn(3, 4, 9)
    assert same_bits(module(x), module(x, tuple(torch.zeros_like(s) for s in states(module, 4))))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batch_first_is_the_same_turned(options):
    module = make(**options)
    turned = make(**options, batch_first=True)
    turned.load_state_dict(module.state_dict())
    x, hx = torch.randn(3, 4, 9), states(module, 4)
    output, state = DynamicQuantizedLSTM.from_float(module)(x, hx)
    output_turned, state_turned = DynamicQuantizedLSTM.from_float(turned)(x.transpose(0, 1), hx)
    assert torch.equal(output_turned.transpose(0, 1), output)
    assert same_bits(state, state_turned)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_unbatched_is_a_batch_of_one(options, batch_first, with_state):
    module = DynamicQuantizedLSTM.from_float(make(**options, batch_first=batch_first))
    x, hx = torch.randn(3, 9), states(module, 1)
    given = tuple(s[:, 0] for s in hx) if with_state else None
    output, state = module(x, given)
    batched = module(x.unsqueeze(0 if batch_first else 1), hx if with_state else None)
    assert torch.equal(output, batched[0].squeeze(0 if batch_first else 1))
    assert same_bits(state, tuple(s[:, 0] for s in batched[1]))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_a_packed_sequence_is_each_sequence_alone(options, with_state, is_sorted):
    module = DynamicQuantizedLSTM.from_float(make(**options))
    lengths = [5, 4, 2, 1] if is_sorted else [2, 5, 1, 4]
    x, hx = torch.randn(5, 4, 9), states(module, 4)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=is_sorted)
    output, (h, c) = module(packed, hx if with_state else None)
    assert isinstance(output, PackedSequence)
    padded, got_lengths = pad_packed_sequence(output)
    assert got_lengths.tolist() == lengths
    for b, length in enumerate(lengths):
        own = tuple(s[:, b : b + 1] for s in hx) if with_state else None
        alone, (h1, c1) = module(x[:length, b : b + 1], own)
        assert torch.equal(padded[:length, b : b + 1], alone)
        assert torch.equal(h[:, b : b + 1], h1)
        assert torch.equal(c[:, b : b + 1], c1)


def test_a_packed_sequence_is_near_nn_lstms():
    module = make(bidirectional=True)
    packed = pack_padded_sequence(torch.randn(5, 3, 9), torch.tensor([2, 5, 3]), enforce_sorted=False)
    output, state = DynamicQuantizedLSTM.from_float(module)(packed)
    expected, expected_state = module(packed)
    assert torch.equal(output.batch_sizes, expected.batch_sizes)
    assert torch.equal(output.unsorted_indices, expected.unsorted_indices)
    for a, b in zip([output.data, *state], [expected.data, *expected_state], strict=True):
        assert (a - b).abs().max() < 0.03  # far under a swap of rows; the bound itself is tested on plain input


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 9), (3, 0, 9), (0, 0, 9), (0, 9)])
def test_nothing_in_gives_nothing_out(options, shape):
    module = DynamicQuantizedLSTM.from_float(make(**options))
    output, (h, c) = module(torch.empty(shape))
    columns = (module.proj_size or 7) * (2 if module.bidirectional else 1)
    assert output.shape == (*shape[:-1], columns)
    cells = module.num_layers * (2 if module.bidirectional else 1)
    assert h.shape == (cells, *shape[1:-1], module.proj_size or 7)
    assert c.shape == (cells, *shape[1:-1], 7)


@pytest.mark.parametrize("batch", [4, 1])
def test_no_time_gives_the_state_back(batch):
    module = DynamicQuantizedLSTM.from_float(make())
    hx = states(module, batch)
    assert same_bits(module(torch.empty(0, batch, 9), hx)[1], hx)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_of_another_dtype_converts(dtype):
    module = make(num_layers=2).to(dtype)
    quantized = DynamicQuantizedLSTM.from_float(module)
    x = torch.randn(3, 4, 9).to(dtype)
    got = leaves(quantized(x))
    assert {t.dtype for t in got} == {dtype}
    same = leaves(DynamicQuantizedLSTM.from_float(module.float())(x.float()))
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(got, same, strict=True))


def test_the_initial_state_is_not_written_to():
    module = DynamicQuantizedLSTM.from_float(make())
    hx = states(module, 4)
    before = [s.clone() for s in hx]
    module(torch.randn(3, 4, 9), hx)
    assert same_bits(list(hx), before)


def test_results_do_not_share_memory_with_the_state_given():
    module = DynamicQuantizedLSTM.from_float(make())
    hx = states(module, 4)
    _, (h, c) = module(torch.empty(0, 4, 9), hx)
    assert {h.data_ptr(), c.data_ptr()}.isdisjoint({s.data_ptr() for s in hx})


def test_a_strided_state_and_input():
    module = DynamicQuantizedLSTM.from_float(make())
    x, hx = torch.randn(9, 4, 6).permute(2, 1, 0)[::2], tuple(s.mT.contiguous().mT for s in states(module, 4))
    assert same_bits(module(x, hx), module(x.contiguous(), tuple(s.contiguous() for s in hx)))


def test_a_list_for_a_state_is_taken():
    module = DynamicQuantizedLSTM.from_float(make())
    x, hx = torch.randn(3, 4, 9), states(module, 4)
    assert same_bits(module(x, list(hx)), module(x, hx))


@pytest.mark.parametrize("shape", [(3, 4, 8), (3, 8), (9,), (1, 3, 4, 9)])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ShapeError, match="a quantized LSTM"):
        DynamicQuantizedLSTM.from_float(make())(torch.randn(shape))


@pytest.mark.parametrize(
    ("place", "shape"), [(0, (1, 3, 7)), (0, (2, 4, 7)), (0, (4, 7)), (1, (1, 4, 6)), (1, (1, 4, 7, 1))]
)
def test_a_state_of_another_shape_is_refused(place, shape):
    module = DynamicQuantizedLSTM.from_float(make())
    hx = list(states(module, 4))
    hx[place] = torch.zeros(shape)
    name = ("h0", "c0")[place]
    with pytest.raises(ShapeError, match=rf"needs {name} of shape \(1, 4, 7\), got"):
        module(torch.randn(3, 4, 9), tuple(hx))


def test_a_batched_state_for_unbatched_input_is_refused():
    module = DynamicQuantizedLSTM.from_float(make())
    with pytest.raises(ShapeError, match=r"for input without a batch h0 must be 2-D, got \(1, 1, 7\)"):
        module(torch.randn(3, 9), states(module, 1))


def test_integers_are_refused():
    module = DynamicQuantizedLSTM.from_float(make())
    with pytest.raises(DTypeError, match=r"takes float tensors, got input of torch.int64"):
        module(torch.ones(3, 4, 9, dtype=torch.int64), states(module, 4))


def test_nan_stays_in_its_sequence_and_its_time():
    module = DynamicQuantizedLSTM.from_float(make())
    x = torch.randn(5, 4, 9)
    clean = module(x)[0]
    x[2, 1, 3] = float("nan")
    output = module(x)[0]
    assert output[2:, 1].isnan().all()
    is_touched = torch.zeros(5, 4, dtype=torch.bool)
    is_touched[2:, 1] = True
    assert torch.equal(output[~is_touched], clean[~is_touched])


def test_one_scale_a_tensor_is_a_choice():
    module = make()
    shared = DynamicQuantizedLSTM.from_float(module, per_tensor_dynamic_qconfig)
    x = torch.randn(3, 2, 9)
    x[:, 1] *= 1000
    assert not torch.equal(shared(x)[0][:, :1], shared(x[:, :1])[0])


def test_callers_of_nn_lstm_find_what_they_use():
    module = DynamicQuantizedLSTM.from_float(make(num_layers=2, bidirectional=True, batch_first=True))
    module.flatten_parameters()
    assert (module.input_size, module.hidden_size, module.num_layers) == (9, 7, 2)
    assert (module.bidirectional, module.batch_first, module.bias, module.proj_size) == (True, True, True, 0)


def test_buffers_are_named_after_nn_lstms_weights():
    module = make(num_layers=2, bidirectional=True, proj_size=3)
    state = DynamicQuantizedLSTM.from_float(module).state_dict()
    weights = {name for name in module.state_dict() if name.startswith("weight")}
    assert {name for name in state if name.startswith("weight")} == {
        f"{n}_{k}" for n in weights for k in ("int8", "scale")
    }
    for name in weights:
        assert state[f"{name}_int8"].shape == module.state_dict()[name].shape
        assert torch.allclose(
            state[f"{name}_scale"], module.state_dict()[name].abs().amax(1) / 127, rtol=2**-22, atol=0
        )


def test_repr_shows_sizes_and_options():
    module = DynamicQuantizedLSTM.from_float(make(num_layers=2, bidirectional=True, bias=False))
    assert repr(module) == (
        "DynamicQuantizedLSTM(9, 7, num_layers=2, bidirectional=True, bias=False, int8 symmetric per channel, "
        "activation uint8 affine per token)"
    )
