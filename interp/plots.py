"""Plotly figures of usage, head scores and damage, for notebooks and for the report.

Memory is always blue and context always vermillion, in bars, dots and heat maps alike. Whatever shows a mean
shows its 95 % interval, and the hover text adds unit and n. Text, grid and background colours come from a theme
alone, so that a figure changes from light to dark with ``figure.update_layout(template=DARK_THEME)``.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.attribution.scores import DIRECTIONS, Direction, HeadScores, RankedHead
from interp.errors import UserError
from interp.files import atomic_path, write_text
from interp.statistics import Estimate

if TYPE_CHECKING:
    from interp.evaluation import UsageReport

EstimateLike = Estimate | Mapping[str, Any]
"""An ``Estimate``, or its record with the keys ``value``, ``low``, ``high`` and ``n``."""

MEMORY_COLOUR = "#0072B2"
CONTEXT_COLOUR = "#D55E00"
OTHER_COLOUR = "#999999"
"""Blue, vermillion and grey of the colour-blind-safe palette of Okabe & Ito (2008)."""
EMPTY_COLOUR = "#C4C4C4"
"""A paler grey, for answers without a word."""

COLOURS: dict[str, str] = {
    "memory": MEMORY_COLOUR,
    "context": CONTEXT_COLOUR,
    "other": OTHER_COLOUR,
    "empty": EMPTY_COLOUR,
}
"""Colours by usage."""
SYMBOLS = {"memory": "circle", "context": "diamond"}
"""Markers by usage."""
SERIES_COLOURS = ("#AA4499", "#44AA99", "#999933", "#CC6677", "#88CCEE")
"""Muted colours of Tol (2021, SRON/EPS/TN/09-002) for what is neither memory nor context."""
METHOD_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", *SERIES_COLOURS)
"""Colours by method: what Okabe & Ito's palette has left, then those of Tol."""
HTML_CONFIG = {"showSendToCloud": False}
"""How figures are written to HTML: without plotly.js 4's button that uploads the figure."""

_METHOD_SYMBOLS = ("square", "diamond", "triangle-up", "star", "pentagon", "hexagon")
_DOSE_SYMBOLS = {
    "memory_rate": SYMBOLS["memory"],
    "context_rate": SYMBOLS["context"],
    "closed_book_accuracy": "square",
    "aligned_accuracy": "triangle-up",
    "irrelevant_accuracy": "star",
    "neutral_kl": "hexagon",
}
_ROW = 21
_IMAGE_SUFFIXES = (".png", ".svg", ".pdf")

Guard = Literal["closed_book_accuracy", "aligned_accuracy", "irrelevant_accuracy", "neutral_kl"]
_GUARD_LABELS: dict[Guard, str] = {
    "closed_book_accuracy": "closed-book accuracy",
    "aligned_accuracy": "accuracy, aligned context",
    "irrelevant_accuracy": "accuracy, irrelevant context",
    "neutral_kl": "KL divergence on neutral text (nats)",
}


def _theme(*, ink: str, muted: str, paper: str, neutral: str, grid: str, zero: str) -> go.layout.Template:
    font = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": ink}
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "zerolinecolor": zero,
        "automargin": True,
        "tickfont": {"color": muted},
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "rgba(0,0,0,0)",
        "title": {"standoff": 8, "font": {"size": 12, "color": muted}},
    }
    return go.layout.Template(
        layout={
            "font": font,
            "paper_bgcolor": paper,
            "plot_bgcolor": paper,
            "margin": {"l": 8, "r": 16, "t": 12, "b": 8},
            "xaxis": axis,
            "yaxis": axis,
            "coloraxis": {"colorscale": [[0, MEMORY_COLOUR], [0.5, neutral], [1, CONTEXT_COLOUR]]},
            "hoverlabel": {"bgcolor": paper, "bordercolor": muted, "font": font, "align": "left"},
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.01,
                "yanchor": "bottom",
                "traceorder": "normal",
            },
            "annotationdefaults": {"font": {"color": ink}},
            "shapedefaults": {"line": {"color": ink}},
        },
        data={
            "bar": [{"error_x": {"color": ink, "thickness": 1.2, "width": 3}}],
            "scatter": [{"marker": {"color": ink}, "textfont": {"color": ink}}],
            "heatmap": [{"textfont": {"color": ink}}],
        },
    )


