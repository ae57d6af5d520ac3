"""Figures of a feature of a sparse autoencoder."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import plotly.graph_objects as go
import polars as pl

from figures.theme import (
    LABEL_COLOURS,
    LIGHT_THEME,
    OTHER_COLOUR,
    escape,
    example_hover,
    interval,
    label_symbol,
    measure_hover,
    percent,
    translucent,
)
from interp.statistics import Estimate
from probes.feature_views import FeatureView

_PROMOTED_COLOUR, _SUPPRESSED_COLOUR = "#44AA99", "#AA4499"
# Of a feature's view: its texts are set for a screen of 390 pixels, its heights are in pixels.
_PROMPT_WIDTH = 50
_PROMPT_LINES = 4
_TOKEN_WIDTH = 20
_LINE = 16
_TOKEN_ROW = 19
_SOURCE_ROW = 44
_RETURN = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def feature_view(view: FeatureView) -> go.Figure:
    """One feature: its activation by source, the prompts that activate it most, and the tokens that it moves.

    The three parts stand one above the other. A prompt lies on a bar as long as its activation, in the colour of the
    source that its answer used; a long prompt is cut, and whole in the hover text.
    """
    blocks = [_prompt_block(prompt) for prompt in view.prompts.iter_rows(named=True)]
    if not blocks:
        blocks = [["It fires for none of the prompts."]]
    heading = f"layer {view.layer}, feature {view.feature}"
    panels = (
        _Panel(
            f"<b>{heading}</b>, fires for {percent(view.frequency)} of prompts<br><b>activation by source</b>",
            _SOURCE_ROW * len(view.by_source),
            84,
        ),
        _Panel("<b>prompts of highest activation</b>", sum(_block_height(block) for block in blocks), 40),
        _Panel("<b>promoted and suppressed tokens</b>", _TOKEN_ROW * (len(view.promoted) + len(view.suppressed)), 0),
    )
    top = total = sum(panel.height + panel.gap for panel in panels)
    figure = go.Figure().update_layout(
        template=LIGHT_THEME,
        height=total + 122,
        margin={"t": 64, "b": 58},
        barmode="overlay",
        hovermode="closest",
        showlegend=False,
    )
    for panel, number in zip(panels, ("", "2", "3"), strict=True):
        bottom = top - panel.height
        figure.layout[f"xaxis{number}"] = {"anchor": f"y{number}", "fixedrange": True}
        # Rows are placed by pixels, downwards.
        figure.layout[f"yaxis{number}"] = {
            "domain": [bottom / total, top / total],
            "range": [panel.height, 0],
            "anchor": f"x{number}",
            "visible": False,
            "fixedrange": True,
        }
        _add_text(figure, panel.title, f"y{number} domain", 1, yanchor="bottom", yshift=6, font_size=13)
        top = bottom - panel.gap
    _add_sources(figure, view.by_source)
    _add_prompts(figure, view.prompts, blocks)
    _add_tokens(figure, view)
    return figure


class _Panel(NamedTuple):
    """One part of a feature's view; height, and gap to the next, in pixels."""

    title: str
    height: int
    gap: int


