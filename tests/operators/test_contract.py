"""What every row of the operator table keeps, walked row by row with the samples of tests/samples.py."""

import copy
import dataclasses
import inspect
import io
import operator
import pickle
import re
import warnings

import pytest
import torch

import fxquant
from fxquant import OPERATORS, QConfigError, QConfigMapping, convert_fx, graph_diff, ops
from fxquant.formats import format_of
from fxquant.nn import QuantizedModule
from fxquant.nn.fused import FLOAT_TYPES, SPELT
from fxquant.operators.base import sole_weight
from fxquant.qconfig_mapping import type_name
from tests.samples import MIXTURES, SAMPLES, SCHEMES, leaves, prepare, same_bits, scheme_mapping, weight_dtypes

DOCUMENTED = {
    torch.nn.functional.linear: "linear(input, weight, bias=None)",
    torch.matmul: "matmul(input, other,",
    torch.linalg.matmul: "linalg.matmul(input, other,",
    torch.mm: "mm(input, mat2,",
    torch.addmm: "addmm(input, mat1, mat2, *, beta=1, alpha=1",
    torch.einsum: "einsum(equation,",
    **{
        function: f"conv{rank}d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1)"
        for rank, function in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), start=1)
    },
}
"""What the documentation of functions without a signature says of their operands."""

CASES = [
    (row, sample, scheme)
    for row in OPERATORS
    for sample in SAMPLES.get(row.name, ())
    for scheme in (*(scheme.name for scheme in row.schemes), *(MIXTURES if row.parts is not sole_weight else ()))
]


def case_id(case):
    row, sample, scheme = case
    return f"{row.name}-{type_name(sample.covers)}-{scheme}".replace(" ", "_")


@pytest.fixture(params=CASES, ids=[case_id(case) for case in CASES])
def case(request):
    row, sample, scheme = request.param
    torch.manual_seed(5)
    model, inputs = sample.model().eval(), sample.inputs()
    prepared = prepare(model, *inputs, mapping=scheme_mapping(scheme))
    if row.is_static:
        prepared(*inputs)  # calibrates
    return row, sample, model, inputs, prepared


@pytest.mark.parametrize("row", OPERATORS, ids=lambda row: row.name)
def test_every_module_and_function_of_a_row_has_a_sample(row):
    def named(kind):
        return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"

    covered = {named(sample.covers) for sample in SAMPLES.get(row.name, ())}
    functions = (function for pattern in row.patterns for function in pattern.functions)
    assert covered == {named(kind) for kind in (*row.modules, *functions)}


@pytest.mark.parametrize("row", OPERATORS, ids=lambda row: row.name)
def test_every_scheme_of_a_row_has_a_qconfig_that_it_takes(row):
    for scheme in row.schemes:
        assert scheme.accepts(SCHEMES[scheme.name])
        assert row.accepts(SCHEMES[scheme.name])


def test_names_are_unique_and_summaries_given():
    assert len({row.name for row in OPERATORS}) == len(OPERATORS)
    assert all(row.summary for row in OPERATORS)


@pytest.mark.parametrize(("row", "pattern"), [(row, pattern) for row in OPERATORS for pattern in row.patterns])
def test_weights_are_operands_of_the_functions(row, pattern):
    assert set(row.weights) <= set(pattern.roles or pattern.operands)
    for function in pattern.functions:
        if function is operator.matmul:
            continue  # it takes no names
        if isinstance(function, str):
            matrices = {name: torch.eye(2) for name in pattern.operands[1:3]}
            assert torch.is_tensor(getattr(torch.eye(2), function)(**matrices))  # else a TypeError
        elif function in DOCUMENTED:
            assert DOCUMENTED[function] in function.__doc__.replace("out_dtype=None, ", "")  # of torch 2.11's addmm
            names = re.findall(r"\b[a-z]\w*(?=[,=)]|$)", DOCUMENTED[function].partition("(")[2])
            assert tuple(names) == pattern.operands[: len(names)]
        else:
            assert tuple(inspect.signature(function).parameters) == pattern.operands


def test_rows_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPERATORS[0].name = "other"


def test_the_sample_is_one_site(case):
    row, sample, _, _, prepared = case
    (site,) = prepared.record.sites
    assert site.operator == row.name
    assert prepared.record.skipped == ()
    assert (site.call is None) == isinstance(sample.covers, type)


