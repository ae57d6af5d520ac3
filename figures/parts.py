"""Blocks of rows under headings, and estimates as hover text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from figures.theme import LIGHT_THEME, escape
from interp.statistics import Estimate

EstimateLike = Estimate | Mapping[str, Any]
"""An ``Estimate``, or its record with the keys ``value``, ``low``, ``high`` and ``n``."""
ROW = 21
"""Height of a row, in pixels."""


def grouped_rows(headings: Iterable[str], rows: Sequence[str]) -> tuple[go.Figure, Any]:
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
        height=round(ROW * block * len(headings)) + 50,
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


def estimate_of(source: EstimateLike) -> Estimate:
    """Read an estimate from its record, or take it as it is."""
    return Estimate.from_record(source) if isinstance(source, Mapping) else source


def written(estimate: Estimate, measure: str) -> str:
    """Write an estimate with its interval: a divergence in nats, anything else in percent."""
    if measure == "neutral_kl":
        return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{100 * estimate.value:.1f}% [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def usage_hover(heading: str, measure: str, estimate: Estimate) -> str:
    """Write what hovering over a rate shows: value, interval and n."""
    return (
        f"<b>{escape(heading)}</b><br>{measure} {written(estimate, measure)}"
        f"<br>95% interval by subject, n = {estimate.n} prompts"
    )
