"""Run a study: candidates compete on dev, what is chosen is measured once on test, next to random controls.

1. Each method names its candidates for each direction; dev chooses the best and the best within the damage budget.
2. Each method draws random controls of the same kind and size.
3. Everything is measured once on test, and compared with the unedited model.
4. The record, the answers, head scores, prompts and intervention files are written; the record comes last.

Where the record is wanted as it grows, what a method chose is measured before the next method begins, and a record that
says which methods are to come is written; controls come last.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl

from conflictscope import __version__
from conflictscope.study.choice import Chosen, Tried, best_of
from conflictscope.study.condition import AS_IS, Condition
from conflictscope.study.lab import Lab
from conflictscope.study.leaderboard import chosen_on_dev, heads_found, measured_on_test
from conflictscope.study.measure import Result, measure, measures_of, pooled
from conflictscope.study.method import Method
from conflictscope.study.record import HEADS, RECORD, UNEDITED, WITHIN, Choice, Measured, StudyRecord, write_examples
from interp.answers import DIRECTIONS, Direction
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.fingerprints import fingerprint
from interventions.base import Intervention
from interventions.config import InterventionFile

_ChosenBy = dict[tuple[Method, Direction], Chosen]


@dataclass(frozen=True)
class _Row:
    """What becomes one row of the record: a condition, or draws of a control."""

    name: str
    conditions: Sequence[Condition]
    choices: tuple[Choice, ...] = ()
    dev: Tried | None = None
    control_of: str | None = None


@dataclass
class _Work:
    """What a study has done so far.

    Attributes:
        chosen: What dev chose.
        not_run: What could not be run, and why.
        results: What was measured on test, by row.
        tests: The same as estimates.
        heads_told: Whether it was told which heads carry a source.
    """

    chosen: _ChosenBy = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    heads_told: bool = False


@dataclass(frozen=True)
class Study:
    """What is measured of methods, and where it is written.

    Attributes:
        kind: What the study is called: demo, compare, ...
        command: The command that makes it again.
        out: The folder for the record and all files beside it.
        directions: Towards which sources.
        choices: Which of dev's choices are measured.
        controls: Whether random controls are measured for each method, for the best, by each choice, of those that
            share a kind of control (random heads, directions, ...) towards each source, or for the best alone.
        draws: How many draws of each control are measured; ``None`` measures all that its method makes.
        lines: Measurements at each dose that the record holds too, by name.
        details: What else the record says, besides what its methods do.
        digest: A hash of all that decides the study, which the record keeps in its settings; empty keeps none.
        told: Takes a sentence about what was found, at every stage.
        shown: Takes the record as it grows, after every method but the last; ``None``, or a finished record in the
            folder, has it written once.
    """

    kind: str
    command: str
    out: Path
    directions: Sequence[Direction] = DIRECTIONS
    choices: Sequence[Choice] = ("best", "within_budget")
    controls: Literal["each", "kinds", "winners"] = "each"
    draws: int | None = None
    lines: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    told: Callable[[str], None] = lambda _: None
    shown: Callable[[StudyRecord], None] | None = None

    def run(self, lab: Lab, methods: Sequence[Method]) -> StudyRecord:
        """Choose, measure and record; finished steps are kept, so that what was killed goes on where it stopped.

        Raises:
            UserError: If none of the methods can run; where some can, the record says why the others can't.
        """
        work = _Work()
        # What is whole is replaced by what is whole.
        grows = self.shown is not None and not self._is_finished()
        for number, method in enumerate(methods, 1):
            self._choose(lab, method, work)
            if grows and self.shown is not None and work.chosen and number < len(methods):
                self.shown(self._record(lab, work, to_come=tuple(other.name for other in methods[number:])))
        return self._record(lab, self._checked(work))

    def choose(self, lab: Lab, method: Method) -> None:
        """Let dev choose of one method; what it chose is kept, for ``run``."""
        self._choose(lab, method, _Work())

    def conditions(self, lab: Lab, methods: Sequence[Method]) -> list[Condition]:
        """What ``run`` measures on test: the unedited model, what dev chose, and random controls.

        Raises:
            UserError: As ``run``.
        """
        rows, _ = self._planned(lab, self._chosen_quietly(lab, methods))
        return list({c.digest: c for row in rows for c in row.conditions}.values())

    def finish(self, lab: Lab, methods: Sequence[Method]) -> StudyRecord:
        """Do what ``run`` does, where it was told before what dev chose.

        Raises:
            UserError: As ``run``.
        """
        return self._record(lab, self._chosen_quietly(lab, methods))

    def _chosen_quietly(self, lab: Lab, methods: Sequence[Method]) -> _Work:
        quiet, work = replace(self, told=lambda _: None), _Work()
        for method in methods:
            quiet._choose(lab, method, work)
        return self._checked(work)

    def _checked(self, work: _Work) -> _Work:
        if not work.chosen:
            raise UserError(next(iter(work.not_run.values()), "There is no method to measure; give one."))
        return work

    def _is_finished(self) -> bool:
        try:
            return not StudyRecord.load(self.out).to_come
        except UserError:
            return False

    def _choose(self, lab: Lab, method: Method, work: _Work) -> None:
        """Let dev choose of a method in each direction, or note why it can't be run."""
        refused: dict[Direction, str] = {}
        for towards in self.directions:
            try:
                chosen = lab.chosen(method, towards, within_budget="within_budget" in self.choices)
            except UserError as error:
                refused[towards] = str(error)
                continue
            if not work.heads_told and "head_scores" in vars(lab):
                self.told(heads_found(lab.head_scores["logit_diff"]))
                work.heads_told = True
            work.chosen[method, towards] = chosen
            self.told(chosen_on_dev(chosen, towards))
        if len(refused) == len(self.directions) and len(set(refused.values())) == 1:
            work.not_run[method.name] = next(iter(refused.values()))
        else:
            work.not_run |= {f"{method.name}, towards {towards}": reason for towards, reason in refused.items()}

    def _record(self, lab: Lab, work: _Work, to_come: tuple[str, ...] = ()) -> StudyRecord:
        """Measure what dev chose, as far as it was not yet, and write the record and all beside it."""
        winners: dict[Direction, str | None] = {d: _winner(lab, d, work.chosen) for d in self.directions}
        rows, not_run = self._planned(lab, work, with_controls=not to_come)
        self._measure(lab, rows, work)
        for path in (self.out / RECORD, *(self.out / "interventions" / f"towards_{d}.json" for d in DIRECTIONS)):
            path.unlink(missing_ok=True)
        files = {row.name: self._write_edits(lab, row, work.tests, winners) for row in rows}
        settings = {"seed": lab.seed, "quick": lab.quick, "budgets": lab.budgets, "winners": winners}
        settings |= {"digest": self.digest} if self.digest else {}
        measured = [_measured(row, work.tests[row.name], work.results[row.name].cost, files[row.name]) for row in rows]
        record = StudyRecord(
            kind=self.kind,
            command=self.command,
            model=model_record(lab),
            data=lab.prompts.about(),
            settings={**settings, **made_with(lab)},
            conditions=tuple(measured),
            tried=tuple(one.to_record(lab.budgets) for found in work.chosen.values() for one in found.tried),
            lines=self.lines,
            not_run=not_run,
            details={**_details(lab, work.chosen), **self.details},
            to_come=to_come,
        )
        self._write_beside(lab, rows, work.results)
        record.save(self.out)
        return record

    def _planned(self, lab: Lab, work: _Work, *, with_controls: bool = True) -> tuple[list[_Row], dict[str, str]]:
        """The rows of the record, and why others are not there."""
        not_run = dict(work.not_run)
        edits: list[tuple[Method, _Row]] = []
        for (method, _), found in work.chosen.items():
            own, refused = self._rows(found)
            edits += [(method, row) for row in own]
            not_run |= refused
        controls, refused = self._controls(lab, edits) if with_controls else ({}, {})
        not_run |= refused
        rows = [_Row(UNEDITED, [Condition(UNEDITED)])]
        for _, row in edits:
            rows += [row, *controls.get(row.name, ())]
        return rows, not_run

    def _measure(self, lab: Lab, rows: Sequence[_Row], work: _Work) -> None:
        """Measure the rows that were not measured yet."""
        for row in rows:
            if row.name in work.results:
                continue
            result = work.results[row.name] = pooled([measure(lab, condition) for condition in row.conditions])
            before = None if row.name == UNEDITED else work.results[UNEDITED]
            test = measures_of(result) if before is None else measures_of(result, before.report, before.able)
            work.tests[row.name] = test
            self.told(measured_on_test(row.name, test, row.conditions[0].towards))

    def _controls(self, lab: Lab, edits: Sequence[tuple[Method, _Row]]) -> tuple[dict[str, list[_Row]], dict[str, str]]:
        """The random controls that are measured, by the row that they control, and why others could not be drawn."""
        most = 1 if lab.quick else self.draws
        drawn = {row.name: _control(lab, method, row, most) for method, row in edits}
        wanted = {row.name for _, row in edits}
        if self.controls != "each":
            kinds: dict[tuple[Choice, Direction | None, str], list[_Row]] = {}
            for method, row in edits:
                controls, _ = drawn[row.name]
                # What nothing could be drawn for is a kind of its own, so that it is said.
                kind = controls[0].conditions[0].method if controls and self.controls == "kinds" else ""
                for choice in () if method.derived else row.choices:
                    kinds.setdefault((choice, row.conditions[0].towards, kind), []).append(row)
            wanted = {_preferred(lab, choice, rows).name for (choice, _, _), rows in kinds.items()}
        refused = {name: reason for row in sorted(wanted) for name, reason in drawn[row][1].items()}
        return {row: drawn[row][0] for row in wanted}, refused

    def _rows(self, found: Chosen) -> tuple[list[_Row], dict[str, str]]:
        """What is measured of a method in one direction, and why the rest is not."""
        best, within = found.best, found.within_budget
        name, not_run = best.condition.name, {}
        is_both = within is not None and within.condition.digest == best.condition.digest
        rows = [_Row(name, [best.condition], tuple(self.choices) if is_both else ("best",), best)]
        if "within_budget" in self.choices and not is_both:
            if within is None:
                not_run[f"{name}{WITHIN}"] = "No candidate stays within the damage budget on dev, also moved back."
            else:
                rows.append(_Row(f"{name}{WITHIN}", [within.condition], ("within_budget",), within))
        return rows, not_run

    def _write_edits(
        self, lab: Lab, row: _Row, tests: Mapping[str, Any], winners: Mapping[Direction, str | None]
    ) -> str | None:
        """Write the row's intervention file, if files can hold it; gives its path from the record."""
        (condition, *others) = row.conditions
        # Rules of other packages have no entry.
        is_foreign = condition.decoding is not None and type(condition.decoding).entry is Intervention.entry
        if others or not condition.parts or condition.prompting != AS_IS or is_foreign:
            return None
        file = InterventionFile.of(
            condition.parts,
            name=f"{lab.name}: {row.name}",
            towards=condition.towards,
            model=lab.identity,
            provenance={
                "method": condition.method,
                "chosen_on": "random" if row.control_of else "dev",
                "data": lab.prompts.digest,
                "relations": list(lab.prompts.relations),
                "settings": dict(condition.settings),
                "seed": lab.seed,
                "quick": lab.quick,
                **made_with(lab),
            },
            measured={"test": tests[row.name], "unedited": tests[UNEDITED]},
        )
        folder = self.out / "interventions"
        suffix = "-within_budget" if row.name.endswith(WITHIN) else ""
        name = f"{condition.method}-towards_{condition.towards}{suffix}.json"
        if row.control_of:
            name = f"{condition.method}-for-{condition.control_of}-towards_{condition.towards}{suffix}.json"
        file.save(folder / name)
        if condition.towards is not None and winners.get(condition.towards) == row.name:
            file.save(folder / f"towards_{condition.towards}.json")
        return f"interventions/{name}"

    def _write_beside(self, lab: Lab, rows: Sequence[_Row], results: Mapping[str, Result]) -> None:
        """The answers behind the numbers, the scores behind the heads, and the prompts."""
        single = {row.name: results[row.name].report for row in rows if len(row.conditions) == 1}
        write_examples(self.out, example_frame(lab.asked, single))
        if "head_scores" in vars(lab):
            lab.head_scores["logit_diff"].save(self.out / HEADS)
        for split in ("train", "dev", "test"):
            lab.prompts.part(split).save(self.out / "prompts" / f"{split}.jsonl")


