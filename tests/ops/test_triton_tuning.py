"""Which tile a product takes."""

import pytest
import torch

from tests.ops.kernels_on_gpu import needs_triton

pytestmark = needs_triton


@pytest.fixture
def tuning(monkeypatch):
    from fxquant.ops import triton_tuning

    monkeypatch.setattr(triton_tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return triton_tuning


KEY, GPU = ("int8", 0, 64, 64, torch.float32), torch.device("cuda", 0)


def test_there_are_few_shapes_for_any_number_of_tokens(tuning):
    for name in ("int8", "int4", "int3", "int16"):
        for tokens in (1, 2, 15, 16, 100, 1024, 10**6):
            known = tuning.shapes(name, tokens)
            assert 1 <= len(known) <= 4
            assert tokens == 1 or all(shape.tokens > 1 for shape in known)


def test_the_fastest_shape_is_kept(tuning, monkeypatch):
    fastest = tuning.shapes("int8", 40)[1]
    measured = []
    monkeypatch.setattr(tuning, "_measure", lambda shape, _: measured.append(shape) or (shape != fastest))
    launched = []
    for tokens in (40, 60, 33):  # up to 64 tokens are one case
        tuning.tuned(KEY, tokens, GPU, launched.append)
    assert launched == [fastest] * 3
    assert len(measured) == len(tuning.shapes("int8", 40))
    tuning.tuned(KEY, 40, torch.device("cuda", 1), launched.append)
    assert len(measured) == 2 * len(tuning.shapes("int8", 40))


def test_nothing_is_measured_while_a_graph_is_captured(tuning, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tuning, "_measure", lambda *_: pytest.fail("measured"))
    launched = []
    tuning.tuned(KEY, 40, GPU, launched.append)
    assert launched == [tuning.shapes("int8", 40)[0]]
    assert not tuning._chosen


def test_a_shape_beyond_the_devices_memory_is_left_out(tuning, monkeypatch):
    refused = type("OutOfResources", (Exception,), {})

    def launch(_):
        raise refused

    monkeypatch.setattr(torch.cuda, "Event", lambda **_: None)
    assert tuning._measure(tuning.shapes("int8", 40)[0], launch) == float("inf")
    with pytest.raises(ZeroDivisionError):
        tuning._measure(tuning.shapes("int8", 40)[0], lambda _: 1 / 0)
