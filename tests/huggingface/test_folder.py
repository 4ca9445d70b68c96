"""What a saved folder holds, and folders that are not whole."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fxquant.errors import CheckpointError

transformers = pytest.importorskip("transformers", reason="needs transformers 5", minversion="5.0")

from fxquant.huggingface import FxQuantConfig  # noqa: E402 - it needs transformers
from tests.huggingface.models import MODELS  # noqa: E402

transformers.logging.disable_progress_bar()
KEY = "transformer.h.0.attn.c_attn.weight_int8"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    MODELS["GPT-2"][0]().save_pretrained(folder)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, quantization_config=FxQuantConfig())
    model.save_pretrained(folder / "quantized")
    return folder / "quantized"


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder whose tensors and plan a test changes, and a function that writes them."""
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with safe_open(saved / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors, plan = load_file(saved / "model.safetensors"), json.loads(metadata["fxquant"])

    def load(metadata=None):
        metadata = {"format": "pt", "fxquant": json.dumps(plan)} if metadata is None else metadata
        save_file(tensors, tmp_path / "model.safetensors", metadata)
        return transformers.GPT2LMHeadModel.from_pretrained(tmp_path)

    return tensors, plan, load


def test_it_is_about_a_quarter_of_the_floats_and_names_what_it_holds(saved):
    size = (saved / "model.safetensors").stat().st_size
    with safe_open(saved / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - not a dict
        plan = json.loads(file.metadata()["fxquant"])
    assert dtypes[KEY] == torch.int8
    assert dtypes[KEY.replace("int8", "scale")] == torch.float32
    assert "architecture" in plan
    assert size - len(json.dumps(plan)) < 0.35 * (saved.parent / "model.safetensors").stat().st_size


def test_the_folder_as_it_was_loads(folder):
    assert folder[2]().hf_quantizer.record.sites


def test_a_missing_tensor_is_an_error(folder):
    tensors, _, load = folder
    del tensors[KEY]
    with pytest.raises(CheckpointError, match=f"have no tensor '{KEY}'"):
        load()


def test_another_dtype_is_an_error(folder):
    tensors, _, load = folder
    tensors[KEY] = tensors[KEY].to(torch.int16)
    with pytest.raises(CheckpointError, match=r"is torch\.int16 in the files, but torch\.int8"):
        load()


def test_files_without_a_plan_are_an_error(folder):
    with pytest.raises(CheckpointError, match="holds no plan of fxquant's"):
        folder[2]({"format": "pt"})


def test_a_plan_of_a_newer_format_is_an_error(folder):
    _, plan, load = folder
    plan["format"] += 1
    with pytest.raises(CheckpointError, match="upgrade fxquant"):
        load()


def test_a_plan_of_another_model_is_an_error(folder):
    _, plan, load = folder
    plan["sites"][0]["path"] = "transformer.words"
    with pytest.raises(
        CheckpointError, match=r"quantized 'transformer\.words', which this GPT2LMHeadModel does not have"
    ):
        load()


def test_a_plan_that_makes_no_sense_is_an_error(folder):
    _, plan, load = folder
    del plan["aliases"]
    with pytest.raises(CheckpointError, match="its plan cannot be used"):
        load()