def model_record(lab: Lab) -> dict[str, Any]:
    """What a record says about the model."""
    shape = ("architecture", "n_layers", "n_heads", "d_head", "d_model")
    about = {name: getattr(lab.anatomy, name) for name in shape}
    return {"name": lab.name, **about, "fingerprint": fingerprint(lab.model)}


def made_with(lab: Lab) -> dict[str, Any]:
    """What a record says about where and with what it was made."""
    packages = ("torch", "transformers")
    versions = {"conflictscope": __version__, **{name: importlib.metadata.version(name) for name in packages}}
    dtype = str(lab.anatomy.dtype).removeprefix("torch.")
    return {"device": str(lab.anatomy.device), "dtype": dtype, "versions": versions}


def example_frame(asked: ConflictSet, reports: dict[str, UsageReport]) -> pl.DataFrame:
    """What each condition answered: ``condition``, the columns of ``UsageReport``, and what each source answers."""
    expected = pl.DataFrame(
        {
            "id": [example.id for example in asked],
            "memory_answers": [list(example.memory_answers) for example in asked],
            "context_answers": [list(example.context_answers) for example in asked],
        },
        schema_overrides={"memory_answers": pl.List(pl.String), "context_answers": pl.List(pl.String)},
    )
    rows = [report.frame.select(pl.lit(name).alias("condition"), pl.all()) for name, report in reports.items()]
    return pl.concat(rows).join(expected, on="id", how="left", maintain_order="left")