def test_the_quantized_model_is_smaller_and_near(case):
    _, _, model, inputs, prepared = case
    quantized = convert_fx(prepared)
    (site,) = quantized.record.sites
    assert 0 < site.int_bytes < site.float_bytes
    weight = next(model.parameters())
    for got, expected in zip(leaves(quantized(*inputs)), leaves(model(*inputs)), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        # A doubled scale or a lost bias is several times as much. 4-bit values: steps of 1 / 8 of a weight's largest,
        # here some 2.3 deviations: 2.3 / 8 / sqrt(12) = 0.08 a product, two of them in attention; of 3: double.
        bits = min(format_of(dtype).bits for dtype in weight_dtypes(site.qconfig))
        assert (got - expected).norm() <= max(0.03, 2.4 / 2**bits) * expected.norm()
        assert not torch.equal(got, expected)
    assert not any(p.shape == weight.shape for p in quantized.parameters())


def test_the_graph_holds_the_rows_operator_or_a_quantized_module(case):
    row, sample, _, _, prepared = case
    quantized = convert_fx(prepared)
    calls = [n for n in quantized.graph.nodes if n.op in ("call_module", "call_function") and "getitem" not in n.name]
    if row.is_static:
        assert calls.pop(0).target is ops.quantize
    (node,) = calls
    if isinstance(sample.covers, type) or row.is_static:
        assert isinstance(quantized.get_submodule(node.target), QuantizedModule)
    else:
        assert node.target is getattr(ops, row.name)


def test_rows_are_independent(case):
    _, sample, _, inputs, prepared = case
    quantized = convert_fx(prepared)
    together = leaves(quantized(*inputs))[0]
    is_float = "float16" in weight_dtypes(prepared.record.sites[0].qconfig)
    is_torchs_matmul = is_float and inputs[0].is_floating_point()
    for index in range(inputs[0].shape[sample.rows]):
        alone = leaves(quantized(inputs[0].narrow(sample.rows, index, 1)))[0]
        expected = together.narrow(sample.rows, index, 1)
        assert torch.allclose(alone, expected, atol=1e-5) if is_torchs_matmul else torch.equal(alone, expected)


def test_copies_pickles_and_state_dicts(case):
    _, _, _, inputs, prepared = case
    quantized = convert_fx(prepared)
    expected = quantized(*inputs)
    assert same_bits(copy.deepcopy(quantized)(*inputs), expected)
    assert same_bits(pickle.loads(pickle.dumps(quantized))(*inputs), expected)
    other = convert_fx(copy.deepcopy(prepared))
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    buffer = io.BytesIO()
    torch.save(quantized.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert same_bits(other(*inputs), expected)


def test_checkpoints(case, tmp_path):
    _, sample, _model, inputs, prepared = case
    quantized = convert_fx(prepared)
    fxquant.save(quantized, tmp_path / "q")
    with torch.device("meta"):
        skeleton = sample.model().eval()
    assert same_bits(fxquant.load(skeleton, tmp_path / "q")(*inputs), quantized(*inputs))


def test_compile_and_export(case):
    _, _, _, inputs, prepared = case
    quantized = convert_fx(prepared)
    expected = quantized(*inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, inside export and dynamo
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")(*inputs)
        exported = torch.export.export(quantized, inputs).module()(*inputs)
    for got in (compiled, exported):
        assert same_bits(got, expected)


def test_views_name_the_site(case):
    row, _, model, _, prepared = case
    quantized = convert_fx(prepared)
    (site,) = quantized.record.sites
    explained = fxquant.explain(quantized)
    assert fxquant.explain(prepared).rows == explained.rows  # foreseen without converting
    assert [(r.path, r.operator, r.is_quantized, r.saved_bytes) for r in explained.rows] == [
        (site.path, row.name, True, site.float_bytes - site.int_bytes)
    ]
    assert "1 of 1 candidates, " in graph_diff(model, quantized).total


def test_float_weights_that_are_not_finite_are_left_with_a_reason(case):
    _, _sample, model, inputs, prepared = case
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] = float("nan")
    (left,) = prepare(model, *inputs, mapping=prepared.record.mapping).record.skipped
    assert "NaN or infinity" in left.reason


def test_a_qconfig_of_no_scheme_is_refused(case):
    row, sample, model, inputs, _ = case
    odd = fxquant.QConfig(
        activation=fxquant.default_static_qconfig.activation if row.is_static else None,
        weight=fxquant.TensorSpec(dtype="int8", qmin=-100, qmax=100, axis="channel"),
    )  # affine int8 weights: nobody takes them
    written = {**FLOAT_TYPES, **SPELT}
    kind = written.get(sample.covers, sample.covers)
    with pytest.raises(QConfigError, match="cannot take the qconfig"):
        prepare(model, *inputs, mapping=QConfigMapping().set_object_type(kind, odd))
