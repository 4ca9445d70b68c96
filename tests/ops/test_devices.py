"""The references give the same bits on every device, whatever torch's modes for products of floats are."""

import contextlib
import importlib

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.numerics import (
    QuantizedTensor,
    choose_qparams,
    choose_value_qparams,
    dequantize,
    quantize_with,
    weight_range,
)
from fxquant.ops import KERNELS
from fxquant.ops.register import Kernel
from fxquant.qconfig import BEST
from tests.ops.operands import quantized, table_arguments
from tests.ops.test_register import CASES
from tests.samples import same_bits

LINEAR = importlib.import_module("fxquant.ops.linear")  # the package's attribute of this name is the function

ALIKE = """
    abs add alias all amax amin aminmax arange as_strided bitwise_and bitwise_left_shift bitwise_not bitwise_or cat
    clamp clamp_min clone constant_pad_nd copy detach div empty empty_like eq expand fill floor floor_divide full ge gt
    index index_select le lift_fresh local_scalar_dense lshift lt masked_fill max max_pool2d_with_indices maximum
    minimum mul nan_to_num ne neg new_empty new_full new_ones new_zeros ones permute reciprocal relu resolve_neg round
    rshift rsub scalar_tensor select sign slice split split_with_sizes squeeze stack sub t to_copy transpose tril triu
    unsafe_view unsqueeze view where zeros zeros_like
"""
"""What moves numbers or rounds once: every device does it alike."""

EXACT = {
    "sum": "sums of integers",
    "cumsum": "sums of whole numbers in float64",
    "avg_pool2d": "sums of whole numbers in float64, divided once",
    "int_mm": "sums of integers",
    "mm": "of whole numbers in float64 or below 2**24, but for float weights",
    "convolution": "of whole numbers in float64 or below 2**24",
    "embedding_bag": "what is no bag is refused by it; its result is not used",
    "embedding_bag_forward_only": "what is no bag is refused by it; its result is not used",
}


def more_cases():
    """Yield the other formats: of products, recurrent layers and tables, by the names of their qconfigs."""
    for qconfig in BEST.values():
        if qconfig.weight.format.activation is None:
            continue
        values, scale, _ = qconfig.quantize_weight(torch.randn(8, 70)).tensors
        yield "linear", (torch.randn(3, 70), values, scale, None, False, True, 255, *qconfig.layout(70)), {}
    weight, scale = torch.randint(-32767, 32768, (8, 6), dtype=torch.int16), torch.rand(8)
    yield "linear", (torch.randn(3, 6), weight, scale, None, False, False, 255, "int16"), {}
    yield "adaptive_pool_value", (*_value(), *_value()[1:], [2, 3]), {}
    yield "pool_value", (*_value(), *_value()[1:], [2, 2], [2, 2], [0, 0]), {}
    for curve in ("leaky_relu", "hardswish", "silu"):
        weight = torch.randint(-127, 128, (8, 6), dtype=torch.int8)
        yield "static_linear", (*_value(), weight, torch.rand(8) / 99), {"curve": curve, "slope": 0.1}
    yield "embedding_bag", table_arguments(affine=True), {"mode": "mean", "format": "uint8"}


def _value():
    q = torch.randint(256, (2, 4, 5, 6), dtype=torch.uint8)
    return q, torch.tensor(0.02), torch.tensor(128, dtype=torch.int32)


ALL = [*CASES, *more_cases()]


def detached(case):
    """Return a case's operator and arguments, without gradients."""
    name, args, kwargs = case
    bare = pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, (args, kwargs))
    return KERNELS[name], KERNELS[name].arguments(*bare[0], **bare[1])


def sums_floats(kernel, arguments):
    """Return whether torch orders some of a call's sums of floats."""
    return kernel.name in ("linear", "lstm", "rnn") and any(
        isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float16
        for leaf in pytree.tree_leaves(tuple(arguments)[1:])
    )


class Watching(TorchDispatchMode):
    """Collects calls whose bits may be others on another device."""

    def __init__(self):
        super().__init__()
        self.faults = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        why = self.fault(func, args, kwargs or {}, out)
        if why:
            self.faults.append(f"{func}: {why}")
        return out

    @staticmethod
    def fault(func, args, kwargs, out):
        name = func._opname.strip("_")
        if name not in ALIKE.split() and name not in EXACT:
            return "is it the same on every device, to the bit?"
        is_float = isinstance(out, torch.Tensor) and out.is_floating_point()
        if name == "div" and is_float and not isinstance(args[1], torch.Tensor):
            return "CUDA multiplies with the reciprocal of a Python number; see numerics.divided"
        if name in ("add", "sub", "rsub") and is_float and kwargs.get("alpha", 1) != 1:
            return "CUDA fuses the multiplication by alpha with the addition"
        if name in ("sum", "cumsum", "avg_pool2d") and is_float and out.dtype != torch.float64:
            return "the order of a sum of floats is the device's"
        return None


