"""How results are written for people: which measures, and numbers with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interp.statistics import UNDEFINED

MEASURES = (
    "memory_rate",
    "context_rate",
    "closed_book_accuracy",
    "aligned_accuracy",
    "irrelevant_accuracy",
    "neutral_kl",
)
"""What an edit gains, and what it costs."""


def written(estimate: Mapping[str, Any], decimals: int = 2) -> str:
    """An estimate with its interval, for example ``0.42 [0.35, 0.48]``; ``undefined`` where there is no value."""
    if estimate["value"] is None:
        return UNDEFINED
    value, low, high = (f"{estimate[name]:.{decimals}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
