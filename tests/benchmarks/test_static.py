"""The static networks' benchmark: published shapes, sides that compute the same, lines for the documentation."""

import json
import multiprocessing
import threading

import pytest
import torch
from torch import nn

from benchmarks import networks, static

PARAMETERS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "mobilenetv2": 3_504_872, "dscnn": 23_180}
"""As published (torchvision's figures); DS-CNN by hand: 40·64 + 4·(9·64 + 64²) + 9·2·64 + 64·12 + 12."""


@pytest.fixture(autouse=True)
def one_thread():
    threads, engine = torch.get_num_threads(), torch.backends.quantized.engine
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.quantized.engine = engine


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_network_has_as_many_parameters_as_the_published_one(name):
    with torch.device("meta"):
        model = networks.NETWORKS[name][0]()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@torch.no_grad()
def test_a_networks_places_are_those_published():
    for name, size, places in (("dscnn", (1, 49, 10), (24, 5)), ("mobilenetv2", (3, 64, 64), (2, 2))):
        model = networks.NETWORKS[name][0]().eval()
        assert model[:-3](torch.zeros(1, *size)).shape[2:] == places


@torch.no_grad()
def test_the_sides_compute_what_float_does_and_are_quantized():
    x = torch.randn(2, 1, 49, 10)
    found = {side: static.quantized("dscnn", side)(x) for side in ("fxquant", "float", "torch_ao")}
    for side in ("fxquant", "torch_ao"):
        error = (found[side] - found["float"]).pow(2).mean() / found["float"].var()
        assert 0 < error < 0.1**2, side


@pytest.fixture
def threads(monkeypatch):
    """Let each side have a thread instead of a process."""

    def start(side, threads):
        ours, theirs = multiprocessing.Pipe()
        threading.Thread(target=static.serve, args=(theirs, side, threads), daemon=True).start()
        return ours

    monkeypatch.setattr(static, "start", start)


def test_a_run_prints_the_tables_lines_keeps_all_figures_and_leaves_out_what_is_missing(
    tmp_path, capsys, monkeypatch, threads
):
    def missing(*_):
        raise ModuleNotFoundError("no module", name="onnxruntime")

    monkeypatch.setitem(static.SIDES, "onnx_runtime", missing)
    path = tmp_path / "out.json"
    static.main(f"--networks dscnn:2 --sides float,onnx_runtime --rounds 2 --seconds 0 --json {path}".split())
    out = capsys.readouterr().out.splitlines()
    assert "onnx_runtime: left out, since there is no onnxruntime" in out
    assert out[-3:-1] == ["| network, batch | fxquant | float |", "|---|---|---|"]
    assert out[-1].startswith("| dscnn, 2 | ")
    figures = json.loads(path.read_text())["microseconds"]["dscnn:2"]
    assert {side: len(rounds) for side, rounds in figures.items()} == {"fxquant": 2, "float": 2}


def test_ratios_are_to_fxquants_time():
    times = {"fxquant": [1000.0, 2000.0], "float": [3000.0, 5000.0]}
    assert static.report("net", 8, times) == "| net, 8 | 1.5 | 2.75 (2.50–3.00) |"


def test_activations_have_no_weights_and_convolutions_keep_the_size():
    layers = networks.conv(3, 8, 7, 2, act=nn.ReLU6)
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU6]
    assert layers.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 8, 112, 112)
    assert len(networks.conv(3, 8, act=None)) == 2
