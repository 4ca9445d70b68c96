"""What was decided so far: sites and skipped candidates, and how many bytes of weights are quantized."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxquant.graph import edit
from fxquant.graph.plan.rules import join, refusal
from fxquant.graph.record import Coverage, Site, Skipped
from fxquant.graph.why import Reason, Why, because
from fxquant.operators import Operator
from fxquant.qconfig_mapping import Entry, Rule, opt_out


@dataclass(frozen=True)
class Candidate:
    """A module or call that holds a weight of two or more dimensions, or one weight of a module.

    kind: its type as reports name it. operator: None where it has none. tensors: all that it holds. shape,
    call: as a Site has them.
    """

    path: str
    kind: str
    operator: Operator | None
    tensors: tuple[torch.Tensor, ...]
    shape: tuple[int, ...] = ()
    call: str | None = None


@dataclass
class _Weight:
    """A weight's bytes, the paths of the sites that have it, and whether a candidate that stays float has it too."""

    size: int
    sites: list[str] = field(default_factory=list)
    is_float: bool = False


class Decisions:
    """Collects a Site or a Skipped for each candidate. written: the storages of tensors that forward writes into."""

    def __init__(self, written: Collection[int]) -> None:
        self.sites: list[Site] = []
        self._skipped: list[tuple[Skipped, list[_Weight]]] = []
        self._written = written
        self._weights: dict[tuple[Any, ...], _Weight] = {}

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What stays float, with the site that quantizes its weight too, if any: the model then keeps both."""
        result = []
        for skipped, weights in self._skipped:
            tied = next((weight.sites[0] for weight in weights if weight.sites), "")
            result.append(replace(skipped, tied="" if skipped.why.why is Why.ASKED else tied))
        return tuple(result)

    @property
    def coverage(self) -> Coverage:
        """How many bytes of the candidates' weights are quantized."""
        weights = self._weights.values()
        done = sum(weight.size for weight in weights if weight.sites and not weight.is_float)
        return Coverage(done, sum(weight.size for weight in weights))

    def decide(
        self, candidate: Candidate, rule: Rule, reason: Reason | None = None, part_entries: tuple[Entry, ...] = ()
    ) -> bool:
        """Record a Site and return True, or record why there is none. reason: why it stays float under any rule."""
        operator, tensors = candidate.operator, candidate.tensors
        if reason is None and any(edit.identity(tensor)[0] in self._written for tensor in tensors):
            reason = because(Why.WRITTEN)
        reason = refusal(candidate.path, candidate.kind, operator, rule, reason)
        common: dict[str, Any] = {
            "path": candidate.path,
            "kind": candidate.kind,
            "entry": rule.entry,
            "call": candidate.call,
            "float_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "opt_out": rule.opt_out,
        }
        weights = [self._weight(tensor) for tensor in tensors if tensor.dim() > 1]
        if reason is not None:
            self._skipped.append((Skipped(**common, why=reason), weights))
            for weight in weights:
                weight.is_float = True
            return False
        for weight in weights:
            weight.sites.append(candidate.path)
        assert operator is not None, candidate.path
        assert rule.qconfig is not None, candidate.path
        self.sites.append(
            Site(
                **common, operator=operator.name, qconfig=rule.qconfig, shape=candidate.shape, part_entries=part_entries
            )
        )
        return True

    def decide_weights(
        self, candidate: Candidate, rule: Rule, rules: Mapping[str, Rule], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Record a Site of those weights of a module that their own rules quantize, and why the others stay float.

        rule: the module's; rules: by the weights' names; tensors: all that the module holds, by name.
        """
        taken: dict[str, Rule | None] = dict(rules)
        rest = dict(tensors)
        for name, part_rule in rules.items():
            path = f"{candidate.path}.{name}" if candidate.path else name
            reason = refusal(path, candidate.kind, candidate.operator, part_rule)
            if reason is not None:
                weight = Candidate(path, candidate.kind, None, (rest.pop(name),))
                self.decide(weight, part_rule._replace(opt_out=opt_out(path)), reason)
                taken[name] = None
        if any(taken.values()):
            main, others = join(candidate.path, candidate.kind, rule, taken)
            self.decide(replace(candidate, tensors=tuple(rest.values())), main, part_entries=others)

    def _weight(self, tensor: torch.Tensor) -> _Weight:
        return self._weights.setdefault(edit.identity(tensor), _Weight(tensor.numel() * tensor.element_size()))
