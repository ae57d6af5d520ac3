"""Read ConflictBank."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    options = row.texts("options")
    memory = (row.choice("correct_option", options),)
    replaced = (row.choice("replace_option", options),)
    # The published table has this one column with the last word twice.
    twice = "misinformation_conflict_evidence_evidence"
    evidence = {
        "misinformation": row.text(twice if row.has(twice) else "misinformation_conflict_evidence"),
        "temporal": row.text("temporal_conflict_evidence"),
        "semantic": row.text("semantic_conflict_evidence"),
    }
    conflicts = (Context("conflict", text, replaced, template) for template, text in evidence.items())
    aligned = Context("aligned", row.text("default_evidence"), memory)
    return [Item(row.text("question"), memory, (*conflicts, aligned), row.text("subject"), row.text("relation"))]


FORMAT = Format(
    "conflictbank",
    "ConflictBank",
    (
        "subject",
        "relation",
        "question",
        "options",
        "correct_option",
        "replace_option",
        "default_evidence",
        "misinformation_conflict_evidence",
        "temporal_conflict_evidence",
        "semantic_conflict_evidence",
    ),
    "Su et al. 2024, arXiv 2408.12076",
    _read,
)
