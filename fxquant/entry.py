"""What the public functions have in common: they run outside of inference mode, and answer torch.ao's keywords."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from fxquant.errors import ArgumentError, each_warning_once

P = ParamSpec("P")
R = TypeVar("R")

_TABLE = "add your own operators to ours, operators=(*OPERATORS, MY_OPERATOR)"
_KEPT = "name the attributes that shall stay reachable in prepare_fx(..., preserved_attributes=(...)); leave modules float with a qconfig of None"  # noqa: E501
_DONE = "leave it out"

SUCCESSORS = {
    "inplace": f"{_DONE}: the model that you pass is never changed",
    "backend_config": f"{_DONE}: {_TABLE}",
    "mapping": f"{_DONE}: {_TABLE}",
    "prepare_custom_config": _KEPT,
    "prepare_custom_config_dict": _KEPT,
    "convert_custom_config": _KEPT,
    "convert_custom_config_dict": _KEPT,
    "fuse_custom_config": _KEPT,
    "fuse_custom_config_dict": _KEPT,
    "qconfig_dict": "pass it as qconfig_mapping, which takes the dict form too",
    "qconfig_mapping": "give it to prepare_fx, which decides once",
    "_equalization_config": f"{_DONE}: call equalize_fx or smooth_fx before prepare_fx",
    "is_standalone_module": f"{_DONE}: prepare a submodule by itself and put the result in its place",
    "is_reference": f"{_DONE}: every operator has a plain-torch reference, for any device",
    "_remove_qconfig": f"{_DONE}: the result keeps its qconfigs, for fxquant.explain",
    "keep_original_weights": f"{_DONE}: keep the float model, which is not changed",
}
"""The keyword arguments of torch.ao's functions that ours do not take, and what to do instead."""


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, run outside of inference mode, whose tensors could not be used elsewhere.

    A keyword of torch.ao's that it does not take is an ArgumentError that says what to do instead.
    """
    own = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in own and name in SUCCESSORS:
                raise ArgumentError(f"{function.__name__} takes no {name!r}, as torch.ao's does: {SUCCESSORS[name]}")
        with torch.inference_mode(False), each_warning_once():
            return function(*args, **kwargs)

    return call
