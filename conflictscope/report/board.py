"""Rank methods over many studies: models, data sets and seeds, at equal damage.

1. A cell is what one method did to one model on one data set, towards one source, by one of dev's choices: gain and
   losses prompt by prompt against the unedited model, pooled over seeds.
2. Intervals resample subjects and seeds (``interp.statistics.pigeonhole_means``). What is averaged over cells, each
   weighing the same, is resampled together, so that a subject or seed that cells share is drawn in all of them.
3. What a record holds as an estimate alone (divergence, speed, random controls) is averaged with its interval's ends.
4. Methods are ranked by gain. Within the budget, where all may damage equally much on dev, a method of which nothing
   fits gains 0, as it is not applied. A method that could not run somewhere has no rank.
5. Ranks over models and data sets are tested (``interp.ranks``), and the front is what nothing beats in gain, damage
   and speed at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, product
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from conflictscope.report.runs import Run
from conflictscope.study.leaderboard import LOSSES, lost
from conflictscope.study.method import registered
from conflictscope.study.record import UNEDITED, WITHIN, Choice, Measured
from interp.answers import DIRECTIONS, Direction
from interp.errors import UserError
from interp.evaluation import GUARDS
from interp.ranks import LEAST_BLOCKS, LEAST_METHODS, Ranks, compare_ranks
from interp.statistics import Crossed, Estimate, pigeonhole_means

CHOICES: tuple[Choice, ...] = ("within_budget", "best")
"""How conditions are chosen on dev; the first compares at equal damage."""


_NOTHING = Estimate(0.0, 0.0, 0.0, 0)


class Block(NamedTuple):
    """What a method is tried on: a model and a data set."""

    model: str
    data: str


@dataclass(frozen=True)
class Numbers:
    """What an edit gains and costs.

    Attributes:
        gain: How much the rate of the wanted source rose, a share of conflict prompts.
        losses: How much accuracies fell, by what they are called; ``None`` where one does not apply.
        kl: Divergence at the ends of ordinary text, nats; ``None`` where it does not apply.
        speed: Tokens per second relative to the unedited model; ``None`` where it was not timed.
    """

    gain: Estimate
    losses: Mapping[str, Estimate | None]
    kl: Estimate | None
    speed: Estimate | None

    @property
    def damage(self) -> float | None:
        """The largest of the losses; ``None`` where none applies."""
        return max((loss.value for loss in self.losses.values() if loss is not None), default=None)


@dataclass(frozen=True, eq=False)
class Study:
    """One study of the board: a model, a data set, a seed, and the answers to test's prompts.

    Attributes:
        number: Its place on the board, from 0.
        run: What was read.
        block: Its model and data set.
        seed: Its seed.
    """

    number: int
    run: Run = field(repr=False)
    block: Block
    seed: int

    def asks(self, measure: str) -> bool:
        """Whether there are prompts that a rate or an accuracy is measured on."""
        return bool(self._outcome(UNEDITED, measure)[0])

    def changes(self, conditions: Sequence[str], measure: str) -> Crossed:
        """By how much each prompt's outcome rose: 1, 0 or -1, ``(n_prompts, n_conditions)``.

        Args:
            conditions: What was measured; the unedited model changes nothing.
            measure: A rate on conflict prompts, or an accuracy.
        """
        subjects, before = self._outcome(UNEDITED, measure)
        after = [self._outcome(condition, measure)[1] for condition in conditions]
        return Crossed(np.stack(after, axis=1) - before[:, None], subjects, [self.seed] * len(subjects))

    def _outcome(self, condition: str, measure: str) -> tuple[list[str], np.ndarray]:
        """The subject of each prompt, and 1 where it was answered as the measure counts, else 0."""
        if (condition, measure) not in self._outcomes:
            raise UserError(f"The examples of {self.run.name} lack {condition}; run the study again.")
        return self._outcomes[condition, measure]

    @cached_property
    def _outcomes(self) -> dict[tuple[str, str], tuple[list[str], np.ndarray]]:
        examples = self.run.examples
        assert examples is not None
        found = {}
        first = examples.filter(condition=UNEDITED).select("id")
        for (name,), part in examples.partition_by("condition", as_dict=True).items():
            rows = first.join(part, on="id", how="left", maintain_order="left")
            if rows["usage"].null_count() or rows.height != part.height:
                raise UserError(f"The examples of {self.run.name} have other prompts of {name}; run the study again.")
            conflicts = rows.filter(kind="conflict")
            outcomes = {f"{d}_rate": (conflicts, conflicts["usage"] == d) for d in DIRECTIONS}
            for measure, kind in GUARDS.items():
                guards = rows.filter(kind=kind)
                outcomes[measure] = (guards, guards["memory_span_match"] > 0)
            for measure, (frame, outcome) in outcomes.items():
                found[str(name), measure] = (frame["subject"].to_list(), outcome.cast(pl.Float64).to_numpy())
        return found


class Source(NamedTuple):
    """What one study adds to a cell.

    Attributes:
        study: The study.
        condition: What it measured; ``None`` where nothing fits the budget, so that nothing is done.
    """

    study: Study
    condition: Measured | None

    @property
    def name(self) -> str:
        """The condition's name; that of the unedited model where nothing is done."""
        return UNEDITED if self.condition is None else self.condition.name


