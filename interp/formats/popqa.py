"""Read PopQA."""

from __future__ import annotations

from interp.formats.items import Format, Item
from interp.formats.row import Row, distinct


def _read(row: Row) -> list[Item]:
    memory = distinct(row.text("obj"), *row.answers("possible_answers"))
    return [Item(row.text("question"), memory, (), row.text("subj"), row.text("prop"))]


FORMAT = Format(
    "popqa",
    "PopQA",
    ("subj", "prop", "obj", "question", "possible_answers"),
    "Mallen et al. 2023, arXiv 2212.10511",
    _read,
)
