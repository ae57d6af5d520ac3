"""Read ConflictNQ."""

from __future__ import annotations

from collections.abc import Mapping

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """Several passages for a fake answer, for the real one, and all of them."""
    real, fake = _passages(row, "real_passages"), _passages(row, "fake_passages")
    memory, counter = row.answers("real_short_answer"), row.answers("fake_short_answer")
    contexts = (
        Context("conflict", fake, counter, "fake"),
        Context("aligned", real, memory, "real"),
        Context("conflict", (*fake, *real), counter, "both"),
    )
    question = row.text("question")
    if row.has("cleaned_question"):
        question = row.text("cleaned_question")
    return [Item(question, memory, contexts)]


def _passages(row: Row, name: str) -> tuple[str, ...]:
    passages = row.value(name)
    if not isinstance(passages, list) or not all(isinstance(one, Mapping) for one in passages):
        raise row.unexpected(name, "a list of objects with a passage")
    if not (texts := tuple(text for one in passages if (text := str(one.get("passage") or "").strip()))):
        raise row.unexpected(name, "a list with at least one passage")
    return texts


FORMAT = Format(
    "conflictnq",
    "ConflictNQ",
    ("question", "real_short_answer", "real_passages", "fake_short_answer", "fake_passages"),
    "github.com/nii-cl/conflictnq",
    _read,
)