def difference_bars(table: pl.DataFrame, one: str, other: str) -> go.Figure:
    """The features that differ most between two sides, with 95 % intervals by subject.

    Args:
        table: What ``probes.feature_differences.FeatureDifferences.table`` gives.
        one: What the one side is called; its features reach to the left.
        other: What the other side is called.
    """
    rows = list(table.iter_rows(named=True))
    estimates = [Estimate(row["difference"], row["low"], row["high"], 0) for row in rows]
    figure = go.Figure(
        go.Bar(
            x=[estimate.value for estimate in estimates],
            y=[f"feature {row['feature']}" for row in rows],
            error_x=interval(estimates),
            orientation="h",
            marker_color=[_PROMOTED_COLOUR if row["difference"] > 0 else _SUPPRESSED_COLOUR for row in rows],
            hovertext=[
                f"layer {row['layer']}, feature {row['feature']}<br>{escape(one)}: mean {row['one']:.3f}, fires for "
                f"{percent(row['fires_one'])}<br>{escape(other)}: mean {row['other']:.3f}, fires for "
                f"{percent(row['fires_other'])}"
                for row in rows
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    arrows = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"
    return figure.update_layout(
        template=LIGHT_THEME,
        height=24 * len(rows) + 110,
        bargap=0.2,
        xaxis_title_text=f"{arrows[0]} {escape(one)} \N{MIDDLE DOT} mean activation \N{MIDDLE DOT} "
        f"{escape(other)} {arrows[1]}",
        xaxis_zerolinewidth=1.5,
        yaxis={"type": "category", "autorange": "reversed", "dtick": 1},
    )


def _add_text(figure: go.Figure, text: str, yref: str, y: float, **properties: Any) -> None:
    """Text at the left edge of a feature's view."""
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": y, "yref": yref, "align": "left"}
    figure.add_annotation(place | {"text": text, "showarrow": False} | properties)


def _prompt_block(prompt: Mapping[str, Any]) -> list[str]:
    """The lines about a prompt: what it is, and its text, without the middle if it is long."""
    kind = " \N{MIDDLE DOT} ".join([prompt["usage"] or "not judged", prompt["relation"], prompt["template"]])
    lines = textwrap.wrap(prompt["text"].replace("\n", f" {_RETURN} "), _PROMPT_WIDTH)
    if len(lines) > _PROMPT_LINES:
        # The context speaks first, and the activation is that of the last token.
        half = _PROMPT_LINES // 2
        end = lines[-half:]
        lines = [*lines[:half], f"\N{HORIZONTAL ELLIPSIS} {end[0]}", *end[1:]]
    return [f"<b>{prompt['activation']:#.3g}</b> {escape(kind)}", *(escape(line) for line in lines)]


def _block_height(block: Sequence[str]) -> int:
    return _LINE * len(block) + 16


def _add_sources(figure: go.Figure, by_source: pl.DataFrame) -> None:
    for i, row in enumerate(by_source.iter_rows(named=True)):
        usage, fires = row["usage"], f"fires for {percent(row['frequency'])}"
        estimate = Estimate(row["mean"], row["low"], row["high"], row["prompts"])
        colour = LABEL_COLOURS.get(usage, OTHER_COLOUR)
        heading = f"<b>{usage}</b>, {fires} of {estimate.n} prompts"
        _add_text(figure, heading, "y", _SOURCE_ROW * i + 4, yanchor="top", xshift=3, font_size=12)
        figure.add_scatter(
            x=[estimate.value],
            y=[_SOURCE_ROW * i + 31],
            error_x=interval([estimate]) | {"color": colour, "thickness": 2, "width": 0},
            mode="markers",
            marker={"color": colour, "symbol": label_symbol(usage), "size": 11},
            name=usage,
            hovertext=[f"{measure_hover(usage, 'mean activation', estimate)}<br>{fires}"],
            hovertemplate="%{hovertext}<extra></extra>",
            cliponaxis=False,
        )
    figure.update_layout(xaxis={"title": {"text": "mean activation"}, "rangemode": "tozero"})


def _add_prompts(figure: go.Figure, prompts: pl.DataFrame, blocks: Sequence[list[str]]) -> None:
    edges = [0, *accumulate(_block_height(block) for block in blocks)]
    for edge, block in zip(edges, blocks, strict=False):
        _add_text(figure, "<br>".join(block), "y2", edge + 5, yanchor="top", xshift=6, font_size=12)
    rows = prompts.to_dicts()
    colours = [LABEL_COLOURS.get(row["usage"], OTHER_COLOUR) for row in rows]
    places = list(pairwise(edges))[: len(rows)]
    figure.add_bar(
        x=prompts["activation"].to_list(),
        y=[(low + high) / 2 for low, high in places],
        width=[high - low - 6 for low, high in places],
        orientation="h",
        marker={"color": [translucent(colour) for colour in colours], "line": {"color": colours, "width": 1}},
        name="prompts",
        hovertext=[example_hover(row["usage"] or "not judged", row["text"]) for row in rows],
        hovertemplate="%{hovertext}<extra></extra>",
        cliponaxis=False,
        xaxis="x2",
        yaxis="y2",
    )
    reach = [0.0, *prompts["activation"]]
    figure.update_layout(xaxis2={"visible": False, "range": [min(reach), max(reach) or 1.0]})


def _add_tokens(figure: go.Figure, view: FeatureView) -> None:
    """Bars to either side of 0; the token stands on the other side."""
    first = 0
    for name, frame, colour, side in (
        ("promoted", view.promoted, _PROMOTED_COLOUR, "left"),
        ("suppressed", view.suppressed, _SUPPRESSED_COLOUR, "right"),
    ):
        y = [_TOKEN_ROW * (first + i + 0.5) for i in range(len(frame))]
        first += len(frame)
        tokens = [escape(token) for token in frame["token"]]
        figure.add_bar(
            x=frame["effect"].to_list(),
            y=y,
            width=_TOKEN_ROW - 4,
            orientation="h",
            marker_color=colour,
            name=name,
            hovertext=[
                f"<b>{token}</b><br>{name}, {effect:+.3g}"
                for token, effect in zip(tokens, frame["effect"], strict=True)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            xaxis="x3",
            yaxis="y3",
        )
        figure.add_scatter(
            x=[0.0] * len(frame),
            y=y,
            mode="text",
            text=[f" {escape(_cut(token))} " for token in frame["token"]],
            textposition=f"middle {side}",
            textfont_size=12,
            name=name,
            hoverinfo="skip",
            cliponaxis=False,
            xaxis="x3",
            yaxis="y3",
        )
    reach = 1.05 * max((abs(x) for x in (*view.promoted["effect"], *view.suppressed["effect"])), default=0) or 1.0
    title = "change of the logit per unit of activation,<br>up to the scale of the final norm"
    figure.update_layout(xaxis3={"title": {"text": title}, "range": [-reach, reach], "nticks": 8})


def _cut(token: str) -> str:
    return token if len(token) <= _TOKEN_WIDTH else f"{token[: _TOKEN_WIDTH - 1]}\N{HORIZONTAL ELLIPSIS}"