LIGHT_THEME = _theme(ink="#1b1f24", muted="#4b535d", paper="#ffffff", neutral="#f1f3f5", grid="#e3e6ea", zero="#8b939c")
DARK_THEME = _theme(ink="#eceff3", muted="#b3bac4", paper="#171a1f", neutral="#272b32", grid="#33383f", zero="#8b939c")


def percent(share: float) -> str:
    """A share as a percentage: whole, but with a decimal where rounding would say 0 or 100 and be wrong."""
    decimals = 1 if round(share, 2) in (0, 1) and share not in (0, 1) else 0
    return f"{100 * share:.{decimals}f}%"


def usage_bars(conditions: Mapping[str, UsageReport | Mapping[str, EstimateLike]]) -> go.Figure:
    """How often each condition answers from memory, from context, from neither and not at all: bars with intervals.

    Args:
        conditions: By label ("unedited", "pruned", ...): a report, or a record with ``memory_rate``,
            ``context_rate``, ``other_rate`` and ``empty_rate``. The first is on top. Empty answers have bars only
            where there are some.
    """
    usages = [usage for usage in COLOURS if usage != "empty" or _some_empty(list(conditions.values()))]
    groups = {label: _rates(source, usages) for label, source in conditions.items()}
    figure, y = _grouped_rows(groups, usages)
    for row, usage in enumerate(usages):
        estimates = [rates[usage] for rates in groups.values()]
        figure.add_bar(
            x=[e.value for e in estimates],
            y=[y(group, row) for group in range(len(groups))],
            error_x=interval(estimates),
            orientation="h",
            width=0.82,
            marker_color=COLOURS[usage],
            name=usage,
            hovertext=[_hover(label, f"{usage} rate", e) for label, e in zip(groups, estimates, strict=True)],
            hovertemplate="%{hovertext}<extra></extra>",
        )
        figure.add_scatter(
            x=[e.high for e in estimates],
            y=[y(group, row) for group in range(len(groups))],
            mode="text",
            text=[f" {percent(e.value)}" for e in estimates],
            textposition="middle right",
            hoverinfo="skip",
            cliponaxis=False,
        )
    return figure.update_layout(showlegend=False, bargap=0)


def usage_by_template(
    conditions: Mapping[str, UsageReport | Mapping[str, Mapping[str, EstimateLike]]], *, held_out: Collection[str] = ()
) -> go.Figure:
    """Memory and context rate of every condition, phrasing family by phrasing family: dots with intervals.

    Args:
        conditions: By label: a report, or by template a record with ``memory_rate`` and ``context_rate``.
        held_out: The families that nothing was tuned on; they are marked.
    """
    by_template = {label: _by_template(source) for label, source in conditions.items()}
    templates = list(dict.fromkeys(template for rates in by_template.values() for template in rates))
    headings = [f"{t} (held out)" if t in held_out else t for t in templates]
    figure, y = _grouped_rows(headings, list(conditions))
    for usage in DIRECTIONS:
        points = [
            (y(group, row), f"{headings[group]}, {label}", rates[template][usage])
            for group, template in enumerate(templates)
            for row, (label, rates) in enumerate(by_template.items())
            if template in rates
        ]
        estimates = [estimate for _, _, estimate in points]
        figure.add_scatter(
            x=[e.value for e in estimates],
            y=[at for at, _, _ in points],
            error_x={**interval(estimates), "color": COLOURS[usage], "thickness": 2, "width": 0},
            mode="markers",
            marker={"color": COLOURS[usage], "symbol": SYMBOLS[usage], "size": 11},
            name=usage,
            hovertext=[_hover(heading, f"{usage} rate", estimate) for _, heading, estimate in points],
            hovertemplate="%{hovertext}<extra></extra>",
            cliponaxis=False,
        )
    return figure.update_layout(margin_t=40)


