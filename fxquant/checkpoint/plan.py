"""A quantized model's plan as JSON and back.

It holds the format, version, sites, skipped candidates ("left"), fusions, mapping, aliases of tied tensors, preserved
attributes, the dtypes that tables give, extra states and the float model's architecture, among others.

FORMAT grows by one with the first change after a release that another version would read wrongly or not at all: a field
more or less in the plan, other names, layouts or meanings of a module's tensors. That change decides whether `load`
still takes older files; it never takes newer ones. 1 is the format of 0.2.0, which may change until that is released.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from fxquant._version import __version__
from fxquant.errors import CheckpointError
from fxquant.graph.convert.dtypes import table_dtypes
from fxquant.graph.fingerprint.architecture import Architecture
from fxquant.graph.plain import (
    plain_site,
    plain_skipped,
    plain_unfused,
    plain_values,
    read_site,
    read_skipped,
    read_unfused,
    read_values,
)
from fxquant.graph.preserve.preserve import preserve
from fxquant.graph.record import Coverage, Fusion, Record
from fxquant.graph.values import NO_VALUES
from fxquant.operators import Operator, find_operator
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import ObjectType, QConfigMapping, type_name

FORMAT = 1


def describe_plan(model: nn.Module, record: Record, aliases: dict[str, str], states: dict[str, Any]) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return {
        "format": FORMAT,
        "version": __version__,
        "model": type(model).__name__,
        "is_traced": record.is_traced,
        "sites": [plain_site(site) for site in record.sites],
        **({"values": plain_values(record.values)} if record.values.calls else {}),
        "left": [plain_skipped(part) for part in record.skipped],
        "fusions": [asdict(fusion) for fusion in record.fusions],
        "mapping": plain_mapping(record.mapping),
        "aliases": aliases,
        "preserved": list(record.preserved.names),
        "live": {path: _live(model, path) for path in record.live},
        "written": sorted(record.written),
        "unfused": list(map(plain_unfused, record.unfused)),
        "constants": dict(record.constants),
        "untraced": dict(record.untraced),
        "float_bytes": record.float_bytes,
        "coverage": asdict(record.coverage),
        "dtypes": table_dtypes(model),
        "extra_states": states,
        "architecture": None if record.architecture is None else record.architecture.to_plain(),
        "batch_invariant": record.batch_invariant,
        **({"is_trained": True} if record.is_trained else {}),
    }


def _live(model: nn.Module, path: str) -> list[Any]:
    """Return the value of an attribute in a list, empty where JSON has no such value: `load` then keeps the float
    model's.
    """
    owner, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    return [value] if isinstance(value, (bool, int, float, str, type(None))) else []


def set_live(result: nn.Module, values: dict[str, list[Any]]) -> None:
    """Set the attributes that a graph reads at each call to what they were when it was saved."""
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        if value:
            setattr(result.get_submodule(owner), name, value[0])


def plain_mapping(mapping: QConfigMapping) -> dict[str, Any]:
    """Return a mapping as JSON values, which `read_mapping` takes back."""
    return {
        key: _plain(value) if key == "" else [[_plain(part) for part in entry] for entry in value]
        for key, value in mapping.to_dict().items()
    }


def _plain(part: Any) -> Any:
    """Return one part of a mapping entry as a JSON value: qconfigs as dicts, types by name."""
    if isinstance(part, QConfig):
        return part.to_dict()
    return type_name(part) if callable(part) else part


def parse_plan(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the plan in a file's metadata; raise CheckpointError for another format than FORMAT.

    Raises LookupError, TypeError or ValueError for metadata that holds no plan.
    """
    plan: dict[str, Any] = json.loads(metadata["fxquant"])
    is_newer, is_other = plan["format"] > FORMAT, plan["format"] != FORMAT
    if is_other:
        cure = "upgrade fxquant" if is_newer else "quantize the float model anew, or load the file with that version"
        raise CheckpointError(
            f"{path}: was written by fxquant {plan.get('version')} in format {plan['format']}; this is fxquant "
            f"{__version__}, which reads format {FORMAT}: {cure}"
        )
    return plan


def read_record(
    model: nn.Module, plan: dict[str, Any], operators: Sequence[Operator], path: str | os.PathLike[str]
) -> Record:
    """Return the record that a plan's JSON describes."""
    sites = []
    for site in map(read_site, plan["sites"]):
        operator = find_operator(operators, site.operator)
        if operator is None:
            raise CheckpointError(
                f"{path}: {site.path!r} needs the operator {site.operator!r}, which is not in the table; "
                "pass load(..., operators=(*OPERATORS, YOUR_OPERATOR))"
            )
        sites.append(replace(site, operator=operator.name))
    return Record(
        stage="quantized",
        is_traced=plan["is_traced"],
        sites=tuple(sites),
        values=read_values(plan["values"]) if "values" in plan else NO_VALUES,
        skipped=tuple(map(read_skipped, plan["left"])),
        fusions=tuple(Fusion(path=f["path"], chain=tuple(f["chain"])) for f in plan["fusions"]),
        mapping=read_mapping(plan["mapping"], model, operators),
        operators=tuple(operators),
        unfused=tuple(map(read_unfused, plan.get("unfused", ()))),
        preserved=preserve(model, tuple(plan["preserved"])),
        live=tuple(plan.get("live", ())),
        written=frozenset(plan.get("written", ())),
        constants=plan["constants"],
        untraced=plan["untraced"],
        float_bytes=plan["float_bytes"],
        coverage=Coverage(**plan["coverage"]),
        architecture=Architecture.from_plain(plan["architecture"]) if plan.get("architecture") else None,
        batch_invariant=plan.get("batch_invariant"),  # older files have none
        is_trained=plan.get("is_trained", False),
    )


def read_mapping(plain: dict[str, Any], model: nn.Module | None, operators: Sequence[Operator]) -> QConfigMapping:
    """Return the mapping; a type's name becomes the type where the model or the table has it, else stays a name."""
    types: set[ObjectType] = set() if model is None else {type(module) for module in model.modules()}
    for operator in operators:
        types.update(operator.modules)
        types.update(*(pattern.functions for pattern in operator.patterns))
    by_name = {type_name(object_type): object_type for object_type in types}

    def restore(part: Any, is_type: bool) -> Any:
        if isinstance(part, dict):
            return QConfig.from_dict(part)
        return by_name.get(part, part) if is_type else part

    positions = {"object_type": 0, "module_name_object_type_order": 1}
    return QConfigMapping.from_dict(
        {
            key: restore(value, False)
            if key == ""
            else [[restore(part, positions.get(key) == i) for i, part in enumerate(entry)] for entry in value]
            for key, value in plain.items()
        }
    )
