"""Figures of what edits gain and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures.parts import estimate_of, usage_hover, written
from figures.theme import COLOURS, LIGHT_THEME, OTHER_COLOUR, SERIES_COLOURS, escape, interval
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
_METHOD_SYMBOLS = ("square", "diamond", "triangle-up", "star", "pentagon", "hexagon")


def gain_and_damage(
    baseline: Mapping[str, Any],
    edits: Mapping[str, Mapping[Direction, Mapping[str, Any]]],
    *,
    control: Mapping[Direction, Mapping[str, Any]] | None = None,
    guard: Guard = "closed_book_accuracy",
) -> go.Figure:
    """What each edit gains (the wanted rate, to the right) against what it costs (a guard), one panel per direction.

    Args:
        baseline: The unedited model: a record with ``memory_rate``, ``context_rate`` and ``guard``.
        edits: Such a record for every method and direction of control.
        control: For each direction such a record with as many random heads edited alike.
        guard: What should not change.
    """
    figure = gain_panels()
    named = dict(zip(edits, _METHOD_SYMBOLS * len(edits), strict=False))
    for column, direction in enumerate(DIRECTIONS, start=1):
        points: list[tuple[str, str, Mapping[str, Any], str | None]] = [
            (name, named[name], by[direction], COLOURS[direction]) for name, by in edits.items() if direction in by
        ]
        if control is not None:
            points.append(("random heads", "circle-open", control[direction], OTHER_COLOUR))
        points.append(("unedited", "circle", baseline, None))
        for name, symbol, record, colour in points:
            wanted, kept = estimate_of(record[f"{direction}_rate"]), estimate_of(record[guard])
            error = {"thickness": 1.2, "width": 0} | ({"color": colour} if colour else {})
            figure.add_scatter(
                x=[wanted.value],
                y=[kept.value],
                error_x=interval([wanted]) | error,
                error_y=interval([kept]) | error,
                mode="markers",
                marker={"symbol": symbol, "size": 11} | ({"color": colour} if colour else {}),
                name=escape(name),
                showlegend=False,
                hovertext=[
                    f"{usage_hover(f'{name}, towards {direction}', f'{direction} rate', wanted)}"
                    f"<br>{GUARD_LABELS[guard]} {written(kept, guard)}, "
                    f"n = {kept.n} {'texts' if guard == 'neutral_kl' else 'prompts'}"
                ],
                hovertemplate="%{hovertext}<extra></extra>",
                row=1,
                col=column,
            )
        figure.add_scatter(
            **front([by[direction] for by in edits.values() if direction in by] + [baseline], direction, guard),
            mode="lines",
            line={"color": OTHER_COLOUR, "dash": "dot", "width": 1.5},
            name="front",
            showlegend=column == 1,
            hoverinfo="skip",
            row=1,
            col=column,
        )
    keys = [*named.items(), *([("random heads", "circle-open")] if control is not None else []), ("unedited", "circle")]
    for name, symbol in keys:
        figure.add_scatter(x=[None], y=[None], mode="markers", marker={"symbol": symbol, "size": 9}, name=escape(name))
    guards = [estimate_of(record[guard]) for record in (baseline, *(r for by in edits.values() for r in by.values()))]
    return with_gain_axes(figure, lowest=min(estimate.low for estimate in guards), guard=guard)


def gain_panels() -> go.Figure:
    """An empty figure of what edits gain and cost, a panel for each direction; ``with_gain_axes`` finishes it."""
    return make_subplots(
        rows=1,
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.12,
        column_titles=[f"<b>towards {direction}</b>" for direction in DIRECTIONS],
    )


def with_gain_axes(
    figure: go.Figure, *, lowest: float, guard: Guard = "closed_book_accuracy", height: int = 400
) -> go.Figure:
    """The figure with its axes: the wanted rate to the right, the guard upwards, from ``lowest`` at the latest."""
    figure.update_yaxes(title_text=GUARD_LABELS[guard], col=1)
    if guard == "neutral_kl":
        figure.update_yaxes(rangemode="tozero")
    else:
        figure.update_yaxes(tickformat=".0%", range=[min(0.8, lowest - 0.05), 1.01])
    for column, direction in enumerate(DIRECTIONS, start=1):
        figure.update_xaxes(
            title_text=f"{direction} rate", range=[-0.04, 1.04], tickformat=".0%", dtick=0.5, col=column
        )
    return figure.update_annotations(font_size=13).update_layout(
        template=LIGHT_THEME,
        height=height,
        margin_t=30,
        hovermode="closest",
        legend={"y": -0.2, "yanchor": "top", "entrywidth": 140},
    )


def damage_fronts(tried: Sequence[Mapping[str, Any]]) -> go.Figure:
    """What every candidate of every method gains on dev (to the right) and costs, one column per direction.

    Args:
        tried: Records with ``method``, ``towards``, ``does`` (in words), ``rate`` (share of conflict prompts that are
            answered from the wanted source), ``kept`` (closed-book accuracy) and ``damage`` (nats, by guard), as
            ``conflictscope.study.record`` has them. What a method does not have is ``None``.
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
    figure.update_yaxes(type="log", dtick="D2", title_text="KL on text (nats)", row=1, col=1)
    figure.update_yaxes(tickformat=".0%", range=[lowest, 1.01], title_text="closed-book accuracy", row=2, col=1)
    return figure.update_annotations(font_size=13).update_layout(
        template=LIGHT_THEME,
        height=620,
        margin_t=30,
        hovermode="closest",
        legend={"y": -0.12, "yanchor": "top", "entrywidth": 130},
    )


def front(records: Iterable[Mapping[str, Any]], direction: Direction, guard: Guard) -> dict[str, list[float]]:
    """The steps ``x``, ``y`` between records than which none has both more gain and less damage (Pareto).

    Args:
        records: Such records as those of ``gain_and_damage``.
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
