"""The table of what stands between products."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, ops, prepare_fx
from fxquant.graph.plan.targets import call_name
from fxquant.operators.values import VALUE_OPERATORS, Form, arguments_of, find_value_operator
from tests.samples import sqnr


def test_no_kind_is_in_two_rows():
    kinds = [kind for row in VALUE_OPERATORS for kind in (*row.modules, *row.functions)]
    assert len(kinds) == len(set(kinds))
    assert len({row.name for row in VALUE_OPERATORS}) == len(VALUE_OPERATORS)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (nn.Flatten, Form.KEEPS), (torch.cat, Form.KEEPS), ("view", Form.KEEPS), (F.pad, Form.PADS),
        (nn.MaxPool1d, Form.POOLS), (F.gelu, Form.LOOKS_UP), ("relu", Form.LOOKS_UP), (torch.add, Form.ADDS),
        ("mul", Form.MULTIPLIES), (nn.AvgPool3d, Form.AVERAGES), (torch.mean, Form.AVERAGES),
    ],
)  # fmt: skip
def test_a_kind_has_its_form(kind, form):
    assert find_value_operator(kind).form is form


@pytest.mark.parametrize("kind", [nn.Softmax, F.softmax, nn.LayerNorm, torch.cumsum, "matmul"])
def test_others_have_none(kind):
    assert find_value_operator(kind) is None


@pytest.mark.parametrize(
    ("kind", "given", "takes"),
    [
        (F.pad, {"mode": "constant", "value": 0}, True),
        (F.pad, {"mode": "constant", "value": 1.5}, False),
        (F.pad, {"mode": "reflect"}, True),
        (F.max_pool2d, {"return_indices": True}, False),
        (F.interpolate, {"mode": "nearest"}, True),
        (F.interpolate, {"mode": "bilinear"}, True),
        (F.interpolate, {"mode": "bilinear", "antialias": True}, False),
        (F.interpolate, {"mode": "bicubic"}, False),
        (nn.BatchNorm2d, {"track_running_stats": True, "training": False}, True),
        (nn.BatchNorm2d, {"track_running_stats": False, "training": False}, False),
    ],
)
def test_some_arguments_have_no_integer_form(kind, given, takes):
    assert find_value_operator(kind).takes(given) is takes


def test_functions_of_the_channel_need_a_table_each():
    assert find_value_operator(nn.PReLU).channels({"num_parameters": 1}) == 0
    assert find_value_operator(nn.PReLU).channels({"num_parameters": 8}) == 8
    assert find_value_operator(nn.BatchNorm1d).channels({"num_features": 6}) == 6


def test_arguments_are_known_by_name_however_they_are_given():
    assert arguments_of(F.avg_pool2d, ("x", 2, 1), {"ceil_mode": True}, None) == {
        "kernel_size": 2, "stride": 1, "ceil_mode": True,
    }  # fmt: skip
    module = nn.MaxPool2d(3, 2)
    found = arguments_of(nn.MaxPool2d, ("x",), {}, module)
    assert (found["kernel_size"], found["stride"], found["padding"]) == (3, 2, 0)


# Every kind of every row


def spatial(x, rank):
    """Return (B, C, 6, 6) with `rank` dimensions after the second."""
    return x.flatten(2) if rank == 1 else x if rank == 2 else x.unflatten(3, (2, 3))


SHAPES = {
    torch.permute: ((0, 2, 3, 1),), "permute": (0, 2, 3, 1), torch.transpose: (1, 2), "transpose": (1, 2),
    torch.swapaxes: (1, 2), "swapaxes": (1, 2), torch.movedim: (1, 2), "movedim": (1, 2), torch.flatten: (2,),
    torch.unsqueeze: (2,), "unsqueeze": (2,), torch.squeeze: (2,), "squeeze": (2,), torch.reshape: ((-1, 4, 2, 36),),
    "reshape": (-1, 4, 72), "view": (-1, 4, 72), torch.chunk: (2, 1), "chunk": (2, 1), torch.split: (4, 1),
    "split": (4, 1), torch.unbind: (2,), "unbind": (2,), torch.roll: (1, 1), "roll": (1, 2), torch.flip: ((2,),),
    "flip": (1,), torch.narrow: (1, 2, 4), "narrow": (1, 2, 4), torch.select: (1, 2), "select": (1, 2),
    torch.tile: ((1, 2, 1, 1),), "repeat": (1, 2, 1, 1), operator.getitem: ((slice(None), slice(1, 5)),),
    torch.broadcast_to: ((3, 8, 6, 6),), "expand": (-1, -1, -1, 6), F.dropout: (0.2, False), F.dropout1d: (0.2, False),
    F.dropout2d: (0.2, False), F.dropout3d: (0.2, False), F.pixel_shuffle: (2,), F.pixel_unshuffle: (2,),
    torch.channel_shuffle: (2,), torch.unflatten: (1, (2, 4)), "unflatten": (1, (2, 4)), F.pad: ((1, 2, 0, 1),),
    F.interpolate: (None, 2.0), F.upsample: (None, 2.0, "bilinear", False), torch.clamp: (-1.0, 0.5),
    torch.clip: (0.0, 2.0), "clamp": (-1.0, 0.5), "clip": (-0.5,), "clamp_": (-1.0, 0.5), "flatten": (1,),
    torch.clamp_: (-1.0, 0.5), **dict.fromkeys((torch.clamp_min, "clamp_min", "clamp_min_"), (-1.0,)),
    **dict.fromkeys((torch.clamp_max, "clamp_max", "clamp_max_"), (0.5,)),
    **dict.fromkeys((torch.pow, operator.pow, "pow"), (2,)),
    torch.mean: ((2, 3),), "mean": (1,), nn.Flatten: (1,), nn.Unflatten: (1, (2, 4)), nn.PixelShuffle: (2,),
    nn.PixelUnshuffle: (2,), nn.ChannelShuffle: (2,), nn.Upsample: (None, 2, "bilinear"), nn.PReLU: (8, 0.1),
    nn.Hardshrink: (0.0,), nn.UpsamplingNearest2d: (None, 2), nn.UpsamplingBilinear2d: (None, 2),
    nn.BatchNorm1d: (8,), nn.BatchNorm2d: (8,),
    torch.index_select: (1, torch.tensor([5, 1, 1, 0])), "index_select": (1, torch.tensor([5, 1, 1, 0])),
    nn.BatchNorm3d: (8,), **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), (1, 0.0)),
}  # fmt: skip
"""The arguments of a kind beside the value."""


def arguments(kind):
    """Return what a kind is called or made with beside the value."""
    name = kind if isinstance(kind, str) else kind.__name__
    if kind in SHAPES:
        return SHAPES[kind]
    if "Pad" in name:
        return (1,)
    if "dropout" in name.lower():
        return (0.2,)
    if "adaptive" in name.lower():
        return (1,)
    return (2, 1, 1) if "pool" in name.lower() else ()


def body_of(kind):
    """Return a function of a value, (B, 8, 6, 6), that a kind of a row does."""
    name = kind if isinstance(kind, str) else kind.__name__
    rank = next((rank for rank in (1, 3) if f"{rank}d" in name), 2)
    more = arguments(kind)
    if isinstance(kind, type):
        return nn.Sequential(Spatial(rank), kind(*more).eval())
    row = find_value_operator(kind)
    if row.form in (Form.ADDS, Form.MULTIPLIES):
        other = (lambda x: 2.0) if "div" in name else (lambda x: x[:, :1])
        if isinstance(kind, str):
            return lambda x: getattr(x * 1.0, kind)(other(x))
        return lambda x: kind(x * 1.0, other(x))
    if row.is_pair:
        return lambda x: getattr(x * 0.5, kind)(-x) if isinstance(kind, str) else kind(x * 0.5, -x)
    if kind in (torch.cat, torch.concat, torch.stack):
        return lambda x: kind([x, x.flip(3)], 1)
    if kind in ("view_as", "reshape_as", "expand_as"):
        return lambda x: getattr(x, kind)(x)
    if kind in (torch.t, "t"):
        return lambda x: (x[:, 0, 0].t() if kind == "t" else torch.t(x[:, 0, 0])).t()
    if kind in (torch.sqrt, torch.log1p, "sqrt"):
        return lambda x: x.abs().sqrt() if kind == "sqrt" else kind(x.abs())
    has_parts = name in ("chunk", "split", "unbind")
    call = (lambda x: getattr(x, kind)(*more)) if isinstance(kind, str) else lambda x: kind(x, *more)
    return lambda x: call(spatial(-x, rank))[0] if has_parts else call(spatial(-x, rank))


class Spatial(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def forward(self, x):
        return spatial(-x, self.rank)  # so that it is not fused with the convolution before it


class Between(nn.Module):
    """A kind of function between two products."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 8, 3, padding=1), body_of(kind)
        with torch.no_grad():
            self.last = nn.Linear(self.body(torch.randn(3, 8, 6, 6)).flatten(1).shape[1], 4)

    def forward(self, x):
        return self.last(self.body(self.conv(x)).flatten(1))


