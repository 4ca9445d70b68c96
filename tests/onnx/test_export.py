"""to_onnx: what it needs, what it refuses and where, and what the files hold."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fxquant
from fxquant.onnx.refusals import REFUSALS
from fxquant.ops import KERNELS
from tests.onnx.runtime import REASON, Exported


class Model(nn.Module):
    """A table and a head that have one weight, and a wide layer."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(400, 256), nn.Linear(256, 256), nn.Linear(256, 400)
        self.head.weight = self.table.weight

    def forward(self, indices):
        return self.head(torch.relu(self.hidden(self.table(indices))))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(8, 8)})

    def forward(self, x):
        return self.encoder["lstm"](pack_padded_sequence(x, [3, 2]))[0].data


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    quantized = fxquant.quantize_dynamic(Model().eval())
    indices = torch.randint(400, (3,))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return Exported(quantized, (indices,), path, input_names=["words"], output_names=["scores"])


def test_a_model_of_quantize_dynamic_gives_its_own_bits(exported):
    ((expected, got),) = exported.both(torch.randint(400, (3,)))
    assert torch.equal(expected, got)
    assert [value.name for value in (*exported.session.get_inputs(), *exported.session.get_outputs())] == [
        "words",
        "scores",
    ]


def test_the_file_is_as_large_as_the_checkpoint_and_names_no_file_of_this_machine(exported, tmp_path):
    fxquant.save(exported.quantized, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert exported.path.stat().st_size < 1.05 * size
    assert b"test_export" not in exported.path.read_bytes()


def test_the_operators_are_standard_ones(exported):
    assert not [name for name in exported.operators() if ":" in name]


def test_every_operator_of_ours_has_a_translation():
    pytest.importorskip("onnxscript", reason=REASON)
    from fxquant.onnx.table import TRANSLATIONS

    assert TRANSLATIONS.keys() == KERNELS.keys()


def test_refusals_are_of_operators_that_are_there():
    assert {row.operator for row in REFUSALS} <= KERNELS.keys()


@pytest.fixture
def with_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


def test_what_onnx_cannot_express_is_refused_with_its_site(with_packages, tmp_path):
    x = torch.randn(3, 2, 8)
    quantized = fxquant.quantize_dynamic(Packed().eval())
    with pytest.raises(
        fxquant.ExportError, match=r"'encoder\.lstm' is a recurrent layer called with a packed sequence.*padded batch"
    ):
        fxquant.to_onnx(quantized, (x,), tmp_path / "model.onnx")


def test_an_adaptive_pooling_of_unequal_windows_is_refused(with_packages, tmp_path):
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.AdaptiveAvgPool1d(3), nn.Conv1d(4, 4, 1)).eval()
    x = torch.randn(2, 4, 12)
    prepared = fxquant.prepare_fx(model, fxquant.default_static_qconfig_mapping(), (x,))
    with pytest.raises(fxquant.ExportError, match="adaptive average pooling to a size that does not divide"):
        fxquant.to_onnx(fxquant.convert_fx(prepared, data=[(x,)]), (x,), tmp_path / "model.onnx")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else found("torch"))
    with pytest.raises(fxquant.MissingPackageError, match=r'needs onnxscript: pip install "fxquant\[onnx\]"'):
        fxquant.to_onnx(nn.Linear(2, 2), (torch.randn(1, 2),), tmp_path / "model.onnx")


def test_what_is_no_module_is_refused(with_packages, tmp_path):
    with pytest.raises(fxquant.ArgumentError, match=r"to_onnx takes a quantized nn\.Module, got str"):
        fxquant.to_onnx("model", (), tmp_path / "model.onnx")


def test_data_without_a_batch_is_refused(with_packages, tmp_path):
    model, x = nn.Sequential(nn.Conv1d(4, 4, 1)).eval(), torch.randn(2, 4, 12)
    prepared = fxquant.prepare_fx(model, fxquant.default_static_qconfig_mapping(), (x,))
    quantized = fxquant.convert_fx(prepared, data=[(x,)])
    with pytest.raises(fxquant.ArgumentError, match="data of to_onnx holds no batch"):
        fxquant.to_onnx(quantized, (x,), tmp_path / "model.onnx", data=[])


def test_importing_fxquant_imports_no_onnx():
    code = "import sys, fxquant; print(sorted({'onnx', 'onnxscript', 'onnxruntime', 'onnx_ir'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_documentation_lists_every_refusal_and_operator():
    page = (Path(fxquant.__file__).parents[1] / "docs" / "onnx.md").read_text(encoding="utf8")
    for row in REFUSALS:
        assert f"`{row.operator}`" in page
        assert f"| {row.what} | {row.why} | {row.cure} |" in page
    assert not [name for name in KERNELS if f"`{name}`" not in page]