@dataclass(frozen=True)
class Cell:
    """What one method did on one block.

    Attributes:
        block: The model and the data set.
        towards: The source that it was to strengthen.
        choice: How it was chosen on dev.
        method: Its name.
        sources: What it is pooled from, a study for each seed.
        seeds: How many seeds the block has, among them those that the method could not run with.
        numbers: What it gains and costs.
    """

    block: Block
    towards: Direction
    choice: Choice
    method: str
    sources: tuple[Source, ...] = field(repr=False)
    seeds: int
    numbers: Numbers

    @property
    def applied(self) -> int:
        """In how many of its studies something fits the budget."""
        return sum(source.condition is not None for source in self.sources)


@dataclass(frozen=True)
class Row:
    """What one method, or one random control, did over the blocks of a view.

    Attributes:
        method: Its name; of a control what was drawn.
        numbers: The mean over its cells.
        cells: In how many of the view's blocks it ran.
        applied: In how many studies it was applied.
        studies: Of how many.
        rank: Its place by gain, among the methods that ran in every study; ``None`` for others and for controls.
        on_front: Whether no other ranked method beats it in gain, damage and speed at once.
        is_derived: Whether it is an ablation of another method.
        control_of: The method that it is a random control of.
    """

    method: str
    numbers: Numbers
    cells: int
    applied: int
    studies: int
    rank: int | None = None
    on_front: bool = False
    is_derived: bool = False
    control_of: str | None = None

    @property
    def name(self) -> str:
        """What people read."""
        return (self.method if self.control_of is None else f"{self.method} for {self.control_of}").replace("_", " ")


class Refusal(NamedTuple):
    """Why a method is not there in a study."""

    method: str
    study: Study
    towards: Direction
    reason: str


@dataclass(frozen=True)
class View:
    """The leaderboard of some blocks.

    Attributes:
        towards: The source that is wanted.
        choice: How conditions were chosen.
        model: The model; ``None`` for all.
        data: The data set; ``None`` for all.
        blocks: What it is about.
        rows: The ranked methods, the best first, then those that did not run everywhere.
        controls: Random controls, in the order of their methods.
        refused: Why methods did not run.
        ranks: The test of ranks over blocks, or a sentence that says why there is none.
    """

    towards: Direction
    choice: Choice
    model: str | None
    data: str | None
    blocks: tuple[Block, ...]
    rows: tuple[Row, ...]
    controls: tuple[Row, ...]
    refused: tuple[Refusal, ...]
    ranks: Ranks | str


