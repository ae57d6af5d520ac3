"""Read KRE."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """Questions with choices, and a passage for the right choice and for a wrong one."""
    options = row.texts("choices")
    memory, negative = (row.choice("answer", options),), (row.choice("negative_answer", options),)
    golden = " golden_context" if row.has(" golden_context") else "golden_context"
    contexts = (
        Context("conflict", row.text("negative_context"), negative),
        Context("aligned", row.text(golden), memory),
    )
    return [Item(row.text("question"), memory, contexts)]


FORMAT = Format(
    "kre",
    "KRE",
    ("question", "answer", "negative_answer", "negative_context", "choices"),
    "Ying et al. 2023, arXiv 2309.17415",
    _read,
)
