"""Read WikiContradict."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """Two passages that contradict each other, each alone and both; what a model remembers is not part of the data."""
    texts = row.text("context1"), row.text("context2")
    answers = row.text("answer1"), row.text("answer2")
    contexts = (
        Context("conflict", texts[0], (answers[0],), "first"),
        Context("conflict", texts[1], (answers[1],), "second"),
        Context("conflict", texts, answers, "both"),
    )
    subject = row.text("WikipediaArticleTitle") if row.has("WikipediaArticleTitle") else ""
    return [Item(row.text("question"), (), contexts, subject)]


FORMAT = Format(
    "wikicontradict",
    "WikiContradict",
    ("question", "context1", "context2", "answer1", "answer2"),
    "Hou et al. 2024, arXiv 2406.13805",
    _read,
)
