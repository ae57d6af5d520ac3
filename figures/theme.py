"""What all figures share: colours, themes, intervals, and how they are saved."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from interp.errors import UserError
from interp.files import atomic_path, write_text
from interp.statistics import Estimate

MEMORY_COLOUR = "#0072B2"
CONTEXT_COLOUR = "#D55E00"
OTHER_COLOUR = "#999999"
"""Blue, vermillion and grey of the colour-blind-safe palette of Okabe & Ito (2008)."""
EMPTY_COLOUR = "#C4C4C4"
"""A paler grey, for answers without a word."""
CONFLICT_COLOUR = "#CC79A7"
ALIGNED_COLOUR = "#009E73"
"""Purple and green of the same palette."""

COLOURS: dict[str, str] = {
    "memory": MEMORY_COLOUR,
    "context": CONTEXT_COLOUR,
    "other": OTHER_COLOUR,
    "empty": EMPTY_COLOUR,
}
"""Colours by usage."""
LABEL_COLOURS = {
    "memory": MEMORY_COLOUR,
    "context": CONTEXT_COLOUR,
    "conflict": CONFLICT_COLOUR,
    "aligned": ALIGNED_COLOUR,
    "other": OTHER_COLOUR,
    "empty": EMPTY_COLOUR,
}
"""Colours by label of an example: the source of its answer, or its kind."""
SYMBOLS = {"memory": "circle", "context": "diamond"}
"""Markers by usage."""
SERIES_COLOURS = ("#AA4499", "#44AA99", "#999933", "#CC6677", "#88CCEE")
"""Muted colours of Tol (2021, SRON/EPS/TN/09-002) for what is neither memory nor context."""
HTML_CONFIG = {"showSendToCloud": False}
"""How figures are written to HTML: without plotly.js 4's button that uploads the figure."""

_IMAGE_SUFFIXES = (".png", ".svg", ".pdf")
_BAND_OPACITY = 0.14


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


def percent(share: float) -> str:
    """A share as a percentage: whole, but with a decimal where rounding would say 0 or 100 and be wrong."""
    decimals = 1 if round(share, 2) in (0, 1) and share not in (0, 1) else 0
    return f"{100 * share:.{decimals}f}%"


def escape(text: str) -> str:
    """Text that plotly shows as it is: of HTML's entities it knows few, and none for quotes."""
    return html.escape(text, quote=False)


def interval(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Error bars, which plotly wants as distances from the mean."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [e.high - e.value for e in estimates],
        "arrayminus": [e.value - e.low for e in estimates],
    }


def integer_ticks(n: int) -> dict[str, Any]:
    """At most 16 ticks at whole numbers of an axis with ``n`` of them."""
    return {"tick0": 0, "dtick": next((step for step in (1, 2, 5, 10) if n <= 16 * step), 20)}


def label_symbol(label: str) -> str:
    """Choose the marker of a label: diamonds for context and aligned, circles for all others."""
    return "diamond" if label in ("context", "aligned") else "circle"


def translucent(colour: str) -> str:
    """Make a colour ``#rrggbb`` as translucent as bands of intervals are."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{_BAND_OPACITY})"


def example_hover(label: str, text: str) -> str:
    """Write what hovering over an example shows: its label and its text."""
    return "<br>".join([f"<b>{escape(label)}</b>", *(escape(line) for line in textwrap.wrap(text, 60))])


def measure_hover(heading: str, measure: str, estimate: Estimate) -> str:
    """Write what hovering over an estimate shows that is no rate: value, interval and n."""
    decimals = 3 if max(abs(estimate.low), abs(estimate.high)) < 10 else 1
    value, low, high = (f"{x:.{decimals}f}" for x in (estimate.value, estimate.low, estimate.high))
    return (
        f"<b>{escape(heading)}</b><br>{escape(measure)} {value} [{low}, {high}]"
        f"<br>95% interval by subject, n = {estimate.n} prompts"
    )
