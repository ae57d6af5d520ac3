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


def written(estimate: Mapping[str, Any] | None, decimals: int = 2) -> str:
    """Write an estimate with its interval, for example ``0.42 [0.35, 0.48]``.

    Args:
        estimate: Its record; ``None`` where the measure does not apply, which is ``n/a``.
        decimals: How many.
    """
    if estimate is None:
        return "n/a"
    if estimate["value"] is None:
        return UNDEFINED
    # z: no minus before nothing.
    value, low, high = (f"{estimate[name]:z.{decimals}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
