"""Figures of head scores: which heads push to memory, which to context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import plotly.graph_objects as go

from figures.parts import ROW, grouped_rows
from figures.theme import (
    COLOURS,
    CONTEXT_COLOUR,
    LIGHT_THEME,
    MEMORY_COLOUR,
    SERIES_COLOURS,
    SYMBOLS,
    escape,
    integer_ticks,
    interval,
    translucent,
)
from interp.answers import DIRECTIONS
from interp.attribution.scores import HeadScores, LayerScores, RankedHead, Scores
from interp.errors import UserError
from interp.statistics import Estimate


def head_map(
    scores: HeadScores, *, highlighted: Iterable[tuple[int, int]] = (), chosen: tuple[int, int] | None = None
) -> go.Figure:
    """Every head's mean score, layer 0 at the bottom: blue pushes towards memory, vermillion towards context.

    Scores without a sign are vermillion, the deeper the higher.

    A dot marks heads whose interval excludes 0, a frame marks ``highlighted`` heads.

    Args:
        scores: The scores.
        highlighted: ``(layer, head)`` pairs, for example the heads that an intervention edits.
        chosen: ``(layer, head)`` of the head to mark with a ring.

    Raises:
        UserError: If a highlighted head is not on the map.
    """
    ranked = scores.ranked("context")
    mean = scores.mean()
    n_layers, n_heads = mean.shape
    cell = min(30, max(6, 480 // n_layers))
    framed = sorted(set(highlighted))
    if outside := [head for head in framed if not (0 <= head[0] < n_layers and 0 <= head[1] < n_heads)]:
        raise UserError(
            f"Head {outside[0][0]}.{outside[0][1]} is not among these scores of {n_layers} layers x {n_heads} heads; "
            "take heads and scores from the same model."
        )
    texts = [[""] * n_heads for _ in range(n_layers)]
    for head in ranked:
        texts[head.layer][head.head] = _head_hover(scores, head, edited=(head.layer, head.head) in framed)
    figure = go.Figure(
        go.Heatmap(
            z=mean.tolist(),
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertext=texts,
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    # One subject has no spread to speak of.
    several = len(set(scores.subjects)) > 1
    certain = [(head.layer, head.head) for head in ranked if several and (head.low > 0 or head.high < 0)]
    for name, places, symbol, size, width in (
        ("interval excludes 0", certain, "circle", 4, 0),
        ("edited", framed, "square-open", min(cell, 16) - 1, 2.5),
        ("chosen", [] if chosen is None else [chosen], "circle-open", 14, 2.5),
    ):
        if places:
            figure.add_scatter(
                x=[head for _, head in places],
                y=[layer for layer, _ in places],
                mode="markers",
                marker={"symbol": symbol, "size": size, "line": {"width": width}},
                name=name,
                hoverinfo="skip",
                cliponaxis=False,
            )
    limit = max(mean.abs().max().item(), 1e-12)
    return figure.update_layout(
        template=LIGHT_THEME,
        height=cell * n_layers + 152,
        xaxis={"title": {"text": "head"}, "range": [-0.5, n_heads - 0.5], "showgrid": False, "zeroline": False}
        | integer_ticks(n_heads),
        yaxis={"title": {"text": "layer"}, "range": [-0.5, n_layers - 0.5], "showgrid": False, "zeroline": False}
        | integer_ticks(n_layers),
        coloraxis={
            "cmin": -limit,
            "cmax": limit,
            "colorbar": {
                "orientation": "h",
                "thickness": 10,
                "y": -50 / (cell * n_layers),
                "yanchor": "top",
                "ypad": 0,
                "outlinewidth": 0,
                "title": {"text": _score_title(scores), "side": "bottom", "font": {"size": 12}},
            },
        },
        margin={"t": 34, "b": 118},
    )


def top_heads_bars(scores: HeadScores, k: int = 8) -> go.Figure:
    """The ``k`` heads that push hardest towards context, then the ``k`` towards memory, with intervals."""
    towards_context = [head for head in scores.ranked("context")[:k] if head.score > 0]
    towards_memory = [head for head in scores.ranked("memory")[:k] if head.score < 0]
    heads = towards_context + towards_memory[::-1]
    estimates = [Estimate(head.score, head.low, head.high, len(scores.example_ids)) for head in heads]
    figure = go.Figure(
        go.Bar(
            x=[e.value for e in estimates],
            y=[f"{head.layer}.{head.head}" for head in heads],
            error_x=interval(estimates) if len(set(scores.subjects)) > 1 else None,
            orientation="h",
            marker_color=[CONTEXT_COLOUR if head.score > 0 else MEMORY_COLOUR for head in heads],
            hovertext=[_head_hover(scores, head) for head in heads],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    return figure.update_layout(
        template=LIGHT_THEME,
        height=ROW * len(heads) + 90,
        bargap=0.2,
        xaxis_title_text=_score_title(scores),
        xaxis_zerolinewidth=1.5,
        yaxis={"title": {"text": "layer.head"}, "type": "category", "autorange": "reversed", "dtick": 1},
    )


def top_heads_by_group(scores: HeadScores, groups: Mapping[str, str], k: int = 3) -> go.Figure:
    """The strongest heads of each direction, group by group: do phrasings or relations agree about a head?

    Args:
        scores: The scores.
        groups: The group of each example, by example id: its template, or its relation.
        k: How many heads of each direction.

    Raises:
        UserError: If an example has no group.
    """
    if missing := [example for example in scores.example_ids if example not in groups]:
        raise UserError(f"The example {missing[0]} has no group; give a phrasing or a relation for every example.")
    members: dict[str, list[int]] = {}
    for number, example in enumerate(scores.example_ids):
        members.setdefault(groups[example], []).append(number)
    parts = {group: scores.select(rows) for group, rows in members.items()}
    heads = [head for d in DIRECTIONS for head in scores.ranked(d)[:k] if (head.score > 0) == (d == "context")]
    headings = [f"head {h.layer}.{h.head}{_towards(scores, h)}" for h in heads]
    figure, y = grouped_rows(headings, list(parts))
    for number, head in enumerate(heads):
        colour = COLOURS["context" if head.score > 0 else "memory"]
        found = []
        for part in parts.values():
            at = (head.layer, head.head)
            low, high = part.interval
            found.append(RankedHead(*at, part.mean()[at].item(), low[at].item(), high[at].item()))
        figure.add_scatter(
            x=[own.score for own in found],
            y=[y(number, row) for row in range(len(found))],
            error_x=interval([Estimate(own.score, own.low, own.high, 0) for own in found])
            | {"color": colour, "thickness": 2, "width": 0},
            mode="markers",
            marker={"color": colour, "symbol": SYMBOLS["context" if head.score > 0 else "memory"], "size": 10},
            hovertext=[
                f"{escape(group)}<br>{_head_hover(part, own)}"
                for (group, part), own in zip(parts.items(), found, strict=True)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            showlegend=False,
        )
    # They begin about where the names below them do, left of the line at 0.
    figure.update_annotations(x=0, xref="paper", xshift=-7 * max(map(len, parts)))
    return figure.update_layout(
        height=round(ROW * (len(parts) + 1.5) * len(heads)) + 90,
        xaxis={"range": None, "autorange": True, "tickformat": "", "tickvals": None, "zerolinewidth": 1.5},
        xaxis_title_text=_score_title(scores),
    )


def layer_lines(scores: LayerScores) -> go.Figure:
    """Each layer's mean score with its 95 % interval."""
    mean, (low, high) = scores.mean(), scores.interval
    layers = list(range(len(mean)))
    figure = go.Figure()
    figure.add_scatter(
        x=layers + layers[::-1],
        y=[*high.tolist(), *low.tolist()[::-1]],
        fill="toself",
        fillcolor=translucent(SERIES_COLOURS[0]),
        line_width=0,
        hoverinfo="skip",
        name="95% interval by subject",
    )
    figure.add_scatter(
        x=layers,
        y=mean.tolist(),
        mode="lines+markers",
        line={"color": SERIES_COLOURS[0], "width": 2},
        marker={"color": SERIES_COLOURS[0]},
        name=escape(scores.metric),
        hovertemplate="layer %{x}: %{y:.2f}<extra></extra>",
    )
    return figure.update_layout(
        template=LIGHT_THEME,
        xaxis={"title": {"text": "layer"}} | integer_ticks(len(layers)),
        yaxis={"title": {"text": f"{escape(scores.metric)} ({_unit(scores)})"}, "rangemode": "tozero"},
    )


