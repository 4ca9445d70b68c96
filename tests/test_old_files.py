"""Files and state_dicts that hold integers under the float weights' names, as fxquant wrote them before 0.1.0."""

import pytest
import safetensors.torch
import torch
from torch import nn

import fxquant
from tests import old_files
from tests.samples import same_bits


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
