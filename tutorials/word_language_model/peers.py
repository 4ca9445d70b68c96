"""The same model quantized by torch.ao, where this torch still has it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .model import Hidden, WordLanguageModel


@contextmanager
def _deprecations_silenced() -> Iterator[None]:
    """Keep torch.ao's notices that it will be removed out of a demo that compares with it on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quantize_with_torch_ao(model: WordLanguageModel, example_inputs: tuple[Tensor, Hidden]) -> nn.Module:
    """Return the model as torch.ao's FX mode quantizes it, with the documents' mapping.

    That is default_dynamic_qconfig for all but nn.Embedding, which takes no activation qconfig there and has
    float_qparams_weight_only_qconfig. Raises ImportError where this torch has no torch.ao any more.
    """
    with _deprecations_silenced():
        from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig, float_qparams_weight_only_qconfig
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        mapping = QConfigMapping().set_global(default_dynamic_qconfig)
        mapping.set_object_type(nn.Embedding, float_qparams_weight_only_qconfig)
        return convert_fx(prepare_fx(model, mapping, example_inputs))
