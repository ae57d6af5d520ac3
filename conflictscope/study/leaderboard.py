"""Say what a study found: a sentence at each stage, and the record as a leaderboard for each direction."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import polars as pl

from conflictscope.study.choice import Chosen
from conflictscope.study.measure import AGREE
from conflictscope.study.record import Measured, StudyRecord
from conflictscope.tables import written
from interp.answers import DIRECTIONS, Direction
from interp.attribution.scores import HeadScores

LOSSES = {
    "closed-book": "closed_book_accuracy",
    "aligned": "aligned_accuracy",
    "irrelevant": "irrelevant_accuracy",
}
"""What an edit may cost, by what it is called."""

_LONGEST = 72
_SOURCES: Mapping[Direction, str] = {"memory": "memory", "context": "the context"}


def leaderboard(record: StudyRecord) -> list[pl.DataFrame]:
    """One table for each direction: the unedited model, then by choice each method from the best, then controls.

    The rate of the wanted source is a share of conflict prompts; losses are fallen shares of right answers, prompt by
    prompt; both with 95 % intervals by subject. KL is in nats at the ends of ordinary text; speed is relative.
    """
    tables = []
    for towards in DIRECTIONS:
        own = [c for c in record.conditions if c.towards == towards]
        if not own:
            continue
        rows = [_row(record.unedited, towards, "", chosen="")]
        for choice in ("best", "within_budget"):
            for c in sorted(record.chosen(towards, choice), key=lambda c: -c.test[f"{towards}_rate"]["value"]):
                rows.append(_row(c, towards, c.method.replace("_", " "), chosen=choice.replace("_", " ")))
        ending = f", towards {towards}"
        rows += [_row(c, towards, c.name.removesuffix(ending), chosen="random") for c in own if c.is_control]
        tables.append(pl.DataFrame(rows))
    return tables


def heads_found(scores: HeadScores) -> str:
    """Name the heads that carry most of each source, by what happens without them."""
    parts = []
    for towards in DIRECTIONS:
        (first, *_) = scores.ranked(towards)
        parts.append(f"{first.layer}.{first.head} pushes most towards {towards} ({first.score:+.2f})")
    return f"Path patching, positive towards the context: {', '.join(parts)}."


def chosen_on_dev(found: Chosen, towards: Direction) -> str:
    """Say what dev chose of a method towards a source."""
    best, kept = found.best, found.best.right.get("none")
    facts = "" if kept is None else f", {kept:.0%} of closed-book answers start right"
    rate = f"{best.rate(towards):.0%} of answers start with what {_SOURCES[towards]} says"
    does = textwrap.shorten(best.condition.does, _LONGEST, placeholder=" \N{HORIZONTAL ELLIPSIS}")
    return f"{best.condition.name}: dev chose, of {len(found.tried)} tried, {does}; {rate}{facts}."


def measured_on_test(name: str, test: Mapping[str, Any], towards: Direction | None) -> str:
    """Say what a condition did on unseen subjects."""
    if towards is None:
        rates = " and ".join(f"{written(test[f'{d}_rate'])} follow {_SOURCES[d]}" for d in DIRECTIONS)
        return f"{name}, on unseen subjects: where the two disagree, {rates}."
    change = lost(test["change"].get("closed_book_accuracy"))
    loss = "" if change is None else f"; closed-book accuracy loses {written(change)}"
    return f"{name}, on unseen subjects: {written(test[f'{towards}_rate'])} follow {_SOURCES[towards]}{loss}."


def _row(condition: Measured, towards: Direction, method: str, *, chosen: str) -> dict[str, str]:
    test = condition.test
    change = test.get("change", {})
    cost = condition.cost
    return {
        f"towards {towards}": method or "unedited",
        "chosen": chosen,
        "moved": str(condition.moved),
        "rate": written(test[f"{towards}_rate"]),
        **{f"{label} loss": written(lost(change.get(m))) if change else "" for label, m in LOSSES.items()},
        **_abilities(test),
        "text KL": written(test["neutral_kl"], 3),
        "speed": "1" if not change else speed(cost),
    }


def _abilities(test: Mapping[str, Any]) -> dict[str, str]:
    """What is lost of other abilities, in studies that asked."""
    if "abilities_accuracy" not in test:
        return {}
    return {"abilities loss": written(lost(test["change"].get("abilities_accuracy"))) if "change" in test else ""}


def lost(change: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Say what is lost: the change with its sign turned round."""
    if change is None or change["value"] is None:
        return None
    return {"value": -change["value"], "low": -change["high"], "high": -change["low"], "n": change["n"]}


def speed(cost: Mapping[str, float] | None) -> str:
    """The tokens per second relative to unedited; ``unclear`` where the rounds that were timed disagree by a tenth."""
    if cost is None:
        return "n/a"
    return f"{cost['speed']:.2f}" if cost["high"] <= AGREE * cost["low"] else "unclear"
