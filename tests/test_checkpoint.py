"""save and load: round trips, meta skeletons, every kind of damage, and files of others."""

import copy
import dataclasses
import json
import os
import pathlib
import pickle
import random
import struct

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    CheckpointError,
    FxQuantError,
    ModelStateError,
    QConfig,
    QConfigMapping,
    convert_fx,
    graph_diff,
    quantize_dynamic,
    tensor_file,
)
from fxquant.checkpoint import FORMAT, files
from fxquant.graph.fingerprint.architecture import ModuleKind
from fxquant.graph.record import Coverage, Fusion, Site, Skipped
from fxquant.graph.values import Edge, FloatValue, IntegerCall
from fxquant.spec import TensorSpec
from tests.samples import SCHEMES, Call, WordLM, everything, leaves, lm_inputs, prepare, quantize, same_bits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def round_trip(model, skeleton, path, *inputs, mapping=None, **options):
    """Assert that a saved model loads into a skeleton and computes the same; return both."""
    quantized = quantize(model, *inputs, mapping=mapping, **options)
    fxquant.save(quantized, path)
    loaded = fxquant.load(skeleton.eval(), path)
    assert same_bits(loaded(*inputs), quantized(*inputs))
    assert all(tensor.device.type == "cpu" for tensor in (*loaded.parameters(), *loaded.buffers()))
    return quantized, loaded


def on_meta(make):
    with torch.device("meta"):
        return make()


