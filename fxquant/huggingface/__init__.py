"""Hugging Face's transformers: FxQuantConfig quantizes a model as `from_pretrained` loads it.

Importing this package registers the quantization method "fxquant" with transformers, for saved folders too, so a
process that loads one imports it first. It is an extra: pip install 'fxquant[transformers]'.

config.py: what the user asks for. quantizer.py: what transformers calls. tree.py: modules replaced in the user's model.
folder.py: what a saved folder holds beside the tensors.
"""

import importlib.metadata

from fxquant.errors import MissingPackageError

try:
    _version = importlib.metadata.version("transformers")
except importlib.metadata.PackageNotFoundError:
    _version = "none"
if int(_version.partition(".")[0] if _version[0].isdigit() else 0) < 5:
    raise MissingPackageError(
        f"fxquant.huggingface needs transformers 5, found {_version}: pip install 'fxquant[transformers]'"
    )

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer

from fxquant.huggingface.config import METHOD, FxQuantConfig
from fxquant.huggingface.quantizer import FxQuantizer, as_pretrained

__all__ = ["FxQuantConfig", "FxQuantizer", "as_pretrained"]

if METHOD not in AUTO_QUANTIZER_MAPPING:  # importlib.reload runs this again
    register_quantization_config(METHOD)(FxQuantConfig)
    register_quantizer(METHOD)(FxQuantizer)
