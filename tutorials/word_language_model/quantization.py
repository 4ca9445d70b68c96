"""The word language model in int8, with fxquant."""

from pathlib import Path

import torch
from torch import Tensor, nn

import fxquant
from fxquant import QConfigMapping, convert_fx, default_dynamic_qconfig, prepare_fx

from .checkpoint import infer_sizes
from .model import Hidden, WordLanguageModel

# What a caller still needs once the model is a graph. The two numbers that the method reads come along.
PRESERVED = ("init_hidden",)


def quantize(model: WordLanguageModel, example_inputs: tuple[Tensor, Hidden]) -> nn.Module:
    """Return the model with int8 weights: the two calls that all this is about."""
    mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    prepared = prepare_fx(model, mapping, example_inputs, preserved_attributes=PRESERVED)
    return convert_fx(prepared)


def save_and_check(
    model: WordLanguageModel, quantized: nn.Module, example_inputs: tuple[Tensor, Hidden], path: Path
) -> int:
    """Save the quantized model and read it back onto a skeleton without weights; return the file's size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fxquant.save(quantized, path)
    with torch.device("meta"):
        skeleton = WordLanguageModel(**infer_sizes(model.state_dict())).eval()
    loaded = fxquant.load(skeleton, path)
    if not torch.equal(loaded(*example_inputs)[0], quantized(*example_inputs)[0]):
        raise RuntimeError(f"the model read back from {path} answers otherwise than the one saved")
    return path.stat().st_size
