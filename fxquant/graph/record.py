"""What a model of ours remembers of its decisions: every site, every candidate that stays float, and what was fused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fxquant.errors import ModelStateError
from fxquant.graph.call import Example
from fxquant.graph.fingerprint.architecture import Architecture
from fxquant.graph.preserve.preserve import NOTHING_PRESERVED, Keep, Preserved
from fxquant.graph.values import NO_VALUES, Values
from fxquant.graph.why import Reason, Rounded
from fxquant.nn.training import trainable
from fxquant.operators import Operator
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import Entry, QConfigMapping


@dataclass(frozen=True)
class Coverage:
    """How many bytes of the weights are quantized, or will be.

    Weights are the tensors of two or more dimensions that candidates hold. Tied ones count once, and as float where
    one of their candidates stays so.
    """

    quantized_bytes: int = 0
    total_bytes: int = 0

    @property
    def share(self) -> float:
        """The quantized part, 0 to 1; 1 where there is no weight."""
        return self.quantized_bytes / self.total_bytes if self.total_bytes else 1.0


NOTHING = Coverage()
"""The coverage of a model without weights."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One decision to quantize.

    path: the module's path, or its weight's path for a call. kind: what it was ("nn.Linear", "F.linear"). operator: its
    name in the table. entry: the mapping entry that decided. call, observer: a call's node name and the path of its
    weight's observer, None for a module. float_bytes, int_bytes: what its tensors take before and after (0 before
    convert_fx). opt_out: the mapping entry that would leave it float. shape: rows, inputs and outputs of its first call
    on the example inputs, () where they are not known. part_entries: further entries, which decided for some of its
    weights. Its float weights are candidates of their own, each `Skipped`, and in none of its bytes. rounded: how its
    weights were rounded where data was given for that.
    """

    path: str
    kind: str
    operator: str
    qconfig: QConfig
    entry: Entry
    call: str | None = None
    observer: str | None = None
    float_bytes: int = 0
    int_bytes: int = 0
    opt_out: str = ""
    shape: tuple[int, ...] = ()
    part_entries: tuple[Entry, ...] = ()
    rounded: tuple[Rounded, ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether its input's integers are found by calibration."""
        return self.qconfig.is_static

    @property
    def rule(self) -> str:
        """The mapping entry that decided, as reports name it."""
        return str(self.entry)

    @property
    def part_rules(self) -> tuple[str, ...]:
        """The entries that decided for weights of it, as reports name them."""
        return tuple(map(str, self.part_entries))

    @property
    def rounding(self) -> str:
        """How its weights were rounded, in words; "" where there is nothing to say."""
        return "; ".join(rounded.value for rounded in self.rounded)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """One candidate, or one weight of a Site, that stays float, and why.

    call: a call's node name, None for a module. entry: the mapping entry that decided. opt_out: the one that would
    leave it float. tied: the path of a site that has its weight too, or "".
    """

    path: str
    kind: str
    why: Reason
    entry: Entry
    call: str | None = None
    float_bytes: int = 0
    opt_out: str = ""
    tied: str = ""

    @property
    def reason(self) -> str:
        """Why it stays float, in words."""
        told = f"; its weight is that of {self.tied!r} too, which is quantized: both are kept"
        return f"{self.why}{told if self.tied else ''}"

    @property
    def rule(self) -> str:
        """The mapping entry that decided, as reports name it."""
        return str(self.entry)


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """One chain that became one node. path: where it stands now; chain: what it was, in order."""

    path: str
    chain: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Unfused:
    """One chain that was not fused, and why; for a BatchNorm without a layer before it, only the BatchNorm."""

    chain: tuple[str, ...]
    why: Reason


