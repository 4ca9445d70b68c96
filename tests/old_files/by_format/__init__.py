"""Files that fxquant wrote once integers stood under names of their format ("0.weight_int4"), and their models.

`<name>.safetensors` is what `fxquant.save` wrote of the model that `MODELS[name]` makes, and `outputs.pt` holds what it
gave on `inputs(name)`. They were written by `write` below at commit 31ce8c5, before the formats became a table.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import QConfig, QConfigMapping, default_dynamic_qconfig_mapping

FOLDER = pathlib.Path(__file__).parent
INT4_32 = fxquant.int4_dynamic_qconfig.with_group_size(32)


class Tables(nn.Module):
    """A table of words whose rows go through layers, and its logits by the table itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = nn.Embedding(19, 15), nn.Linear(15, 15, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return F.linear(self.middle(self.encoder(words)), self.encoder.weight)


class Bags(nn.Module):
    """Sums of an 8-bit table beside means of a 4-bit one."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.means = nn.EmbeddingBag(19, 9, mode="sum"), nn.EmbeddingBag(19, 9)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return what both say."""
        return torch.cat((self.sums(words), self.means(words)), 1)


class LSTM(nn.Module):
    """Two layers in both directions, projected, and a linear layer on them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(9, 17, 2, bidirectional=True, proj_size=5)
        self.out = nn.Linear(10, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all steps."""
        return self.out(self.lstm(x)[0])


class Mixed(nn.Module):
    """A GRU each of whose matrices has a scheme of its own, a plain RNN, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.rnn, self.cell = nn.GRU(9, 33), nn.RNN(33, 5, nonlinearity="relu"), nn.LSTMCell(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the cell's state."""
        return self.cell(self.rnn(self.gru(x)[0])[0][-1])[1]


class Attention(nn.Module):
    """An attention to a single key, whose weight is 1 however it is summed, and the weights of one to many.

    So no sum of floats is rounded to integers by the last projection, and no other machine may round it elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(18, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return both in a row."""
        single, weights = self.attention(x, x[:1], x[:1])[0], self.attention(x, x, x)[1]
        return torch.cat((single.flatten(), weights.flatten()))


def _layers() -> nn.Module:
    return nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 9, bias=False))


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(86, 257, 3, padding=1), nn.ReLU())


def _of(qconfig: QConfig) -> Callable[[], QConfigMapping]:
    return lambda: QConfigMapping().set_global(qconfig)


def _tables() -> QConfigMapping:
    return default_dynamic_qconfig_mapping().set_object_type(nn.Embedding, fxquant.float_qparams_weight_only_qconfig)


def _bags() -> QConfigMapping:
    mapping = QConfigMapping().set_global(fxquant.float_qparams_weight_only_qconfig)
    return mapping.set_module_name("means", fxquant.uint4_weight_only_qconfig)


def _mixed() -> QConfigMapping:
    return (
        default_dynamic_qconfig_mapping()
        .set_module_name("gru.weight_ih_l0", fxquant.int16_dynamic_qconfig)
        .set_module_name("gru.weight_hh_l0", INT4_32)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], QConfigMapping]]] = {
    "int8": (_layers, default_dynamic_qconfig_mapping),
    "per_tensor": (_layers, _of(fxquant.per_tensor_dynamic_qconfig.with_reduce_range())),
    "int4": (_layers, _of(INT4_32)),
    "int4_with_data": (_layers, _of(fxquant.int4_dynamic_qconfig)),
    "int16": (_layers, _of(fxquant.int16_dynamic_qconfig)),
    "float16": (_layers, _of(fxquant.float16_dynamic_qconfig)),
    "tables": (Tables, _tables),
    "bags": (Bags, _bags),
    "lstm": (LSTM, _of(fxquant.per_channel_dynamic_qconfig)),
    "mixed": (Mixed, _mixed),
    "attention": (Attention, default_dynamic_qconfig_mapping),
    "convolution": (_convolution, default_dynamic_qconfig_mapping),
    "eager": (Mixed, default_dynamic_qconfig_mapping),
}
"""What makes each model, and its mapping."""

FLOAT_SUMS = ("float16", "bags", "attention")
"""The models whose last operators sum floats, in an order that differs by machine; none rounds such a sum to integers.
All others compute in our operators alone, with the same bits on every machine."""


def inputs(name: str) -> tuple[torch.Tensor, ...]:
    """Return the inputs that a model was run on."""
    make = torch.Generator().manual_seed(2)
    shape = {
        "lstm": (4, 3, 9),
        "mixed": (4, 3, 9),
        "eager": (4, 3, 9),
        "attention": (5, 2, 18),
        "convolution": (2, 86, 7),
    }
    if name in ("tables", "bags"):
        return (torch.randint(19, (3, 4), generator=make),)
    # whole 64ths: torch.randn's last bits depend on the processor
    return (torch.randint(-150, 151, shape.get(name, (5, 70)), generator=make) / 64,)


def quantized(name: str) -> nn.Module:
    """Return a model with random weights, quantized as it is in its file."""
    make, mapping = MODELS[name]
    torch.manual_seed(3)
    model, example = make().eval(), inputs(name)
    if name == "eager":
        return fxquant.quantize_dynamic(model, mapping())
    data: Any = [example] if name == "int4_with_data" else None
    return fxquant.convert_fx(fxquant.prepare_fx(model, mapping(), example), data=data)


def load(name: str, folder: pathlib.Path = FOLDER) -> nn.Module:
    """Return the model of a file."""
    with torch.device("meta"):
        skeleton = MODELS[name][0]().eval()
    return fxquant.load(skeleton, folder / f"{name}.safetensors")


def write(folder: pathlib.Path) -> None:
    """Write the files."""
    results = {}
    for name in MODELS:
        model = quantized(name)
        fxquant.save(model, folder / f"{name}.safetensors")
        with torch.no_grad():
            results[name] = model(*inputs(name))
    torch.save(results, folder / "outputs.pt")
