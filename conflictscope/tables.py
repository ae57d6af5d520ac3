"""How results are written for people: which measures, and numbers with their intervals."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

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


def print_frame(frame: Any) -> None:
    """Print a polars frame to standard output; null is what is undefined."""

    def cell(value: Any) -> str:
        return UNDEFINED if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    table = Table(*frame.columns)
    for row in frame.iter_rows():
        table.add_row(*map(cell, row))
    # A pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
