"""get_extra_state and set_extra_state, torch's way to keep a vocabulary or a version: in graphs, copies and files."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fxquant
from fxquant import CheckpointError, convert_fx, default_dynamic_qconfig_mapping, fuse_fx, prepare_fx, quantize_dynamic
from fxquant.graph.preserve.extra_state import tensors_of


class Vocabulary(nn.Module):
    """Holds words, and no tensor; nothing in forward calls it."""

    def __init__(self):
        super().__init__()
        self.words = []

    def get_extra_state(self):
        return tuple(self.words)

    def set_extra_state(self, state):
        self.words = list(state)


class Scaled(nn.Module):
    """Has a layer and a version, and is traced through."""

    def __init__(self):
        super().__init__()
        self.linear, self.version = nn.Linear(8, 8), 0

    def get_extra_state(self):
        return {"version": self.version, "seen": torch.full((2,), self.version)}

    def set_extra_state(self, state):
        self.version = state["version"]

    def forward(self, x):
        return self.linear(x)


class Tagger(nn.Module):
    def __init__(self, labels=(), words=(), version=0):
        super().__init__()
        self.scaled, self.linear, self.vocabulary = Scaled(), nn.Linear(8, 3), Vocabulary()
        self.labels, self.vocabulary.words, self.scaled.version = dict(labels), list(words), version

    def get_extra_state(self):
        return {"labels": self.labels}

    def set_extra_state(self, state):
        self.labels = state["labels"]

    def forward(self, x):
        return self.linear(self.scaled(x))


LABELS = {"B": 0, "I": 1, "O": 2}
X = torch.ones(2, 8)


def full():
    return Tagger(LABELS, ["a", "b"], 3).eval()


def by_fx(model):
    return convert_fx(prepare_fx(model, default_dynamic_qconfig_mapping(), X))


def by_fuse_fx(model):
    return by_fx(fuse_fx(model, X))


WAYS = pytest.mark.parametrize("way", [by_fx, quantize_dynamic], ids=["graph", "modules"])


def states(model):
    found = {key: value for key, value in model.state_dict().items() if key.endswith("_extra_state")}
    found["scaled._extra_state"] = {
        **found["scaled._extra_state"],
        "seen": found["scaled._extra_state"]["seen"].tolist(),
    }
    return found


EXPECTED = {
    "_extra_state": {"labels": LABELS},
    "scaled._extra_state": {"version": 3, "seen": [3, 3]},
    "vocabulary._extra_state": ("a", "b"),
}


@pytest.mark.parametrize("way", [by_fx, quantize_dynamic, by_fuse_fx])
def test_a_quantized_model_has_what_the_float_one_has(way):
    quantized = way(full())
    for model in (full(), quantized, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert states(model) == EXPECTED
    assert quantized.labels == LABELS
    assert [site.path for site in quantized._fxquant_record.sites] == ["scaled.linear", "linear"]


@WAYS
def test_a_file_holds_it(way, tmp_path):
    fxquant.save(way(full()), tmp_path / "model.safetensors")
    with torch.device("meta"):
        skeleton = Tagger().eval()
    loaded = fxquant.load(skeleton, tmp_path / "model.safetensors")
    assert states(loaded) == EXPECTED
    assert loaded.labels == LABELS
    assert skeleton.labels == {}
    again = tmp_path / "again.safetensors"
    fxquant.save(loaded, again)
    assert states(fxquant.load(skeleton, again)) == EXPECTED


class Holds(nn.Module):
    """Gives away what it holds itself."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def get_extra_state(self):
        return self.held

    def set_extra_state(self, state):
        self.held = state


class Counts(nn.Module):
    """Its extra state is the value of a tensor, which a skeleton on the meta device does not have."""

    def __init__(self, count, inner=None):
        super().__init__()
        self.linear, self.inner = nn.Linear(8, 8), inner
        self.register_buffer("count", torch.tensor(count))

    def get_extra_state(self):
        return {"n": int(self.count)}

    def set_extra_state(self, state):
        assert state["n"] == 3

    def forward(self, x):
        return self.linear(x if self.inner is None else self.inner(x))


@WAYS
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_brings_it_where_its_code_asks_for_values(way, device, tmp_path):
    fxquant.save(way(Counts(3, Counts(3)).eval()), tmp_path / "model")
    with torch.device(device):
        skeleton = Counts(0, Counts(0)).eval()
    state = fxquant.load(skeleton, tmp_path / "model").state_dict()
    assert state["_extra_state"] == state["inner._extra_state"] == {"n": 3}


def test_the_tensors_of_a_model_are_found_without_its_extra_state():
    quantized = by_fx(Counts(3, Counts(3)).eval())
    expected = [key for key in quantized.state_dict() if not key.endswith("_extra_state")]
    quantized.count = torch.zeros((), device="meta")
    with pytest.raises(RuntimeError, match="meta tensors"):
        quantized.state_dict()
    assert [*tensors_of(quantized)] == expected


@WAYS
def test_a_state_dict_brings_it_over(way):
    file = io.BytesIO()
    torch.save(way(full()).state_dict(), file)
    file.seek(0)
    other = way(Tagger().eval())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert states(other) == EXPECTED
    assert other.labels == LABELS


@WAYS
@pytest.mark.parametrize("key", EXPECTED)
def test_a_state_dict_without_it_is_refused_unless_asked(way, key):
    quantized = way(full())
    state = quantized.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        quantized.load_state_dict(state)
    quantized.load_state_dict(state, strict=False)
    assert states(quantized) == EXPECTED


def test_as_a_part_of_a_larger_model():
    larger = nn.Sequential(by_fx(full()))
    other = nn.Sequential(by_fx(Tagger().eval()))
    assert {f"0.{key}" for key in EXPECTED} <= larger.state_dict().keys()
    other.load_state_dict(larger.state_dict())
    assert states(other[0]) == EXPECTED


def test_what_only_pickle_could_hold_is_refused(tmp_path):
    model = full()
    model.labels = {"B": object}
    with pytest.raises(
        CheckpointError, match=r"'_extra_state' holds a builtins.type, which a file without pickle cannot"
    ):
        fxquant.save(quantize_dynamic(model), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_a_copy():
    model = full()
    held = {"words": ["a"]}
    model.vocabulary = Holds(held)
    quantized = by_fx(model)
    held["words"].append("b")
    assert quantized.state_dict()["vocabulary._extra_state"] == {"words": ["a"]}


@WAYS
def test_a_layer_with_extra_state_of_its_own_stays_float(way):
    class Versioned(nn.Linear):
        def get_extra_state(self):
            return 7

        def set_extra_state(self, state):
            assert state == 7

    quantized = way(nn.Sequential(Versioned(8, 8), nn.Linear(8, 3)).eval())
    (left,) = quantized._fxquant_record.skipped
    assert (left.path, left.reason) == (
        "0",
        "it keeps extra state (get_extra_state), for which its quantized form has no place",
    )
    assert quantized.state_dict()["0._extra_state"] == 7
