"""Views of what happened: graph_diff, explain, compare, profile and sensitivity."""

import importlib
import warnings
from typing import Any

from fxquant.debug.diff.diff import GraphDiff, graph_diff
from fxquant.debug.diff.fold import DiffRow
from fxquant.debug.explain import ExplainRow, Explanation, explain
from fxquant.debug.measure.compare import CompareRow, Comparison, OutputRow, compare
from fxquant.debug.measure.profile import Profile, ProfileRow, profile
from fxquant.debug.measure.sensitivity import Sensitivity, SensitivityRow, sensitivity

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
    "compare",
    "explain",
    "graph_diff",
    "profile",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    """Return a name that has moved to fxquant.tuning, with a DeprecationWarning."""
    if name not in ("Suggestion", "SuggestionStep", "suggest_mapping"):
        raise AttributeError(f"module 'fxquant.debug' has no attribute {name!r}")
    warnings.warn(f"fxquant.debug.{name} is now fxquant.tuning.{name}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module("fxquant.tuning"), name)