class Positions(nn.Module):
    """Makes tensors on the device of a buffer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("table", torch.randn(9, 4))

    def forward(self, x):
        return self.net(x) + F.embedding(torch.arange(x.shape[0], device=self.table.device), self.table)


def test_a_device_that_forward_asks_for_is_not_the_skeletons(path):
    round_trip(Positions(), on_meta(Positions), path, torch.randn(3, 4))


@pytest.mark.parametrize("skeleton", [WordLM, lambda: on_meta(WordLM)], ids=["cpu", "meta"])
def test_round_trip(skeleton, path):
    model = WordLM()
    quantized, loaded = round_trip(model, skeleton(), path, *lm_inputs(model))
    assert loaded.record.sites == quantized.record.sites
    assert loaded.record.mapping == quantized.record.mapping
    assert str(fxquant.explain(loaded)) == str(fxquant.explain(quantized))
    assert graph_diff(quantized, loaded).bytes_after == graph_diff(model, quantized).bytes_after
    assert loaded.state_dict().keys() == quantized.state_dict().keys()


def test_a_meta_skeleton_never_holds_float_weights(path, monkeypatch):
    model = WordLM()
    fxquant.save(quantize(model, *lm_inputs(model)), path)
    skeleton = on_meta(WordLM).eval()
    floats = []
    original = torch.empty_like

    def spy(tensor, *args, **kwargs):
        result = original(tensor, *args, **kwargs)
        if result.device.type != "meta" and result.is_floating_point():
            floats.append(result.numel())
        return result

    monkeypatch.setattr(torch, "empty_like", spy)
    fxquant.load(skeleton, path)
    assert floats == []
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


def test_the_skeleton_is_not_changed(path):
    model, other = WordLM().eval(), WordLM().eval()
    inputs = lm_inputs(model)
    fxquant.save(quantize(model, *inputs), path)
    expected = other(*inputs)
    loaded = fxquant.load(other, path)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    assert same_bits(other(*inputs), expected)


def test_a_loaded_model_saves_loads_and_copies_again(path, tmp_path):
    model = WordLM()
    inputs = lm_inputs(model)
    quantized, loaded = round_trip(model, WordLM(), path, *inputs)
    fxquant.save(loaded, tmp_path / "again")
    plans = []
    for file in (path, tmp_path / "again"):
        with safetensors.safe_open(file, "pt") as opened:
            plans.append(json.loads(opened.metadata()["fxquant"]))
    assert plans[0] == plans[1]
    assert same_bits(pickle.loads(pickle.dumps(loaded))(*inputs), quantized(*inputs))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme, path):
    model = WordLM()
    round_trip(model, on_meta(WordLM), path, *lm_inputs(model), mapping=everything(SCHEMES[scheme]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype, path):
    model = WordLM().to(dtype)
    _, loaded = round_trip(model, on_meta(WordLM).to(dtype), path, *lm_inputs(model))
    assert loaded(*lm_inputs(model))[0].dtype == dtype


@pytest.mark.parametrize(
    "skeleton", [lambda: WordLM(ninp=8, tie=True), lambda: on_meta(lambda: WordLM(ninp=8, tie=True))]
)
def test_tied_weights_are_saved_once_and_loaded_tied(skeleton, path):
    model = WordLM(ninp=8, tie=True)
    _, loaded = round_trip(model, skeleton(), path, *lm_inputs(model))
    assert loaded.encoder.weight_int8 is loaded.decoder.weight_int8
    with safetensors.safe_open(path, "pt") as file:
        names = set(file.keys())
    assert ("encoder.weight_int8" in names) != ("decoder.weight_int8" in names)


def test_a_bn_fused_model(path):
    def make():
        model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
                              nn.BatchNorm1d(5), nn.ReLU())  # fmt: skip
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
        return model

    x = torch.randn(2, 3, 5)
    quantized, loaded = round_trip(make(), make(), path, x)
    assert loaded.record.fusions == quantized.record.fusions
    round_trip(make(), on_meta(make), path, x)


def test_functionals_and_a_shared_module(path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))
            self.net = nn.Linear(6, 6)
            self.same = self.net

        def forward(self, x):
            x = F.relu(F.linear(self.same(self.net(x)), self.weight))
            return F.linear(x, self.net.weight)

    quantized, _ = round_trip(Model(), on_meta(Model), path, torch.randn(2, 6))
    assert len(quantized.record.sites) == 3


def test_an_embedding_tied_to_a_functional(path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Embedding(20, 8)

        def forward(self, x):
            return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight)

    round_trip(Model(), on_meta(Model), path, torch.arange(5))
    round_trip(Model(), on_meta(Model), path, torch.arange(5), mapping=everything().set_module_name("encoder", None))
    round_trip(Model(), on_meta(Model), path, torch.arange(5), mapping=everything().set_object_type(F.linear, None))


def test_what_the_mapping_left_float(path):
    model = WordLM()
    mapping = everything().set_module_name("decoder", None).set_module_name_regex("enc.*", None)
    quantized, loaded = round_trip(model, on_meta(WordLM), path, *lm_inputs(model), mapping=mapping)
    assert loaded.record.skipped == quantized.record.skipped
    assert type(loaded.decoder) is nn.Linear


def test_the_mapping_is_restored_with_its_types(path):
    model = WordLM()
    mapping = (
        everything()
        .set_object_type(nn.Linear, fxquant.per_tensor_dynamic_qconfig)
        .set_module_name("encoder", fxquant.float_qparams_weight_only_qconfig)
        .set_module_name_object_type_order("", nn.LSTM, 0, fxquant.float16_dynamic_qconfig)
    )
    _, loaded = round_trip(model, WordLM(), path, *lm_inputs(model), mapping=mapping)
    assert loaded.record.mapping == mapping


def test_preserved_attributes(path):
    model, names = WordLM(), ("init_hidden", "nlayers", "nhid")
    _, loaded = round_trip(model, WordLM(), path, *lm_inputs(model), preserved_attributes=names)
    assert loaded.init_hidden(3)[0].shape == (2, 3, 8)


def test_buffers_of_the_users(path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)
            self.register_buffer("mask", torch.tensor([True, False, True, True]))
            self.register_buffer("shift", torch.randn(4))
            self.register_buffer("table", torch.arange(4.0), persistent=False)

        def forward(self, x):
            return self.net(x) * self.mask + self.shift + self.table

    round_trip(Model(), on_meta(Model), path, torch.randn(2, 4))


class Shift(nn.Module):
    """Adds a buffer that no state_dict holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return x + self.table


def test_a_non_persistent_buffer_in_a_leaf_comes_from_the_model(path):
    def make():
        model = nn.Sequential(nn.Linear(4, 4), Shift())
        model[1].register_forward_hook(lambda *_: None)  # so it is a leaf, kept whole
        return model

    round_trip(make(), make(), path, torch.randn(2, 4))
    with pytest.raises(CheckpointError, match=r"holds no value for the non-persistent buffer '1.table'"):
        fxquant.load(on_meta(make).eval(), path)


