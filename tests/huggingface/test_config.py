"""FxQuantConfig: its arguments, and how it is written and read."""

import importlib
import importlib.metadata
import json
import sys

import pytest
from torch import nn

import fxquant
from fxquant import QConfigMapping, default_dynamic_qconfig, default_dynamic_qconfig_mapping
from fxquant.errors import MissingPackageError, QConfigError


@pytest.mark.parametrize("version", ["4.57.1", None])
def test_without_transformers_5_the_import_says_what_to_install(version, monkeypatch):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    for name in [name for name in sys.modules if name.startswith("fxquant.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(MissingPackageError, match=r"found .*: pip install 'fxquant\[transformers\]'"):
        importlib.import_module("fxquant.huggingface")


@pytest.fixture
def huggingface():
    pytest.importorskip("transformers", reason="needs transformers 5", minversion="5.0")
    return importlib.import_module("fxquant.huggingface")


def test_it_is_json_and_back(huggingface):
    mapping = QConfigMapping().set_global(default_dynamic_qconfig).set_object_type(nn.Embedding, None)
    mapping.set_module_name("head", fxquant.int4_dynamic_qconfig).set_module_name_regex(r".*\.q", None)
    config = huggingface.FxQuantConfig(mapping, strict=True, batch_invariant=False)
    again = huggingface.FxQuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.mapping_for(nn.Sequential(nn.Embedding(2, 2))) == mapping
    assert (again.strict, again.batch_invariant) == (True, False)
    assert dict(config) == config.to_dict() == json.loads(config.to_json_string())


def test_the_mapping_is_its_own(huggingface):
    mapping = default_dynamic_qconfig_mapping()
    config = huggingface.FxQuantConfig(mapping)
    mapping.set_module_name("a", None)
    assert config.qconfig_mapping == default_dynamic_qconfig_mapping() == huggingface.FxQuantConfig().qconfig_mapping


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qconfig_maping": None}, "did you mean 'qconfig_mapping'"),
        ({"load_in_8bit": True}, "takes no 'load_in_8bit'"),
        ({"qconfig_mapping": default_dynamic_qconfig}, r"set_global\(qconfig\)"),
        ({"qconfig_mapping": {"module": []}}, "unknown key 'module'"),
        ({"quant_method": "gptq"}, "got 'gptq'"),
    ],
)
def test_other_arguments_are_errors(huggingface, arguments, message):
    with pytest.raises(QConfigError, match=message):
        huggingface.FxQuantConfig(**arguments)
