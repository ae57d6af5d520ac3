"""Put what was measured of one edit on test into three sentences: what it gains, what it costs, what it leaves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from conflictscope.study.leaderboard import LOSSES, lost, speed
from conflictscope.study.record import Measured, StudyRecord
from conflictscope.tables import written
from interp.answers import OPPOSITE, Direction
from interp.errors import UserError

SOURCES: Mapping[Direction, str] = {"memory": "memory", "context": "the context"}
"""What people call the sources."""

_CHANCE = 0.05
_LONGEST = 140
_CANNOT: Mapping[Direction, str] = {
    "context": "it cannot tell a context that is right from one that is wrong, and follows both",
    "memory": "it cannot tell a memory that is right from one that is wrong, and keeps both",
}


class Goal(NamedTuple):
    """What is wanted: a rate of a source, as a share of test's conflict prompts.

    Attributes:
        source: The source.
        rate: The least share.
    """

    source: Direction
    rate: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read a goal such as ``context >= .9``.

        Raises:
            UserError: If it is not of that form, or the rate is no share above 0.
        """
        name, sign, number = text.partition(">=")
        names: dict[str, Direction] = {"memory": "memory", "context": "context"}
        source = names.get(name.strip())
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if source is None or not sign or not 0 < rate <= 1:
            raise UserError(f'A goal is a source and a rate up to 1, for example "context >= .9", not {text!r}.')
        return cls(source, rate)

    def met_by(self, estimate: Mapping[str, Any]) -> str:
        """Say whether an estimate meets it."""
        goal = f"the goal of {self.rate:g}"
        if estimate["value"] < self.rate:
            return f"{goal} is not met"
        return f"{goal} is met" + ("" if estimate["low"] >= self.rate else ", though the interval begins below it")


def helps(edit: Measured) -> bool:
    """Say whether an edit raises the rate of its source on test by more than chance."""
    change = edit.test["change"][f"{edit.towards}_rate"]
    return change["value"] > 0 and change["p"] <= _CHANCE


def sentences_of(record: StudyRecord, edit: Measured, goal: Goal | None = None) -> tuple[str, ...]:
    """Say what an edit does on test, in three sentences: gain, costs, and what stays as it was.

    Args:
        record: The study.
        edit: The edit, one of the study's conditions.
        goal: What was wanted, if a rate was.
    """
    return _found(record, edit, goal), _costs(edit), _not_fixed(record, edit)


def _found(record: StudyRecord, edit: Measured, goal: Goal | None) -> str:
    towards = _source(edit)
    measure = f"{towards}_rate"
    change, after = edit.test["change"][measure], edit.test[measure]
    subjects = record.data["counts"]["subjects_by_split"]["test"]
    does = textwrap.shorten(edit.does, _LONGEST, placeholder=" \N{HORIZONTAL ELLIPSIS}")
    what = f"{edit.method.replace('_', ' ')} ({does})"
    before = written(record.unedited.test[measure])
    rates = f"{written(after)} of the answers follow {SOURCES[towards]} instead of {before}"
    where = f"on {subjects} subjects that it was not chosen on"
    extra = [
        f"{control.method.replace('_', ' ')} change that by {written(control.test['change'][measure])}"
        for control in record.controls_of(edit)
    ]
    extra += [goal.met_by(after)] if goal else []
    if helps(edit):
        begun = f"{what[0].upper()}{what[1:]} helps: {where}, {rates}"
    else:
        begun = (
            f"Nothing within the budget helps by more than chance: {where}, the best found, {what}, changes the rate "
            f"of {SOURCES[towards]} by {written(change)} (p = {change['p']:.2g})"
        )
    return f"{'; '.join([begun, *extra])}."


def _costs(edit: Measured) -> str:
    change = edit.test["change"]
    losses = [
        f"{written(lost(change[measure]))} of {label} accuracy"
        for label, measure in LOSSES.items()
        if change.get(measure) is not None
    ]
    if (kl := edit.test["neutral_kl"]) is not None:
        losses.append(f"{written(kl, 3)} nats on ordinary text")
    lacking = [label for label, measure in LOSSES.items() if edit.test[measure] is None]
    unasked = f"; nothing is known, or nothing changes, of {' and '.join(lacking)} prompts" if lacking else ""
    pace = "" if edit.cost is None else f"; its speed relative to the unedited model is {speed(edit.cost)}"
    return f"It costs {', '.join(losses) or 'nothing that was measured'}{pace}{unasked}."


def _not_fixed(record: StudyRecord, edit: Measured) -> str:
    towards = _source(edit)
    other = OPPOSITE[towards]
    test = edit.test
    left = f"It does not fix {written(test[f'{other}_rate'])} of the prompts, which still follow {SOURCES[other]}"
    parts = [left, f"{written(test['other_rate'])} are answered with neither"]
    by_template = {name: rates[f"{towards}_rate"] for name, rates in test["by_template"].items()}
    if len(by_template) > 1:
        worst = min(by_template, key=lambda name: by_template[name]["value"])
        parts.append(f"least is gained in {worst}, {written(by_template[worst])}")
    return f"{'; '.join([*parts, _CANNOT[towards]])}; of data other than {record.data['name']} it says nothing."


def _source(edit: Measured) -> Direction:
    assert edit.towards is not None
    return edit.towards
