"""The figures of a run, and of several runs together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
import polars as pl
from plotly.basedatatypes import BaseFigure

from conflictscope.report.runs import Condition, Run
from conflictscope.report.words import interval, share
from figures.dial import dial_curve
from figures.gain import gain_and_damage, gain_panels, with_gain_axes
from figures.heads import head_map, top_heads_bars
from figures.probes import auroc_by_layer
from figures.theme import SERIES_COLOURS, escape
from figures.theme import interval as error_bars
from figures.usage import usage_bars, usage_by_template
from interp.answers import DIRECTIONS, Direction
from interp.attribution.scores import HeadScores
from interp.errors import UserError
from interp.statistics import Estimate
from probes.quality import ProbeScore

_STRONGEST = 8
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "pentagon", "hexagon")


class Plot(NamedTuple):
    """A figure of the page: what to draw, and what it shows in words for those who do not see it."""

    figure: BaseFigure
    alt: str


def plots_of(run: Run) -> dict[str, Plot]:
    """The figures of a run, by name."""
    if run.table is not None:
        return _probe_plots(run.table)
    plots = _usage_plots(run)
    if run.kind == "demo":
        control: dict[Direction, Mapping] = {
            d: c.test for d in DIRECTIONS for c in run.conditions if c.is_control and c.towards in (d, None)
        }
        edits: dict[str, dict[Direction, Mapping]] = {}
        for c in run.conditions:
            if c.towards and not c.is_control:
                edits.setdefault(c.method, {})[c.towards] = c.test
        figure = gain_and_damage(run.unedited.test, edits, control=control)
    else:
        groups: dict[str, list[Condition]] = {}
        for c in run.conditions:
            groups.setdefault(c.method, []).append(c)
        figure = gain_against_damage(groups)
    plots["cost"] = Plot(
        figure,
        "Scatter chart of the wanted rate against closed-book accuracy; the table that follows holds its numbers",
    )
    if run.scores is not None:
        plots |= _head_plots(run, run.scores)
    if run.kind == "dial":
        points = run.record["calibration"]
        said = "; ".join(
            f"trust {p['trust']:+g}: memory {p['memory_rate']:.0%}, context {p['context_rate']:.0%}" for p in points
        )
        plots["dial"] = Plot(dial_curve(points), f"Line chart of usage by the dial's setting. {said}")
    return plots


def compared(runs: Sequence[Run]) -> Plot:
    """Gain and damage of every condition of several runs."""
    return Plot(
        gain_against_damage({run.name: run.conditions for run in runs if run.conditions}),
        "Scatter chart of the wanted rate against closed-book accuracy, one colour and symbol for each run; the table "
        "above holds its numbers",
    )


def gain_against_damage(groups: Mapping[str, Sequence[Condition]]) -> go.Figure:
    """The wanted rate (to the right) against closed-book accuracy, one panel per direction.

    Args:
        groups: Conditions that share a colour and a symbol, by name. What has no direction is in both panels; what is
            unedited is open, random controls are open with a dot.
    """
    figure = gain_panels()
    lowest = 1.0
    for number, (name, conditions) in enumerate(groups.items()):
        symbol, colour = _SYMBOLS[number % len(_SYMBOLS)], SERIES_COLOURS[number % len(SERIES_COLOURS)]
        for column, direction in enumerate(DIRECTIONS, start=1):
            shown = [c for c in conditions if c.towards in (direction, None)]
            gained = [Estimate.from_record(c.test[f"{direction}_rate"]) for c in shown]
            kept = [Estimate.from_record(c.test["closed_book_accuracy"]) for c in shown]
            lowest = min([lowest, *(e.low for e in kept)])
            line = {"color": colour, "thickness": 1.2, "width": 0}
            figure.add_scatter(
                x=[e.value for e in gained],
                y=[e.value for e in kept],
                error_x=error_bars(gained) | line,
                error_y=error_bars(kept) | line,
                mode="markers",
                marker={
                    "symbol": [
                        symbol + ("-open-dot" if c.is_control else "" if c.method != "unedited" else "-open")
                        for c in shown
                    ],
                    "size": 10,
                    "color": colour,
                },
                showlegend=False,
                cliponaxis=False,
                hovertext=[_hover(name, c, direction) for c in shown],
                hovertemplate="%{hovertext}<extra></extra>",
                row=1,
                col=column,
            )
        figure.add_scatter(
            x=[None], y=[None], mode="markers", marker={"symbol": symbol, "size": 9, "color": colour}, name=escape(name)
        )
    return with_gain_axes(figure, lowest=lowest, height=360 + 22 * math.ceil(len(groups) / 2))


def _hover(name: str, condition: Condition, direction: Direction) -> str:
    measures = {f"{direction} rate": f"{direction}_rate", "closed-book accuracy": "closed_book_accuracy"}
    values = (
        f"{label} {share(condition.test[m])} [{interval(condition.test[m])}], n = {condition.test[m]['n']} prompts"
        for label, m in measures.items()
    )
    return "<br>".join([f"<b>{escape(name)}</b>", escape(condition.name), *values, "95% intervals by subject"])


def _usage_plots(run: Run) -> dict[str, Plot]:
    shown = [c for c in run.conditions if c.in_figures or c in run.cards]
    labels = {f"towards {c.towards}" if run.kind == "demo" and c.marked else c.name: c for c in shown}
    rates = "; ".join(
        f"{label}: " + ", ".join(f"{u} {share(c.test[f'{u}_rate'])}" for u in ("memory", "context", "other"))
        for label, c in labels.items()
    )
    by_template = {label: c.test["by_template"] for label, c in labels.items() if not c.is_control}
    return {
        "usage": Plot(usage_bars({label: c.test for label, c in labels.items()}), f"Bar chart of usage. {rates}"),
        "templates": Plot(
            usage_by_template(by_template, held_out=[run.held_out]),
            "Dot chart of usage by phrasing family; the table that follows holds its numbers",
        ),
    }


def _head_plots(run: Run, scores: HeadScores) -> dict[str, Plot]:
    edited = [(layer, head) for d in DIRECTIONS for layer, head, _ in run.record[f"towards_{d}"]["heads"]]
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


def _probe_plots(table: pl.DataFrame) -> dict[str, Plot]:
    plots = {}
    for label in table["label"].unique(maintain_order=True):
        own = table.filter(label=label, group="test")
        fitted = _scores(own.filter(probe="fitted"))
        floors = _scores(own.filter(probe="floor"))
        shuffled = {site: score.auroc for site, score in _scores(own.filter(probe="shuffled labels")).items()}
        floor = next(iter(floors), None)
        best = next(iter(own.filter(chosen=True, probe="fitted")["site"]), None)
        if best not in fitted:
            raise UserError(f"The scores of {label} lack the probe that was chosen on dev; run probe score again.")
        plots[label] = Plot(
            auroc_by_layer(
                fitted,
                shuffled=shuffled or None,
                floor=floors[floor] if floor else None,
                floor_label="floor" if floor == "known beforehand" else "embedding floor",
                chosen=best,
            ),
            f"Line chart of AUROC by layer and kind of site; chosen on dev is {best}, AUROC "
            f"{fitted[best].auroc.value:.2f}",
        )
    return plots


def _scores(rows: pl.DataFrame) -> dict[str, ProbeScore]:
    """Scores by site, as far as the table tells them."""
    unknown = Estimate(math.nan, math.nan, math.nan, 0)
    found: dict[str, dict[str, Estimate]] = {}
    for site, measure, *numbers in rows.select("site", "measure", "value", "low", "high", "n").iter_rows():
        found.setdefault(site, {})[measure] = Estimate(*numbers)
    names = ("auroc", "auprc", "accuracy", "calibration_error")
    return {
        site: ProbeScore(*(measures.get(name, unknown) for name in names), prevalence=math.nan, reliability=())
        for site, measures in found.items()
    }
