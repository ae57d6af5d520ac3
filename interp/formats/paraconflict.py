"""Read ParaConflict."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item, given_away
from interp.formats.row import Row, distinct


def _read(row: Row) -> list[Item]:
    """The form of the hub, and that of its own repository: a file for each category, aliases in ``Answer_ns``."""
    distracted = (row.text("Distracted Token"),)
    contexts = (
        Context("conflict", row.text("Substitution Conflict"), distracted, "substitution"),
        Context("conflict", row.text("Coherent Conflict"), distracted, "coherent"),
    )
    stem, answers = row.text("Clean Prompt"), distinct(*row.answers("Answer"), *row.aliases("Answer_ns"))
    subject, category = row.text("Subject"), row.text("Category") if row.has("Category") else row.file
    unusable = given_away(subject, stem, answers, distracted)
    return [Item(stem, answers, contexts, subject, category, completion=True, unusable=unusable)]


FORMAT = Format(
    "paraconflict",
    "ParaConflict",
    ("Subject", "Answer", "Distracted Token", "Clean Prompt", "Substitution Conflict", "Coherent Conflict"),
    "Li et al. 2025, arXiv 2503.10996",
    _read,
)
