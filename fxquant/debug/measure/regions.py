"""Where a static model computes with integers: parts of its graph without a float between their nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxquant import ops
from fxquant.debug.report.table import first_few, milliseconds
from fxquant.graph.record import Record

_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Region:
    """One part of a graph. first, last: its first and last node; nodes: how many compute; sites: the paths of those
    that are sites, or the calls' names.
    """

    first: str
    last: str
    nodes: int
    sites: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.first} → {self.last} ({self.nodes} nodes)"


def integer_regions(model: nn.Module, record: Record) -> tuple[Region, ...]:
    """Return the regions of a quantized model in the graph's order; none without a graph or static sites."""
    calls = {call.node for call in record.values.calls}
    if not isinstance(model, fx.GraphModule) or record.stage != "quantized" or not calls:
        return ()
    names = {site.path if site.call is None else site.call for site in record.sites if site.is_static}
    members = [node for node in model.graph.nodes if node.name in calls or node.target is ops.quantize]
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in members:
        joined = [node]
        for group in {id(groups[read]): groups[read] for read in _reads(node, groups)}.values():
            joined = group + joined
        groups.update(dict.fromkeys(joined, joined))
    order = {node: number for number, node in enumerate(model.graph.nodes)}
    regions = {id(group): sorted(group, key=order.__getitem__) for group in groups.values()}
    return tuple(_region(nodes, names) for nodes in regions.values())


def in_words(regions: Sequence[Region], ms: Mapping[str, float]) -> list[str]:
    """Return a line about some regions, with what their sites take, if there are any. ms: by the sites' names."""
    sums = [sum(ms.get(name, 0.0) for name in region.sites) for region in regions]
    each = [f"{region}, sites {milliseconds(spent)} ms" for region, spent in zip(regions, sums, strict=True)]
    return [f"integers: {', '.join(first_few(each, _SHOWN, 'regions'))}"] if each else []


def _reads(node: fx.Node, groups: Mapping[fx.Node, object]) -> Iterable[fx.Node]:
    """Return the nodes of regions whose integers a node reads."""
    return (read for read in node.all_input_nodes if read in groups and node.target is not ops.quantize)


def _region(nodes: list[fx.Node], names: set[str]) -> Region:
    places = [str(node.target) if node.op == "call_module" else node.name for node in nodes]
    static = [node.name if node.name in names else place for node, place in zip(nodes, places, strict=True)]
    return Region(
        first=places[0], last=places[-1], nodes=len(nodes), sites=tuple(name for name in static if name in names)
    )