@dataclass(frozen=True)
class Board:
    """Many studies together.

    Attributes:
        studies: The studies.
        cells: What every method did on every block.
        refused: Why methods are not there.
        missing: The studies that are not there though others of the same model, data set and seed are.
        unfinished: The studies that still have methods to measure.
        budgets: The largest divergence on each guard that a choice within budget had on dev, nats.
        is_quick: Whether the studies were made with little data, to see that all runs.
    """

    studies: tuple[Study, ...]
    cells: tuple[Cell, ...]
    refused: tuple[Refusal, ...]
    missing: tuple[tuple[str, str, int], ...]
    unfinished: tuple[Study, ...]
    budgets: Mapping[str, float]
    is_quick: bool

    @property
    def models(self) -> list[str]:
        """The models, in the order of their studies."""
        return list(dict.fromkeys(study.block.model for study in self.studies))

    @property
    def data_sets(self) -> list[str]:
        """The data sets, likewise."""
        return list(dict.fromkeys(study.block.data for study in self.studies))

    def view(
        self, towards: Direction, choice: Choice = CHOICES[0], *, model: str | None = None, data: str | None = None
    ) -> View | None:
        """Rank the methods on some blocks.

        Args:
            towards: The source that is wanted.
            choice: How conditions were chosen on dev.
            model: One model; all by default.
            data: One data set; all by default.

        Returns:
            The leaderboard; ``None`` where no study has such conditions.
        """

        def is_meant(block: Block) -> bool:
            return model in (None, block.model) and data in (None, block.data)

        own = [c for c in self.cells if (c.towards, c.choice) == (towards, choice) and is_meant(c.block)]
        if not own:
            return None
        blocks = tuple(dict.fromkeys(c.block for c in own))
        by_method: dict[str, list[Cell]] = {}
        for cell in own:
            by_method.setdefault(cell.method, []).append(cell)
        rows = list(_rows(by_method, towards))
        whole = [name for name, cells in by_method.items() if _ran_everywhere(cells, blocks)]
        return View(
            towards,
            choice,
            model,
            data,
            blocks,
            tuple(_ranked(rows, whole)),
            tuple(control_rows(own)),
            tuple(r for r in self.refused if r.towards == towards and is_meant(r.study.block)),
            _ranks({name: by_method[name] for name in whole}, blocks),
        )


def board_of(runs: Sequence[Run]) -> Board:
    """Put studies together.

    Args:
        runs: What ``read_runs`` gave.

    Raises:
        UserError: If there is none, one left no answers, two are of the same model, data set and seed, or they were
            made with different budgets.
    """
    studies = _studies(runs)
    records = [study.run.record.settings for study in studies]
    settings = [(dict(own.get("budgets", {})), bool(own.get("quick"))) for own in records]
    for study, other in zip(studies, settings, strict=True):
        if other != settings[0]:
            raise UserError(
                f"{studies[0].run.name} and {study.run.name} were made with different budgets, or one of them with "
                "--quick; give studies that were made alike."
            )
    blocks = dict.fromkeys(study.block for study in studies)
    seeds = sorted({study.seed for study in studies})
    there = {(*study.block, study.seed) for study in studies}
    models, data_sets = (list(dict.fromkeys(names)) for names in zip(*blocks, strict=True))
    return Board(
        studies,
        tuple(cell for block in blocks for cell in _cells([s for s in studies if s.block == block])),
        tuple(refusal for study in studies for refusal in _refusals(study)),
        tuple(one for one in product(models, data_sets, seeds) if one not in there),
        tuple(study for study in studies if study.run.record.to_come),
        *settings[0],
    )


def is_derived(method: str) -> bool:
    """Whether a method is an ablation of another; one that is not installed here is taken for none."""
    return (found := registered().get(method)) is not None and found.derived


