"""How results are written for people: which measures, and numbers with their intervals."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

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
    """An estimate with its interval, for example ``0.42 [0.35, 0.48]``."""
    value, low, high = (f"{estimate[name]:.{decimals}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def print_frame(frame: Any) -> None:
    """Print a polars frame to standard output."""
    table = Table(*frame.columns)
    for row in frame.iter_rows():
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    # A pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