def test_the_file_is_safetensors_with_a_readable_plan(path):
    model = WordLM()
    quantized = quantize(model, *lm_inputs(model))
    fxquant.save(quantized, path)
    tensors = safetensors.torch.load_file(path)
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in quantized.state_dict().items()}  # fmt: skip
    with safetensors.safe_open(path, "pt") as file:
        plan = json.loads(file.metadata()["fxquant"])
    assert (plan["format"], plan["version"], plan["model"]) == (1, fxquant.__version__, "WordLM")
    assert [site["path"] for site in plan["sites"]] == ["encoder", "rnn", "decoder"]


def test_the_state_dict_goes_through_safetensors(path):
    model = WordLM()
    quantized = quantize(model, *lm_inputs(model))
    safetensors.torch.save_file(quantized.state_dict(), path)
    other = quantize(WordLM(), *lm_inputs(model))
    other.load_state_dict(safetensors.torch.load_file(path))
    inputs = lm_inputs(model)
    assert same_bits(other(*inputs), quantized(*inputs))


# What save refuses, and that it is atomic.


@pytest.mark.parametrize("stage", ["float", "prepared"])
def test_only_quantized_models_are_saved(stage, path):
    model = WordLM().eval()
    given = model if stage == "float" else prepare(model, *lm_inputs(model))
    with pytest.raises(ModelStateError, match=r"save needs the result of convert_fx\(prepared\)"):
        fxquant.save(given, path)
    assert not path.exists()


