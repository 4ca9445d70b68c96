"""Every preset, and the further ways to quantize a model, by a name that no refactor changes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

import fxquant
from fxquant import QConfig, QConfigMapping

LINEAR: dict[str, QConfig] = {
    "int8": fxquant.default_dynamic_qconfig,
    "per tensor": fxquant.per_tensor_dynamic_qconfig,
    "per channel": fxquant.per_channel_dynamic_qconfig,
    "int4": fxquant.int4_dynamic_qconfig,
    "int4 of 32": fxquant.int4_dynamic_qconfig.with_group_size(32),
    "int16": fxquant.int16_dynamic_qconfig,
    "float16": fxquant.float16_dynamic_qconfig,
}
"""The presets for products."""

SELDOM: dict[str, QConfig] = {
    "int4 of 128": fxquant.int4_dynamic_qconfig.with_group_size(128),
    "reduced range": fxquant.default_dynamic_qconfig.with_reduce_range(),
    "reduced range per tensor": fxquant.per_tensor_dynamic_qconfig.with_reduce_range(),
}
"""Variants that single operators are run with."""

TABLES: dict[str, QConfig] = {
    "uint8 tables": fxquant.float_qparams_weight_only_qconfig,
    "uint4 tables": fxquant.float_qparams_weight_only_qconfig_4bit,
    "uint4 tables, least error": fxquant.uint4_weight_only_qconfig,
}
"""The presets for embeddings."""

FIRST_SCHEMES = ("int4", "int4 of 32", "int8", "int16", "float16", "float")
"""What suggest_mapping chose from when the fixture was made."""

NEWER = (fxquant.int3_dynamic_qconfig, fxquant.default_static_qconfig, fxquant.default_qat_qconfig)
"""The presets of formats that are younger than the fixture, which has nothing to compare them with."""

Way = Callable[[nn.Module, tuple[Any, ...]], nn.Module]


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function without its warnings."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return call


def everything(qconfig: QConfig) -> QConfigMapping:
    """Return the mapping that gives everything a qconfig."""
    return QConfigMapping().set_global(qconfig)


@quiet
def by_graph(
    model: nn.Module, inputs: tuple[Any, ...], qconfig: QConfig, has_data: bool = False, **options: Any
) -> nn.Module:
    """Return a model quantized by prepare_fx and convert_fx; has_data: int4 weights are rounded on the inputs."""
    prepared = fxquant.prepare_fx(model, everything(qconfig), inputs, **options)
    return fxquant.convert_fx(prepared, data=[inputs, inputs] if has_data else None, check=False)


@quiet
def by_module(model: nn.Module, inputs: tuple[Any, ...], qconfig: QConfig, has_data: bool = False) -> nn.Module:
    """Return a model quantized by quantize_dynamic."""
    return fxquant.quantize_dynamic(model, everything(qconfig), data=[inputs, inputs] if has_data else None)


def _ways() -> dict[str, Way]:
    ways: dict[str, Way] = {
        name: functools.partial(by_graph, qconfig=qconfig)
        for name, qconfig in {**LINEAR, **TABLES}.items()
        if name != "int4 of 32"  # as int4, and run with single operators
    }
    ways["int4 with data"] = functools.partial(by_graph, qconfig=LINEAR["int4"], has_data=True)
    ways["int8, batch invariant"] = functools.partial(by_graph, qconfig=LINEAR["int8"], batch_invariant=True)
    ways["int8, eager"] = functools.partial(by_module, qconfig=LINEAR["int8"])
    return ways


WAYS = _ways()
"""What quantizes an architecture, by its name."""


def is_worth_it(name: str, model: nn.Module) -> bool:
    """Return whether a scheme can do something to a model: those for tables to a model that has one."""
    return name not in TABLES or any(isinstance(part, (nn.Embedding, nn.EmbeddingBag)) for part in model.modules())
