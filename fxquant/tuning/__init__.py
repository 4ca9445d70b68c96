"""suggest_mapping: the search for the smallest or fastest model within a budget."""

from fxquant.tuning.suggest import Suggestion, SuggestionStep, suggest_mapping

__all__ = ["Suggestion", "SuggestionStep", "suggest_mapping"]
