"""Triton's recurrent layers give the references' bits: the walk's division into programs, formats, packed batches."""

import importlib

import pytest
import torch

from fxquant import ShapeError
from fxquant.ops import gpu
from tests.ops.kernels_on_gpu import DEVICE, check, needs_triton, run_triton, triton_kernels  # noqa: F401
from tests.ops.operands import recurrent_call as operands

pytestmark = [needs_triton, pytest.mark.usefixtures("triton_kernels")]


def changed(arguments, **changes):
    """Return an operator's arguments with some of them changed."""
    names = {"x": 1, "h0": 3, "c0": 4, "per_token": -3, "qmax": -2, "formats": -1, "biases": 7, "hidden_biases": 7}
    arguments = list(arguments)
    for name, value in changes.items():
        arguments[names[name]] = value
    return arguments


@pytest.fixture
def recurrent():
    return importlib.import_module("fxquant.ops.triton_recurrent")


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_a_layer(kind):
    check(*operands(kind))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_packed_batch_in_both_directions(kind):
    check(*operands(kind, both=True, packed=[3, 2], batch=4))


@pytest.mark.parametrize("name", ["int4", "int3", "int16"])
def test_other_formats(name):
    check(*operands("rnn_tanh", ("int8", name), hidden=37, steps=1))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_projection(name):
    check(*operands("lstm", ("int8", "int8", name), proj=5, hidden=35))


def test_without_biases():
    check(*changed(operands("lstm", steps=1), biases=[]))
    check(*changed(operands("gru", steps=1), hidden_biases=[]))


def test_seven_bits_and_half_precision():
    arguments = operands("lstm", steps=1)
    check(*changed(arguments, qmax=127, x=arguments[1].half()))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # in the interpreter
def test_special_states():
    """A NaN makes its token's results NaN alone; infinities, tiny values and zeros are as the reference has them."""
    h0 = torch.randn(1, 6, 9)
    h0[0, 0, 3], h0[0, 1, 2], h0[0, 1, 4], h0[0, 2], h0[0, 3] = torch.nan, torch.inf, -torch.inf, 0.0, 1e-39
    h, _ = check(*changed(operands("rnn_relu", batch=6, steps=1), h0=h0))
    assert h[0].isnan().any(1).tolist() == [True] + 5 * [False]
    check(*changed(operands("gru", batch=6, steps=1), h0=h0))
    check(*changed(operands("rnn_tanh", ("int8", "int16"), batch=6, steps=1), h0=h0))


def test_a_token_alone_gives_the_same_bits():
    arguments = operands("gru", batch=3, steps=1)
    x, h0 = arguments[1], arguments[3]
    whole = check(*arguments)[0]
    for i in range(3):
        alone = changed(arguments, x=x[:, i : i + 1], h0=h0[:, i : i + 1])
        assert torch.equal(check(*alone)[0], whole[:, i : i + 1])


def by_steps(recurrent):
    """Return a launch of one step at a time: so programs that the interpreter runs in turn need not meet."""

    def launch(shares, steps, operands, numbers, meta):
        for t in range(steps):
            grid = (shares.tiles, shares.programs)
            recurrent.walk_kernel[grid](*operands, operands[0], t, t + 1, *numbers, **meta, MEETS=False)

    return launch


@pytest.mark.parametrize(("kind", "how"), [
    ("lstm", {"both": True, "packed": [18, 17]}),
    ("gru", {}),
])  # fmt: skip
def test_programs_share_rows_and_units(kind, how, recurrent, monkeypatch):
    monkeypatch.setattr(recurrent, "share", lambda *_: recurrent.Shares(16, 2, 2, False))
    monkeypatch.setattr(recurrent, "launch", by_steps(recurrent))
    check(*operands(kind, batch=18, hidden=40, **how))


def test_programs_meet_after_each_step(recurrent, monkeypatch):
    """With one program for each row, since the interpreter runs one after another."""
    monkeypatch.setattr(recurrent, "share", lambda *_: recurrent.Shares(16, 1, 1, True))
    check(*operands("lstm", ("int8", "int8", "int8"), proj=5))


def test_states_that_are_read_in_parts(recurrent, monkeypatch):
    monkeypatch.setattr(recurrent, "_AT_ONCE", 64)
    check(*operands("lstm", hidden=40, steps=1))


@pytest.mark.parametrize(("batch", "hidden", "shares"), [
    (1, 128, (16, 1, 4, True)),
    (1, 1024, (16, 1, 32, True)),
    (64, 1024, (16, 4, 32, True)),
    (256, 1024, (64, 4, 32, True)),
    (4096, 1024, (64, 64, 2, True)),
    (9000, 1024, (64, 141, 1, False)),
    (7, 40, (16, 1, 1, False)),
])  # fmt: skip
def test_a_walk_is_divided_among_no_more_programs_than_run_at_once(batch, hidden, shares, recurrent, monkeypatch):
    monkeypatch.setattr(recurrent, "_multiprocessors", lambda _: 132)
    device = torch.device("cuda", 0)
    assert recurrent.share(batch, hidden, 4 * hidden * hidden, True, False, device) == shares
    cell = recurrent.share(batch, hidden, 4 * hidden * hidden, False, False, device)
    assert cell.programs == -(-hidden // 32)
    assert not cell.meets


def test_what_the_reference_computes():
    arguments = operands("lstm")
    floats = changed(operands("lstm"), formats=["int8", "float32"])
    floats[5] = [floats[5][0], torch.randn(36, 9)]
    floats[6] = [floats[6][0], torch.empty(0)]
    for other in (changed(arguments, per_token=False), changed(arguments, x=torch.randn(0, 3, 5)), floats):
        assert run_triton(*other) is None


def test_sizes_that_are_no_packed_batchs_are_refused():
    with pytest.raises(ShapeError, match=r"5 rows of a batch of 3 cannot have batch_sizes \[2, 3\]"):
        run_triton(*operands("lstm", packed=[2, 3]))


def test_the_sizes_of_a_packed_batch_may_be_on_the_cpu(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "run", lambda _, a, tensors: seen.extend(tensors))
    _, x, sizes, *_ = arguments = operands("lstm", packed=[3, 2])
    run_triton(*arguments)
    assert len(seen) == 8  # x, h0, c0, two weights, two scales, a bias
    assert not any(tensor is sizes for tensor in seen)
    assert DEVICE == "cuda" or any(tensor is x for tensor in seen)
