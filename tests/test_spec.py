"""TensorSpec: what it refuses and what it says."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch

import fxquant
from fxquant import QConfigError, TensorSpec


def test_an_unknown_dtype_is_refused():
    with pytest.raises(QConfigError, match=r"'int7' is not one of int8, int4, .*int16, uint8"):
        TensorSpec(dtype="int7")


@pytest.mark.parametrize(
    ("dtype", "qmin", "qmax"),
    [("int8", -129, 127), ("uint8", 0, 256), ("uint8", -1, 9), ("uint4", 0, 16), ("int16", -32768, 32767)],
)
def test_a_range_beyond_the_dtype_is_refused(dtype, qmin, qmax):
    with pytest.raises(QConfigError, match=rf"range \[{qmin}, {qmax}\] does not fit {dtype}"):
        TensorSpec(dtype=dtype, qmin=qmin, qmax=qmax)


@pytest.mark.parametrize(("qmin", "qmax"), [(5, 5), (6, 5)])
def test_an_empty_range_is_refused(qmin, qmax):
    with pytest.raises(QConfigError, match="does not fit"):
        TensorSpec(dtype="uint8", qmin=qmin, qmax=qmax)


def test_an_unknown_axis_is_refused():
    with pytest.raises(QConfigError, match="axis 'column' is not one of"):
        TensorSpec(dtype="int8", qmin=-127, qmax=127, axis="column")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"group_size": 48}, "group_size must be 32, 64 or 128 for axis 'group', got 48"),
        ({"group_size": None}, "group_size must be 32, 64 or 128 for axis 'group', got None"),
        ({"axis": "channel"}, "group_size=64 needs axis 'group', got 'channel'"),
        (
            {"axis": "channel", "group_size": None},
            "axis 'group' and dtype 'int4'.* go together, got 'channel' and 'int4'",
        ),
        ({"dtype": "int8"}, "axis 'group' and dtype 'int4'.* go together, got 'group' and 'int8'"),
        ({"symmetric": False}, "int4 must be symmetric=True with qmin below 0"),
        ({"qmin": 0}, "int4 must be symmetric=True with qmin below 0"),
        ({"qmin": -9}, r"range \[-9, 7\] does not fit int4 \[-8, 7\]"),
    ],
)
def test_groups_of_other_kinds_are_refused(fields, words):
    with pytest.raises(QConfigError, match=words):
        dataclasses.replace(fxquant.int4_dynamic_qconfig.weight, **fields)


@pytest.mark.parametrize("fields", [{"symmetric": False}, {"qmin": -100}, {"qmax": 100}])
def test_int16_is_symmetric_over_its_whole_range(fields):
    with pytest.raises(QConfigError, match="int16 must be symmetric=True with qmin=-32767 and qmax=32767, got"):
        dataclasses.replace(fxquant.int16_dynamic_qconfig.weight, **fields)


def test_it_is_a_value():
    spec = TensorSpec(dtype="uint8", qmin=0, qmax=255)
    assert spec == TensorSpec(dtype="uint8", qmax=255)
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    with pytest.raises(AttributeError, match="cannot assign"):
        spec.qmax = 7


@pytest.mark.parametrize(
    ("dtype", "qmax", "bits", "storage"),
    [("int8", 127, 8, torch.int8), ("uint8", 255, 8, torch.uint8), ("uint4", 15, 4, torch.uint8),
     ("float16", 0, 16, torch.float16), ("int4", 7, 4, torch.uint8), ("int16", 32767, 16, torch.int16)],
)  # fmt: skip
def test_bits_and_storage(dtype, qmax, bits, storage):
    more = {
        "int4": {"qmin": -8, "symmetric": True, "axis": "group", "group_size": 32},
        "int16": {"qmin": -32767, "symmetric": True},
    }
    spec = TensorSpec(dtype=dtype, qmax=qmax, **more.get(dtype, {}))
    assert (spec.bits, spec.torch_dtype, spec.is_integer) == (bits, storage, dtype != "float16")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="channel"), "int8 symmetric per channel"),
        (TensorSpec(dtype="uint8", qmax=255, axis="token", dynamic=True), "uint8 affine per token"),
        (TensorSpec(dtype="uint8", qmax=127), "uint8 0–127 affine per tensor"),
        (TensorSpec(dtype="float16"), "float16"),
        (fxquant.int4_dynamic_qconfig.weight, "int4 symmetric per group of 64"),
        (fxquant.int16_dynamic_qconfig.activation, "int16 symmetric per token"),
    ],
)
def test_str_says_the_scheme(spec, text):
    assert str(spec) == text


def test_the_old_name_of_an_axis_warns():
    with pytest.warns(DeprecationWarning, match="axis 'row' is now 'token'") as caught:
        spec = TensorSpec(dtype="uint8", qmax=255, axis="row", dynamic=True)
    assert [warning.filename for warning in caught] == [__file__]
    assert spec == TensorSpec(dtype="uint8", qmax=255, axis="token", dynamic=True)


def test_an_old_pickle_has_the_new_axis():
    spec = TensorSpec(dtype="uint8", qmax=255, axis="token", dynamic=True)
    old = copy.copy(spec)
    vars(old)["axis"] = "row"
    assert pickle.loads(pickle.dumps(old)) == spec  # a warning would be an error


def test_to_dict_goes_through_json():
    spec = TensorSpec(dtype="int8", qmin=-128, qmax=127, symmetric=True, scale_steps=127.5)
    assert TensorSpec(**json.loads(json.dumps(spec.to_dict()))) == spec


def test_fewer_levels_need_no_more_than_their_number():
    spec = TensorSpec(qmax=15)
    assert (spec.dtype, spec.qmin, spec.qmax, spec.axis) == ("uint8", 0, 15, "tensor")
    assert str(spec) == "uint8 0–15 affine per tensor"
    assert fxquant.QConfig(activation=spec, weight=fxquant.default_static_qconfig.weight).is_static
