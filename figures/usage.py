"""Figures of usage: how often conditions answer from memory and from context."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from figures.parts import EstimateLike, estimate_of, grouped_rows, usage_hover
from figures.theme import COLOURS, SYMBOLS, interval, percent
from interp.answers import DIRECTIONS
from interp.statistics import Estimate

if TYPE_CHECKING:
    from interp.evaluation import UsageReport


def usage_bars(conditions: Mapping[str, UsageReport | Mapping[str, EstimateLike]]) -> go.Figure:
    """How often each condition answers from memory, from context, from neither and not at all: bars with intervals.

    Args:
        conditions: By label ("unedited", "pruned", ...): a report, or a record with ``memory_rate``,
            ``context_rate``, ``other_rate`` and ``empty_rate``. The first is on top. Empty answers have bars only
            where there are some.
    """
    usages = [usage for usage in COLOURS if usage != "empty" or _some_empty(list(conditions.values()))]
    groups = {label: _rates(source, usages) for label, source in conditions.items()}
    figure, y = grouped_rows(groups, usages)
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
            hovertext=[usage_hover(label, f"{usage} rate", e) for label, e in zip(groups, estimates, strict=True)],
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
    figure, y = grouped_rows(headings, list(conditions))
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
            hovertext=[usage_hover(heading, f"{usage} rate", estimate) for _, heading, estimate in points],
            hovertemplate="%{hovertext}<extra></extra>",
            cliponaxis=False,
        )
    return figure.update_layout(margin_t=40)


def _rates(source: UsageReport | Mapping[str, EstimateLike], usages: Sequence[Any]) -> dict[str, Estimate]:
    if isinstance(source, Mapping):
        return {usage: estimate_of(source[f"{usage}_rate"]) for usage in usages}
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