def _studies(runs: Sequence[Run]) -> tuple[Study, ...]:
    """The runs in the order of model, data set and seed."""
    if not runs:
        raise UserError("There is no study to rank; give folders below which a study.json lies.")
    found: dict[tuple[str, str, int], Run] = {}
    prints: dict[str, Any] = {}
    for run in runs:
        if run.examples is None or "memory_span_match" not in run.examples.columns:
            raise UserError(f"{run.name} left no answers to compare; run its command again in the same folder.")
        about = run.record
        try:
            key = (str(about.model["name"]), str(about.data["name"]), int(about.settings["seed"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"The record of {run.name} lacks something ({error}); run the study again.") from error
        if key in found:
            raise UserError(
                f"{found[key].name} and {run.name} are both of {key[0]} on {key[1]}, seed {key[2]}; give one of them."
            )
        if prints.setdefault(key[0], about.model.get("fingerprint")) != about.model.get("fingerprint"):
            raise UserError(
                f"Two different models are called {key[0]}, one in {run.name}; give studies of one of them."
            )
        found[key] = run
    order = sorted(found.items(), key=lambda one: one[0])
    return tuple(Study(n, run, Block(model, data), seed) for n, ((model, data, seed), run) in enumerate(order))


def _cells(studies: Sequence[Study]) -> Iterator[Cell]:
    """The cells of one block."""
    for towards, choice in product(DIRECTIONS, CHOICES):
        sources: dict[str, tuple[Source, ...]] = {}
        for study in studies:
            for method, condition in _chosen(study, towards, choice):
                sources[method] = (*sources.get(method, ()), Source(study, condition))
        numbers = _numbers({method: [own] for method, own in sources.items()}, towards)
        for method, own in sources.items():
            yield Cell(studies[0].block, towards, choice, method, own, len(studies), numbers[method])


def _chosen(study: Study, towards: Direction, choice: Choice) -> Iterator[tuple[str, Measured | None]]:
    """What was chosen of each method; ``None`` where nothing fits the budget."""
    record = study.run.record
    yield from ((c.method, c) for c in record.chosen(towards, choice))
    if choice == "within_budget":
        best = record.chosen(towards, "best")
        yield from ((c.method, None) for c in best if f"{c.name}{WITHIN}" in record.not_run)


def _refusals(study: Study) -> Iterator[Refusal]:
    record = study.run.record
    for key, reason in record.not_run.items():
        method, _, named = key.partition(", towards ")
        if not (key.endswith(WITHIN) or key.startswith("random control of ")):
            yield from (Refusal(method, study, d, reason) for d in DIRECTIONS if named in ("", d))
    for method, towards in product(record.to_come, DIRECTIONS):
        yield Refusal(method, study, towards, "The study has not come to it yet.")


def _numbers(methods: Mapping[str, Sequence[Sequence[Source]]], towards: Direction) -> dict[str, Numbers]:
    """What methods gain and cost over their cells, each cell weighing the same."""

    def speed(source: Source) -> Mapping[str, Any] | None:
        if source.condition is None:
            return Estimate(1.0, 1.0, 1.0, 0).to_record()
        cost = source.condition.cost
        return cost and {"value": cost["speed"], "low": cost["low"], "high": cost["high"], "n": 1}

    gains = _pooled(methods, f"{towards}_rate")
    losses = {label: _pooled(methods, measure, sign=-1) for label, measure in LOSSES.items()}
    return {
        method: Numbers(
            gains[method],
            {label: found.get(method) for label, found in losses.items()},
            _divergence(cells),
            _averaged([[speed(source) for source in cell] for cell in cells]),
        )
        for method, cells in methods.items()
    }


def _divergence(cells: Sequence[Sequence[Source]]) -> Estimate | None:
    found = [[_NOTHING.to_record() if c is None else c.test["neutral_kl"] for _, c in cell] for cell in cells]
    # Where it is not applied nothing moves, but that says nothing of what it would do.
    return None if any(one is None for cell in found for one in cell) else _averaged(found)


def _pooled(methods: Mapping[str, Sequence[Sequence[Source]]], measure: str, *, sign: int = 1) -> dict[str, Estimate]:
    """The mean change of a measure over cells, by method, resampled by subject and seed.

    Cells without prompts for it are left out, and so is a method that it does not apply to.
    """
    # What is of the same studies is of the same prompts, and is drawn at once.
    alike: dict[tuple[tuple[Study, ...], ...], dict[str, list[list[Source]]]] = {}
    for method, cells in methods.items():
        own = [[source for source in cell if source.study.asks(measure)] for cell in cells]
        own = [cell for cell in own if cell]
        if own and all(c is None or c.test[measure] is not None for cell in own for _, c in cell):
            studies = tuple(tuple(source.study for source in cell) for cell in own)
            alike.setdefault(studies, {})[method] = own
    found = {}
    for studies, members in alike.items():
        tables = []
        for number, cell in enumerate(studies):
            parts = [
                study.changes([own[number][place].name for own in members.values()], measure)
                for place, study in enumerate(cell)
            ]
            values, rows, columns = zip(*parts, strict=True)
            tables.append(Crossed(sign * np.concatenate(values), [*chain(*rows)], [*chain(*columns)]))
        # A table of which nothing was drawn says nothing in that draw.
        drawn = np.ma.masked_invalid(pigeonhole_means(tables)).mean(1).filled(np.nan)
        lows, highs = np.nanquantile(drawn, [0.025, 0.975], axis=0) + 0.0
        means = np.mean([table.values.mean(0) for table in tables], axis=0) + 0.0
        n = sum(len(table.values) for table in tables)
        for method, value, low, high in zip(members, means, lows, highs, strict=True):
            found[method] = Estimate(float(value), float(low), float(high), n)
    return found


def _averaged(cells: Sequence[Sequence[Mapping[str, Any] | None]]) -> Estimate | None:
    """The mean of estimates by seed, then by cell, and of the ends of their intervals; ``None`` where there is none."""
    known = [[one for one in cell if one is not None] for cell in cells]
    known = [cell for cell in known if cell]
    if not known:
        return None
    value, low, high = (fmean(fmean(one[part] for one in cell) for cell in known) for part in ("value", "low", "high"))
    return Estimate(value, low, high, sum(one["n"] for cell in known for one in cell))


def _ran_everywhere(cells: Sequence[Cell], blocks: Sequence[Block]) -> bool:
    return len(cells) == len(blocks) and all(len(cell.sources) == cell.seeds for cell in cells)


def _rows(methods: Mapping[str, Sequence[Cell]], towards: Direction) -> Iterator[Row]:
    several = {method: [cell.sources for cell in cells] for method, cells in methods.items() if len(cells) > 1}
    numbers = _numbers(several, towards)
    for method, cells in methods.items():
        yield Row(
            method,
            numbers[method] if method in numbers else cells[0].numbers,
            len(cells),
            sum(cell.applied for cell in cells),
            sum(len(cell.sources) for cell in cells),
            is_derived=is_derived(method),
        )


def _ranked(rows: Sequence[Row], whole: Sequence[str]) -> Iterator[Row]:
    """The rows by gain, with ranks and front of those that ran everywhere, which come first."""
    competing = [row for row in rows if row.method in whole]
    front = front_of([row.numbers for row in competing if row.applied])
    for row in sorted(rows, key=lambda row: (row.method not in whole, -row.numbers.gain.value)):
        if row.method not in whole:
            yield row
            continue
        rank = 1 + sum(other.numbers.gain.value > row.numbers.gain.value for other in competing)
        yield replace(row, rank=rank, on_front=any(row.numbers is numbers for numbers in front))


def front_of(found: Sequence[Numbers]) -> list[Numbers]:
    """Those that no other beats: none is at least as good in gain, damage and speed, and better in one of them.

    Only by what was measured: what was not timed is compared by gain and damage, and beats nothing that was timed.
    """

    def beats(one: Numbers, other: Numbers) -> bool:
        pairs = [(one.gain.value, other.gain.value)]
        if other.damage is not None:
            pairs.append((-math.inf if one.damage is None else -one.damage, -other.damage))
        if other.speed is not None:
            pairs.append((-math.inf if one.speed is None else one.speed.value, other.speed.value))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [one for one in found if not any(beats(other, one) for other in found)]


def control_rows(cells: Sequence[Cell]) -> Iterator[Row]:
    """The random controls of some cells of one source and choice: what the records hold of them, averaged."""
    found: dict[tuple[str, str], dict[Block, list[Measured]]] = {}
    for cell in cells:
        for study, condition in cell.sources:
            for control in study.run.record.controls_of(condition) if condition is not None else ():
                found.setdefault((control.method, cell.method), {}).setdefault(cell.block, []).append(control)
    towards = cells[0].towards
    for (kind, method), blocks in found.items():
        own = list(blocks.values())

        def changes(measure: str, own: Sequence[Sequence[Measured]] = own) -> list[list[Mapping[str, Any] | None]]:
            return [[control.test.get("change", {}).get(measure) for control in cell] for cell in own]

        if (gain := _averaged(changes(f"{towards}_rate"))) is None:
            continue
        losses = {
            label: _averaged([[lost(change) for change in cell] for cell in changes(measure)])
            for label, measure in LOSSES.items()
        }
        kl = _averaged([[control.test["neutral_kl"] for control in cell] for cell in own])
        studies = sum(map(len, own))
        yield Row(kind, Numbers(gain, losses, kl, None), len(own), studies, studies, control_of=method)


def _ranks(cells: Mapping[str, Sequence[Cell]], blocks: Sequence[Block]) -> Ranks | str:
    if len(blocks) < LEAST_BLOCKS or len(cells) < LEAST_METHODS:
        return (
            "Ranks are tested over two data sets or more (counted once for each model) and three methods or more that "
            f"ran on all of them; here are {len(blocks)} and {len(cells)}."
        )
    gains = {name: {c.block: c.numbers.gain.value for c in own} for name, own in cells.items()}
    return compare_ranks({name: np.array([own[block] for block in blocks]) for name, own in gains.items()})
