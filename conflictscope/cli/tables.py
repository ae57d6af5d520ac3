"""Tables on the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def print_frame(frame: Any) -> None:
    """Print a polars frame to standard output, with what its columns of numbers mean; null is what is undefined."""
    from interp.statistics import UNDEFINED

    def cell(value: Any) -> str:
        return UNDEFINED if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    explained = "low to high is the 95 % interval" if {"low", "high"} <= set(frame.columns) else None
    table = Table(*frame.columns, caption=explained)
    for row in frame.iter_rows():
        table.add_row(*map(cell, row))
    # A pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
