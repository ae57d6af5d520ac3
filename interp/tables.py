"""Build conflict data from a person's own table of questions, documents and answers.

A row is a question, the documents that a product retrieved for it, and the answer that they give. What memory answers
may be a column too; where it is not, it is what the model says without the documents. From a row come

    conflict    the documents, where memory answers otherwise
    aligned     the documents, where memory answers the same; else the documents with memory's answer in its place
    irrelevant  the documents of another row about another subject, which say none of the answers
    none        the question alone

What cannot be made of a row is left out and counted under its reason.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from interp.answers import abstains, contains_answer
from interp.conflicts import ConflictExample, ConflictSet, split_of, subject_key
from interp.errors import UserError
from interp.formats.items import Context, Item
from interp.formats.reading import examples_of
from interp.formats.row import Row, distinct, row_of
from interp.generation import continue_greedily
from interp.rows import BadRow, data_files, read_rows

NAMES: Mapping[str, tuple[str, ...]] = {
    "question": ("question", "query", "q", "prompt", "input", "user_input"),
    "context": (
        *("context", "contexts", "documents", "document", "passages", "passage", "evidence"),
        *("retrieved_contexts", "docs", "text"),
    ),
    "answer": (
        *("answer", "answers", "context_answer", "context_answers", "gold_answers", "gold_answer", "gold"),
        *("reference", "ground_truth", "expected", "target", "output"),
    ),
    "memory": ("memory_answer", "memory_answers", "memory", "parametric_answer", "closed_book_answer", "old_answer"),
    "subject": ("subject", "entity", "topic", "title"),
    "id": ("id", "key", "qid", "uid", "question_id"),
}
"""The names by which columns are found, in whatever capitals; the first that a table has counts."""

_NEEDED = ("question", "context", "answer")
_LONGEST_MEMORY, _MEMORY_TOKENS = 8, 24
_NO_CONTEXT, _NO_ANSWER = "it has no context", "it has no answer"
_NOT_KNOWN = "the model says nothing without the context that could be an answer"
_ALIGNED_ONLY = "memory and context agree: no conflict is made"
_SAYS_OTHERWISE = "the context says its answer in other words: no aligned prompt is made"
_NO_OTHER = "no other row's context is about something else: no irrelevant prompt is made"
# What tells a model to answer in few words.
_SHOWN = (("Who wrote Faust?", "Johann Wolfgang von Goethe"), ("On which continent is Kenya?", "Africa"))
_SHOWN += (("In which year did the Berlin Wall fall?", "1989"),)


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        key: Tells it from others in ids.
        question: The question.
        documents: What was retrieved for it.
        answers: What the documents answer, with aliases.
        memory: What memory answers, with aliases; empty where the table does not say.
        subject: What the question is about; the question itself where the table does not say.
    """

    key: str
    question: str
    documents: tuple[str, ...]
    answers: tuple[str, ...]
    memory: tuple[str, ...]
    subject: str


@dataclass(frozen=True)
class Table:
    """A table that was read.

    Attributes:
        name: What it is called.
        rows: Its rows.
        columns: The name of the column of each role.
        left_out: One sentence for each row that could not be read.
    """

    name: str
    rows: tuple[TableRow, ...]
    columns: Mapping[str, str]
    left_out: tuple[str, ...]


class Built(NamedTuple):
    """What ``table_conflicts`` gives back.

    Attributes:
        conflicts: The examples.
        reasons: How many rows lack something, by what.
        asked: How many questions the model was asked for what memory answers.
    """

    conflicts: ConflictSet
    reasons: Counter[str]
    asked: int


