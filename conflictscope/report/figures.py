"""The figures of a run, and of several runs together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
from plotly.basedatatypes import BaseFigure

from conflictscope.report.runs import Run
from conflictscope.report.words import clipped, share, words
from conflictscope.study.record import UNEDITED, Measured
from figures.dial import dial_curve
from figures.gain import Point, damage_fronts, gain_and_damage
from figures.heads import agreement_map, head_map, top_heads_bars
from figures.probe_scores import auroc_of_scores
from figures.theme import percent
from figures.usage import usage_bars, usage_by_template
from interp.answers import DIRECTIONS
from interp.attribution.scores import HeadScores

_STRONGEST = 8
_GUARD = "closed_book_accuracy"


class Plot(NamedTuple):
    """A figure of the page: what to draw, and what it shows in words for those who do not see it."""

    figure: BaseFigure
    alt: str


def plots_of(run: Run) -> dict[str, Plot]:
    """The figures of a run, by name."""
    if run.table is not None:
        return _probe_plots(run.table)
    record = run.record
    plots = _usage_plots(run)
    if _can_be_drawn([run]):
        plots["cost"] = _gain_plot(_by_method(run))
    if run.scores is not None:
        plots |= _head_plots(run, run.scores)
    if agreement := record.details.get("agreement"):
        plots["agreement"] = _agreement_plot(agreement)
    if weighed := [{**candidate, "does": clipped(candidate["does"])} for candidate in record.weighed]:
        plots["tried"] = Plot(
            damage_fronts(weighed),
            f"Scatter chart of gain on dev against damage on text and closed-book, {len(weighed)} candidates",
        )
    for number, (name, points) in enumerate(record.lines.items()):
        plots[f"line-{number}"] = _line_plot(name, points)
    return plots


def compared(runs: Sequence[Run]) -> Plot | None:
    """Gain and damage of every condition of several runs; ``None`` where none was asked closed-book."""
    measured = [run for run in runs if run.conditions]
    return _gain_plot([(run.name, c) for run in measured for c in run.conditions]) if _can_be_drawn(measured) else None


def _can_be_drawn(runs: Sequence[Run]) -> bool:
    return any(run.conditions and run.unedited.test[_GUARD] is not None for run in runs)


def _by_method(run: Run) -> list[tuple[str, Measured]]:
    """The conditions with their methods; controls belong to that of what they control."""
    methods = {c.name: c.method for c in run.conditions}
    return [(words(methods.get(c.control_of or c.name, c.method)), c) for c in run.conditions]


def _gain_plot(named: Sequence[tuple[str, Measured]]) -> Plot:
    groups: dict[str, list[Point]] = {}
    for name, c in named:
        if c.test[_GUARD] is not None:
            kind = "control" if c.is_control else "unedited" if c.method == UNEDITED else "edit"
            groups.setdefault(name, []).append(Point(c.name, c.test, c.towards, kind))
    return Plot(
        gain_and_damage(groups),
        "Scatter chart of the wanted rate against closed-book accuracy; the table of all conditions holds its numbers",
    )


def _usage_plots(run: Run) -> dict[str, Plot]:
    rates = "; ".join(
        f"{c.name}: " + ", ".join(f"{u} {share(c.test[f'{u}_rate'])}" for u in ("memory", "context", "other"))
        for c in run.cards
    )
    by_template = {
        f"towards {c.towards}" if c.towards else c.name: c.test["by_template"] for c in run.cards if not c.is_control
    }
    return {
        "usage": Plot(usage_bars({c.name: c.test for c in run.cards}), f"Bar chart of usage. {rates}"),
        "templates": Plot(
            usage_by_template(by_template, held_out=[run.held_out] if run.held_out else ()),
            "Dot chart of usage by phrasing family; the table that follows holds its numbers",
        ),
    }


def _line_plot(name: str, points: Sequence[Mapping[str, Any]]) -> Plot:
    dose = next(iter(points[0]))
    said = "; ".join(
        f"{p[dose]:g}: " + ", ".join(f"{d} {percent(p[f'{d}_rate'])}" for d in ("memory", "context")) for p in points
    )
    return Plot(dial_curve(points, dose=dose), f"Line chart of usage by {words(dose)}, {words(name)}. {said}")


def _head_plots(run: Run, scores: HeadScores) -> dict[str, Plot]:
    edited: Iterable[tuple[int, int]] = [(layer, head) for w in run.winners.values() for layer, head, _ in w.heads]
    strongest = "; ".join(
        f"towards {d}: " + ", ".join(f"{h.layer}.{h.head} ({h.score:+.2f})" for h in scores.ranked(d)[:_STRONGEST])
        for d in DIRECTIONS
    )
    return {
        "map": Plot(
            head_map(scores, highlighted=edited), f"Heat map of head scores, layer by head. Strongest {strongest}"
        ),
        "top": Plot(top_heads_bars(scores, _STRONGEST), f"Bar chart of the strongest heads, {strongest}"),
    }


def _agreement_plot(agreement: Mapping[str, Mapping[str, float]]) -> Plot:
    pairs = [f"{a} and {b} {agreement[a][b]:.2f}" for a in agreement for b in agreement[a] if a < b]
    return Plot(agreement_map(agreement), f"Heat map of rank correlations: {'; '.join(pairs)}")


def _probe_plots(table: pl.DataFrame) -> dict[str, Plot]:
    plots = {}
    for label in table["label"].unique(maintain_order=True):
        figure, best = auroc_of_scores(table.filter(label=label)), best_probes(table)[label]
        said = f"chosen on dev is {best['site']}, AUROC {best['value']:.2f}"
        plots[label] = Plot(figure, f"Line chart of AUROC by layer and kind of site; {said}")
    return plots


def best_probes(table: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """For each label the AUROC on test of the probe that dev chose."""
    chosen = table.filter(pl.col("chosen"), probe="fitted", group="test", measure="auroc")
    return {row["label"]: row for row in chosen.iter_rows(named=True)}
