"""Setting on a graph what forward read while it was traced: an error, where it would be deaf; else as on any module."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import FixedAttributeError, fuse_fx, load, prepare_fx, save
from tests.samples import everything, prepare, quantize, same_bits


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.scale, self.unread = nn.Linear(64, 64), 3.0, 1

    def forward(self, x):
        return self.out(x) * self.scale


class Scaled(nn.Module):
    gain = 2.0

    def __init__(self):
        super().__init__()
        self.layer, self.head, self.activation = nn.Linear(64, 64), Head(), F.relu
        self.scale, self.sizes, self.unread, self.own, self._hidden = 2.0, [4, 16], 3, 0, 1.0
        self.config = {"scale": 1.0}

    @property
    def place(self):
        return self.layer.weight.device

    def forward(self, x):
        self.own = 5
        y = self.activation(self.layer(x.to(self.place))) * self.scale * self.gain * self._hidden * self.config["scale"]
        return self.head(y * self.own).unflatten(-1, self.sizes)


X = torch.randn(2, 64)


@pytest.fixture(scope="module")
def models():
    """A traced model at each stage, and by each way that one is copied."""
    prepared, quantized = prepare(Scaled(), X), quantize(Scaled(), X)
    fused = fuse_fx(Scaled().eval(), X)
    return {
        "fused": fused,
        "prepared": prepared,
        "prepared once fused": prepare_fx(fused, everything(), X),
        "quantized": quantized,
        "copied": copy.copy(quantized),
        "deeply copied": copy.deepcopy(quantized),
        "pickled": pickle.loads(pickle.dumps(quantized)),
    }


STAGES = ("fused", "prepared", "prepared once fused", "quantized", "copied", "deeply copied", "pickled")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("path", "value"),
    [("scale", 5.0), ("gain", 3.0), ("activation", F.gelu), ("sizes", [8, 8]), ("head.scale", 1.0), ("scale", None)],
)
def test_setting_what_forward_read_is_an_error_that_says_what_to_do(models, stage, path, value):
    owner, _, name = path.rpartition(".")
    said = f"'{path}' was read when forward was traced.*name '{path.partition('.')[0]}' in its preserved_attributes"
    with pytest.raises(FixedAttributeError, match=said):
        setattr(models[stage].get_submodule(owner), name, value)


@pytest.mark.parametrize("stage", STAGES)
def test_everything_else_may_be_set_without_a_word(models, stage):
    model = copy.deepcopy(models[stage])
    before = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.scale, model.gain, model.activation, model.sizes = 2.0, 2.0, F.relu, [4, 16]  # as it was read
        model.unread, model.own, model._hidden, model.config = 4, 1, 2.0, {}
        model.training, model.place, model.graph, model.new = False, "here", model.graph, 1
        model.head.scale, model.head.unread, model.head.new = 3.0, 2, 1
        model.layer = model.layer
        model.register_forward_hook(lambda *_: None)
        model.to(torch.float32).eval().recompile()
    assert same_bits(model(X), before)
    assert (model.unread, model.config, model.head.unread, model.place) == (4, {}, 2, "here")


def test_a_loaded_model_refuses_it_too(tmp_path):
    save(quantize(Scaled(), X), tmp_path / "model.safetensors")
    loaded = load(Scaled().eval(), tmp_path / "model.safetensors")
    with pytest.raises(FixedAttributeError, match=r"'scale' was read when forward was traced \(2.0\)"):
        loaded.scale = 5.0
    with pytest.raises(FixedAttributeError, match=r"'head.scale' was read when forward was traced \(3.0\)"):
        loaded.head.scale = 5.0


def test_what_is_preserved_counts_and_the_rest_is_refused():
    model = Scaled()
    quantized = quantize(model, X, preserved_attributes=("scale",))
    quantized.scale = model.scale = 4.0
    assert same_bits(quantized(X), quantize(model, X)(X))
    with pytest.raises(FixedAttributeError, match="'gain' was read"):
        quantized.gain = 3.0


def test_tracing_leaves_nn_module_as_it_was():
    prepare(Scaled(), X)
    assert "__getattribute__" not in vars(nn.Module)
    with pytest.raises(Exception, match="Nothing"):
        prepare(Broken(), X)
    assert "__getattribute__" not in vars(nn.Module)


class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("Nothing")
