"""Read FaithEval."""

from __future__ import annotations

from collections.abc import Mapping

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """Its three tasks, told apart by what a row and its file say; what a model remembers is not part of the data.

    With ``choices`` the context argues for a false one of them (counterfactual). Else the context gives several answers
    (a file called inconsistent), or none (unanswerable).
    """
    question, context = row.text("question"), row.text("context")
    if row.has("choices"):
        return [Item(question, (), (Context("conflict", context, (_chosen(row),), "counterfactual"),))]
    if "inconsistent" in row.file.lower():
        return [Item(question, (), (Context("conflict", context, row.answers("answers"), "inconsistent"),))]
    if "unanswerable" in row.file.lower():
        return [Item(question, (), (Context("irrelevant", context, (), "unanswerable"),))]
    raise row.unexpected("question", "a row with choices, or of a file with inconsistent or unanswerable in its name")


def _chosen(row: Row) -> str:
    """The choice that the answer's key names."""
    choices = row.value("choices")
    if not isinstance(choices, Mapping) or not {"label", "text"} <= choices.keys():
        raise row.unexpected("choices", "an object with label and text")
    by_label = dict(zip(map(str, choices["label"]), choices["text"], strict=False))
    if not str(answer := by_label.get(str(row.value("answerKey")), "")).strip():
        raise row.unexpected("answerKey", f"one of {', '.join(by_label)}")
    return str(answer).strip()


FORMAT = Format("faitheval", "FaithEval", ("question", "context"), "Ming et al. 2024, arXiv 2410.03727", _read)