@pytest.mark.parametrize("breaks", ["save_file", "sign", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_no_litter(breaks, path, monkeypatch):
    model = WordLM()
    quantized = quantize(model, *lm_inputs(model))
    fxquant.save(quantized, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    home = {"replace": files.os, "sign": tensor_file, "save_file": files}[breaks]
    monkeypatch.setattr(home, breaks, fail)
    with pytest.raises(CheckpointError, match="cannot be written: disk full"):
        fxquant.save(quantized, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_paths_may_be_strings_and_replace_what_is_there(path):
    model = WordLM()
    path.write_text("old")
    fxquant.save(quantize(model, *lm_inputs(model)), str(path))
    assert fxquant.load(WordLM().eval(), str(path)).record.stage == "quantized"


def test_other_users_may_read_the_file_as_any_new_file(path):
    model = WordLM()
    fxquant.save(quantize(model, *lm_inputs(model)), path)
    plain = path.with_name("plain")
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


# Damage.


@pytest.fixture
def saved(path):
    model = Call(F.linear, 6, 5)
    fxquant.save(quantize(model, torch.randn(2, 5)), path)
    return path


def load_small(path, **options):
    return fxquant.load(Call(F.linear, 6, 5).eval(), path, **options)


def test_every_truncation_is_refused(saved):
    whole = saved.read_bytes()
    for length in sorted({*range(40), *range(40, len(whole), 97), len(whole) - 1}):
        saved.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"^{saved}: "):
            load_small(saved)


def test_every_flipped_bit_is_refused(saved):
    whole = saved.read_bytes()
    generator = random.Random(0)
    places = {*range(24), *generator.sample(range(len(whole)), 250), *range(len(whole) - 54, len(whole))}
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"^{saved}: "):
            load_small(saved)


def test_bytes_added_at_the_end_are_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="is damaged or was altered"):
        load_small(saved)


def rewrite(path, change):
    """Save the file anew with an altered plan or tensors and a digest that is right for them."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    plan = json.loads(metadata["fxquant"])
    change(plan, tensors)
    safetensors.torch.save_file(tensors, path, {"fxquant": json.dumps(plan), "sha256": "0" * 64})
    tensor_file.sign(path)


@pytest.mark.parametrize(
    ("number", "cure"),
    [(2, "upgrade fxquant"), (0, "quantize the float model anew, or load the file with that version")],
)
def test_another_format_is_refused(saved, number, cure):
    rewrite(saved, lambda plan, _: plan.update(format=number, version="9.9"))
    with pytest.raises(
        CheckpointError, match=rf"was written by fxquant 9\.9 in format {number}; .* reads format 1: {cure}$"
    ):
        load_small(saved)


FIELDS = {
    1: {
        Site: "path kind operator qconfig entry call observer float_bytes int_bytes opt_out shape part_entries rounded",
        Skipped: "path kind why entry call float_bytes opt_out tied",
        Fusion: "path chain",
        Coverage: "quantized_bytes total_bytes",
        QConfig: "activation weight weight_observer parts gptq",
        ModuleKind: "type details attributes code release tensors",
        TensorSpec: "dtype qmin qmax symmetric axis dynamic scale_steps group_size range",
        Edge: "name at scale_of spec is_float is_moved",
        FloatValue: "node path kind why source",
        IntegerCall: "node form inputs output low high curve slope addend absorbed rank",
    }
}
"""What a plan is made of, by format; after a release, a change here needs a new FORMAT: fxquant/checkpoint/plan.py."""


def test_the_plan_s_fields_are_those_of_its_format():
    found = {kind: " ".join(field.name for field in dataclasses.fields(kind)) for kind in FIELDS[FORMAT]}
    assert found == FIELDS[FORMAT]


def test_a_missing_tensor_is_refused(saved):
    rewrite(saved, lambda _, tensors: tensors.pop("weight_scale"))
    with pytest.raises(CheckpointError, match="has no tensor 'weight_scale', which this model needs"):
        load_small(saved)


def test_a_tensor_too_many_is_refused(saved):
    rewrite(saved, lambda _, tensors: tensors.update(other=torch.zeros(1)))
    with pytest.raises(CheckpointError, match="has 'other', for which this model has no place"):
        load_small(saved)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(6, 4, dtype=torch.int8), torch.zeros(6, 5), torch.zeros(30, dtype=torch.int8)]
)
def test_a_tensor_of_another_form_is_refused(saved, tensor):
    rewrite(saved, lambda _, tensors: tensors.update(weight_int8=tensor))
    with pytest.raises(CheckpointError, match=r"'weight_int8' is .* but this model needs"):
        load_small(saved)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_integers_of_another_dtype_are_refused(saved, dtype):
    rewrite(saved, lambda _, tensors: tensors.update(weight_int8=tensors["weight_int8"].to(dtype)))
    with pytest.raises(FxQuantError, match="weight_int8"):
        load_small(saved)


def damaged_plans():
    return {
        "no sites": lambda plan, _: plan.pop("sites"),
        "no format": lambda plan, _: plan.pop("format"),
        "format of text": lambda plan, _: plan.update(format="one"),
        "a site with a field too many": lambda plan, _: plan["sites"][0].update(shell="rm"),
        "a site without a path": lambda plan, _: plan["sites"][0].pop("path"),
        "a qconfig that contradicts itself": lambda plan, _: plan["sites"][0]["qconfig"]["weight"].update(qmax=999),
        "no qconfig": lambda plan, _: plan["sites"][0].pop("qconfig"),
        "an alias of nothing": lambda plan, _: plan["aliases"].update(x="y"),
        "a mapping of another kind": lambda plan, _: plan.update(mapping=3),
        "a preserved attribute it does not have": lambda plan, _: plan.update(preserved=["absent"]),
        "a site that is not there": lambda plan, _: plan["sites"][0].update(path="other"),
        "a call that is not there": lambda plan, _: plan["sites"][0].update(call="other"),
        "an architecture of another kind": lambda plan, _: plan.update(architecture=3),
        "an architecture without its modules": lambda plan, _: plan["architecture"].pop("modules"),
        "a kind that is not there": lambda plan, _: plan["architecture"]["modules"].update(x=99),
        "a kind with a field too many": lambda plan, _: plan["architecture"].update(kinds=[{"shell": "rm"}]),
        "an operator that is not there": lambda plan, _: plan["sites"][0].update(operator="other"),
    }


@pytest.mark.parametrize("name", damaged_plans())
def test_a_plan_that_makes_no_sense_is_one_of_our_errors(saved, name):
    rewrite(saved, damaged_plans()[name])
    with pytest.raises(FxQuantError, match=r"."):
        load_small(saved)


def test_a_foreign_safetensors_file_is_refused(path):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"is a safetensors file, but not one that fxquant.save wrote"):
        load_small(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + b"\0" * 100, b"{}", b"\xff" * 64, struct.pack("<Q", 2) + b"[]",
     struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 8) + b'{"a": 1}', struct.pack("<Q", 2) + b"{}",
     struct.pack("<Q", 21) + b'{"__metadata__": null'[:20] + b"}", struct.pack("<Q", 19) + b'{"__metadata__": 3}',
     struct.pack("<Q", 31) + b'{"__metadata__": {"sha256": 1}}'],
)  # fmt: skip
def test_something_else_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path}: "):
        load_small(path)


def test_a_pickle_is_never_loaded(path, tmp_path):
    class Boom:
        def __reduce__(self):
            return pathlib.Path(tmp_path / "boom").touch, ()

    torch.save({"model": Boom()}, path)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_small(path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_cannot_be_opened(tmp_path, kind):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load_small(tmp_path / "absent" if kind == "missing" else tmp_path)


@pytest.mark.parametrize(
    "other",
    [lambda: WordLM(nhid=9), lambda: WordLM(ntoken=51), lambda: WordLM(nlayers=1), lambda: WordLM(nlayers=3),
     lambda: nn.Sequential(nn.Linear(4, 4)), lambda: WordLM(ninp=8, tie=True)],
    ids=["hidden", "tokens", "fewer layers", "more layers", "another model", "tied"],
)  # fmt: skip
def test_another_architecture_is_refused(other, path):
    model = WordLM()
    fxquant.save(quantize(model, *lm_inputs(model)), path)
    with pytest.raises(CheckpointError, match=f"^{path}: "):
        fxquant.load(other().eval(), path)


def test_an_lstm_with_other_options_is_refused(path):
    fxquant.save(quantize(nn.Sequential(nn.LSTM(4, 4, bidirectional=True)), torch.randn(2, 3, 4)), path)
    for other in ({}, {"bias": False, "bidirectional": True}, {"proj_size": 2, "bidirectional": True}):
        with pytest.raises(CheckpointError, match=f"^{path}: "):
            fxquant.load(nn.Sequential(nn.LSTM(4, 4, **other)).eval(), path)


@pytest.mark.parametrize("model", [lambda: WordLM().train(), lambda: None])
def test_load_needs_a_model_in_eval_mode(model, path):
    lm = WordLM()
    fxquant.save(quantize(lm, *lm_inputs(lm)), path)
    with pytest.raises(ModelStateError, match=r"training mode|expected a torch.nn.Module"):
        fxquant.load(model(), path)


def test_a_failed_load_changes_nothing(saved):
    model = Call(F.linear, 6, 5).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    rewrite(saved, lambda _, tensors: tensors.pop("weight_scale"))
    with pytest.raises(CheckpointError, match="has no tensor"):
        fxquant.load(model, saved)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_with_hooks_and_a_mapping_of_nothing(path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda *_: None)
    round_trip(model, model, path, torch.randn(2, 4))
    quantized = convert_fx(prepare(model, torch.randn(2, 4), mapping=QConfigMapping()))
    fxquant.save(quantized, path)
    x = torch.randn(2, 4)
    assert torch.equal(fxquant.load(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), path)(x), model(x))
    assert len(leaves(model(x))) == 1


def test_a_missing_folder_is_named(tmp_path):
    model = WordLM().eval()
    quantized, path = quantize(model, *lm_inputs(model)), tmp_path / "absent" / "m.safetensors"
    with pytest.raises(CheckpointError, match=r"there is no folder '.*absent'; make it first"):
        fxquant.save(quantized, path)
    assert not path.parent.exists()


def test_loading_into_a_quantized_model_is_an_error(tmp_path):
    quantized = quantize(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4))
    fxquant.save(quantized, tmp_path / "model.safetensors")
    with pytest.raises(ModelStateError, match="load needs the float model, got a model that is quantized already"):
        fxquant.load(quantized, tmp_path / "model.safetensors")


def test_a_folder_that_may_not_be_written_to_is_an_error(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    quantized = quantize(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4))
    monkeypatch.setattr(pathlib.Path, "touch", refuse)  # root, as whom tests may run, is refused nothing
    with pytest.raises(CheckpointError, match="model: cannot be written: Permission denied"):
        fxquant.save(quantized, tmp_path / "model")


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path):
    quantized = quantize(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4))
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="model: cannot be written: it is a folder; name a file in it"):
        fxquant.save(quantized, tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


class Rotates(nn.Module):
    """Keeps a plain tensor, which no state_dict holds and no device reaches, as Llama's reference code does."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.angles = torch.arange(4.0)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.net(x) * self.angles


def test_a_plain_tensor_of_a_model_that_does_not_trace_comes_from_the_model(path):
    fxquant.save(quantize_dynamic(Rotates()), path)
    x = torch.randn(2, 4)
    assert torch.equal(fxquant.load(Rotates().eval(), path)(x)[:, 0], torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"holds no value for the attribute 'angles', which is not a buffer"):
        fxquant.load(on_meta(Rotates).eval(), path)


@pytest.mark.parametrize("columns", [75, 128])
def test_int4_weights_round_trip(path, columns):
    def make():
        return nn.Sequential(nn.Linear(columns, 20), nn.ReLU())

    mapping = everything(fxquant.int4_dynamic_qconfig.with_group_size(32))
    quantized, loaded = round_trip(make(), on_meta(make), path, torch.randn(3, columns), mapping=mapping)
    assert loaded.record.sites == quantized.record.sites
    assert {t.dtype for t in loaded.buffers()} == {torch.uint8, torch.bfloat16}
    assert same_bits(list(copy.deepcopy(loaded).buffers()), list(quantized.buffers()))


def test_int16_weights_round_trip(path):
    def make():
        return nn.Sequential(nn.Linear(75, 20), nn.ReLU())

    mapping = everything(fxquant.int16_dynamic_qconfig)
    quantized, loaded = round_trip(make(), on_meta(make), path, torch.randn(3, 75), mapping=mapping)
    assert loaded.record.sites == quantized.record.sites
    assert {t.dtype for t in loaded.buffers()} == {torch.int16, torch.float32}
    assert same_bits(list(copy.deepcopy(loaded).buffers()), list(quantized.buffers()))


@pytest.mark.parametrize("change", ["truncate", "rewrite"])
def test_what_becomes_of_the_file_is_nothing_to_a_loaded_model(saved, change):
    loaded = load_small(saved)
    kept = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with open(saved, "r+b") as file:  # in place, as cp does it
        file.truncate(0) if change == "truncate" else file.write(b"\1" * saved.stat().st_size)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.state_dict().items())


