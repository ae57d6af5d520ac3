"""Answers of other models in which people marked what the documents do not support: for testing detectors of answers.

RAGTruth (Niu et al. 2024, arXiv 2401.00396) keeps them in two files, which are read together:

    response.jsonl      an answer a row: id, source_id, model, split, quality, response, labels
    source_info.jsonl   what it was written from: source_id, task_type, source_info, prompt

``interp.reliance.forced_reliance`` says what the documents add to each token of such an answer, and
``probes.spans.score_spans`` how well a score of tokens finds the marked ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from interp.errors import UserError
from interp.formats.row import Row, row_of
from interp.rows import BadRow, data_files, read_rows

_PASSAGE = re.compile(r"^passage \d+:", re.MULTILINE)
_ASKS = {"QA": "Question: {}\nAnswer:", "Summary": "Summary:", "Data2txt": "Overview:"}


class MarkedSpan(NamedTuple):
    """A part of an answer that is marked.

    Attributes:
        start: Its first character in the answer, from 0.
        end: The character after its last.
        text: What stands there.
        label: The type of what is wrong with it, for example ``Evident Conflict`` or ``Subtle Baseless Info``.
        implicit_true: Whether it is true all the same, though the documents do not say it.
    """

    start: int
    end: int
    text: str
    label: str
    implicit_true: bool = False


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer, what it was written from, and what is marked in it.

    Attributes:
        id: Unique in its file.
        source: What it was written from; several answers share one.
        task: ``QA``, ``Summary`` or ``Data2txt``.
        question: The question; empty for the other tasks.
        documents: The passages, the text, or the data as JSON.
        answer: What the model wrote.
        spans: What is marked, in the order of the text; empty where all is supported.
        model: Who wrote it.
        split: ``train`` or ``test``, as published.
        quality: ``good``, ``incorrect_refusal`` or ``truncated``.
    """

    id: str
    source: str
    task: str
    question: str
    documents: tuple[str, ...]
    answer: str
    spans: tuple[MarkedSpan, ...]
    model: str
    split: str
    quality: str

    @property
    def prompt(self) -> str:
        """The documents and what is asked of them, in the words that public sets are asked in here."""
        return "\n\n".join((*self.documents, self.bare_prompt))

    @property
    def bare_prompt(self) -> str:
        """The same without the documents."""
        return _ASKS[self.task].format(self.question)


class MarkedAnswers(NamedTuple):
    """What ``load_marked_answers`` gives back.

    Attributes:
        answers: In the order of the file.
        skipped: One sentence for each malformed row, with its place in the file.
    """

    answers: list[MarkedAnswer]
    skipped: list[str]


class _Source(NamedTuple):
    task: str
    question: str
    documents: tuple[str, ...]


def load_marked_answers(
    path: str | Path | Sequence[str | Path], *, on_error: Literal["stop", "skip"] = "stop"
) -> MarkedAnswers:
    """Read answers with marked spans, and join them with what they were written from.

    Args:
        path: The folder of RAGTruth's ``response.jsonl`` and ``source_info.jsonl``, or the files themselves in any
            order. Fields tell them apart, not names.
        on_error: What to do with a row that cannot be read: ``stop`` raises, ``skip`` reports it in the result.

    Raises:
        UserError: If a file cannot be read, a row is bad, or there is no answer, or nothing that one was written from.
    """
    named = [path] if isinstance(path, str | Path) else list(path)
    files = [file for one in named for file in data_files(one)]
    skipped: list[str] = []
    sources: dict[str, _Source] = {}
    rows: list[tuple[str, Row]] = []
    for where, record in _records(files):
        try:
            row = row_of(record, where)
            if "response" in row.fields:
                rows.append((where, row))
            else:
                sources[_name(row, "source_id")] = _source(row)
        except BadRow as problem:
            _note(where, problem, on_error, skipped)
    answers: list[MarkedAnswer] = []
    for where, row in rows:
        try:
            answers.append(_answer(row, sources))
        except BadRow as problem:
            _note(where, problem, on_error, skipped)
    if not answers:
        first = f"; the first problem is: {skipped[0]}" if skipped else ""
        raise UserError(
            f"{', '.join(map(str, named))} gave no marked answer{first}; give RAGTruth's response.jsonl and "
            "source_info.jsonl, or the folder that has both."
        )
    return MarkedAnswers(answers, skipped)


def marked_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[MarkedSpan]) -> np.ndarray:
    """Say which tokens of an answer are marked: those that share a character with a span.

    Args:
        offsets: For each of ``n`` tokens its first character in the answer and the one after its last.
        spans: What is marked.

    Returns:
        ``(n,)`` booleans.
    """
    return np.array([any(start < s.end and s.start < end for s in spans) for start, end in offsets], dtype=bool)


def _records(files: Sequence[Path]) -> Iterator[tuple[str, object]]:
    return ((f"{file}, {place}", record) for file in files for place, record in read_rows(file))


def _note(where: str, problem: BadRow, on_error: str, skipped: list[str]) -> None:
    if on_error == "stop":
        raise UserError(f"{where}: {problem}; mend or remove it, or skip such rows (on_error='skip').") from problem
    skipped.append(f"{where}: {problem}")


def _name(row: Row, field: str) -> str:
    """An id, which may be a number."""
    value = row.value(field)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else row.text(field)


def _source(row: Row) -> _Source:
    task, given = row.text("task_type"), row.value("source_info")
    if task not in _ASKS:
        raise row.unexpected("task_type", f"one of {', '.join(_ASKS)}")
    if task == "QA":
        passages = _PASSAGE.split(row.text("source_info.passages"))
        documents = tuple(text for one in passages if (text := one.strip()))
        return _Source(task, row.text("source_info.question"), documents)
    if isinstance(given, Mapping):
        return _Source(task, "", (json.dumps(given, ensure_ascii=False),))
    return _Source(task, "", (row.text("source_info"),))


def _answer(row: Row, sources: Mapping[str, _Source]) -> MarkedAnswer:
    name = _name(row, "source_id")
    if name not in sources:
        raise row.unexpected("source_id", "the source_id of a row of source_info.jsonl")
    # Spaces at either end count: spans are numbered from the first character.
    if not isinstance(answer := row.value("response"), str) or not answer.strip():
        raise row.unexpected("response", "a text that is not empty")
    return MarkedAnswer(
        id=_name(row, "id"),
        source=name,
        task=sources[name].task,
        question=sources[name].question,
        documents=sources[name].documents,
        answer=answer,
        spans=_spans(row, answer),
        model=row.text("model"),
        split=row.text("split"),
        quality=row.text("quality"),
    )


def _spans(row: Row, answer: str) -> tuple[MarkedSpan, ...]:
    labels = row.value("labels")
    if not isinstance(labels, list) or not all(isinstance(one, Mapping) for one in labels):
        raise row.unexpected("labels", "a list of objects with start, end, text and label_type")
    spans: list[MarkedSpan] = []
    for label in labels:
        start, end, text = (label.get(name) for name in ("start", "end", "text"))
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(answer)):
            raise BadRow(f"expected labels with start and end within the response of {len(answer)} characters")
        there = answer[start:end]
        if not isinstance(text, str) or text.split() != there.split():
            raise BadRow(f"expected the label's text {text!r} where it is said to stand, got {there!r}")
        spans.append(
            MarkedSpan(start, end, there, str(label.get("label_type") or ""), label.get("implicit_true") is True)
        )
    return tuple(sorted(spans))
