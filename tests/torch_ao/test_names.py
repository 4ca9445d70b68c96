"""torch.ao's public names: each is fxquant's too, or an error that says what takes its place."""

import importlib
import inspect
import pkgutil
import re
import warnings

import pytest

import fxquant
from fxquant import FxQuantError, MovedImportError, MovedNameError, QConfigMapping
from fxquant.torch_ao.names import MOVED, SAME


def their_names():
    """Return the public names of torch.ao.quantization, its modules' `__all__`s and quantize_fx's functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their deprecation
        package = importlib.import_module("torch.ao.quantization")
        public = [found.name for found in pkgutil.iter_modules(package.__path__) if not found.name.startswith("_")]
        modules = [importlib.import_module(f"torch.ao.quantization.{name}") for name in public]
        modules += [package, importlib.import_module("torch.ao.quantization.fx.custom_config")]
    names = {name for module in modules for name in getattr(module, "__all__", ())}
    for module in modules:
        if not hasattr(module, "__all__"):  # quantize_fx
            functions = inspect.getmembers(module, inspect.isfunction)
            names |= {name for name, value in functions if value.__module__ == module.__name__ and name[0] != "_"}
    return names


THEIRS = their_names()


def test_the_walk_finds_what_everyone_uses():
    known = {"prepare_fx", "prepare_qat_fx", "QConfigMapping", "default_dynamic_qconfig", "QuantStub", "FakeQuantize"}
    assert known <= THEIRS
    assert len(THEIRS) > 150


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_each_of_their_names_is_ours_or_says_what_takes_its_place(name):
    if hasattr(fxquant, name):
        assert name in SAME
    else:
        with pytest.raises(MovedNameError, match=rf"fxquant has no {name}, which is torch\.ao's: \w+"):
            getattr(fxquant, name)


def test_the_tables_do_not_contradict_each_other():
    assert not SAME.keys() & MOVED.keys()
    assert all(name in fxquant.__all__ for name in SAME)


def test_what_takes_a_names_place_is_there():
    texts = " ".join(MOVED.values())
    named = set(re.findall(r"(?<!\.)\b(\w+)\(", texts)) | set(re.findall(r"\w+_qconfig\w*", texts))
    assert {"prepare_fx", "convert_fx", "quantize_dynamic", "default_static_qconfig_mapping"} <= named
    assert not [name for name in named if not hasattr(fxquant, name)]


def test_a_moved_name_is_an_attribute_error_of_ours():
    assert issubclass(MovedNameError, (FxQuantError, AttributeError))
    assert not hasattr(fxquant, "prepare_qat")
    with pytest.raises(MovedNameError, match=r"prepare_qat_fx\(model\.train\(\), .* takes its place"):
        _ = fxquant.prepare_qat


def test_importing_a_moved_name_says_the_same():
    assert issubclass(MovedImportError, FxQuantError)
    with pytest.raises(ImportError, match=r"default_static_qconfig_mapping\(\)") as caught:
        from fxquant import get_default_qconfig_dict  # noqa: F401
    assert isinstance(caught.value, MovedImportError)


def test_a_name_that_nobody_has():
    with pytest.raises(AttributeError, match="module 'fxquant' has no attribute 'prepare_fy'") as caught:
        _ = fxquant.prepare_fy
    assert not isinstance(caught.value, FxQuantError)
    with pytest.raises(ImportError, match="cannot import name 'prepare_fy' from 'fxquant'"):
        from fxquant import prepare_fy  # noqa: F401


def test_the_mapping_has_their_methods():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import QConfigMapping as Theirs
    assert {name for name in dir(Theirs) if not name.startswith("_")} <= set(dir(QConfigMapping()))
