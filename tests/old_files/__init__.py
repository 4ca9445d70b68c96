"""Files that fxquant wrote while integers stood under the float weights' names, and the models that they are of.

`<name>.safetensors` is what `fxquant.save` wrote, `<name>.pt` what torch.save wrote of the model's state_dict; both
are of the model that `MODELS[name]` makes, and `outputs.pt` holds what it gave on `inputs(name)`. They were written
by `write` below at commit 5e67bd7.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    QConfig,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    default_dynamic_qconfig_mapping,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    prepare_fx,
    quantize_dynamic,
)

FOLDER = pathlib.Path(__file__).parent


class Tied(nn.Module):
    """One table, looked up and multiplied with; its logits are a functional call on the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = nn.Embedding(12, 8), nn.Linear(8, 8, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return F.linear(self.middle(self.encoder(words)), self.encoder.weight)


class Recurrent(nn.Module):
    """An LSTM and a GRU, one scheme a matrix, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.cell = nn.LSTM(8, 6, bias=False), nn.GRU(6, 5), nn.RNNCell(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last state."""
        y, _ = self.gru(self.lstm(x)[0])
        return self.cell(y[-1])


class Functional(nn.Module):
    """F.linear and F.embedding on parameters, one of them stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Parameter(torch.randn(11, 8)), nn.Parameter(torch.randn(6, 8))
        self.turned = nn.Parameter(torch.randn(6, 5))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return rows of the table, multiplied twice."""
        return F.linear(F.embedding(words, self.table), self.weight) @ self.turned


class Attention(nn.Module):
    """An attention with sizes of its own, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.other = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=4, bias=False)

    def forward(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return what is attended to."""
        return self.other(self.same(x, x, x)[0], key, value)[0]


def _mixed() -> QConfigMapping:
    return (
        default_dynamic_qconfig_mapping()
        .set_module_name("lstm.weight_hh_l0", float16_dynamic_qconfig)
        .set_module_name("gru.weight_ih_l0", int4_dynamic_qconfig)
        .set_module_name("gru.weight_hh_l0", None)
    )


def _of(qconfig: QConfig, table: QConfig | None = None, kind: Any = None) -> Callable[[], QConfigMapping]:
    """Return what makes a mapping: a qconfig for all, and one for tables."""

    def make() -> QConfigMapping:
        mapping = QConfigMapping().set_global(qconfig)
        return mapping.set_object_type(kind, table) if table else mapping

    return make


def _linears() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))


def _bags() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(9, 7), nn.Linear(7, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], QConfigMapping]]] = {
    "int8": (Tied, default_dynamic_qconfig_mapping),
    "int16": (_linears, _of(int16_dynamic_qconfig)),
    "int4": (Functional, _of(int4_dynamic_qconfig, float_qparams_weight_only_qconfig_4bit, F.embedding)),
    "uint8": (Functional, _of(default_dynamic_qconfig, float_qparams_weight_only_qconfig, F.embedding)),
    "uint4": (_bags, _of(int4_dynamic_qconfig, float_qparams_weight_only_qconfig_4bit, nn.EmbeddingBag)),
    "float16": (Tied, _of(float16_dynamic_qconfig)),
    "recurrent": (Recurrent, _mixed),
    "attention": (Attention, default_dynamic_qconfig_mapping),
    "eager": (Recurrent, default_dynamic_qconfig_mapping),
}
"""What makes each model, and its mapping."""


def inputs(name: str) -> tuple[torch.Tensor, ...]:
    """Return the inputs that a model was run on."""
    make = torch.Generator().manual_seed(1)
    words = torch.randint(9, (3, 4), generator=make)
    rows = tuple(torch.randn(5, 2, size, generator=make) for size in (8, 6, 4))
    return {"int16": rows[:1], "recurrent": rows[:1], "eager": rows[:1], "attention": rows}.get(name, (words,))


def quantized(name: str, model: nn.Module, mapping: QConfigMapping) -> nn.Module:
    """Return a model as it was quantized for its file."""
    if name == "eager":
        return quantize_dynamic(model, mapping)
    return convert_fx(prepare_fx(model, mapping, inputs(name)))


def write(folder: pathlib.Path) -> None:
    """Write the files."""
    outputs = {}
    for name, (make, mapping) in MODELS.items():
        torch.manual_seed(0)
        model = quantized(name, make().eval(), mapping())
        fxquant.save(model, folder / f"{name}.safetensors")
        torch.save(model.state_dict(), folder / f"{name}.pt")
        outputs[name] = model(*inputs(name)).detach()
    torch.save(outputs, folder / "outputs.pt")
