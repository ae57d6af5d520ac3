"""What a page is about: a study's folder, or one of scored probes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from conflictscope.study.record import HEADS, Measured, StudyRecord, read_examples
from conflictscope.tables import MEASURES
from interp.answers import DIRECTIONS, USAGES, Direction
from interp.attribution.scores import HeadScores
from interp.errors import UserError
from interp.files import read_json
from interp.statistics import Estimate

SIGNIFICANT = 0.05
"""The largest p-value of a change that is called one."""
PROBES = "probes"
"""The kind of record that a folder of scored probes is given."""

_RATES = tuple(f"{usage}_rate" for usage in USAGES)
_SCORE_COLUMNS = {"label", "probe", "group", "site", "chosen", "measure", "value", "low", "high", "n"}


class Change(NamedTuple):
    """One measure before and after an edit.

    Attributes:
        before: The unedited model's; ``None`` where the measure does not apply.
        after: The edited one's; likewise.
        paired: The change prompt by prompt, with ``value`` and ``p``; ``None`` where it is not known.
    """

    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    paired: Mapping[str, Any] | None = None

    @property
    def verdict(self) -> str:
        """What the paired change allows to say: ``rises``, ``falls``, or ``unclear`` where chance could explain it."""
        if self.paired is None or self.paired["p"] > SIGNIFICANT:
            return "unclear"
        return "rises" if self.paired["value"] > 0 else "falls"


@dataclass(frozen=True)
class Run:
    """One study, or one folder of scored probes.

    Attributes:
        name: What it is called where there are several.
        record: What was measured; of probes what is known of model and data, without conditions.
        examples: The answers; ``None`` where there are none.
        scores: Of the heads, where they were scored.
        table: What probes scored.
    """

    name: str
    record: StudyRecord
    examples: pl.DataFrame | None = field(default=None, repr=False)
    scores: HeadScores | None = field(default=None, repr=False)
    table: pl.DataFrame | None = field(default=None, repr=False)

    @property
    def conditions(self) -> tuple[Measured, ...]:
        """What was measured, the unedited model first; none for probes."""
        return self.record.conditions

    @property
    def unedited(self) -> Measured:
        """The model as it comes."""
        return self.record.unedited

    @property
    def held_out(self) -> str | None:
        """The phrasing family that nothing was chosen on."""
        return self.record.data.get("phrasings", {}).get("held_out")

    @property
    def winners(self) -> dict[Direction, Measured]:
        """What dev preferred over all methods, by the source that it strengthens."""
        found: dict[Direction, Measured | None] = {d: self.record.winner(d) for d in DIRECTIONS if self.conditions}
        return {d: winner for d, winner in found.items() if winner is not None}

    @property
    def cards(self) -> list[Measured]:
        """The key conditions: unedited, and for each source the winner and its random controls."""
        return [self.unedited, *(c for w in self.winners.values() for c in (w, *self.record.controls_of(w)))]

    def rows(self, towards: Direction) -> list[Measured]:
        """What was measured towards a source, each followed by its random controls."""
        edits = [c for c in self.conditions if c.towards == towards and not c.is_control]
        return [c for edit in edits for c in (edit, *self.record.controls_of(edit))]

    def change(self, condition: Measured, measure: str) -> Change:
        """A measure before and after an edit; nothing where it was not asked."""
        paired = condition.test.get("change", {}).get(measure)
        return Change(self.unedited.test.get(measure), condition.test.get(measure), paired)


def read_run(folder: Path) -> Run:
    """The records in a folder.

    Args:
        folder: What a study or ``probe score`` wrote.

    Raises:
        UserError: If it holds neither, or they are damaged or unfinished.
    """
    name = folder.resolve().name
    if (folder / "scores.parquet").exists():
        return _read_scores(folder, name)
    record = StudyRecord.load(folder)
    for condition in record.conditions:
        if missing := _missing(condition.test):
            raise UserError(f"{folder} has no {missing} of {condition.name}; run the study again.")
    scores = HeadScores.load(folder / HEADS) if (folder / HEADS).exists() else None
    return Run(name, record, read_examples(folder), scores)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The records of several folders; where two have the same name, they are numbered.

    Raises:
        UserError: See ``read_run``.
    """
    runs = [read_run(folder) for folder in folders]
    named = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name} ({number})") if named[run.name] > 1 else run
        for number, run in enumerate(runs, 1)
    ]


def _missing(test: Mapping[str, Any]) -> str | None:
    """The first measure that a record lacks; rates are of every condition, other measures may not apply."""
    for rates in (test, *(test.get("by_template") or {}).values()):
        if missing := next((m for m in _RATES if not _is_estimate(rates.get(m))), None):
            return missing
    others = (*(measure for measure in MEASURES if measure not in _RATES), "memorisation_ratio")
    return next(
        (m for m in others if m not in test or not (test[m] is None or _is_estimate(test[m], m == others[-1]))),
        None if "by_template" in test else "by_template",
    )


def _is_estimate(found: Any, may_be_undefined: bool = False) -> bool:
    """Whether a record is that of an estimate; only the ratio of two rates is undefined where both are 0."""
    if not isinstance(found, dict) or found.keys() != set(Estimate.__annotations__):
        return False
    numbers = [found["n"]] if may_be_undefined and found["value"] is None else found.values()
    return all(isinstance(number, (int, float)) for number in numbers)


def _read_scores(folder: Path, name: str) -> Run:
    path = folder / "scores.parquet"
    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read ({error}); run probe score again.") from error
    if missing := _SCORE_COLUMNS - set(table.columns):
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; run probe score again.")
    about = read_json(folder / "scores.json") if (folder / "scores.json").exists() else {}
    record = StudyRecord(
        PROBES,
        "conflictscope probe fit\nconflictscope probe score",
        about.get("model", {"name": "an unnamed model"}),
        {**about.get("data", {}), "phrasings": {"held_out": about.get("held_out_template")}},
        {"seed": about["seed"]} if "seed" in about else {},
        (),
    )
    return Run(name, record, table=table)