def _control(lab: Lab, method: Method, row: _Row, most: int | None) -> tuple[list[_Row], dict[str, str]]:
    """The random control of a row, of so many draws at most, if its method has one, or why it could not be drawn."""
    try:
        draws = method.controls(lab, row.conditions[0])[:most]
    except UserError as error:
        return [], {f"random control of {row.name}": str(error)}
    kinds = [draw.method.replace("_", " ") for draw in draws[:1]]
    return [_Row(f"{kind} for {row.name}", list(draws), control_of=row.name) for kind in kinds], {}


def _preferred(lab: Lab, choice: Choice, rows: Sequence[_Row]) -> _Row:
    """The row that dev prefers of some towards one source, by the rule of a choice."""
    tries = [(row, row.dev) for row in rows if row.dev is not None]
    towards = rows[0].conditions[0].towards
    if choice == "within_budget" or towards is None:
        return max(tries, key=lambda one: one[1].rate(towards))[0]
    best = best_of(lab, [dev for _, dev in tries], towards)
    return next(row for row, dev in tries if dev is best)


def _winner(lab: Lab, towards: Direction, chosen: _ChosenBy) -> str | None:
    """The name of the best condition over all methods that compete, by the rule that chooses within one."""
    bests = [found.best for (method, way), found in chosen.items() if way == towards and not method.derived]
    return best_of(lab, bests, towards).condition.name if bests else None


def _measured(row: _Row, test: Mapping[str, Any], cost: Mapping[str, float] | None, file: str | None) -> Measured:
    first = row.conditions[0]
    return Measured(
        name=row.name,
        method=first.method,
        test=test,
        towards=first.towards,
        choices=row.choices,
        settings=dict(first.settings),
        does=first.does,
        moved=first.moved,
        heads=first.heads,
        cost=cost,
        dev=None if row.dev is None else row.dev.numbers,
        control_of=row.control_of,
        draws=len(row.conditions),
        file=file,
    )


def _details(lab: Lab, chosen: _ChosenBy) -> dict[str, Any]:
    details: dict[str, dict[str, Any]] = {}
    for (method, towards), found in chosen.items():
        if said := method.details(lab, found.best.condition):
            details.setdefault(method.name, {})[f"towards_{towards}"] = dict(said)
    return details