def columns_of(names: Sequence[str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Find the column of each role among the names of columns.

    Args:
        names: The table's columns.
        given: Columns that are said, by role: ``question``, ``context``, ``answer``, ``memory``, ``subject``, ``id``.

    Raises:
        UserError: If a role is not known, a column that is said does not exist, or one that is needed is not found.
    """
    given = given or {}
    if unknown := [role for role in given if role not in NAMES]:
        raise UserError(f"There is no role {unknown[0]!r} for a column; choose among {', '.join(NAMES)}.")
    if missing := [name for name in given.values() if name not in names]:
        raise UserError(f"The table has no column {missing[0]!r}; it has {', '.join(names)}.")
    lower = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(names)}
    found = dict(given)
    for role, known in NAMES.items():
        taken = set(found.values())
        column = next((lower[name] for name in known if name in lower and lower[name] not in taken), None)
        if role not in found and column is not None:
            found[role] = column
    if lacking := [role for role in _NEEDED if role not in found]:
        raise UserError(
            f"No column of the table is known to hold the {lacking[0]}; name it, for example "
            f"`--column {lacking[0]}=NAME`; the table has {', '.join(names)}."
        )
    return found


def read_table(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> Table:
    """Read a table: CSV, TSV, JSON, JSON lines, Parquet, a folder of these or of what ``datasets`` saves.

    Args:
        path: The file or folder.
        columns: Columns by role, where their names do not say it.
        limit: Read so many rows at most.
        sample: Keep so many rows at most, drawn at random from those that were read.
        seed: Decides which.

    Raises:
        UserError: If nothing can be read, or columns are missing.
    """
    found: dict[str, str] = {}
    rows: list[TableRow] = []
    left_out: list[str] = []
    files = data_files(path)
    for file in files:
        for number, (place, record) in enumerate(read_rows(file), 1):
            if limit is not None and len(rows) + len(left_out) >= limit:
                break
            where = f"{file}, {place}"
            try:
                row = row_of(record, file.stem)
                found = found or columns_of([str(name) for name in row.fields], columns)
                key = f"{file.stem}-{number}" if len(files) > 1 else str(number)
                rows.append(_row(row, found, key))
            except BadRow as problem:
                left_out.append(f"{where}: {problem}")
    if not rows:
        raise UserError(f"{path} has no row that can be used; {left_out[0] if left_out else 'it is empty'}.")
    if sample is not None and sample < len(rows):
        chosen = sorted(random.Random(seed).sample(range(len(rows)), sample))
        rows = [rows[i] for i in chosen]
    return Table(Path(path).name.split(".")[0], tuple(_unique(rows)), found, tuple(left_out))


def table_conflicts(table: Table, model: nn.Module | None, *, seed: int = 0, progress: str | None = None) -> Built:
    """Build the prompts of a table's rows.

    Args:
        table: The table.
        model: The model, or a bridge around it, that is asked what memory answers; ``None`` leaves rows out whose table
            does not say it.
        seed: Decides splits and which documents are irrelevant.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If nothing can be made of it.
    """
    reasons: Counter[str] = Counter()
    unasked = [row for row in table.rows if not row.memory]
    said = dict(zip((row.key for row in unasked), _said(model, unasked, progress), strict=True))
    examples: list[ConflictExample] = []
    spellings: dict[str, str] = {}
    for row in table.rows:
        if row.key in said:
            row = replace(row, memory=said[row.key])
        if not row.memory:
            reasons[_NOT_KNOWN] += 1
            continue
        contexts, lacking = _contexts(row, table.rows, seed)
        reasons.update(lacking)
        # An answer that is found in the model's own is the same answer, and shorter.
        memory = row.answers if _agree(row) else row.memory
        item = Item(row.question, memory, tuple(contexts), row.subject)
        examples += examples_of(item, table.name, row.key, seed, spellings)
    if not examples:
        raise UserError(f"Nothing can be made of {table.name}: {_NOT_KNOWN}; give a column of memory answers.")
    return Built(ConflictSet(table.name, tuple(examples)), reasons, len(unasked) if model is not None else 0)


def _row(row: Row, columns: Mapping[str, str], key: str) -> TableRow:
    """The row; raises what says that it lacks something."""

    def texts(role: str) -> tuple[str, ...]:
        return _texts(row.fields.get(columns[role])) if role in columns else ()

    question = row.text(columns["question"])
    if not (documents := texts("context")):
        raise BadRow(_NO_CONTEXT)
    if not (answers := texts("answer")):
        raise BadRow(_NO_ANSWER)
    return TableRow(
        key=next(iter(texts("id")), key),
        question=question,
        documents=documents,
        answers=answers,
        memory=texts("memory"),
        subject=next(iter(texts("subject")), question),
    )


def _texts(value: Any) -> tuple[str, ...]:
    """A cell as texts: a list, one that is written as text, or a single text or number; objects give their text."""
    if isinstance(value, str):
        return distinct(*Row({"cell": value}).texts("cell")) if value.strip() else ()
    if isinstance(value, Mapping):
        value = [value.get("text") or value.get("content") or value.get("page_content")]
    if isinstance(value, list | tuple):
        return distinct(*(text for one in value for text in _texts(one)))
    # Not a number is a missing one.
    return () if value is None or value != value else (str(value),)


def _unique(rows: Sequence[TableRow]) -> list[TableRow]:
    """The rows with keys that no other has."""
    times = Counter(row.key for row in rows)
    seen: Counter[str] = Counter()
    unique = []
    for row in rows:
        seen[row.key] += 1
        unique.append(replace(row, key=f"{row.key}.{seen[row.key]}") if times[row.key] > 1 else row)
    return unique


def _said(model: nn.Module | None, rows: Sequence[TableRow], progress: str | None) -> list[tuple[str, ...]]:
    """What the model answers to each question alone, in few words, which examples show; empty if it does not know."""
    if model is None or not rows:
        return [()] * len(rows)
    shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in _SHOWN)
    prompts = [f"{shown}Question: {row.question}\nAnswer:" for row in rows]
    found = continue_greedily(model, prompts, max_new_tokens=_MEMORY_TOKENS, progress=progress).answers
    return [
        distinct(answer) if 0 < len(answer.split()) <= _LONGEST_MEMORY and not abstains(answer) else ()
        for answer in found
    ]


def _agree(row: TableRow) -> bool:
    """Whether memory answers what the documents do: one of the answers within one of the other source."""
    one, other = row.memory, row.answers
    return any(contains_answer(a, other) for a in one) or any(contains_answer(a, one) for a in other)


def _contexts(row: TableRow, rows: Sequence[TableRow], seed: int) -> tuple[list[Context], list[str]]:
    """The contexts that a row is asked with, and what could not be made."""
    lacking: list[str] = []
    contexts: list[Context] = []
    if _agree(row):
        contexts.append(Context("aligned", row.documents, row.answers))
        lacking.append(_ALIGNED_ONLY)
    else:
        contexts.append(Context("conflict", row.documents, row.answers))
        place = re.compile(
            "|".join(rf"(?<!\w){re.escape(a)}(?!\w)" for a in sorted(row.answers, key=len, reverse=True))
        )
        changed = tuple(place.sub(lambda _: row.memory[0], text) for text in row.documents)
        if changed == row.documents:
            lacking.append(_SAYS_OTHERWISE)
        else:
            contexts.append(Context("aligned", changed, row.memory))
    if other := _other(row, rows, seed):
        contexts.append(Context("irrelevant", other.documents, ()))
    else:
        lacking.append(_NO_OTHER)
    return contexts, lacking


def _other(row: TableRow, rows: Sequence[TableRow], seed: int) -> TableRow | None:
    """Another row of the same split about another subject, whose documents say nothing of this one."""
    avoid = distinct(row.subject, *row.answers, *row.memory)
    split, own = split_of(row.subject, seed), subject_key(row.subject)
    start = random.Random(f"{seed}/{row.key}").randrange(len(rows))
    for other in (*rows[start:], *rows[:start]):
        if subject_key(other.subject) == own or split_of(other.subject, seed) != split:
            continue
        if not contains_answer("\n".join(other.documents), avoid):
            return other
    return None
