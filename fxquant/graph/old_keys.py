"""State_dicts of quantized models as fxquant wrote them before 0.1.0."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.record import Record, record_of
from fxquant.nn.base import QuantizedModule


def take_old_keys(root: nn.Module, state_dict: Any) -> None:
    """Rename in place what a state_dict of a quantized model holds under the keys that fxquant wrote before 0.1.0."""
    for path, module in root.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        record = record_of(module)
        if isinstance(module, fx.GraphModule) and record is not None:
            take_old_call_keys(module, record, state_dict, prefix)
        elif isinstance(module, QuantizedModule):
            module.take_old_keys(state_dict, prefix)


def take_old_call_keys(model: fx.GraphModule, record: Record, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename in place what a state_dict holds of quantized calls under their old keys.

    Those were named by the dtype of the values: all of 4 bits were `_uint8`, numbered where there were several. A
    state_dict counts as old if it has none of the new keys, at least one that no longer exists, and only tensors that
    fit.
    """
    old_of = _old_call_keys(model, record)
    old = {key: name for key, name in old_of.items() if prefix + name in state_dict}
    has_new = any(prefix + key in state_dict for key in old_of.keys() - old_of.values())
    if has_new or not set(old.values()) - old_of.keys():
        return
    held = {key: state_dict[prefix + name] for key, name in old.items()}
    if all(_fits(edit.get_tensor(model, key), tensor) for key, tensor in held.items()):
        for name in old.values():
            del state_dict[prefix + name]
        state_dict.update({prefix + key: tensor for key, tensor in held.items()})


def _fits(expected: torch.Tensor | None, tensor: Any) -> bool:
    """Return whether what a state_dict holds could be the values of a tensor."""
    return (
        expected is not None
        and isinstance(tensor, torch.Tensor)
        and (expected.dtype, expected.shape) == (tensor.dtype, tensor.shape)
    )


def _old_call_keys(model: fx.GraphModule, record: Record) -> dict[str, str]:
    """Return the old key of the values of each quantized call whose values are stored as uint8."""
    old_of: dict[str, str] = {}
    calls = {node.name: node for node in model.graph.nodes}
    for site in record.sites:
        spec, node = site.qconfig.weight, calls.get(site.call or "")
        for part in node.all_input_nodes if node is not None and spec.torch_dtype == torch.uint8 else ():
            key = str(part.target)
            stem, is_suffixed, _ = key.rpartition(f"_{spec.dtype}")
            if part.op == "get_attr" and is_suffixed and key not in old_of:
                names = (f"{stem}_uint8{f'_{n}' if n else ''}" for n in itertools.count())
                old_of[key] = next(name for name in names if name not in old_of.values())
    return old_of
