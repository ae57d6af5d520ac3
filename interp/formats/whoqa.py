"""Read WhoQA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row, distinct


def _read(row: Row) -> list[Item]:
    """One question about several people of the same name: each passage alone, and all together.

    What a model remembers is not part of the data, nor whom it takes the name for.
    """
    passages, by_context = row.value("contexts"), row.value("answer_by_context")
    if not isinstance(passages, list) or not isinstance(by_context, Mapping):
        raise row.unexpected("contexts", "a list of passages, whose answers answer_by_context gives by number")
    texts = [_text(row, passage) for passage in passages]
    answers = [_answers(by_context.get(str(number)) or ()) for number in range(len(texts))]
    alone = [
        Context("conflict", text, answer, f"passage-{number}")
        for number, (text, answer) in enumerate(zip(texts, answers, strict=True), 1)
        if answer
    ]
    every = Context("conflict", tuple(texts), distinct(*(one for answer in answers for one in answer)), "all")
    question = row.answers("questions")[0]
    return [Item(question, (), (*alone, every) if len(alone) > 1 else tuple(alone))]


def _text(row: Row, passage: Any) -> str:
    text = passage.get("text", "") if isinstance(passage, Mapping) else passage
    if not isinstance(text, str) or not text.strip():
        raise row.unexpected("contexts", "a list of passages that are not empty")
    return text.strip()


def _answers(groups: Any) -> tuple[str, ...]:
    """All aliases of all answers."""
    return distinct(*(str(one) for group in groups for one in (group if isinstance(group, list) else [group])))


FORMAT = Format(
    "whoqa", "WhoQA", ("questions", "contexts", "answer_by_context"), "Pham et al. 2024, arXiv 2410.15737", _read
)
