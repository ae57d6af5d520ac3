"""Read known_1000."""

from __future__ import annotations

from interp.formats.items import Format, Item, given_away
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """Facts to complete, without contexts."""
    stem, memory, subject = row.text("prompt"), (row.text("attribute"),), row.text("subject")
    relation = row.text("relation_id") if row.has("relation_id") else ""
    return [Item(stem, memory, (), subject, relation, completion=True, unusable=given_away(subject, stem, memory, ()))]


FORMAT = Format(
    "known-1000",
    "known_1000",
    ("subject", "attribute", "prompt"),
    "Meng et al. 2022, arXiv 2202.05262",
    _read,
)