def agreement_map(correlations: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """How far ways to score heads agree, as ``interp.attribution.ways.agreement`` gives it: -1 blue, 1 vermillion."""
    ways = list(correlations)
    rows = [[correlations[one].get(other) for other in ways] for one in ways]
    figure = go.Figure(
        go.Heatmap(
            x=ways,
            y=ways,
            z=rows,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            text=[["" if value is None else f"{value:.2f}" for value in row] for row in rows],
            texttemplate="%{text}",
            hovertemplate="%{y} and %{x}: %{z:.2f}<extra></extra>",
        )
    )
    return figure.update_layout(
        template=LIGHT_THEME,
        height=34 * len(ways) + 150,
        xaxis={"showgrid": False, "tickangle": -40, "side": "bottom", "type": "category"},
        yaxis={"showgrid": False, "autorange": "reversed", "type": "category"},
        coloraxis={"cmin": -1, "cmax": 1, "showscale": False},
    )


def _score_title(scores: HeadScores) -> str:
    scale = "\N{LEFTWARDS ARROW} memory \N{MIDDLE DOT} mean score \N{MIDDLE DOT} context \N{RIGHTWARDS ARROW}"
    return f"{scale if scores.signed else 'mean score'}<br>{_unit(scores)}"


def _unit(scores: Scores) -> str:
    return escape(str(scores.settings.get("unit", scores.metric)))


def _towards(scores: HeadScores, head: RankedHead) -> str:
    """The source that a head pushes towards, where that is known."""
    return f", towards {'context' if head.score > 0 else 'memory'}" if scores.signed else ""


def _head_hover(scores: HeadScores, head: RankedHead, *, edited: bool = False) -> str:
    n, n_subjects = len(scores.example_ids), len(set(scores.subjects))
    name = f"<b>head {head.layer}.{head.head}</b>{' (edited)' if edited else ''}{_towards(scores, head)}"
    if n_subjects == 1:
        return f"{name}<br>mean score {head.score:+.3f}<br>{_unit(scores)}<br>n = {n} of one subject, no interval"
    return (
        f"{name}<br>mean score {head.score:+.3f} [{head.low:+.3f}, {head.high:+.3f}]<br>{_unit(scores)}"
        f"<br>95% interval by subject, n = {n} examples of {n_subjects} subjects"
    )
