"""The Hessians that GPTQ needs: H = Σ x xᵀ of the inputs x of each weight, from a run of the float model.

Every product of a model (of a module, a call, an LSTM's step, attention's projections) comes to torch as one of a few
operators, with a view of the weight as its second factor. The rows are summed there, so no operator of the table has to
say what its weights are multiplied with, and a tied weight gets the rows of all its uses.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.errors import ExampleInputsError, warn
from fxquant.formats import FORMATS
from fxquant.gptq import round_with_gptq
from fxquant.graph import edit
from fxquant.graph.call import Inputs, each_batch, run
from fxquant.graph.record import Site, record_of
from fxquant.graph.trace.writes import without_writes
from fxquant.graph.why import Rounded
from fxquant.nn.base import quantize_alone
from fxquant.numerics import QuantizedTensor
from fxquant.observers import Observer
from fxquant.progress import Progress
from fxquant.qconfig import QConfig

aten = torch.ops.aten

_FACTORS = {
    aten.mm.default: slice(0, 2),
    aten.bmm.default: slice(0, 2),
    aten.addmm.default: slice(1, 3),
    aten.baddbmm.default: slice(1, 3),
}
"""Where the operators in which all products end have their factors."""

Rounding: TypeAlias = Callable[[torch.Tensor, QConfig, Observer | None], tuple[QuantizedTensor, Rounded]]
"""Returns a quantized weight and how it was rounded. An observer, if any, has measured its range already."""


def to_nearest(weight: torch.Tensor, qconfig: QConfig, observer: Observer | None) -> QuantizedTensor:
    """Return a quantized weight, rounded to nearest, with the range that an observer has measured, if any."""
    return quantize_alone(weight, qconfig) if observer is None else observer.quantize(weight.contiguous())


class Hessians:
    """H = Σ x xᵀ of the inputs x of a model's weights, by each weight's name and number of inputs.

    It rounds the weights of all mirrors of the model, each once.
    """

    def __init__(self, sums: dict[tuple[str, int], torch.Tensor]) -> None:
        self.sums = sums
        self._done: dict[tuple[Any, ...], tuple[QuantizedTensor, Rounded]] = {}

    def rounding(self, module: nn.Module) -> Rounding:
        """Return a function that quantizes a mirror's weights, each (O, I), and says how it rounded."""
        names = _names(module)

        def quantize(
            weight: torch.Tensor, qconfig: QConfig, observer: Observer | None
        ) -> tuple[QuantizedTensor, Rounded]:
            if not uses_gptq(qconfig):
                return to_nearest(weight, qconfig, observer), Rounded.TO_NEAREST
            name = names.get(weight.data_ptr())
            if name is None:
                return self._round(weight, None, qconfig, observer)
            key = name, weight.shape, weight.stride(), qconfig.weight, qconfig.weight_observer
            if key not in self._done:
                hessian = self.sums.get((name, weight[0].numel())) if len(weight) else None
                self._done[key] = self._round(weight, hessian, qconfig, observer)
            return self._done[key]

        return quantize

    def _round(
        self, weight: torch.Tensor, hessian: torch.Tensor | None, qconfig: QConfig, observer: Observer | None
    ) -> tuple[QuantizedTensor, Rounded]:
        if hessian is not None and hessian.isfinite().all():
            return round_with_gptq(weight, hessian, qconfig.weight), Rounded.GPTQ
        if weight.dim() > 2 and hessian is None:
            return to_nearest(weight, qconfig, observer), Rounded.NO_CONVOLUTION
        return to_nearest(weight, qconfig, observer), Rounded.NO_INPUT if hessian is None else Rounded.NOT_FINITE


def uses_gptq(qconfig: QConfig) -> bool:
    """Return whether GPTQ rounds a qconfig's weights: by their format, or since the qconfig asks for it."""
    return qconfig.gptq or qconfig.weight.format.uses_gptq


def gather(prepared: nn.Module, sites: Sequence[Site], data: Iterable[Any], progress: Progress = iter) -> Hessians:
    """Return the Hessians of the sites' weights, from their inputs while a prepared model runs over data.

    It runs as a mirror, so that it is not changed. All weights are watched in one pass, since one each would take far
    longer: float32 (K, K) for a weight (O, K), K / O of its memory.
    Raises ExampleInputsError for a batch that does not run, or no batch at all.
    """
    batches = each_batch(data, prepared, progress)
    twin = edit.mirror(prepared)
    weights = _weights(twin, sites)
    if any(tensor.is_meta for tensor in twin.parameters()):
        warn("data was given to round weights with GPTQ, but the model is on the meta device and has no values")
        return Hessians({})
    if not weights:
        formats = " or ".join(known.name for known in FORMATS if known.uses_gptq)
        warn(
            f"data was given to round weights with GPTQ, but no weight becomes {formats}: others are rounded to "
            "nearest, which is as good for them; leave data out, or give a Linear a qconfig with such weights"
        )
        return Hessians({})
    first = next(batches)
    twin = edit.mirror(prepared, written=_written(prepared, first))
    counter = _Counter(_weights(twin, sites))
    is_recurrent = any(isinstance(part, nn.RNNBase) for part in twin.modules())
    for number, arguments in enumerate(itertools.chain([first], batches)):
        with _unfused(is_recurrent), counter:
            run_batch(twin, arguments, number)
    return Hessians(counter.close())


def calibrated(prepared: nn.Module, data: Iterable[Any], progress: Progress = iter) -> nn.Module:
    """Return a mirror of a prepared model whose observers have seen data, beside what they saw before.

    Raises ExampleInputsError for a batch that does not run, or no batch at all.
    """
    twin = edit.mirror(prepared)
    for number, arguments in enumerate(each_batch(data, prepared, progress)):
        with torch.no_grad():
            run_batch(twin, arguments, number)
    return twin


