"""suggest_mapping: the search for the smallest or fastest model within a budget."""

from fxquant.tuning.suggest import suggest_mapping
from fxquant.tuning.suggestion import Suggestion, SuggestionStep

__all__ = ["Suggestion", "SuggestionStep", "suggest_mapping"]
