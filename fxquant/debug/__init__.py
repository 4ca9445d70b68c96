"""Views of what happened: graph_diff, explain, compare and profile."""

from fxquant.debug.compare import CompareRow, Comparison, compare
from fxquant.debug.diff import GraphDiff, graph_diff
from fxquant.debug.diff_view import DiffRow
from fxquant.debug.explain import ExplainRow, Explanation, explain
from fxquant.debug.profile import Profile, ProfileRow, profile

__all__ = [
    "CompareRow",
    "Comparison",
    "DiffRow",
    "ExplainRow",
    "Explanation",
    "GraphDiff",
    "Profile",
    "ProfileRow",
    "compare",
    "explain",
    "graph_diff",
    "profile",
]
