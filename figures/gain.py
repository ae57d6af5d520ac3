"""Figures of what edits gain and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from math import ceil, log10
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures.parts import estimate_of, usage_hover, written
from figures.theme import LIGHT_THEME, OTHER_COLOUR, SERIES_COLOURS, escape, interval
from interp.answers import DIRECTIONS, Direction

Guard = Literal["closed_book_accuracy", "aligned_accuracy", "irrelevant_accuracy", "neutral_kl"]
"""What an edit should not change."""
GUARD_LABELS: dict[Guard, str] = {
    "closed_book_accuracy": "closed-book accuracy",
    "aligned_accuracy": "accuracy, aligned context",
    "irrelevant_accuracy": "accuracy, irrelevant context",
    "neutral_kl": "KL divergence on neutral text (nats)",
}
"""What a guard is called on an axis."""

_METHOD_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", *SERIES_COLOURS)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "pentagon", "hexagon")
_METHOD_SYMBOLS = _SYMBOLS[1:]
_ENDINGS = {"edit": "", "control": "-open-dot", "unedited": "-open"}


class Point(NamedTuple):
    """One of the points of ``gain_and_damage``.

    Attributes:
        name: What hovering calls it.
        measures: Its ``memory_rate``, ``context_rate`` and the guard, as records of estimates.
        towards: The source that it strengthens; what has none is in both panels.
        kind: What it is: unedited is open, a random control open with a dot.
    """

    name: str
    measures: Mapping[str, Any]
    towards: Direction | None = None
    kind: Literal["edit", "control", "unedited"] = "edit"


def gain_and_damage(groups: Mapping[str, Sequence[Point]], *, guard: Guard = "closed_book_accuracy") -> go.Figure:
    """What edits gain (the wanted rate, to the right) against what they cost (a guard), one panel per direction.

    The dotted steps lead along what nothing else beats in both; random controls are left out of them.

    Args:
        groups: Points that share a colour and a symbol, by name.
        guard: What should not change.
    """
    figure = make_subplots(
        rows=1,
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.12,
        column_titles=[f"<b>towards {direction}</b>" for direction in DIRECTIONS],
    )
    for number, (name, points) in enumerate(groups.items()):
        symbol, colour = _SYMBOLS[number % len(_SYMBOLS)], SERIES_COLOURS[number % len(SERIES_COLOURS)]
        for column, direction in enumerate(DIRECTIONS, start=1):
            shown = [point for point in points if point.towards in (direction, None)]
            gained = [estimate_of(point.measures[f"{direction}_rate"]) for point in shown]
            kept = [estimate_of(point.measures[guard]) for point in shown]
            line = {"color": colour, "thickness": 1.2, "width": 0}
            figure.add_scatter(
                x=[e.value for e in gained],
                y=[e.value for e in kept],
                error_x=interval(gained) | line,
                error_y=interval(kept) | line,
                mode="markers",
                marker={"symbol": [symbol + _ENDINGS[point.kind] for point in shown], "size": 10, "color": colour},
                name=escape(name),
                showlegend=False,
                cliponaxis=False,
                hovertext=[_gain_hover(name, point, direction, guard) for point in shown],
                hovertemplate="%{hovertext}<extra></extra>",
                row=1,
                col=column,
            )
        key = {"symbol": symbol, "size": 9, "color": colour}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=key, name=escape(name))
    every = [point for points in groups.values() for point in points]
    for column, direction in enumerate(DIRECTIONS, start=1):
        competing = [p.measures for p in every if p.towards in (direction, None) and p.kind != "control"]
        figure.add_scatter(
            **_front(competing, direction, guard),
            mode="lines",
            line={"color": OTHER_COLOUR, "dash": "dot", "width": 1.5},
            name="front",
            showlegend=column == 1,
            hoverinfo="skip",
            row=1,
            col=column,
        )
        figure.update_xaxes(
            title_text=f"{direction} rate", range=[-0.04, 1.04], tickformat=".0%", dtick=0.5, col=column
        )
    figure.update_yaxes(title_text=GUARD_LABELS[guard], col=1)
    if guard == "neutral_kl":
        figure.update_yaxes(rangemode="tozero")
    else:
        lowest = min(estimate_of(point.measures[guard]).low for point in every)
        figure.update_yaxes(tickformat=".0%", range=[min(0.8, lowest - 0.05), 1.01])
    return figure.update_annotations(font_size=13).update_layout(
        template=LIGHT_THEME,
        height=360 + 22 * ceil(len(groups) / 2),
        margin_t=30,
        hovermode="closest",
        legend={"y": -0.2, "yanchor": "top", "entrywidth": 140},
    )


def _gain_hover(group: str, point: Point, direction: Direction, guard: Guard) -> str:
    wanted, kept = estimate_of(point.measures[f"{direction}_rate"]), estimate_of(point.measures[guard])
    heading = point.name if point.name == group else f"{group}: {point.name}"
    return (
        f"{usage_hover(heading, f'{direction} rate', wanted)}<br>{GUARD_LABELS[guard]} {written(kept, guard)}, "
        f"n = {kept.n} {'texts' if guard == 'neutral_kl' else 'prompts'}"
    )


def damage_fronts(tried: Sequence[Mapping[str, Any]]) -> go.Figure:
    """What candidates of each method gain on dev (to the right) and cost, one column per direction.

    Args:
        tried: Records with ``method``, ``towards``, ``does`` (in words), ``rate`` (share of conflict prompts that are
            answered from the wanted source), ``kept`` (closed-book accuracy) and ``damage`` (nats, by guard), as
            ``conflictscope.study.record`` has those that were asked guards. What a method does not have is ``None``.
    """
    figure = make_subplots(
        rows=2,
        cols=2,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.06,
        vertical_spacing=0.08,
        column_titles=[f"<b>towards {direction}</b>" for direction in DIRECTIONS],
    )
    methods = list(dict.fromkeys(record["method"] for record in tried))
    for number, method in enumerate(methods):
        marker = {
            "symbol": _METHOD_SYMBOLS[number % len(_METHOD_SYMBOLS)],
            "color": _METHOD_COLOURS[number % len(_METHOD_COLOURS)],
        }
        name = escape(method.replace("_", " "))
        for column, direction in enumerate(DIRECTIONS, start=1):
            own = [r for r in tried if r["method"] == method and r["towards"] == direction]
            own.sort(key=lambda r: r["rate"])
            costs = ([r["damage"].get("neutral") for r in own], [r["kept"] for r in own])
            for row, values in enumerate(costs, start=1):
                figure.add_scatter(
                    x=[r["rate"] for r in own],
                    y=values,
                    mode="markers",
                    marker=marker | {"size": 8},
                    name=name,
                    legendgroup=method,
                    showlegend=False,
                    hovertext=[f"{name}: {escape(r['does'])}" for r in own],
                    hovertemplate="%{hovertext}<br>rate %{x:.2f}, %{y:.3f}<extra></extra>",
                    row=row,
                    col=column,
                )
        figure.add_scatter(
            x=[None], y=[None], mode="markers", marker=marker | {"size": 9}, name=name, legendgroup=method
        )
    for column, direction in enumerate(DIRECTIONS, start=1):
        figure.update_xaxes(title_text=f"{direction} rate on dev", range=[0, 1.02], tickformat=".0%", row=2, col=column)
    lowest = min([0.85, *(r["kept"] for r in tried if r["kept"] is not None)]) - 0.05
    nats = [damage for r in tried if (damage := r["damage"].get("neutral"))] or [1.0]
    # 1, 2, 5, ...: of a narrower range an axis may hold none of these.
    ticks: dict[str, Any] = {"dtick": "D2"} if max(nats) > 5 * min(nats) else {"nticks": 4}
    ends = [log10(min(nats)) - 0.1, log10(max(nats)) + 0.1]
    figure.update_yaxes(type="log", range=ends, **ticks, row=1)
    figure.update_yaxes(tickformat=".0%", range=[lowest, 1.01], row=2)
    figure.update_yaxes(title_text="KL on text (nats)", row=1, col=1)
    figure.update_yaxes(title_text="closed-book accuracy", row=2, col=1)
    return figure.update_annotations(font_size=13).update_layout(
        template=LIGHT_THEME,
        height=620,
        margin_t=30,
        hovermode="closest",
        legend={"y": -0.12, "yanchor": "top", "entrywidth": 130},
    )


def _front(records: Iterable[Mapping[str, Any]], direction: Direction, guard: Guard) -> dict[str, list[float]]:
    """The steps ``x``, ``y`` between records than which none has both more gain and less damage (Pareto).

    Args:
        records: Their ``memory_rate``, ``context_rate`` and the guard.
        direction: The wanted source.
        guard: What should not change.
    """
    sign = -1 if guard == "neutral_kl" else 1
    points = [(estimate_of(r[f"{direction}_rate"]).value, sign * estimate_of(r[guard]).value) for r in records]
    front: list[tuple[float, float]] = []
    for gain, kept in sorted(points, reverse=True):
        if not front or kept > front[-1][1]:
            front.append((gain, kept))
    corners = [(a[0], b[1]) for a, b in pairwise(front)]
    steps = [point for pair in zip_longest(front, corners) for point in pair if point]
    return {"x": [gain for gain, _ in steps], "y": [sign * kept for _, kept in steps]}
