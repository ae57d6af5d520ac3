"""Read CUB."""

from __future__ import annotations

import re

from interp.conflicts import ContextKind
from interp.formats.items import Context, Format, Item, given_away
from interp.formats.row import Row

_KINDS: dict[str, ContextKind] = {
    "gold": "aligned",
    "edited": "conflict",
    "conflicting": "conflict",
    "irrelevant": "irrelevant",
}
_LEFT = re.compile(r"<(?:subject|target)[\w-]*>|<\|")


def _read(row: Row) -> list[Item]:
    """One context a row, of one of three types; each of the three parts has fields of its own.

    Memory is the gold answer (``target_true``): in CounterFact what the authors' models remember, in NQ and DRUID what
    is right. A conflicting context gives ``target_new``. For DRUID both are True, False or None.
    """
    kind = _kind(row)
    memory = (_target(row, "target_true"),)
    answers = memory if kind == "aligned" else (_target(row, "target_new"),) if kind == "conflict" else ()
    if row.has("claim"):
        claim = row.text("claim")
        context = Context(kind, row.text("evidence"), answers, "druid")
        asked = f"Is this claim True or False, or None if that cannot be told? {claim}"
        return [Item(asked, memory, (context,), claim, template="druid")]
    if row.has("question"):
        context = Context(kind, row.text("context"), answers, "nq")
        return [Item(row.text("question"), memory, (context,), template="nq")]
    return [_completed(row, kind, memory, answers)]


def _completed(row: Row, kind: ContextKind, memory: tuple[str, ...], answers: tuple[str, ...]) -> Item:
    """A sentence of CounterFact to complete, after a line with a fact."""
    subject, told = row.text("subject"), answers or memory
    if kind == "irrelevant" and row.has("target_new"):
        told = (_target(row, "target_new"),)
    stem, prompt = (_filled(row, name, subject, told[0]) for name in ("template", "template_w_context"))
    why = given_away(subject, stem, memory, answers)
    context = Context(kind, prompt, answers, "counterfact")
    return Item(stem, memory, (context,), subject, template="counterfact", completion=True, unusable=why)


def _kind(row: Row) -> ContextKind:
    name = row.text("context_type").lower()
    if name not in _KINDS:
        raise row.unexpected("context_type", f"one of {', '.join(_KINDS)}")
    return _KINDS[name]


def _target(row: Row, name: str) -> str:
    """An answer; True and False may be written without quotes."""
    value = row.value(name)
    return str(value) if isinstance(value, bool) else row.text(name)


def _filled(row: Row, name: str, subject: str, target: str) -> str:
    """A template with its subject and answer in their places."""
    text = row.text(name).replace("<subject-w-space>", f"{subject} ").replace("<subject>", subject)
    text = re.sub(r" {2,}", " ", text.replace("<target>", target)).strip()
    if _LEFT.search(text):
        raise row.unexpected(name, "a sentence to complete with <subject> and <target>, from the file of a base model")
    return text


FORMAT = Format(
    "cub",
    "CUB",
    ("context_type", "target_true"),
    "Hagström et al. 2025, arXiv 2505.16518",
    _read,
)