def test_a_file_is_mapped_only_when_asked(saved, monkeypatch):
    read, mapped = load_small(saved), []
    monkeypatch.setattr(tensor_file, "load_file", lambda path: mapped.append(path) or safetensors.torch.load_file(path))
    assert not mapped
    loaded = load_small(saved, mmap=True)
    assert mapped == [saved]
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_mapped_file_is_checked_first(saved):
    whole = bytearray(saved.read_bytes())
    whole[-1] ^= 1
    saved.write_bytes(whole)
    with pytest.raises(CheckpointError, match="is damaged or was altered"):
        load_small(saved, mmap=True)


def test_a_file_that_shrinks_while_it_is_read_is_refused(path, monkeypatch):
    model, places = nn.Linear(1024, 1024).eval(), tensor_file._places  # larger than what Python reads ahead
    fxquant.save(quantize_dynamic(model), path)

    def shrink(*header):
        os.truncate(path, path.stat().st_size - 1)
        return places(*header)

    monkeypatch.setattr(tensor_file, "_places", shrink)
    with pytest.raises(CheckpointError, match="was cut short while it was read; write it anew"):
        fxquant.load(model, path)


def signed(path, header, data):
    """Write a file with a right digest, whatever its header says of its tensors."""
    header = {"__metadata__": {"fxquant": "{}", "sha256": tensor_file.BLANK}, **header}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    tensor_file.sign(path)


