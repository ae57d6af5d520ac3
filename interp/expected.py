"""Whether answers do what the type of a conflict asks for, as far as their text alone tells.

CONFLICTS (Cattan et al. 2025, arXiv 2506.08500) says for each type of conflict between search results how an answer
should deal with it, and lets a model judge whether it does. This judges without one: with c the correct answer, o an
answer that another document gives (the memory answers of a prompt, where the data has them), found as whole words:

    type                        expected       yes                   no                        cannot be told
    no conflict                 one answer     c, no abstention      no c, or an abstention    where no c is known
    outdated information        the newest     c, no o               no c                      c with o, no c known
    misinformation              the reliable   c, no o               no c                      c with o, no c known
    complementary information   all together   -                     an abstention             else
    opinions, research          both sides     -                     an abstention, yes, no    else

An empty answer is never as expected, nor is one that abstains and does not name c. One that does both is too unsure for
the first type, and cannot be told for the next two. What text alone cannot show: that partial answers are brought
together, that sides are shown neutrally, that the newer of two answers is preferred, or that a named one is denied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from interp.answers import abstains, normalise, usage_of
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.statistics import rate

DIRECT = "one answer, with certainty"
TOGETHER = "all partial answers, brought together"
SIDES = "the sides of the debate, neutrally"
NEWEST = "the newest information"
RELIABLE = "what reliable sources say"

_PREFIX = "conflicts-"
_BEHAVIOURS: Mapping[str, str] = {
    "no-conflict": DIRECT,
    "complementary": TOGETHER,
    "conflicting": SIDES,
    "conflict-due-to-outdated": NEWEST,
    "conflict-due-to-misinformation": RELIABLE,
}
_TELLABLE = (DIRECT, NEWEST, RELIABLE)


def expected_behaviour(template: str) -> str | None:
    """Say how an answer should deal with a type of conflict.

    Args:
        template: The template of a prompt of CONFLICTS, for example ``conflicts-conflict-due-to-outdated-information``.

    Returns:
        The behaviour in words; ``None`` for templates of other data, and of CONFLICTS' prompts without a context.
    """
    kind = template.removeprefix(_PREFIX) if template.startswith(_PREFIX) else ""
    return next((behaviour for start, behaviour in _BEHAVIOURS.items() if kind.startswith(start)), None)


def as_expected(behaviour: str, answer: str, correct: Sequence[str], others: Sequence[str] = ()) -> bool | None:
    """Judge from its text alone whether an answer does what is expected; the module says by which rules.

    Args:
        behaviour: What ``expected_behaviour`` gives.
        answer: What the model says.
        correct: The correct answer and its aliases; empty where there is none.
        others: What other documents answer; empty where it is not known.

    Returns:
        ``None`` where text alone cannot tell.
    """
    usage, evades = usage_of(answer, others, correct), abstains(answer)
    is_named = usage in ("context", "both")
    if usage == "empty" or (evades and not is_named):
        return False
    if behaviour == SIDES:
        return False if normalise(answer) in ("yes", "no") else None
    if behaviour == TOGETHER or not correct:
        return None
    if behaviour == DIRECT:
        return is_named and not evades
    if not is_named:
        return False
    return None if evades or usage == "both" else True


def with_expected(report: pl.DataFrame, conflicts: ConflictSet) -> pl.DataFrame:
    """Add what is expected of each answer, and whether it is so, to the rows of a usage report.

    Args:
        report: The frame of a ``UsageReport``: ``id`` and ``answer`` are read.
        conflicts: The prompts that were answered.

    Returns:
        The rows with ``expected`` (text; null for prompts that are of no type of CONFLICTS) and ``as_expected``
        (Boolean; null for those, and where text alone cannot tell).

    Raises:
        UserError: If a row's prompt is not among ``conflicts``.
    """
    examples = {example.id: example for example in conflicts}
    if unknown := [name for name in report["id"] if name not in examples]:
        raise UserError(f"The prompt {unknown[0]!r} is not in {conflicts.name}; give the prompts that were answered.")
    asked = [examples[name] for name in report["id"]]
    expected = [expected_behaviour(example.template) for example in asked]
    judged = [
        None if behaviour is None else as_expected(behaviour, answer, example.context_answers, _others(example))
        for behaviour, answer, example in zip(expected, report["answer"], asked, strict=True)
    ]
    return report.with_columns(
        pl.Series("expected", expected, dtype=pl.String), pl.Series("as_expected", judged, dtype=pl.Boolean)
    )


def expected_rates(rows: pl.DataFrame) -> pl.DataFrame:
    """Count by type how often answers are as expected, are not, and cannot be told: shares of all prompts of a type.

    A judge that could tell all would find a rate between ``as_expected`` and 1 - ``against``.

    Args:
        rows: What ``with_expected`` gives; rows without an expected behaviour are left out.

    Returns:
        Columns ``template``, ``expected``, ``as_expected`` with the interval ``low`` to ``high`` (null for types of
        which it can never be told), ``against``, ``untold`` and ``n``.
    """
    counted = []
    for (template, expected), part in rows.drop_nulls("expected").group_by(
        ["template", "expected"], maintain_order=True
    ):
        found = part["as_expected"]
        share = rate(found.fill_null(value=False).to_numpy(), part["subject"].to_list()).to_record()
        if expected not in _TELLABLE:
            share |= dict.fromkeys(("value", "low", "high"))
        counted.append(
            {
                "template": template,
                "expected": expected,
                "as_expected": share["value"],
                "low": share["low"],
                "high": share["high"],
                "against": (~found).sum() / len(part),
                "untold": found.null_count() / len(part),
                "n": len(part),
            }
        )
    numbers = dict.fromkeys(("as_expected", "low", "high", "against", "untold"), pl.Float64)
    schema = {"template": pl.String, "expected": pl.String, **numbers, "n": pl.Int64}
    return pl.DataFrame(counted, schema=schema)


def _others(example: ConflictExample) -> tuple[str, ...]:
    """Answers that are not the correct one: what memory answers, where it is not the same."""
    return () if example.kind == "aligned" else example.memory_answers
