"""The figures of a run, and of several runs together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
import polars as pl
from plotly.basedatatypes import BaseFigure

from conflictscope.report.runs import Run
from conflictscope.report.words import clipped, interval, share, words
from conflictscope.study.record import UNEDITED, Measured
from figures.dial import dial_curve, dose_response
from figures.gain import GUARD_LABELS, damage_fronts, front, gain_panels, with_gain_axes
from figures.heads import head_map, top_heads_bars
from figures.probes import auroc_by_layer
from figures.theme import OTHER_COLOUR, SERIES_COLOURS, escape, percent
from figures.theme import interval as error_bars
from figures.usage import usage_bars, usage_by_template
from interp.answers import DIRECTIONS, Direction
from interp.attribution.scores import HeadScores
from interp.errors import UserError
from interp.statistics import Estimate
from probes.quality import ProbeScore

_STRONGEST = 8
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "pentagon", "hexagon")
_GUARD = "closed_book_accuracy"
_ON_A_LINE = ("memory_rate", "context_rate", *GUARD_LABELS)


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
    if record.tried:
        tried = [{**candidate, "does": clipped(candidate["does"])} for candidate in record.tried]
        plots["tried"] = Plot(
            damage_fronts(tried),
            f"Scatter chart of gain on dev against damage on text and closed-book, {len(tried)} candidates",
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
    groups: dict[str, list[Measured]] = {}
    for name, condition in named:
        if condition.test[_GUARD] is not None:
            groups.setdefault(name, []).append(condition)
    return Plot(
        gain_against_damage(groups),
        "Scatter chart of the wanted rate against closed-book accuracy; the table of all conditions holds its numbers",
    )


def gain_against_damage(groups: Mapping[str, Sequence[Measured]]) -> go.Figure:
    """The wanted rate (to the right) against closed-book accuracy, one panel per direction.

    Args:
        groups: Conditions that share a colour and a symbol, by name. What has no direction is in both panels; what is
            unedited is open, random controls are open with a dot. The dotted steps lead along what nothing else beats
            in both.
    """
    figure = gain_panels()
    lowest = 1.0
    for number, (name, conditions) in enumerate(groups.items()):
        symbol, colour = _SYMBOLS[number % len(_SYMBOLS)], SERIES_COLOURS[number % len(SERIES_COLOURS)]
        for column, direction in enumerate(DIRECTIONS, start=1):
            shown = [c for c in conditions if c.towards in (direction, None)]
            gained = [Estimate.from_record(c.test[f"{direction}_rate"]) for c in shown]
            kept = [Estimate.from_record(c.test[_GUARD]) for c in shown]
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
                        symbol + ("-open-dot" if c.is_control else "-open" if c.method == UNEDITED else "")
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
    edits = [c for conditions in groups.values() for c in conditions if not c.is_control]
    for column, direction in enumerate(DIRECTIONS, start=1):
        figure.add_scatter(
            **front([c.test for c in edits if c.towards in (direction, None)], direction, _GUARD),
            mode="lines",
            line={"color": OTHER_COLOUR, "dash": "dot", "width": 1.5},
            name="front",
            showlegend=column == 1,
            hoverinfo="skip",
            row=1,
            col=column,
        )
    return with_gain_axes(figure, lowest=lowest, height=360 + 22 * math.ceil(len(groups) / 2))


def _hover(name: str, condition: Measured, direction: Direction) -> str:
    measures = {f"{direction} rate": f"{direction}_rate", "closed-book accuracy": _GUARD}
    values = (
        f"{label} {share(condition.test[m])} [{interval(condition.test[m])}], n = {condition.test[m]['n']} prompts"
        for label, m in measures.items()
    )
    return "<br>".join([f"<b>{escape(name)}</b>", escape(condition.name), *values, "95% intervals by subject"])


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
    """Measures by dose: dev's rates, or, where they have intervals, those of all measures."""
    dose = next(key for key in points[0] if key not in (*_ON_A_LINE, "kept", "damage"))
    if isinstance(points[0]["memory_rate"], Mapping):
        doses = {p[dose]: {m: e for m, e in p.items() if m in _ON_A_LINE and e is not None} for p in points}
        figure = dose_response(doses, dose=words(dose))
    else:
        figure = dial_curve([{**p, "trust": p[dose]} for p in points])
        if dose != "trust":
            figure.update_xaxes(title_text=escape(words(dose)), range=None, autorange=True)
            figure.update_traces(hovertemplate=None, hoverinfo="x+y+name")
    said = "; ".join(
        f"{p[dose]:g}: " + ", ".join(f"{d} {_in_words(p[f'{d}_rate'])}" for d in ("memory", "context")) for p in points
    )
    return Plot(figure, f"Line chart of usage by {words(dose)}, {words(name)}. {said}")


def _in_words(rate: float | Mapping[str, Any]) -> str:
    return share(rate) if isinstance(rate, Mapping) else percent(rate)


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