@dataclass(frozen=True, kw_only=True, repr=False)
class Record:
    """All that a model of ours remembers beside its graph. stage: "fused", "prepared" or "quantized".

    is_traced: whether it is an FxModule; quantize_dynamic gives the user's own class instead. example: of a prepared
    one, the arguments that it is checked on once it is quantized. architecture: of the float model, for checkpoints.
    unchecked: why that check was not possible. live, checked: the paths of the attributes that its graph reads at each
    call, to use and to compare; fixed: of those that forward read when it was traced; baked: the plain values that it
    read. written: the parameters that forward writes into. batch_invariant: how its float products are summed:
    graph/convert/invariant.py. extra_states: what get_extra_state gave, by the paths of modules that were traced
    through. trainable: for a quantized one with sites, the parameters that required a gradient when it was made.
    is_trained: whether it is from prepare_qat_fx.
    """

    stage: str
    is_traced: bool = True
    sites: tuple[Site, ...] = ()
    values: Values = NO_VALUES
    skipped: tuple[Skipped, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    mapping: QConfigMapping = field(default_factory=QConfigMapping)
    operators: tuple[Operator, ...] = ()
    unfused: tuple[Unfused, ...] = ()
    preserved: Preserved = NOTHING_PRESERVED
    live: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()
    baked: Mapping[str, Any] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)
    untraced: Mapping[str, str] = field(default_factory=dict)
    float_bytes: int = 0
    coverage: Coverage = NOTHING
    extra_states: Mapping[str, Any] = field(default_factory=dict)
    example: Example | None = field(default=None, compare=False)
    architecture: Architecture | None = None
    unchecked: str = ""
    batch_invariant: bool | None = None
    trainable: frozenset[str] | None = field(default=None, compare=False)
    is_trained: bool = False

    @property
    def left(self) -> tuple[Skipped, ...]:
        """The old name of `skipped`."""
        warnings.warn("record.left is now record.skipped", DeprecationWarning, stacklevel=2)
        return self.skipped

    @property
    def outcome(self) -> str:
        """In a line: how many candidates, and how many bytes of their weights, are quantized or will be."""
        done, tense = len(self.sites), "quantized" if self.stage == "quantized" else "to be quantized by convert_fx"
        return (
            f"{done} of {done + len(self.skipped)} candidates, {self.coverage.quantized_bytes:,} of "
            f"{self.coverage.total_bytes:,} weight bytes {tense} ({100 * self.coverage.share:.1f} %)"
        )

    @property
    def keep(self) -> Keep:
        """What another trace of the same model has to take care of."""
        return Keep(self.preserved, self.live, self.written, self.is_trained, checks=True)

    def __repr__(self) -> str:
        return f"<fused: {len(self.fusions)} chains>" if self.stage == "fused" else f"<{self.stage}: {self.outcome}>"

    def advance(self, **changes: Any) -> Record:
        """Return a record with some fields changed."""
        return replace(self, **changes)


def keep_record(model: nn.Module, record: Record) -> nn.Module:
    """Return a model of the user's own class that carries a record, in copies and pickles too."""
    if record.stage == "quantized" and record.sites and record.trainable is None:
        record = record.advance(trainable=trainable(model))
    model.__dict__["_fxquant_record"] = record
    return model


def record_of(model: Any) -> Record | None:
    """Return the record of one of our models, None for any other."""
    record = vars(model).get("_fxquant_record") if isinstance(model, nn.Module) else None
    return record if isinstance(record, Record) else None


def preserved_of(model: nn.Module) -> Preserved:
    """Return what a model keeps of the user's beside forward: what fuse_fx kept, for example."""
    record = record_of(model)
    return NOTHING_PRESERVED if record is None else record.preserved


def refuse_ours(model: Any, caller: str, stages: Sequence[str] = ("fused", "prepared", "quantized")) -> None:
    """Raise ModelStateError for a model that went through fxquant already, to one of these stages."""
    record = record_of(model)
    if record is not None and record.stage in stages:
        raise ModelStateError(f"{caller} needs the float model, got a model that is {record.stage} already")


def need_stage(model: Any, stage: str, caller: str, cure: str) -> Record:
    """Return the model's record if it is at the stage that a call needs, else raise ModelStateError."""
    record = record_of(model)
    if record is not None and record.stage == stage:
        return record
    got = f"a model that is {record.stage} already" if record is not None else type(model).__name__
    raise ModelStateError(f"{caller} needs the result of {cure}, got {got}")
