"""The way back from quantization-aware training: a trained graph becomes what prepare_fx and calibration give.

Each trained module becomes its float one again, chains are fused as they were decided, and what rounded values counts
as their observers. So convert is the same for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.errors import DivergedError
from fxquant.fake_quantize import FakeQuantize
from fxquant.graph import edit
from fxquant.graph.constants import constant_of
from fxquant.graph.fuse import folded
from fxquant.graph.observe import make_weight_observer
from fxquant.graph.record import Fusion, Record
from fxquant.graph.teach import calls_of, flat_arguments, put_argument
from fxquant.nn.fused import WITH_RELU, linear_relu
from fxquant.nn.modes import ByMode
from fxquant.nn.trained import Given, Rounds, Trained, given
from fxquant.nn.trained_product import TrainedProduct
from fxquant.rounding import FakeQuantizeTokens, FakeQuantizeWeight


def lower(module: nn.Module, record: Record) -> list[Given]:
    """Rewrite a trained model in place, which may share its tensors with another.

    Returns the integers of the weights whose step sizes were learned.
    """
    if not isinstance(module, fx.GraphModule) or not record.is_traced:
        return _lower_modules(module)
    _fix_mode(module)
    _restore_relus(module)
    learned = _join(module, record.fusions)
    learned += _lower_modules(module)
    learned += given(_rounds_of_calls(module, record))
    for site in record.sites:
        rounding = None if site.observer is None else module.get_submodule(site.observer)
        if isinstance(rounding, FakeQuantizeWeight):
            edit.swap_module(module, str(site.observer), make_weight_observer(rounding.qconfig))
    for node in list(module.graph.nodes):
        rounding = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        is_second = isinstance(rounding, FakeQuantize) and len(node.args) > 1  # after a linear interpolation
        if is_second or isinstance(rounding, FakeQuantizeTokens):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return learned


def refuse_diverged(module: nn.Module, record: Record) -> None:
    """Raise DivergedError where a range or a weight of a model in training is not finite, naming the first."""
    for part in module.modules():
        if isinstance(part, FakeQuantize):
            part.refuse_diverged()
    for site in record.sites:
        tensor = edit.get_tensor(module, site.path)
        named = module.get_submodule(site.path).named_parameters() if tensor is None else [("", tensor)]
        for name, weight in named:
            if weight.numel() and not all(map(torch.isfinite, weight.detach().aminmax())):
                where = f"{name!r} of {site.path!r}" if name else repr(site.path)
                raise DivergedError(
                    f"{where} ({site.kind}) became NaN or infinite in training; load a checkpoint from before that"
                )


def rounds_of(module: nn.Module, record: Record) -> Iterator[Rounds]:
    """Yield what rounds the weights of a model in training, and the weights; without those before a BatchNorm."""
    for part in module.modules():
        if isinstance(part, Trained) and not getattr(part, "norm_eps", 0.0):
            yield from part.rounds(part)
    if isinstance(module, fx.GraphModule):
        yield from _rounds_of_calls(module, record)


def _rounds_of_calls(module: fx.GraphModule, record: Record) -> Iterator[Rounds]:
    for site in record.sites:
        rounding = None if site.observer is None else module.get_submodule(site.observer)
        tensor = edit.get_tensor(module, site.path)
        if isinstance(rounding, FakeQuantizeWeight) and tensor is not None:
            (node,) = module.graph.find_nodes(op="call_module", target=site.observer)
            shown = constant_of(node.args[0])
            yield rounding, tensor.t() if shown is not None and shown.is_transposed else tensor


def _lower_modules(root: nn.Module) -> list[Given]:
    """Replace the trained modules of a tree by their float forms, and return what is learned of them."""
    learned: list[Given] = []
    for part in list(root.modules()):
        if isinstance(part, Trained):
            result = part.to_float()
            learned += given(part.rounds(result))
            _replace(root, part, result)
    return learned


def _fix_mode(module: fx.GraphModule) -> None:
    """Put the constants of eval mode where arguments followed the mode."""
    for node in list(module.graph.nodes):
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, ByMode):
            for user in list(node.users):
                for place, leaf in enumerate(flat_arguments(user)):
                    if leaf is node:
                        put_argument(user, place, called.in_eval)
            module.graph.erase_node(node)


def _restore_relus(module: fx.GraphModule) -> None:
    """Put the ReLUs back that what rounds values did."""
    for node in list(module.graph.nodes):
        rounding = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(rounding, FakeQuantize) and rounding.rectifies:
            with module.graph.inserting_before(node):
                relu = module.graph.create_node("call_function", F.relu, node.args, name=rounding.rectifies)
            relu.meta.update(node.meta)
            node.args, rounding.rectifies = (relu,), ""


def _join(module: fx.GraphModule, fusions: Sequence[Fusion]) -> list[Given]:
    """Fuse the chains again that were taken apart, and return what is learned of them."""
    learned: list[Given] = []
    for fusion in fusions:
        path = fusion.chain[0]
        calls = calls_of(module, path)
        norm: Any = _norm_after(module, calls[0]) if calls else None
        has_relu = len(fusion.chain) > 1 + (norm is not None)
        for node in calls:
            if norm is not None:
                tensors = [read for read in node.args[1:] if isinstance(read, fx.Node)]
                node.args = node.args[:1]  # without the BatchNorm's tensors
                edit.erase_dead(module.graph, tensors)
                _absorb(module, node)
            if has_relu:
                _absorb(module, node)
            if node.op == "call_function":
                node.target = linear_relu
        if calls and calls[0].op == "call_module":
            layer = module.get_submodule(path)
            result = _joined(layer, norm)
            learned += given(layer.rounds(result)) if isinstance(layer, Trained) else []
            _replace(module, layer, result)
            if has_relu:  # in this place alone: a part beside the graph may call the layer too
                fused = edit.mirror(result)
                fused.__class__ = WITH_RELU[type(result)]
                edit.swap_module(module, path, fused)
    return learned


def _norm_after(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the BatchNorm that reads what a fused chain's first node gives, if one does."""
    follower = next(iter(node.users))
    called = module.get_submodule(str(follower.target)) if follower.op == "call_module" else None
    return called if isinstance(called, _BatchNorm) else None


def _absorb(module: fx.GraphModule, node: fx.Node) -> None:
    """Let a node do the one that reads it."""
    (follower,) = node.users
    follower.replace_all_uses_with(node)
    module.graph.erase_node(follower)


def _joined(layer: nn.Module, norm: Any) -> nn.Module:
    """Return the float module of a chain, without its ReLU."""
    if isinstance(layer, TrainedProduct):
        result = layer.to_float() if norm is None else layer.folded(norm)
    else:
        result = layer.to_float() if isinstance(layer, Trained) else layer
        result = edit.mirror(result) if norm is None else folded(result, norm)
    return result


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one, wherever that stands."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
