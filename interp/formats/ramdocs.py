"""Read RAMDocs."""

from __future__ import annotations

from collections.abc import Mapping

from interp.conflicts import ContextKind
from interp.formats.items import Context, Format, Item
from interp.formats.row import Row, distinct

_PARTS: tuple[tuple[ContextKind, str], ...] = (("conflict", "misinfo"), ("aligned", "correct"), ("irrelevant", "noise"))


def _read(row: Row) -> list[Item]:
    """Documents that are right, wrong, or beside the point; memory is the right answer.

    Contexts: the wrong documents alone (``misinfo``), the right ones (``correct``), those beside the point (``noise``),
    and all in the row's order (``all``): there memory's answer stands in some documents, the wrong one in others.
    """
    documents = row.value("documents")
    if not isinstance(documents, list) or not all(
        isinstance(one, Mapping) and isinstance(one.get("text"), str) and one.get("type") for one in documents
    ):
        raise row.unexpected("documents", "a list of objects with text and type")
    gold, wrong = row.answers("gold_answers"), distinct(*row.texts("wrong_answers"))
    answers: dict[ContextKind, tuple[str, ...]] = {"conflict": wrong, "aligned": gold, "irrelevant": ()}
    texts: dict[ContextKind, tuple[str, ...]] = {kind: _texts(documents, template) for kind, template in _PARTS}
    contexts = [Context(kind, texts[kind], answers[kind], template) for kind, template in _PARTS if texts[kind]]
    if texts["conflict"]:
        contexts.append(Context("conflict", _texts(documents), wrong, "all"))
    if not wrong:
        contexts = [context for context in contexts if context.kind != "conflict"]
    return [Item(row.text("question"), gold, tuple(contexts))]


def _texts(documents: list[Mapping[str, str]], kind: str | None = None) -> tuple[str, ...]:
    """The texts of the documents, of one kind or of all."""
    return tuple(one["text"].strip() for one in documents if kind in (None, one["type"]) and one["text"].strip())


FORMAT = Format(
    "ramdocs",
    "RAMDocs",
    ("question", "documents", "gold_answers", "wrong_answers"),
    "Wang et al. 2025, arXiv 2504.13079",
    _read,
)
