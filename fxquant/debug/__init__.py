"""Views of what happened, graph_diff, explain, compare, profile and sensitivity, and suggest_mapping."""

from fxquant.debug.compare import CompareRow, Comparison, OutputRow, compare
from fxquant.debug.diff import GraphDiff, graph_diff
from fxquant.debug.diff_view import DiffRow
from fxquant.debug.explain import ExplainRow, Explanation, explain
from fxquant.debug.profile import Profile, ProfileRow, profile
from fxquant.debug.sensitivity import Sensitivity, SensitivityRow, sensitivity
from fxquant.debug.suggest import Suggestion, SuggestionStep, suggest_mapping

__all__ = [
    "CompareRow",
    "Comparison",
    "DiffRow",
    "ExplainRow",
    "Explanation",
    "GraphDiff",
    "OutputRow",
    "Profile",
    "ProfileRow",
    "Sensitivity",
    "SensitivityRow",
    "Suggestion",
    "SuggestionStep",
    "compare",
    "explain",
    "graph_diff",
    "profile",
    "sensitivity",
    "suggest_mapping",
]