def uses_hessians(sites: Sequence[Site]) -> bool:
    """Return whether weights of some sites are rounded with GPTQ."""
    chosen = (qconfig for site in sites for qconfig in (site.qconfig, *dict(site.qconfig.parts).values()))
    return any(qconfig is not None and uses_gptq(qconfig) for qconfig in chosen)


def _written(prepared: nn.Module, first: Inputs) -> frozenset[str]:
    """Return the parameters that forward writes into; a graph's record has them, a model that was never run is run
    once.
    """
    record = record_of(prepared)
    if record is None or record.is_traced or record.untraced:
        return frozenset() if record is None else record.written

    def twin_runs(written: frozenset[str]) -> None:
        run_batch(edit.mirror(prepared, written=written), first, 0)

    return without_writes(prepared, twin_runs)[1]


def run_batch(model: nn.Module, arguments: Inputs, number: int) -> None:
    """Run a batch, or raise ExampleInputsError where forward fails."""
    try:
        run(model, arguments, seed=number)
    except Exception as error:
        raise ExampleInputsError(
            f"data's batch {number} does not run through the model ({edit.user_frame(error) or 'in forward'}): {error}"
        ) from error


def _names(root: nn.Module) -> dict[int, str]:
    """Return the name of each matrix of a model by its address in memory; a tied one's first name."""
    named = [*root.named_buffers(), *root.named_parameters()][::-1]
    return {tensor.data_ptr(): name for name, tensor in named if tensor.dim() > 1 and tensor.device.type != "meta"}


def _weights(root: nn.Module, sites: Iterable[Site]) -> dict[str, torch.Tensor]:
    """Return by name those of the sites' weights that GPTQ rounds."""
    names, weights = _names(root), {}
    for site in sites:
        if site.call:
            held = {"": edit.get_tensor(root, site.path)}
        else:
            held = dict(root.get_submodule(site.path).named_parameters(remove_duplicate=False))
        for part, tensor in held.items():
            qconfig = site.qconfig.of(part)
            if tensor is not None and qconfig is not None and uses_gptq(qconfig) and tensor.data_ptr() in names:
                weights[names[tensor.data_ptr()]] = tensor
    return weights


class _Sum:
    """H = Σ x xᵀ, with many rows in each product: an LSTM gives them step by step."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.waiting: list[torch.Tensor] = []
        self.count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add (M, K) rows, which may be overwritten afterwards."""
        self.waiting.append(rows.to(torch.float32, copy=True))
        self.count += len(rows)
        if self.count >= rows.shape[1]:
            self.close()

    def close(self) -> torch.Tensor:
        """Return the sum of all rows so far."""
        if self.waiting:
            x = torch.cat(self.waiting)
            product = x.t() @ x
            self.total = product if self.total is None else self.total.add_(product)
            self.waiting, self.count = [], 0
        assert self.total is not None
        return self.total


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, sums the rows that some weights are multiplied with."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = sorted((w.data_ptr(), w.data_ptr() + w.numel() * w.element_size(), n) for n, w in weights.items())
        self.sums: dict[tuple[str, int], _Sum] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode a linear is not decomposed
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func in _FACTORS:
            self.see(*args[_FACTORS[func]])
        if func is aten.convolution.default:
            self.see_windows(*args)
        return func(*args, **kwargs)

    def see(self, x: torch.Tensor, factor: torch.Tensor) -> None:
        """Add the rows of x if the factor lies within one of the weights."""
        name = self._name(factor)
        if name is not None and x.numel():
            self.sums.setdefault((name, x.shape[-1]), _Sum()).add(x.reshape(-1, x.shape[-1]))

    def see_windows(self, x: torch.Tensor, weight: torch.Tensor, *options: Any) -> None:
        """Add the windows that a convolution without groups multiplies with one of the weights, image by image."""
        _, stride, padding, dilation, is_transposed, _, groups = options
        if is_transposed or groups > 1 or self._name(weight) is None:
            return
        rank, sides = weight.dim() - 2, [part for side in reversed(padding) for part in (side, side)]
        for image in torch.nn.functional.pad(x, sides):
            windows = image
            for at, (size, step, gap) in enumerate(zip(weight.shape[2:], stride, dilation, strict=True)):
                windows = windows.unfold(1 + at, (size - 1) * gap + 1, step)[..., ::gap]
            rows = windows.permute(*range(1, 1 + rank), 0, *range(1 + rank, 1 + 2 * rank))
            self.see(rows.flatten(rank), weight)

    def _name(self, factor: torch.Tensor) -> str | None:
        """Return the name of the weight that a factor lies in."""
        place = bisect.bisect_right(self.places, factor.data_ptr(), key=lambda place: place[0]) - 1
        return self.places[place][2] if place >= 0 and factor.data_ptr() < self.places[place][1] else None

    def close(self) -> dict[tuple[str, int], torch.Tensor]:
        """Return the sums."""
        return {key: total.close() for key, total in self.sums.items()}


class _Plain(TorchFunctionMode):
    """Changes nothing, but keeps attention from its fast path, which would be one operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _unfused(is_recurrent: bool) -> Iterator[None]:
    """Let torch compute attention, and recurrent layers if there are any, product by product inside the block.

    For these, oneDNN and cuDNN are off meanwhile, in all threads: torch has no other switch.
    """
    enabled = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(enabled[0] and not is_recurrent)
    torch._C._set_cudnn_enabled(enabled[1] and not is_recurrent)
    try:
        with _Plain():
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled[0])
        torch._C._set_cudnn_enabled(enabled[1])
