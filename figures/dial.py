"""Figures of usage and damage by how hard an edit acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures.gain import GUARD_LABELS, Guard
from figures.parts import estimate_of, written
from figures.theme import COLOURS, LIGHT_THEME, OTHER_COLOUR, SERIES_COLOURS, SYMBOLS, escape, interval
from interp.answers import DIRECTIONS
from interp.errors import UserError

_DOSE_SYMBOLS = {
    "memory_rate": SYMBOLS["memory"],
    "context_rate": SYMBOLS["context"],
    "closed_book_accuracy": "square",
    "aligned_accuracy": "triangle-up",
    "irrelevant_accuracy": "star",
    "neutral_kl": "hexagon",
}


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
    guards: list[Guard] = [guard for guard in GUARD_LABELS if guard != "neutral_kl"]
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
            estimates = [estimate_of(doses[at][measure]) for at in ordered]
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
                    f"<b>{escape(dose)} {at:g}</b><br>{name} {written(e, measure)}<br>95% interval, n = {e.n}"
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


def dial_curve(points: Sequence[Mapping[str, Any]], *, dose: str = "trust") -> go.Figure:
    """Rates of memory and context answers on dev by the setting of a dial, or by another dose.

    Args:
        points: Records with the dose, ``memory_rate`` and ``context_rate``, by rising dose.
        dose: What the dose is called.
    """
    figure = go.Figure()
    shown = escape(dose.replace("_", " "))
    for usage in ("memory", "context"):
        figure.add_scatter(
            x=[point[dose] for point in points],
            y=[point[f"{usage}_rate"] for point in points],
            mode="lines+markers",
            marker={"symbol": SYMBOLS[usage], "size": 8, "color": COLOURS[usage]},
            line={"color": COLOURS[usage]},
            name=f"answers from {usage}",
            hovertemplate=f"{shown} %{{x:+.2f}}: {usage} rate %{{y:.1%}}<extra></extra>",
        )
    if dose == "trust":
        figure.update_xaxes(title_text="trust: -1 memory, 0 unchanged, 1 context", range=[-1.05, 1.05])
    else:
        figure.update_xaxes(title_text=shown)
    figure.update_yaxes(title_text="share of conflict prompts (dev)", tickformat=".0%", range=[0, 1.02])
    return figure.update_layout(template=LIGHT_THEME, height=360, legend={"y": 1.02})