def head_map(scores: HeadScores, *, highlighted: Iterable[tuple[int, int]] = ()) -> go.Figure:
    """Every head's mean score, layer 0 at the bottom: blue pushes towards memory, vermillion towards context.

    A dot marks heads whose interval excludes 0, a frame marks ``highlighted`` heads.

    Args:
        scores: The scores.
        highlighted: ``(layer, head)`` pairs, for example the heads that an intervention edits.

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
        height=_ROW * len(heads) + 90,
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
    headings = [f"head {h.layer}.{h.head}, towards {'context' if h.score > 0 else 'memory'}" for h in heads]
    figure, y = _grouped_rows(headings, list(parts))
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
        height=round(_ROW * (len(parts) + 1.5) * len(heads)) + 90,
        xaxis={"range": None, "autorange": True, "tickformat": "", "tickvals": None, "zerolinewidth": 1.5},
        xaxis_title_text=_score_title(scores),
    )


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
            wanted, kept = _estimate(record[f"{direction}_rate"]), _estimate(record[guard])
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
                    f"{_hover(f'{name}, towards {direction}', f'{direction} rate', wanted)}"
                    f"<br>{_GUARD_LABELS[guard]} {_written(kept, guard)}, "
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
    guards = [_estimate(record[guard]) for record in (baseline, *(r for by in edits.values() for r in by.values()))]
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
    figure.update_yaxes(title_text=_GUARD_LABELS[guard], col=1)
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
            "color": METHOD_COLOURS[number % len(METHOD_COLOURS)],
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
    points = [(_estimate(r[f"{direction}_rate"]).value, sign * _estimate(r[guard]).value) for r in records]
    front: list[tuple[float, float]] = []
    for gain, kept in sorted(points, reverse=True):
        if not front or kept > front[-1][1]:
            front.append((gain, kept))
    corners = [(a[0], b[1]) for a, b in pairwise(front)]
    steps = [point for pair in zip_longest(front, corners) for point in pair if point]
    return {"x": [gain for gain, _ in steps], "y": [sign * kept for _, kept in steps]}


def dose_response(
    doses: Mapping[float, Mapping[str, Any]], *, dose: str = "scale", neutral: float | None = None
) -> go.Figure:
    """Usage, accuracy of the guards and movement on neutral text against how hard an edit acts, with intervals.

    Args:
        doses: Such records as ``condition_record`` gives, by dose: a head's scale, SpARE's alpha,
            a direction's strength, a dial's trust. Measures that a record lacks are left out.
        dose: What the dose is.
        neutral: The dose that leaves the model as it is (1 for a scale, 0 for a strength); it is marked.

    Raises:
        UserError: If there are fewer than two doses.
    """
    if len(doses) < 2:
        raise UserError("A dose-response curve needs two doses or more; measure another one.")
    ordered = sorted(doses)
    guards: list[Guard] = [guard for guard in _GUARD_LABELS if guard != "neutral_kl"]
    colours: dict[str, str] = {f"{usage}_rate": COLOURS[usage] for usage in DIRECTIONS}
    colours |= dict(zip([*guards, "neutral_kl"], SERIES_COLOURS, strict=False))
    panels = {"usage on conflict prompts": [f"{usage}_rate" for usage in DIRECTIONS], "accuracy of the guards": guards}
    panels["KL on neutral text (nats)"] = ["neutral_kl"]
    shown = {
        title: [m for m in measures if all(m in doses[at] for at in ordered)] for title, measures in panels.items()
    }
    shown = {title: measures for title, measures in shown.items() if measures}
    figure = make_subplots(
        rows=len(shown),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.09,
        subplot_titles=[f"<b>{title}</b>" for title in shown],
    )
    for row, measures in enumerate(shown.values(), start=1):
        for measure in measures:
            estimates = [_estimate(doses[at][measure]) for at in ordered]
            name = measure.removesuffix("_accuracy").replace("_", " ")
            figure.add_scatter(
                x=ordered,
                y=[e.value for e in estimates],
                error_y=interval(estimates) | {"color": colours[measure], "thickness": 1.5, "width": 0},
                mode="lines+markers",
                line={"color": colours[measure], "width": 1.5},
                marker={"color": colours[measure], "size": 8, "symbol": _DOSE_SYMBOLS[measure]},
                name=name,
                showlegend=measure != "neutral_kl",
                hovertext=[
                    f"<b>{escape(dose)} {at:g}</b><br>{name} {_written(e, measure)}<br>95% interval, n = {e.n}"
                    for at, e in zip(ordered, estimates, strict=True)
                ],
                hovertemplate="%{hovertext}<extra></extra>",
                row=row,
                col=1,
            )
        if measures == ["neutral_kl"]:
            figure.update_yaxes(rangemode="tozero", row=row, col=1)
        else:
            figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03], dtick=0.5, row=row, col=1)
    if neutral is not None:
        figure.add_vline(x=neutral, line={"color": OTHER_COLOUR, "dash": "dot", "width": 1.5})
    figure.update_xaxes(zeroline=False)
    figure.update_xaxes(title_text=escape(dose), row=len(shown), col=1)
    return figure.update_annotations(font_size=13).update_layout(
        template=LIGHT_THEME,
        height=190 * len(shown) + 120,
        margin_t=30,
        hovermode="closest",
        legend={"y": -70 / (190 * len(shown)), "yanchor": "top", "entrywidth": 110},
    )


def dial_curve(calibration: Sequence[Mapping[str, float]]) -> go.Figure:
    """Rates of memory and context answers by the setting of a dial.

    Args:
        calibration: Records with ``trust``, ``memory_rate`` and ``context_rate``, by rising trust.
    """
    figure = go.Figure()
    for usage in ("memory", "context"):
        figure.add_scatter(
            x=[point["trust"] for point in calibration],
            y=[point[f"{usage}_rate"] for point in calibration],
            mode="lines+markers",
            marker={"symbol": SYMBOLS[usage], "size": 8, "color": COLOURS[usage]},
            line={"color": COLOURS[usage]},
            name=f"answers from {usage}",
            hovertemplate=f"trust %{{x:+.2f}}: {usage} rate %{{y:.1%}}<extra></extra>",
        )
    figure.update_xaxes(title_text="trust: -1 is memory, 0 the unchanged model, 1 context", range=[-1.05, 1.05])
    figure.update_yaxes(title_text="share of conflict prompts (dev)", tickformat=".0%", range=[0, 1.02])
    return figure.update_layout(template=LIGHT_THEME, height=360, legend={"y": 1.02})


def save_figure(figure: go.Figure, path: str | Path) -> None:
    """Write a figure, atomically: HTML that works offline, or PNG, SVG or PDF (these need the ``images`` extra).

    Raises:
        UserError: If the suffix is none of these, an image cannot be drawn, or the file cannot be written.
    """
    suffix = Path(path).suffix
    if suffix == ".html":
        write_text(path, figure.to_html(include_plotlyjs=True, config=HTML_CONFIG))
        return
    if suffix not in _IMAGE_SUFFIXES:
        raise UserError(
            f"Cannot save a figure as {Path(path).name}; end the name in .html, {', '.join(_IMAGE_SUFFIXES)}."
        )
    try:
        image = figure.to_image(format=suffix[1:])
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{Path(path).name} cannot be drawn ({str(error).strip().splitlines()[0]}); install Chrome or Chromium and "
            "pip install 'conflictscope[images]', or save it as .html."
        ) from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(image)


def _estimate(source: EstimateLike) -> Estimate:
    return Estimate.from_record(source) if isinstance(source, Mapping) else source


def _rates(source: UsageReport | Mapping[str, EstimateLike], usages: Sequence[Any]) -> dict[str, Estimate]:
    if isinstance(source, Mapping):
        return {usage: _estimate(source[f"{usage}_rate"]) for usage in usages}
    return {usage: source.rate(usage) for usage in usages}


def _some_empty(sources: Sequence[UsageReport | Mapping[str, EstimateLike]]) -> bool:
    """Whether any answer is empty; records of older studies do not say."""
    if any(isinstance(source, Mapping) and "empty_rate" not in source for source in sources):
        return False
    return any(_rates(source, ["empty"])["empty"].value > 0 for source in sources)


def _by_template(source: UsageReport | Mapping[str, Mapping[str, EstimateLike]]) -> dict[str, dict[str, Estimate]]:
    if isinstance(source, Mapping):
        return {template: _rates(rates, DIRECTIONS) for template, rates in source.items()}
    templates = source.frame["template"].unique(maintain_order=True)
    return {template: _rates(source.select(template=template), DIRECTIONS) for template in templates}


def interval(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Error bars, which plotly wants as distances from the mean."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [e.high - e.value for e in estimates],
        "arrayminus": [e.value - e.low for e in estimates],
    }


def _grouped_rows(headings: Iterable[str], rows: Sequence[str]) -> tuple[go.Figure, Any]:
    """An empty figure of shares with one block of rows under each heading, and where row r of block g lies.

    Headings stand above their block and not beside it, which leaves narrow screens their width.
    """
    headings = list(headings)
    block = len(rows) + 1.5

    def y(group: int, row: int) -> float:
        return group * block + 1 + row

    figure = go.Figure()
    for group, heading in enumerate(headings):
        figure.add_annotation(
            text=f"<b>{escape(heading)}</b>", x=0, xref="x", y=group * block, xanchor="left", xshift=3, showarrow=False
        )
    figure.update_layout(
        template=LIGHT_THEME,
        height=round(_ROW * block * len(headings)) + 50,
        hovermode="closest",
        xaxis={"range": [-0.02, 1.1], "tickformat": ".0%", "tickvals": [0, 0.25, 0.5, 0.75, 1], "zeroline": True},
        yaxis={
            "range": [len(headings) * block - 0.9, -0.7],
            "tickvals": [y(group, row) for group in range(len(headings)) for row in range(len(rows))],
            "ticktext": [escape(row) for row in rows] * len(headings),
            "showgrid": False,
            "zeroline": False,
        },
    )
    return figure, y


def integer_ticks(n: int) -> dict[str, Any]:
    """At most 16 ticks at whole numbers of an axis with ``n`` of them."""
    return {"tick0": 0, "dtick": next((step for step in (1, 2, 5, 10) if n <= 16 * step), 20)}


def _written(estimate: Estimate, measure: str) -> str:
    if measure == "neutral_kl":
        return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{100 * estimate.value:.1f}% [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _hover(heading: str, measure: str, estimate: Estimate) -> str:
    return (
        f"<b>{escape(heading)}</b><br>{measure} {_written(estimate, measure)}"
        f"<br>95% interval by subject, n = {estimate.n} prompts"
    )


def _score_title(scores: HeadScores) -> str:
    scale = "\N{LEFTWARDS ARROW} memory \N{MIDDLE DOT} mean score \N{MIDDLE DOT} context \N{RIGHTWARDS ARROW}"
    return f"{scale}<br>{_unit(scores)}"


def _unit(scores: HeadScores) -> str:
    return escape(str(scores.settings.get("unit", scores.metric)))


def _head_hover(scores: HeadScores, head: RankedHead, *, edited: bool = False) -> str:
    towards = "context" if head.score > 0 else "memory"
    n, n_subjects = len(scores.example_ids), len(set(scores.subjects))
    name = f"<b>head {head.layer}.{head.head}</b>{' (edited)' if edited else ''}, towards {towards}"
    if n_subjects == 1:
        return f"{name}<br>mean score {head.score:+.3f}<br>{_unit(scores)}<br>n = {n} of one subject, no interval"
    return (
        f"{name}<br>mean score {head.score:+.3f} [{head.low:+.3f}, {head.high:+.3f}]<br>{_unit(scores)}"
        f"<br>95% interval by subject, n = {n} examples of {n_subjects} subjects"
    )


def escape(text: str) -> str:
    """Text that plotly shows as it is: of HTML's entities it knows few, and none for quotes."""
    return html.escape(text, quote=False)
