"""What fxquant wrote before 0.1.0: integers under the float weights' names at first, then under their own."""

import json

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    QConfigMapping,
    convert_fx,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    prepare_fx,
)
from tests import old_files
from tests.old_files import by_format
from tests.samples import same_bits


@pytest.mark.parametrize("name", ["int4", "uint8"])
def test_a_product_of_an_old_file_is_a_linear(name):
    file = old_files.FOLDER / f"{name}.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        stored = json.loads(opened.metadata()["fxquant"])["sites"]
    assert [site["operator"] for site in stored] == ["embedding", "linear", "matmul"]
    record = fxquant.load(old_files.MODELS[name][0]().eval(), file).record
    assert [(site.operator, site.kind) for site in record.sites] == [
        ("embedding", "F.embedding"), ("linear", "F.linear"), ("linear", "operator.matmul")]  # fmt: skip


def made(name):
    """Return the quantized form of the model that a file is of, with other weights."""
    make, mapping = old_files.MODELS[name]
    torch.manual_seed(7)
    return old_files.quantized(name, make().eval(), mapping())


@pytest.mark.parametrize("name", old_files.MODELS)
def test_an_old_file_loads(name):
    make, _ = old_files.MODELS[name]
    with torch.device("meta"):
        skeleton = make().eval()
    path = old_files.FOLDER / f"{name}.safetensors"
    loaded = fxquant.load(skeleton, path)
    held, expected = loaded.state_dict(), safetensors.torch.load_file(path)
    assert held.keys() == made(name).state_dict().keys()
    assert {t.data_ptr() for t in held.values()}.__len__() == len(expected)  # tied ones once, as in the file
    found = loaded(*old_files.inputs(name))
    torch.testing.assert_close(found, torch.load(old_files.FOLDER / "outputs.pt")[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", old_files.MODELS)
def test_an_old_state_dict_loads(name, assign):
    quantized, state = made(name), torch.load(old_files.FOLDER / f"{name}.pt")
    before = dict(state)
    quantized.load_state_dict(state, assign=assign)
    assert dict(state).keys() == before.keys()  # the caller's is left as it is
    inputs = old_files.inputs(name)
    loaded = fxquant.load(old_files.MODELS[name][0]().eval(), old_files.FOLDER / f"{name}.safetensors")
    assert same_bits(quantized(*inputs), loaded(*inputs))
    outer = nn.ModuleList([made(name)])
    outer.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()}, assign=assign)
    assert same_bits(outer[0](*inputs), loaded(*inputs))


def test_an_old_state_dict_that_is_not_whole_is_reported():
    quantized, state = made("int16"), torch.load(old_files.FOLDER / "int16.pt")
    del state["0.weight_scale"]
    found = quantized.load_state_dict(state, strict=False)
    assert found.missing_keys == ["0.weight_int16", "0.weight_scale"]
    assert found.unexpected_keys == ["0.weight"]


class TwoWays(nn.Module):
    """One table that two calls look words up in."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 8))

    def forward(self, words):
        return F.embedding(words, self.table) + F.embedding(words + 1, self.table)


WORDS = torch.tensor([[1, 4, 7]])


def two_ways():
    """Return it with the first call's table in 4 bits and the other's in 8."""
    mapping = QConfigMapping().set_object_type(F.embedding, float_qparams_weight_only_qconfig)
    mapping.set_module_name_object_type_order("", F.embedding, 0, float_qparams_weight_only_qconfig_4bit)
    return convert_fx(prepare_fx(TwoWays().eval(), mapping, (WORDS,)))


def test_old_keys_that_are_new_keys_of_another_call_too():
    made, quantized = two_ways(), two_ways()
    assert {"table_uint4", "table_uint8"} <= made.state_dict().keys()
    old = made.state_dict()
    first, second = old.pop("table_uint4"), old.pop("table_uint8")
    quantized.load_state_dict({**old, "table_uint8": first, "table_uint8_1": second})
    assert same_bits(quantized(WORDS), made(WORDS))


def test_a_part_of_a_new_state_dict_is_not_taken_for_an_old_one():
    made, quantized = two_ways(), two_ways()
    before = quantized.table_uint4.clone()
    quantized.load_state_dict({"table_uint8": made.table_uint8}, strict=False)
    assert torch.equal(quantized.table_uint8, made.table_uint8)
    assert torch.equal(quantized.table_uint4, before)


@pytest.mark.parametrize("change", [lambda t: t.repeat(1, 2), lambda t: t.to(torch.int16)], ids=["shape", "dtype"])
def test_what_does_not_fit_is_not_taken_for_an_old_tensor(change):
    quantized, state = made("int4"), torch.load(old_files.FOLDER / "int4.pt")
    (key,) = [key for key in state if key.startswith("table_uint8")]
    found = quantized.load_state_dict({key: change(state[key])}, strict=False)
    assert found.unexpected_keys == [key]


@pytest.mark.parametrize("name", by_format.MODELS)
def test_a_file_named_by_format_loads_and_computes_what_it_did(name):
    loaded = by_format.load(name)
    path = by_format.FOLDER / f"{name}.safetensors"
    assert loaded.state_dict().keys() >= safetensors.torch.load_file(path).keys()
    with torch.no_grad():
        found = loaded(*by_format.inputs(name))
    expected = torch.load(by_format.FOLDER / "outputs.pt")[name]
    if name in by_format.FLOAT_SUMS:  # of at most 70 products, twice, each sum's order another: float32 rounding
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 2 * 70 * 2**-24 * expected.norm()
    else:
        assert same_bits(found, expected)


@pytest.mark.parametrize("name", by_format.MODELS)
def test_a_file_named_by_format_is_still_written_with_those_tensors(name):
    held = safetensors.torch.load_file(by_format.FOLDER / f"{name}.safetensors")
    state = by_format.quantized(name).state_dict()
    for key, tensor in held.items():
        assert (state[key].shape, state[key].dtype) == (tensor.shape, tensor.dtype), key