@pytest.mark.parametrize("case", ALL, ids=lambda c: c[0])
def test_a_reference_is_made_of_what_every_device_does_alike(case):
    LINEAR.has_exact_int_mm()  # asked once, by products of its own
    kernel, arguments = detached(case)
    with Watching() as watching:
        kernel.reference(arguments)
    assert not watching.faults


WEIGHTS = {str(qconfig.weight): qconfig.weight for qconfig in BEST.values() if qconfig.weight.format.limits}


@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)
def test_so_is_the_quantization_of_weights_by_their_range(spec):
    weight = torch.randn(4, 70)
    with Watching() as watching:
        scale, zero_point = choose_qparams(*weight_range(weight, spec), spec)
        values = quantize_with(weight, scale, zero_point, spec)
        zero = None if spec.symmetric else zero_point
        dequantize(QuantizedTensor(spec.format, values, scale, zero, 70, spec.group_size or 0))
        choose_value_qparams(weight.amin(), weight.amax(), 255)
    assert not watching.faults


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: x / 3.0, "reciprocal of a Python number"),
        (lambda x: torch.sub(x, x, alpha=3.0), "fuses"),
        (lambda x: x.sum(), "order of a sum"),
        (lambda x: x.sigmoid(), "same on every device"),
        (lambda x: torch.addcmul(x, x, x), "same on every device"),
    ],
)
def test_what_devices_do_otherwise_is_found(call, why):
    x = torch.randn(3, 4)
    with Watching() as watching:
        call(x)
    assert why in watching.faults[0]


@contextlib.contextmanager
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a CUDA device with the CPU; there is none")
@pytest.mark.parametrize("case", ALL, ids=lambda c: c[0])
@pytest.mark.parametrize("mode", ["plain", "TF32", "autocast"])
def test_a_gpu_gives_the_cpus_bits(case, mode):
    kernel, arguments = detached(case)
    expected = pytree.tree_leaves(kernel.reference(arguments))
    there = kernel.arguments(
        *(
            pytree.tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, argument)
            if name != "batch_sizes"
            else argument
            for name, argument in zip(kernel.names, arguments, strict=True)
        )
    )
    modes = {"plain": contextlib.nullcontext(), "TF32": tf32(), "autocast": torch.autocast("cuda", torch.float16)}
    with modes[mode]:
        outputs = {"reference": kernel.run_reference(there), "whatever runs": kernel.run(*there)}
    for what, output in outputs.items():
        for got, wanted in zip(pytree.tree_leaves(output), expected, strict=True):
            if sums_floats(kernel, arguments):
                assert torch.allclose(got.cpu(), wanted, 1e-5, 1e-5), what
            else:
                assert same_bits(got.cpu(), wanted), what


@pytest.mark.parametrize("has_int_mm", [True, False])
@pytest.mark.parametrize("name", ["linear", "lstm", "static_linear", "static_convolution"])
def test_autocast_has_no_say_in_a_reference(name, has_int_mm, monkeypatch):
    monkeypatch.setattr(Kernel, "run_native", lambda *_: None)
    if not has_int_mm:
        monkeypatch.setattr(LINEAR, "has_exact_int_mm", lambda: False)
    kernel, arguments = next(map(detached, (case for case in CASES if case[0] == name)))
    expected = pytree.tree_leaves(kernel.run(*arguments))
    with torch.autocast("cpu", torch.bfloat16):
        got = pytree.tree_leaves(kernel.run(*arguments))
    assert all(map(same_bits, got, expected))


@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 1, 1), (3, 70, 9), (16, 64, 8), (40, 8, 17)])
def test_the_product_of_a_gpu_pads_what_it_multiplies(rows, columns, outputs, monkeypatch):
    """torch's product of int8 on a GPU takes certain sizes alone; here that of the CPU gets them."""
    taken, plain = [], torch._int_mm

    def watched(a, b):
        taken.append((a.shape, b.shape))
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", watched)
    q, weight = (torch.randint(-9, 10, (n, columns), dtype=torch.int8) for n in (rows, outputs))
    got = LINEAR._int_mm_on_gpu(q, weight)
    assert torch.equal(got.long(), q.long() @ weight.long().t())
    ((left, right),) = taken
    assert left[0] > 16
    assert left[1] == right[0]
    assert left[1] % 8 == right[1] % 8 == 0


def test_a_gpu_without_products_of_int8_gets_them_by_float64(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    q, weight = torch.randint(-128, 128, (3, 70), dtype=torch.int8), quantized(9, 70)[0]
    assert torch.equal(LINEAR._int_mm_on_gpu(q, weight).long(), q.long() @ weight.long().t())


def test_tf32_is_seen():
    assert not LINEAR._has_tf32()
    with tf32():
        assert LINEAR._has_tf32()
    assert not LINEAR._has_tf32()