def entry(begin, end, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def test_a_file_cut_within_its_header_is_said_to_be_cut_short(path):
    path.write_bytes(struct.pack("<Q", 8) + b'{"a": 1')
    with pytest.raises(CheckpointError, match="is cut short"):
        tensor_file.read(path)


def test_tensors_are_found_whatever_their_order_in_the_header(path):
    signed(path, {"b": entry(8, 16), "a": entry(0, 8)}, struct.pack("<4f", 1, 2, 3, 4))
    tensors = tensor_file.read(path)[1]
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [1, 2], "b": [3, 4]}


HEADERS = {
    "too long": ({"a": entry(0, 16)}, 16),
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 16)}, 16),
    "a rest": ({"a": entry(0, 8)}, 12),
    "three offsets": ({"a": {**entry(0, 8), "data_offsets": [0, 8, 8]}}, 8),
    "a negative size": ({"a": entry(0, 8, (-2,))}, 8),
    "no such dtype": ({"a": {**entry(0, 8), "dtype": "F31"}}, 8),
}


@pytest.mark.parametrize("name", HEADERS)
def test_of_a_header_that_makes_no_sense_safetensors_says_why(name, path):
    header, size = HEADERS[name]
    signed(path, header, bytes(size))
    with pytest.raises(safetensors.SafetensorError):
        tensor_file.read(path)


