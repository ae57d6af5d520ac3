"""Compare answers as text: normalisation, exact match, sub-span match, F1, and which source an answer used.

Exact match and F1 follow SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250); ``normalise`` says where they depart from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

from interp.sentences import sentence_end
from interp.words import Span, Words

if TYPE_CHECKING:
    from interp.conflicts import ConflictExample

Usage = Literal["memory", "context", "both", "other", "empty"]
USAGES: tuple[Usage, ...] = get_args(Usage)
Direction = Literal["context", "memory"]
"""The source that something works towards."""
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
OPPOSITE: Mapping[Direction, Direction] = {"context": "memory", "memory": "context"}
COMPLETION_TOKENS, CHAT_TOKENS = 8, 32
"""Longest answers, in tokens: to what a model completes, and in a chat, where it takes a sentence."""

# Answers and short predictions come again and again, longer texts are asked about several times in a row.
_short_text = lru_cache(maxsize=2**13)(Words)
_long_text = lru_cache(maxsize=8)(Words)
_SHORT = 200

_LONG_FORMS = (("\u2019", "'"), ("can't", "can not"), ("n't", " not"), ("cannot", "can not"), ("'m ", " am "))
_ABSTAINS = re.compile(
    r"\bI (?:am |do |can |could |was )?(?:not (?:know|sure|certain|able|answer|find|have|tell|say)|unable|unsure)\b"
    r"|\b(?:is|are|was|were|has|have|does|do|did|can|could) not (?:be |been )?"
    r"(?:mention|specif|state|provide|contain|include|known|given|available|clear|possible|answer|say|discuss|determin|found)"
    r"|^\W*not (?:mentioned|specified|stated|provided|known|given|available|sure|found|enough|clear)\b"
    r"|\bno (?:information|answer|mention|evidence|data)\b|\b(?:unknown|unanswerable|unclear|undetermined)\b"
    r"|\b(?:insufficient|not enough) information\b",
    re.IGNORECASE,
)


def normalise(text: str) -> str:
    """Reduce a text to its words in lower case, without articles, joined by single spaces.

    For ordinary English text this is SQuAD's rule: punctuation is deleted ("Lima-based" is "limabased", "D.C." is
    "dc"). It departs from that rule where deleting makes another answer of a text: numbers keep their sign and point
    ("3.5" is not "35"), C++ is not C, what is neither hyphen, apostrophe nor full stop within a word separates words
    ("Paris/Lyon"), and an article is dropped only before another word ("Vitamin A" stays). Unicode's compatible forms
    are one, accents of Latin and Greek letters go, and scripts without spaces are words of one character each.
    """
    return _words(text).normal


def without_thinking(continuation: str) -> str:
    """What a model says after it has thought aloud; nothing while it still thinks."""
    _, thinks, thought = continuation.partition("<think>")
    return thought.partition("</think>")[2] if thinks else continuation


def first_sentence(continuation: str) -> str:
    """The part of a continuation that answers: up to its first sentence end or line break, after what was thought."""
    text = without_thinking(continuation).strip() + "\n"
    return text[: sentence_end(text)].rstrip()


def is_complete(continuation: str) -> bool:
    """Whether more tokens could no longer change ``first_sentence(continuation)``."""
    return sentence_end(without_thinking(continuation).lstrip()) is not None


def abstains(answer: str) -> bool:
    """Whether an answer says that there is none to give: "I don't know", "not mentioned in the context"."""
    for short, long in _LONG_FORMS:
        answer = answer.replace(short, long)
    return _ABSTAINS.search(answer) is not None


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the answers, both normalised."""
    return normalise(prediction) in {_words(answer).normal for answer in answers}


def contains_answer(prediction: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers occurs in the prediction as whole words (sub-span match)."""
    text = _words(prediction)
    return any(text.find(_words(answer)) for answer in answers)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best word-overlap F1 of the prediction with any of the answers, in [0, 1]."""
    predicted = normalise(prediction).split()

    def f1(answer: str) -> float:
        expected = _words(answer).normal.split()
        common = sum((Counter(predicted) & Counter(expected)).values())
        return 2 * common / (len(predicted) + len(expected)) if common else 0.0

    return max(map(f1, answers), default=0.0)


def usage_of(prediction: str, memory_answers: Sequence[str], context_answers: Sequence[str]) -> Usage:
    """Which source an answer used, by sub-span match with all aliases (not by its first token alone).

    An answer found within a longer one of the other source does not count: "New York" is not York. Where answers of
    the two sources differ by accents alone, accents count.

    Returns:
        ``empty`` for a prediction without a letter or digit, ``other`` for one in which neither source is found.
    """
    fold = _fold(memory_answers, context_answers)
    text = _words(prediction, fold)
    if not text:
        return "empty"
    memory, context = (
        {span for answer in answers for span in text.find(_words(answer, fold))}
        for answers in (memory_answers, context_answers)
    )
    memory, context = _outside(memory, context), _outside(context, memory)
    if memory and context:
        return "both"
    return "memory" if memory else "context" if context else "other"


def overlap(one: Sequence[str], other: Sequence[str]) -> Literal["same", "contained"] | None:
    """Say why answers of two sources cannot be told apart, if they cannot.

    Returns:
        ``same`` where an alias of one is an alias of the other, as ``usage_of`` compares them; ``contained`` where one
        occurs within another ("New York", "York"), so that only the longer match decides; ``None`` where neither.
    """
    fold = _fold(one, other)
    pairs = [(_words(a, fold), _words(b, fold)) for a in one for b in other]
    found = [(bool(a.find(b)), bool(b.find(a))) for a, b in pairs]
    return "same" if (True, True) in found else "contained" if any(map(any, found)) else None


def ambiguous(examples: Iterable[ConflictExample]) -> dict[str, int]:
    """Count conflict prompts whose answers are hard to tell apart.

    Returns:
        ``prompts`` in all, those whose answers are the ``same``, those where one is ``contained`` in the other (see
        ``overlap``), and those with ``both_in_context``.
    """
    counts = {"prompts": 0, "same": 0, "contained": 0, "both_in_context": 0}
    for example in examples:
        if example.kind != "conflict":
            continue
        answers = example.memory_answers, example.context_answers
        counts["prompts"] += 1
        if kind := overlap(*answers):
            counts[kind] += 1
        counts["both_in_context"] += usage_of(example.context, *answers) == "both"
    return counts


def _fold(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether accents do not matter: no two answers differ by them alone."""
    if all(answer.isascii() for answers in (one, other) for answer in answers):
        return True
    shared = [{_words(a, fold).normal for a in one} & {_words(b, fold).normal for b in other} for fold in (True, False)]
    return len(shared[0]) <= len(shared[1])


def _outside(spans: set[Span], others: set[Span]) -> set[Span]:
    """The spans that do not lie strictly within one of the others."""
    return {
        (first, last)
        for first, last in spans
        if not any(start <= first and last <= end and (start, end) != (first, last) for start, end in others)
    }


def _words(text: str, fold: bool = True) -> Words:
    return _short_text(text, fold) if len(text) <= _SHORT else _long_text(text, fold)
