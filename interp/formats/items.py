"""What a reader makes of a row: items, which are questions with contexts and the answers that each source gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from interp.answers import contains_answer
from interp.conflicts import ContextKind, shows_answer
from interp.formats.row import Row

GIVEN_AWAY = "the memory answer shows in the subject or in the prompt without context"
GIVEN_AWAY_TOO = "the context answer shows in the prompt without context"
TOO_LONG = "an answer is a whole sentence, which no model says word by word"
INSIDE_A_WORD = "the place to fill stands inside a word"


class Context(NamedTuple):
    """A context and the answers that it gives.

    Attributes:
        kind: How it relates to memory.
        text: The text, or the texts of several documents, which a prompt shows with empty lines between them.
        answers: What it answers.
        template: What its family adds to the format's name.
    """

    kind: ContextKind
    text: str | tuple[str, ...]
    answers: tuple[str, ...]
    template: str = ""

    @property
    def joined(self) -> str:
        """The text, that of several documents with empty lines between them."""
        return self.text if isinstance(self.text, str) else "\n\n".join(self.text)


class Item(NamedTuple):
    """A question, what memory answers, and its contexts.

    Attributes:
        question: A question, or the stem of a sentence.
        memory_answers: The canonical answer first.
        contexts: The contexts; with ``completion``, whole prompts that are used as they are: they end with the stem,
            or else with an unfinished sentence, before which the context ends.
        subject: What is asked about; the question where empty.
        relation: What is asked about it; the format's name where empty.
        template: What the family adds to the format's name, for contexts that do not say.
        key: Tells the row from others in ids; the row number where empty.
        completion: Whether the model completes a sentence; else the prompt is the context, an empty line, and the
            lines ``Question: {question}`` and ``Answer:``.
        unusable: Why the item cannot be measured, if so: it is left out and counted under this reason.
    """

    question: str
    memory_answers: tuple[str, ...]
    contexts: tuple[Context, ...]
    subject: str = ""
    relation: str = ""
    template: str = ""
    key: str = ""
    completion: bool = False
    unusable: str = ""


@dataclass(frozen=True)
class Format:
    """A native format.

    Attributes:
        name: What ``load_dataset`` calls it.
        title: What its authors call it.
        fields: The fields that every row must have.
        source: Who published it.
        read: The items of a row.
        together: The field whose value rows share that follow each other and make one: the reader is given the first
            one's fields, and all of them as ``rows``. Empty where each row stands alone.
    """

    name: str
    title: str
    fields: tuple[str, ...]
    source: str
    read: Callable[[Row], list[Item]]
    together: str = ""


def given_away(subject: str, stem: str, memory: Sequence[str], context: Sequence[str]) -> str:
    """Why a fact cannot be measured that is to be completed, if so: as with the tables that the package ships."""
    if shows_answer(subject, memory, stem):
        return GIVEN_AWAY
    return GIVEN_AWAY_TOO if contains_answer(f"{subject} {stem}", context) else ""


def inside_a_word(place: str, text: str) -> bool:
    """Whether a place to fill stands inside a word somewhere."""
    return re.search(rf"(?<=\w){re.escape(place)}|{re.escape(place)}(?=\w)", text) is not None


def told(statement: str, stem: str, true: str, new: str, subject: str) -> Item:
    """A fact to complete after a statement of it with a new answer, or with the true one.

    Args:
        statement: What an answer completes in the contexts.
        stem: What it completes after them.
        true: What memory answers.
        new: What contradicts it.
        subject: What the fact is about.
    """
    contexts = (
        Context("conflict", f"{statement} {new}. {stem}", (new,)),
        Context("aligned", f"{statement} {true}. {stem}", (true,)),
    )
    return Item(stem, (true,), contexts, subject, completion=True, unusable=given_away(subject, stem, (true,), (new,)))


_LONGEST_ANSWER = 12


def too_long(*answers: str) -> str:
    """Why answers cannot be found in what a model says, if so: whole sentences are not repeated word by word."""
    return TOO_LONG if any(len(answer.split()) > _LONGEST_ANSWER for answer in answers) else ""