def test_what_safetensors_reads_for_us_is_in_memory_too(path, monkeypatch):
    signed(path, {"a": entry(0, 8)}, struct.pack("<2f", 1, 2))
    monkeypatch.setattr(tensor_file, "_places", lambda *_: None)
    tensor = tensor_file.read(path)[1]["a"]
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    assert tensor.tolist() == [1, 2]


def test_a_file_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        own = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, own=own: calls.append(name) or own(*args))
    fxquant.save(quantize_dynamic(nn.Linear(4, 4).eval()), path)
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("dtype", tensor_file._DTYPES.values(), ids=str)
def test_tensors_of_every_dtype_are_read_as_safetensors_reads_them(dtype, path):
    tensors = {
        "flat": torch.arange(7).to(dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    safetensors.torch.save_file(tensors, path, {"fxquant": "{}", "sha256": tensor_file.BLANK})
    tensor_file.sign(path)
    metadata, found = tensor_file.read(path)
    assert metadata["fxquant"] == "{}"
    assert found.keys() == tensors.keys()
    for name, tensor in safetensors.torch.load_file(path).items():
        assert (found[name].dtype, found[name].shape) == (dtype, tensor.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


class Scaled(nn.Module):
    """Traced, or not, with what a skeleton may have other than the file."""

    def __init__(self, heads=4, act=nn.GELU, factor=1.0, branches=False):
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(64, heads, batch_first=True), nn.Linear(64, 64)
        self.act, self.factor, self.branches = act(), factor, branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            x = 2 * x
        return self.act(self.linear(self.attention(x, x, x)[0])) * self.factor


@pytest.mark.filterwarnings("ignore:.*does not trace")
@pytest.mark.parametrize("branches", [False, True], ids=["graph", "tree"])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 8}, "num_heads=8, head_dim=8.*in the file .*num_heads=4, head_dim=16"),
        ({"act": nn.SiLU}, r"module 'act' is nn.SiLU\(\), in the file nn.GELU"),
        ({"factor": 3.0}, "3.0.*in the file .*1.0"),
    ],
)
def test_a_skeleton_of_another_architecture_is_refused(options, match, branches, path):
    x = torch.randn(2, 5, 64)
    quantized, _ = round_trip(Scaled(branches=branches), on_meta(lambda: Scaled(branches=branches)), path, x)
    other = Scaled(**options, branches=branches).eval()
    with pytest.raises(CheckpointError, match=f"was made for another model than this Scaled: .*{match}.*check=False"):
        fxquant.load(other, path)
    assert not same_bits(fxquant.load(other, path, check=False)(x), quantized(x))


def test_a_file_without_a_fingerprint_loads_as_before(path):
    x = torch.randn(2, 5, 64)
    quantized = quantize(Scaled(), x)
    quantized.__dict__["_fxquant_record"] = quantized.record.advance(architecture=None)
    fxquant.save(quantized, path)
    rewrite(path, lambda plan, _: plan.pop("architecture"))
    loaded = fxquant.load(Scaled(factor=3.0).eval(), path)
    torch.testing.assert_close(loaded(x), 3 * quantized(x))
    fxquant.save(loaded, path)


def test_another_release_s_untraced_code_is_warned_of(path, monkeypatch):
    x = torch.randn(2, 5, 64)
    with pytest.warns(UserWarning, match="does not trace"):
        quantized = quantize(Scaled(branches=True), x)
    fxquant.save(quantized, path)

    def change(plan, _):
        for kind in plan["architecture"]["kinds"]:
            if kind["code"]:
                kind.update(code="0" * 16, release=f"{__name__.partition('.')[0]} 1.0")

    rewrite(path, change)
    monkeypatch.setattr(__import__(__name__.partition(".")[0]), "__version__", "1.1", raising=False)
    with pytest.warns(UserWarning, match="quantized with another release of its package: .*tests 1.1.* of 1.0"):
        fxquant.load(Scaled(branches=True).eval(), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_skeleton_of_another_dtype_is_told_so(path, dtype):
    fxquant.save(quantize(nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)), path)
    with pytest.raises(CheckpointError, match=rf"float32 in the file, but {dtype} in this .*model.to\(torch.float32\)"):
        fxquant.load(nn.Sequential(nn.Linear(64, 64)).eval().to(dtype), path)
