"""Views of what happened: graph_diff and explain."""

from fxquant.debug.diff import DiffRow, GraphDiff, graph_diff
from fxquant.debug.explain import ExplainRow, Explanation, explain

__all__ = ["DiffRow", "ExplainRow", "Explanation", "GraphDiff", "explain", "graph_diff"]
