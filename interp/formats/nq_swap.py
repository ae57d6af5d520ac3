"""Read NQ-Swap, MacNoise."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    memory = row.answers("org_answer")
    conflict = Context("conflict", row.text("sub_context"), row.answers("sub_answer"))
    return [Item(row.text("question"), memory, (conflict, Context("aligned", row.text("org_context"), memory)))]


FORMAT = Format(
    "nq-swap",
    "NQ-Swap, MacNoise",
    ("question", "org_context", "sub_context", "org_answer", "sub_answer"),
    "Longpre et al. 2021, arXiv 2109.05052; Hong et al. 2024, arXiv 2305.01579",
    _read,
)
