"""FxQuantConfig: what a user asks of `from_pretrained`, and what a saved config.json says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from fxquant._version import __version__
from fxquant.checkpoint.plan import plain_mapping, read_mapping
from fxquant.errors import QConfigError, nearest
from fxquant.operators import OPERATORS
from fxquant.qconfig_mapping import QConfigMapping, default_dynamic_qconfig_mapping

METHOD = "fxquant"
_KEYS = ("qconfig_mapping", "strict", "batch_invariant")
_STORED = {"quant_method", "fxquant_version"}


class FxQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of `from_pretrained`: quantize the model as `fxquant.quantize_dynamic` would.

    qconfig_mapping: a QConfigMapping, or its dict form; None: default_dynamic_qconfig_mapping(). strict,
    batch_invariant: as for `quantize_dynamic`. Raises QConfigError for another argument or a malformed mapping. A name
    that is not in the model is a MappingNameError of `from_pretrained`.
    """

    def __init__(
        self,
        qconfig_mapping: QConfigMapping | Mapping[str, Any] | None = None,
        *,
        strict: bool = False,
        batch_invariant: bool | None = None,
        **stored: Any,
    ) -> None:
        """Take the arguments above. stored: what `to_dict` adds to them."""
        for name in stored.keys() - _STORED:
            raise QConfigError(f"FxQuantConfig takes no {name!r}{nearest(name, _KEYS)}")
        if stored.get("quant_method", METHOD) != METHOD:
            raise QConfigError(f"FxQuantConfig is for quant_method {METHOD!r}, got {stored['quant_method']!r}")
        self.quant_method = METHOD
        self.qconfig_mapping = _as_mapping(qconfig_mapping)
        self.strict, self.batch_invariant = strict, batch_invariant

    def mapping_for(self, model: nn.Module) -> QConfigMapping:
        """Return the mapping, with the names of types that the model has as the types."""
        return read_mapping(plain_mapping(self.qconfig_mapping), model, OPERATORS)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds: JSON values, from which FxQuantConfig(**values) is made again."""
        return {
            "quant_method": METHOD,
            "fxquant_version": __version__,
            "qconfig_mapping": plain_mapping(self.qconfig_mapping),
            "strict": self.strict,
            "batch_invariant": self.batch_invariant,
        }

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def _as_mapping(mapping: Any) -> QConfigMapping:
    """Return the argument as a mapping of its own."""
    if mapping is None:
        return default_dynamic_qconfig_mapping()
    if isinstance(mapping, QConfigMapping):
        return mapping.copy()
    if isinstance(mapping, Mapping):
        return read_mapping(dict(mapping), None, OPERATORS)
    raise QConfigError(
        "FxQuantConfig: qconfig_mapping is a QConfigMapping or its dict form, "
        f"got {type(mapping).__module__}.{type(mapping).__name__}; for one qconfig: "
        "QConfigMapping().set_global(qconfig)"
    )
