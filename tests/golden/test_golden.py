"""The fixture for refactors notices what it is for: a changed bit, key, dtype, figure, a case more or less."""

import random

import pytest
import torch
from torch import nn

import fxquant
from fxquant import QConfig
from tests.golden import __main__ as command
from tests.golden import cases, digest, operators
from tests.golden.schemes import LINEAR, NEWER, SELDOM, TABLES, WAYS, by_graph, by_module
from tests.native import cases as native

INPUTS = (torch.arange(8.0).reshape(1, 8),)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


def flip(tensor):
    """Flip the lowest bit of the first number."""
    tensor.view(-1).view(torch.uint8)[0] ^= 1


def test_a_tensor_s_hash_has_its_bits_shape_and_dtype():
    x = torch.arange(6.0)
    same = digest.digest(x)
    assert digest.digest(x.clone()) == same
    flipped = x.clone()
    flip(flipped)
    assert len({same, digest.digest(flipped), digest.digest(x.view(2, 3)), digest.digest(x.view(torch.int32))}) == 4
    assert digest.digest(-torch.zeros(1)) != digest.digest(torch.zeros(1))
    assert digest.digest(torch.tensor(float("nan"))) == digest.digest(-torch.tensor(float("nan")))


def test_an_output_is_more_than_its_first_tensor():
    a, b = torch.zeros(2), torch.ones(2)
    assert digest.outputs((a, (b, a))) != digest.outputs((a, (b, b)))


@pytest.mark.parametrize("scheme", LINEAR)
def test_one_bit_of_a_weight_changes_the_state(scheme):
    quantized = by_graph(model(), INPUTS, LINEAR[scheme])
    before = digest.state(quantized)
    assert digest.state(by_graph(model(), INPUTS, LINEAR[scheme])) == before
    flip(next(t for name, t in quantized.state_dict().items() if "weight" in name))
    assert digest.state(quantized) != before


def test_a_site_more_changes_the_figures():
    whole = by_graph(model(), INPUTS, LINEAR["int8"])
    mapping = fxquant.default_dynamic_qconfig_mapping().set_module_name("2", None)
    part = fxquant.quantize_dynamic(model(), mapping)
    assert len({digest.figures(m) for m in (whole, part, by_module(model(), (), LINEAR["int4"]))}) == 3


def test_every_preset_is_a_scheme():
    presets = {value for value in vars(fxquant).values() if isinstance(value, QConfig)}
    assert presets <= {*LINEAR.values(), *SELDOM.values(), *TABLES.values(), *NEWER}
    assert WAYS.keys() >= (LINEAR.keys() | TABLES.keys()) - {"int4 of 32"}


@pytest.mark.parametrize("operator", operators.OPERATORS)
def test_an_operator_s_case_is_the_same_again(operator):
    make, schemes, _ = operators.OPERATORS[operator]
    hashes = []
    for _ in range(2):
        torch.manual_seed(5)
        quantized, inputs = make(random.Random(5), next(iter(schemes.values())))
        with torch.no_grad():
            hashes.append(digest.outputs(quantized(*inputs)))
    assert hashes[0] == hashes[1]


CASES = {"machine": "m", "avx2|BERT|int8|state": "1", "avx2|BERT|int8|figures": "2", "reference|BERT|int4|state": "3"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"avx2|BERT|int8|state": "0"}, "differs: avx2|BERT|int8|state\nby setting: avx2 1\nby scheme: int8 1\n"),
        ({"avx2|GPT|int8|state": "0"}, "new: avx2|GPT|int8|state\n"),
        ({"machine": "other"}, "made on another machine: m; this is other"),
    ],
)
def test_what_differs_is_told(change, told):
    summary = command.summary(CASES, CASES | change)
    assert summary.startswith(told)
    assert bool(summary) == bool(told)


def test_a_missing_case_differs():
    found = {case: value for case, value in CASES.items() if "reference" not in case}
    assert command.summary(CASES, found).startswith("missing: reference|BERT|int4|state\n")


def test_only_the_first_cases_are_listed_and_all_are_counted():
    many = {f"avx2|m{i}|int8|state": "1" for i in range(50)}
    lines = command.summary(many, dict.fromkeys(many, "2")).splitlines()
    assert sum(line.startswith("differs") for line in lines) == command.FIRST
    assert lines[-1] == "50 of 50 cases differ"


def test_a_process_of_another_setting_says_so(tmp_path):
    with pytest.raises(SystemExit, match="z80 was asked for, but this is"):
        command.run("z80", tmp_path, tmp_path / "z80.json")
    assert not list(tmp_path.iterdir())


def test_every_kernel_runs_on_one_thread_and_on_two():
    found = dict(cases.results(model(), INPUTS))
    assert found.keys() == {f"outputs, {k} on {n}" for k in native.usable() or ["reference"] for n in (1, 2)}
