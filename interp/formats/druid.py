"""Read DRUID."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row

_ANSWERS = {"supports": ("true",), "refutes": ("false",)}


def _read(row: Row) -> list[Item]:
    """Claims with evidence for or against them, or not enough of it; what a model believes is not part of the data."""
    stance = row.text("evidence_stance").lower()
    answers = next((answers for start, answers in _ANSWERS.items() if stance.startswith(start)), ())
    context = Context("conflict" if answers else "irrelevant", row.text("evidence"), answers, "-".join(stance.split()))
    claim = row.text("claim")
    return [Item(f"Is this claim true or false? {claim}", (), (context,), claim)]


FORMAT = Format(
    "druid",
    "DRUID",
    ("claim", "evidence", "evidence_stance"),
    "Hagström et al. 2024, arXiv 2412.17031",
    _read,
)