KINDS = [(row, kind) for row in VALUE_OPERATORS for kind in (*row.modules, *row.functions)]


@pytest.mark.filterwarnings("ignore:.*nn.functional.upsample")
@pytest.mark.parametrize(("row", "kind"), KINDS, ids=[f"{row.name}-{call_name(kind)}" for row, kind in KINDS])
@torch.no_grad()
def test_every_kind_of_a_row_has_its_form(row, kind):
    torch.manual_seed(1)
    model, x = Between(kind).eval(), torch.randn(3, 3, 6, 6)
    prepared = prepare_fx(model, fxquant.default_static_qconfig_mapping(), (x,))
    assert prepared.record.values.floats == ()
    taken = {row.form for call in prepared.record.values.calls for row in rows_of(prepared, call)}
    assert row.form in taken
    if isinstance(kind, str):
        return  # a method does what a function above does
    prepared(x)
    quantized = convert_fx(prepared, check=False)
    assert ops.dequantize not in [node.target for node in quantized.graph.nodes]
    y = quantized(x)
    assert sqnr(model(x), y) > 25
    assert torch.equal(quantized(x[1:2]), y[1:2]) or kind is torch.broadcast_to  # which says the batch's size


def rows_of(prepared, call):
    """Return the rows of a node that computes with integers, and of those that it does too."""
    for node in prepared.graph.nodes:
        if node.name in (call.node, *call.absorbed) and node.op.startswith("call_"):
            kind = type(prepared.get_submodule(node.target)) if node.op == "call_module" else node.target
            yield from filter(None, [find_value_operator(kind)])
