"""The laws over random models: 300 by default, 2,000 with FXQUANT_EXHAUSTIVE=1.

python -m tests.test_random_graphs 123                  # one again: its modules, what became of them, what fails
python -m tests.test_random_graphs 0 --count 2000       # many, and how long they take
"""

from __future__ import annotations

import argparse
import os
import time
import warnings

import pytest
import torch
from torch import nn

import fxquant
from fxquant import convert_fx, explain, quantize_dynamic
from tests import random_graphs
from tests.architectures import oracle
from tests.architectures.base import byte_sum, coverable_bytes, matrices, noise, power, slow_path
from tests.random_graphs import Draft, Part
from tests.samples import prepare, same_bits
from tests.test_laws import same_snapshot, snapshot

COUNT = 2000 if "FXQUANT_EXHAUSTIVE" in os.environ else 300
ROUNDING = (1000 * 2**-24) ** 2
"""How much of a signal's power float32 sums of up to 1,000 products may round away, where a BatchNorm is folded."""


class Case:
    """One random model and what became of it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model, (self.x,) = Draft(seed).model()
        self.before = snapshot(self.model)
        self.called = [f"{path}.{name}" for path, part in self.parts().items() for name in part.calls]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing in this .* is to be quantized")
            self.prepared = prepare(self.model, self.x)
            self.quantized, self.eager = convert_fx(self.prepared), quantize_dynamic(self.model)
        self.expected, self.got = self.model(self.x), self.quantized(self.x)
        self.modules = list(self.model.modules())

    def parts(self) -> dict[str, Part]:
        """Return the model's parts by their paths."""
        return {path: part for path, part in self.model.named_modules() if isinstance(part, Part)}

    def has(self, *kinds: type) -> bool:
        """Return whether a module of the model is of one of these types."""
        return any(isinstance(module, kinds) for module in self.modules)


def law_1_prepare_keeps_the_outputs(case: Case) -> None:
    """Bit for bit; where a BatchNorm is folded, to float rounding."""
    got = case.prepared(case.x)
    if case.has(nn.BatchNorm1d):
        assert noise([case.expected], [got]) <= ROUNDING * power([case.expected])
    else:
        assert same_bits(got, case.expected)


def law_2_the_model_is_not_changed(case: Case) -> None:
    """Not its modules, modes, tensors or attributes."""
    assert same_snapshot(snapshot(case.model), case.before)


def law_3_every_candidate_is_a_site_or_has_a_reason(case: Case) -> None:
    """Each matrix, by any name of its own or of what holds it; those that can be quantized are, and no others."""
    for quantized in (case.quantized, case.eager):
        rows = explain(quantized).rows
        told = {row.path for row in rows}
        assert all(row.is_quantized or row.decision.startswith("float: ") for row in rows)
        aliases: dict[int, list[str]] = {}
        for path, parameter in case.model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(path)
        for path, parameter in matrices(case.model).items():
            holders = {name.rsplit(".", up)[0] for name in aliases[id(parameter)] for up in range(name.count(".") + 1)}
            assert holders & told, f"{path} is not accounted for in {sorted(told)}"
    covered = byte_sum(matrices(case.model).values()) - byte_sum(matrices(case.quantized).values())
    assert covered == coverable_bytes(case.model, case.called, "fx")
    untraced = {path for path, part in case.parts().items() if not part.traces}
    assert set(case.prepared.record.untraced) == untraced


def law_4_a_row_is_its_own(case: Case) -> None:
    """Its neighbours do not matter; nor does the batch, nor what comes after, where torch multiplies nothing itself."""
    x, parts = case.x, case.parts().values()
    for row in {0, x.shape[0] - 1}:
        other = x.roll(1, 0) * (1000 if x.is_floating_point() else 1)
        other[row] = x[row]
        assert same_bits(case.quantized(other)[row], case.got[row])
    if case.has(nn.LayerNorm) or not all(part.exact for part in parts):
        return
    for row in range(x.shape[0]):
        assert same_bits(case.quantized(x[row : row + 1])[0], case.got[row])
    for length in range(1, x.shape[1] if all(part.causal for part in parts) else 1):
        assert same_bits(case.quantized(x[:, :length]), case.got[:, :length])


def the_answers_are_those_of_the_simulation(case: Case) -> None:
    """Bit for bit, where nothing rounds in an order of its own (tests/architectures/test_architectures.py)."""
    if case.has(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.BatchNorm1d):
        return
    assert same_bits(case.got, oracle.simulate(case.model, (case.x,), case.called, "fx"))
    if not case.has(random_graphs.Head):  # whose table is not one module's alone
        assert same_bits(case.eager(case.x), oracle.simulate(case.model, (case.x,), case.called, "eager"))


LAWS = (
    law_1_prepare_keeps_the_outputs,
    law_3_every_candidate_is_a_site_or_has_a_reason,
    law_4_a_row_is_its_own,
    the_answers_are_those_of_the_simulation,
    law_2_the_model_is_not_changed,  # after all that was done with it and with what came of it
)


@torch.no_grad()
def check(seed: int) -> Case:
    """Return the case of this number, of which all laws hold; AssertionError, with the line to see it again."""
    again = f"to see it again: python -m tests.test_random_graphs {seed}"
    with slow_path():
        try:
            case = Case(seed)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{again}") from error
        for law in LAWS:
            try:
                law(case)
            except Exception as error:
                raise AssertionError(f"{law.__name__}: {error}\n{again}") from error
    return case


def test_the_graphs_hold_every_kind_of_part():
    kinds, spellings, shared, tied = set(), set(), 0, 0
    for seed in range(COUNT):
        model, _ = Draft(seed).model()
        kinds |= {type(module) for module in model.modules()}
        spellings |= {module.call for module in model.modules() if isinstance(module, random_graphs.Written)}
        shared += len([*model.named_modules(remove_duplicate=False)]) > len([*model.modules()])
        tied += len([p for m in model.modules() for p in m.parameters(recurse=False)]) > len([*model.parameters()])
    dynamic = [row for row in fxquant.OPERATORS if not row.is_static]  # tests/test_static_graphs.py has the others
    table = [row for row in dynamic if row.name != "convolution"]  # which at the sizes here stays float
    rows = {kind for row in table for kind in row.modules if getattr(nn, getattr(kind, "__name__", ""), 0)}
    assert len(rows) == 10
    assert rows | set(Part.__subclasses__()) | {nn.ModuleDict, nn.BatchNorm1d, nn.TransformerEncoderLayer} <= kinds
    assert spellings == {call for _, call in random_graphs.Written.SPELLINGS.values()}
    assert shared > COUNT / 10
    assert tied > COUNT / 10


@pytest.mark.parametrize("seed", range(COUNT))
def test_the_laws_hold(seed):
    check(seed)


def main() -> None:
    """Check some numbers; of one, show what it is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--count", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, failures = time.perf_counter(), 0
    for seed in range(options.seed, options.seed + options.count):
        if options.count == 1:
            torch.manual_seed(seed)
            model, (x,) = Draft(seed).model()
            print(model, tuple(x.shape), x.dtype)
        try:
            case = check(seed)
        except AssertionError as error:
            failures += 1
            print(error)
            if options.count == 1:
                raise
        else:
            if options.count == 1:
                print(case.quantized.graph, explain(case.quantized), sep="\n")
    print(f"{failures} of {options.count} fail, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
