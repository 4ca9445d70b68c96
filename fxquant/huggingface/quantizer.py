"""FxQuantizer: what transformers calls as it loads and saves a model whose quantization_config is an FxQuantConfig."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from fxquant.entry import entry
from fxquant.errors import ArgumentError, ModelStateError
from fxquant.graph.plan.rules import check_mapping
from fxquant.graph.record import Record, need_stage, record_of
from fxquant.graph.trace.trace import names_of
from fxquant.huggingface import folder, tree
from fxquant.huggingface.config import METHOD, FxQuantConfig


class FxQuantizer(HfQuantizer):  # type: ignore[misc]
    """The `model.hf_quantizer` of a model that fxquant quantized.

    record: every module that is quantized, and every candidate that stays float, with the reason;
    `fxquant.explain(model)` shows it as a table.
    """

    quantization_config: FxQuantConfig
    record: Record | None = None
    _skeleton: tree.Skeleton | None = None

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raise ArgumentError for a device_map that spreads a model over devices or the disk."""
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if len(devices) > 1 or "disk" in devices:
            raise ArgumentError(
                f"fxquant: device_map spreads the model over {', '.join(sorted(devices))}; a quantized model lies on "
                "one device and is not offloaded: device_map='cpu'"
            )

    @entry
    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **_: Any
    ) -> None:
        if not self.pre_quantized:  # a misspelt name is an error before gigabytes are read
            check_mapping(self.quantization_config.mapping_for(model), names_of(model))
            return
        plan = folder.read(checkpoint_files)
        record, aliases = folder.place_record(model, plan, checkpoint_files[0])
        self._skeleton = tree.build_skeleton(model, record, aliases, plan, checkpoint_files[0])

    @entry
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self._skeleton is None:
            self.record = tree.quantize(model, self.quantization_config)
        else:
            self.record, self._skeleton = tree.fill(model, self._skeleton), None
        model._weight_conversions = []  # files hold the modules' own names
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Return the tensors and the metadata that save_pretrained writes; (None, {}) where it writes adapters only."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return folder.describe(model, need_stage(model, "quantized", "save_pretrained", "from_pretrained"))

    def dequantize(self, *_: Any, **__: Any) -> NoReturn:
        """Raise ModelStateError: model.dequantize() calls this."""
        raise ModelStateError(
            "a model that fxquant quantized is not turned back into a float one, since its weights were rounded; load "
            "the float model"
        )

    def is_serializable(self) -> bool:
        """Return True: save_pretrained writes the quantized model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the quantized model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, since Trainer refuses even to evaluate other models. Training warns: the integers do not train."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes the quantized model."""
        return True


@entry
def as_pretrained(quantized: PreTrainedModel) -> PreTrainedModel:
    """Return the model, a result of `quantize_dynamic` on one of transformers', such that save_pretrained saves it.

    This is for rounding by GPTQ, with data, which from_pretrained has none of. The model is changed in place.
    Raises ModelStateError for anything else than a quantized model of transformers' that keeps its class.
    """
    record = need_stage(quantized, "quantized", "as_pretrained", "quantize_dynamic")
    if not isinstance(quantized, PreTrainedModel) or record.is_traced:
        raise ModelStateError(
            "as_pretrained needs a transformers model that quantize_dynamic quantized, got "
            f"{type(quantized).__name__}: a graph is saved with fxquant.save"
        )
    config = FxQuantConfig(record.mapping, batch_invariant=record.batch_invariant)
    quantizer = FxQuantizer(config, pre_quantized=True)
    quantizer.record = record_of(quantized)
    tree.forget_ties(tree.ties_of(quantized))
    quantized.hf_quantizer, quantized.config.quantization_config = quantizer, config
    quantized.is_quantized, quantized.quantization_method = True, METHOD
    quantized._weight_conversions = []
    return quantized
