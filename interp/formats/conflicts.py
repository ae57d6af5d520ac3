"""Read CONFLICTS."""

from __future__ import annotations

from collections.abc import Mapping

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """The search results of a row contradict each other, or not; what a model remembers is not part of the data.

    Where they do (opinions, outdated information, misinformation) the kind is ``conflict``, the correct answer is the
    context answer, and memory answers are unknown, hence empty. Where they do not (no conflict, complementary
    information) the kind is ``aligned``, and the correct answer is that of the context and of memory. Most rows about
    opinions and complementary information have no correct answer: their answers are empty.
    """
    conflict_type = row.text("conflict_type").lower()
    if not conflict_type.startswith(("conflict", "no conflict", "complementary")):
        raise row.unexpected("conflict_type", "a text that starts with Conflict, No conflict or Complementary")
    row.value("correct_answer")
    correct = (row.text("correct_answer"),) if row.has("correct_answer") else ()
    kind, memory = ("conflict", ()) if conflict_type.startswith("conflict") else ("aligned", correct)
    context = Context(kind, _search_results(row), correct, "-".join(conflict_type.split()))
    return [Item(row.text("question"), memory, (context,))]


def _search_results(row: Row) -> tuple[str, ...]:
    results = row.value("search_results")
    if not isinstance(results, list) or not all(isinstance(result, Mapping) for result in results):
        raise row.unexpected("search_results", "a list of objects")
    texts = [str(result.get("short_text") or result.get("snippet") or "").strip() for result in results]
    heads = [" | ".join(str(result[name]) for name in ("title", "date") if result.get(name)) for result in results]
    if not any(texts):
        raise row.unexpected("search_results", "a list with at least one short_text or snippet")
    return tuple(f"{head}\n{text}".strip() for head, text in zip(heads, texts, strict=True) if text)


FORMAT = Format(
    "conflicts",
    "CONFLICTS",
    ("question", "conflict_type", "correct_answer", "search_results"),
    "Cattan et al. 2025, arXiv 2506.08500",
    _read,
)
