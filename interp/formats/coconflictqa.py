"""Read CoConflictQA."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """The context is right; memory is what the authors' model answered without it."""
    conflict = Context("conflict", row.text("context"), row.answers("answers"))
    return [Item(row.text("question"), (row.text("parametric_answer"),), (conflict,))]


FORMAT = Format(
    "coconflictqa",
    "CoConflictQA",
    ("question", "answers", "context", "parametric_answer"),
    "Huang et al. 2025, arXiv 2502.15543",
    _read,
)
