"""Compare answers as text: normalisation, exact match, sub-span match, F1, and which source an answer used.

Normalisation and F1 follow SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250): lower case, no punctuation, no
articles, single spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Usage = Literal["memory", "context", "both", "other"]
USAGES: tuple[Usage, ...] = ("memory", "context", "both", "other")

_PUNCTUATION = str.maketrans("", "", string.punctuation + "\u2018\u2019\u201c\u201d\u2013\u2014")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A full stop ends a sentence unless it closes an initial ("D.C.") or a title; so does a line break.
_STOP = r"(?<!\b[A-Z])(?<!\bSt)(?<!\bDr)(?<!\bMr)(?<!\bMt)(?<!\bMrs)[.!?]"
_SENTENCE_END = re.compile(rf"{_STOP}(?=\s|$)|\n")
# Text that breaks off after a full stop may go on ("Booking.com").
_CERTAIN_END = re.compile(rf"{_STOP}(?=\s)|\n")


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, with single spaces; a text that is only an article stays."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split() or plain.split())


def first_sentence(continuation: str) -> str:
    """The part of a continuation that answers: up to its first sentence end or line break."""
    text = continuation.strip()
    end = _SENTENCE_END.search(text)
    return text if end is None else text[: end.start()].rstrip()


def is_complete(continuation: str) -> bool:
    """Whether more tokens could no longer change ``first_sentence(continuation)``."""
    return _CERTAIN_END.search(continuation.lstrip()) is not None


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the answers, both normalised."""
    return normalise(prediction) in {normalise(answer) for answer in answers}


def contains_answer(prediction: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers occurs in the prediction as whole words, both normalised (sub-span match)."""
    words = f" {normalise(prediction)} "
    return any(f" {normal} " in words for answer in answers if (normal := normalise(answer)))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best word-overlap F1 of the prediction with any of the answers, in [0, 1]."""
    predicted = normalise(prediction).split()

    def f1(answer: str) -> float:
        expected = normalise(answer).split()
        common = sum((Counter(predicted) & Counter(expected)).values())
        return 2 * common / (len(predicted) + len(expected)) if common else 0.0

    return max(map(f1, answers), default=0.0)


def usage_of(prediction: str, memory_answers: Sequence[str], context_answers: Sequence[str]) -> Usage:
    """Which source an answer used, by sub-span match with all aliases (not by its first token alone)."""
    memory = contains_answer(prediction, memory_answers)
    context = contains_answer(prediction, context_answers)
    if memory and context:
        return "both"
    return "memory" if memory else "context" if context else "other"
