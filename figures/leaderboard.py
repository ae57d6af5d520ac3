"""Figures of many methods over many data sets: gain against loss and speed, and which ranks can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go

from figures.parts import ROW, EstimateLike, estimate_of, written
from figures.theme import LIGHT_THEME, OTHER_COLOUR, SERIES_COLOURS, escape, interval, percent
from interp.ranks import Ranks

_SPEEDS = [[0, "#AA4499"], [0.5, "#DDAA33"], [1, "#44AA99"]]
_KINDS = {"front": ("diamond", 13), "edit": ("circle", 9), "control": ("circle-open-dot", 9)}
_NAMES = {"front": "on the front", "edit": "beaten by another", "control": "random control"}
_STEP, _ABOVE = 0.45, 0.7


class Competitor(NamedTuple):
    """One of the points of ``gain_against_loss``.

    Attributes:
        name: What it is called.
        gain: How much the wanted rate rose.
        loss: The largest of the losses of accuracy.
        speed: Tokens per second relative to the unedited model; ``None`` where it is not known.
        kind: Whether nothing beats it in gain, loss and speed at once, or it is a random control.
    """

    name: str
    gain: EstimateLike
    loss: float
    speed: float | None = None
    kind: Literal["front", "edit", "control"] = "edit"


def gain_against_loss(points: Sequence[Competitor]) -> go.Figure:
    """Draw what methods gain (to the right) against their largest loss (higher is less).

    What nothing beats in gain, loss and speed is a diamond with its name; colours are speeds, where all were timed.

    Args:
        points: The methods.
    """
    figure = go.Figure()
    edits = [point for point in points if point.kind != "control"]
    speeds = [point.speed for point in edits if point.speed is not None]
    is_timed = bool(speeds) and len(speeds) == len(edits)
    for kind, (symbol, size) in _KINDS.items():
        shown = sorted((p for p in points if p.kind == kind), key=lambda p: estimate_of(p.gain).value)
        if not shown:
            continue
        marker: dict[str, Any] = {"symbol": symbol, "size": size, "color": OTHER_COLOUR}
        if is_timed and kind != "control":
            marker |= {"color": [point.speed for point in shown], "coloraxis": "coloraxis2"}
        gains = [estimate_of(point.gain) for point in shown]
        figure.add_scatter(
            x=[gain.value for gain in gains],
            y=[point.loss for point in shown],
            error_x=interval(gains) | {"color": OTHER_COLOUR, "thickness": 1, "width": 0},
            mode="markers+text" if kind == "front" else "markers",
            text=[escape(point.name) for point in shown],
            # Neighbours are named on different sides.
            textposition=["bottom center" if number % 2 else "top center" for number in range(len(shown))],
            marker=marker,
            showlegend=False,
            cliponaxis=False,
            hovertext=[_hover(point) for point in shown],
            hovertemplate="%{hovertext}<extra></extra>",
        )
        key = {"symbol": symbol, "size": 9, "color": OTHER_COLOUR}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=key, name=_NAMES[kind])
    figure.update_xaxes(title_text="gain: rise of the wanted rate", tickformat="+.0%", zeroline=True)
    figure.update_yaxes(title_text="largest loss of accuracy", tickformat=".0%", autorange="reversed", zeroline=True)
    if is_timed:
        bar = {"title": {"text": "speed", "side": "right"}, "orientation": "h", "thickness": 10, "len": 0.6, "y": -0.18}
        bar |= {"yanchor": "top", "tickformat": ".1f"}
        ends = {"cmin": min(0.5, *speeds), "cmax": max(1.0, *speeds)}
        figure.update_layout(coloraxis2={"colorscale": _SPEEDS, "colorbar": bar, **ends})
    return figure.update_layout(
        template=LIGHT_THEME, height=460, margin_t=40, hovermode="closest", legend={"y": 1.02, "yanchor": "bottom"}
    )


def _hover(point: Competitor) -> str:
    speed = "" if point.speed is None else f", {point.speed:.2f} times as fast"
    gain = written(estimate_of(point.gain), "gain")
    return f"<b>{escape(point.name)}</b><br>gain {gain}<br>largest loss {percent(point.loss)}{speed}"


def critical_differences(ranks: Ranks) -> go.Figure:
    """Draw mean ranks, the best first, with bars over the methods that cannot be told apart (Demsar 2006, figure 1).

    Args:
        ranks: What ``interp.ranks.compare_ranks`` found.
    """
    names, means = list(ranks.means), list(ranks.means.values())
    like = ranks.like_the_best
    top = -_ABOVE - _STEP * (len(ranks.groups) + 1)
    figure = go.Figure()
    lines = [point for row, mean in enumerate(means) for point in ((mean, -_ABOVE), (mean, row), (None, None))]
    line = {"color": OTHER_COLOUR, "width": 1}
    x, y = zip(*lines, strict=True)
    figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)
    for number, group in enumerate(ranks.groups):
        ends, height = [ranks.means[group[0]], ranks.means[group[-1]]], -_ABOVE - _STEP * (number + 0.5)
        said = f"cannot be told apart: {', '.join(map(escape, group))}"
        bar = {"color": SERIES_COLOURS[1], "width": 5}
        figure.add_scatter(
            x=ends, y=[height] * 2, mode="lines", line=bar, name=said, hoverinfo="name", showlegend=False
        )
    figure.add_scatter(
        x=means,
        y=list(range(len(names))),
        mode="markers",
        marker={"size": 9, "color": [SERIES_COLOURS[1] if name in like else OTHER_COLOUR for name in names]},
        hovertext=[f"<b>{escape(name)}</b><br>mean rank {mean:.2f}" for name, mean in ranks.means.items()],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    end = max(len(names), 1 + ranks.difference)
    bar = {"width": 2, "color": SERIES_COLOURS[0]}
    figure.add_scatter(
        x=[1, 1 + ranks.difference],
        y=[top] * 2,
        mode="lines+markers",
        line=bar,
        marker={"symbol": "line-ns", "size": 9, "line": bar},
        hoverinfo="skip",
        showlegend=False,
    )
    figure.update_xaxes(title_text="mean rank (1 is best)", range=[0.8, end + 0.2], zeroline=False)
    figure.update_yaxes(
        tickvals=[top, *range(len(names))],
        ticktext=[
            f"critical difference  {ranks.difference:.2f}",
            *(f"{escape(name)}  {mean:.2f}" for name, mean in ranks.means.items()),
        ],
        range=[len(names) - 0.4, top - 0.6],
        showgrid=False,
        zeroline=False,
    )
    return figure.update_layout(
        template=LIGHT_THEME, height=round(ROW * (len(names) + 0.2 - top)) + 50, hovermode="closest"
    )
