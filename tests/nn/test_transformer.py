"""What stands for parts of torch's transformer modules: masks, hints, and the switches of their fast path."""

import pytest
import torch
from torch import nn

from fxquant import DTypeError
from fxquant.nn.transformer import additive_mask, avoid_fast_path, causal_hint

CAUSAL = nn.Transformer.generate_square_subsequent_mask(4)
INF = float("inf")


def test_a_bool_mask_becomes_an_additive_one_in_the_dtype_of_what_it_masks():
    mask = additive_mask(torch.tensor([True, False]), torch.zeros(1, dtype=torch.float64))
    assert mask.dtype == torch.float64
    assert mask.tolist() == [-INF, 0]


def test_a_float_mask_stays_and_none_stays_none():
    assert additive_mask(CAUSAL, torch.zeros(1)) is CAUSAL
    assert additive_mask(None, torch.zeros(1)) is None


def test_another_mask_is_an_error():
    with pytest.raises(DTypeError, match=r"bool or floating point, got torch\.int64; call mask\.bool\(\)"):
        additive_mask(torch.tensor([1, 0]), torch.zeros(1))


@pytest.mark.parametrize(
    ("is_causal", "mask", "expected"),
    [
        (True, CAUSAL + 1, True),
        (False, CAUSAL, False),
        (None, None, False),
        (None, CAUSAL, True),
        (None, CAUSAL < 0, True),
        (None, CAUSAL.t(), False),
        (None, CAUSAL[:2], False),
        (None, CAUSAL.expand(3, 4, 4), False),
    ],
)
def test_a_mask_is_known_to_be_causal_by_the_hint_or_its_values(is_causal, mask, expected):
    assert causal_hint(is_causal, mask) is expected


def test_the_switches_ask_for_torchs_python_code():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    model, seen = nn.TransformerEncoder(layer, 1).eval(), []
    with torch.no_grad():
        for module in model.modules():
            avoid_fast_path(module)
        model.layers[0].linear1 = nn.Sequential(nn.Linear(4, 8))  # without the weight that the fast path would read
        model.layers[0].linear1.register_module("seen", nn.Identity())
        model.layers[0].linear1.seen.forward = lambda x: seen.append(x.shape) or x
        model(torch.randn(2, 3, 4), src_key_padding_mask=torch.tensor([[False] * 3, [False, False, True]]))
    assert seen == [(2, 3, 8)]
