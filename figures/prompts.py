"""Plotly figures that look into prompts: the race of two answers, what heads look at, an answer token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import floor, log10
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from figures.theme import COLOURS, LIGHT_THEME, OTHER_COLOUR, escape, integer_ticks, percent
from interp.answers import DIRECTIONS
from interp.attention import PromptAttention
from interp.errors import UserError
from interp.generation import AnswerStep
from interp.lens import LogitLens
from interp.statistics import Estimate

_DASHES = ("solid", "dot", "dash", "dashdot")
_TOKEN_ROW = 19
_STEP_ROW = 58
_BAND_OPACITY = 0.15
_LOWEST = -12
# How much, not which source: Tol's teal, from nothing to full.
_WEIGHT_SCALE = [[0, "rgba(68,170,153,0)"], [1, "rgba(68,170,153,0.75)"]]


def answer_race(lenses: Mapping[str, LogitLens]) -> go.Figure:
    """How probable each layer makes the two answers, and by how much context leads: where the winner wins.

    Args:
        lenses: By label ("unedited", "pruned", or "answered from memory", ...); each has a line style of its own.

    Raises:
        UserError: If there is no lens.
    """
    if not lenses:
        raise UserError("There is no logit lens to draw; give at least one.")
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.14,
        subplot_titles=["<b>probability of the answer's first token</b>", "<b>logit difference, context - memory</b>"],
    )
    lowest = 1.0
    for (label, lens), dash in zip(lenses.items(), cycle(_DASHES), strict=False):
        # One subject has no spread to speak of.
        several = len(set(lens.subjects)) > 1
        lines = [(answer, COLOURS[answer], lens.probability(answer), 1) for answer in DIRECTIONS]
        lines.append(("difference", OTHER_COLOUR, lens.difference(), 2))
        lowest = min(lowest, *(e.value for *_, estimates, row in lines if row == 1 for e in estimates))
        for name, colour, estimates, row in lines:
            shown = escape(f"{name} answer, {label}" if row == 1 else f"context - memory, {label}")
            measure = "probability" if row == 1 else "logit difference"
            figure.add_traces(_band(estimates, colour) if several else [], rows=row, cols=1)
            figure.add_scatter(
                x=list(range(len(estimates))),
                y=[e.value for e in estimates],
                mode="lines",
                line={"color": colour, "dash": dash, "width": 2},
                name=shown,
                showlegend=row == 1,
                hovertext=[_lens_hover(shown, measure, layer, e, several) for layer, e in enumerate(estimates)],
                hovertemplate="%{hovertext}<extra></extra>",
                row=row,
                col=1,
            )
    n_layers = next(iter(lenses.values())).log_probabilities.shape[1]
    figure.update_xaxes({"range": [-0.5, n_layers - 0.5], "zeroline": False} | integer_ticks(2 * n_layers))
    figure.update_xaxes(title_text="layer", row=2, col=1)
    reach = [max(floor(log10(max(lowest, 1e-12))), _LOWEST), 0.1]
    figure.update_yaxes(type="log", range=reach, exponentformat="e", dtick=3, row=1, col=1)
    figure.update_yaxes(title_text="logits", zerolinewidth=1.5, row=2, col=1)
    return figure.update_annotations(font_size=13).update_layout(
        template=LIGHT_THEME,
        height=460 + 24 * len(lenses),
        margin_t=36,
        hovermode="closest",
        legend={"y": -0.14, "yanchor": "top"},
    )


def attention_view(attention: PromptAttention) -> go.Figure:
    """What heads look at from the prompt's last token: a row for each token, a column for each head.

    Colours are scaled to each head's strongest token but its first, which takes what a head has no use for
    (Xiao et al. 2023, 2309.17453); hovering shows the weights.
    """
    heads = [f"{layer}.{head}" for layer, head in attention.heads]
    n_tokens = len(attention.tokens)
    weights = attention.weights
    highest = weights[:, 1:].max(1).values if n_tokens > 1 else weights[:, 0]
    relative = (weights / highest.clamp(min=1e-6).unsqueeze(1)).clamp(max=1)
    rows = [_visible(token) for token in attention.tokens]
    figure = go.Figure(
        go.Heatmap(
            z=relative.T.tolist(),
            x=heads,
            y=list(range(n_tokens)),
            colorscale=_WEIGHT_SCALE,
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=2,
            ygap=1,
            text=[[_weight(weight) for weight in column] for column in weights.T.tolist()],
            texttemplate="%{text}",
            hovertext=[
                [
                    f"<b>head {head}</b> looks at {escape(rows[token])}<br>attention weight {weights[h, token]:.3f}"
                    for h, head in enumerate(heads)
                ]
                for token in range(n_tokens)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    return figure.update_layout(
        template=LIGHT_THEME,
        height=_TOKEN_ROW * n_tokens + 70,
        margin={"t": 44, "b": 12},
        xaxis={"type": "category", "side": "top", "title": {"text": "layer.head"}, "showgrid": False},
        yaxis={
            "tickvals": list(range(n_tokens)),
            "ticktext": [escape(row) for row in rows],
            "range": [n_tokens - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
    )


def answer_view(steps: Mapping[str, Sequence[AnswerStep]]) -> go.Figure:
    """Answers side by side, token by token: a column for each condition, and what else could have been said.

    A token is framed where it differs from the first condition's token at the same place.

    Args:
        steps: By label ("unedited", "edited", ...), from ``answer_steps``.

    Raises:
        UserError: If there is no answer.
    """
    if not steps or not any(steps.values()):
        raise UserError("There is no answer to draw; give the steps of at least one.")
    labels = list(steps)
    longest = max(map(len, steps.values()))
    first = steps[labels[0]]
    figure = go.Figure()
    for column, label in enumerate(labels):
        for row, step in enumerate(steps[label]):
            differs = column > 0 and (row >= len(first) or first[row].token != step.token)
            figure.add_shape(
                type="rect",
                x0=column - 0.46,
                x1=column + 0.46,
                y0=row - 0.46,
                y1=row + 0.46,
                fillcolor=f"rgba(68,170,153,{0.08 + 0.42 * step.probability:.3f})",
                line={"width": 2.5 if differs else 0},
                layer="below",
            )
            others = ", ".join(f"{_visible(t)} {percent(p)}" for t, p in step.alternatives[:2])
            figure.add_annotation(
                x=column,
                y=row,
                text=f"<b>{escape(_visible(step.token))}</b> {percent(step.probability)}<br>"
                f"<span style='font-size:11px'>{escape(_cut(others))}</span>",
                showarrow=False,
            )
        figure.add_scatter(
            x=[column] * len(steps[label]),
            y=list(range(len(steps[label]))),
            mode="markers",
            marker={"size": 30, "opacity": 0},
            hovertext=[_step_hover(label, row, step) for row, step in enumerate(steps[label])],
            hovertemplate="%{hovertext}<extra></extra>",
            showlegend=False,
        )
    return figure.update_layout(
        template=LIGHT_THEME,
        height=_STEP_ROW * longest + 64,
        margin={"t": 40, "b": 12},
        hovermode="closest",
        xaxis={
            "tickvals": list(range(len(labels))),
            "ticktext": [f"<b>{escape(label)}</b>" for label in labels],
            "side": "top",
            "range": [-0.5, len(labels) - 0.5],
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={
            "tickvals": list(range(longest)),
            "ticktext": [str(row + 1) for row in range(longest)],
            "range": [longest - 0.5, -0.5],
            "title": {"text": "token of the answer"},
            "showgrid": False,
            "zeroline": False,
        },
    )


def _band(estimates: Sequence[Estimate], colour: str) -> list[Any]:
    layers = list(range(len(estimates)))
    return [
        go.Scatter(
            x=layers + layers[::-1],
            y=[e.high for e in estimates] + [e.low for e in reversed(estimates)],
            fill="toself",
            fillcolor=colour,
            opacity=_BAND_OPACITY,
            mode="none",
            hoverinfo="skip",
            showlegend=False,
        )
    ]


def _lens_hover(shown: str, measure: str, layer: int, estimate: Estimate, several: bool) -> str:
    interval = f"95% interval by subject [{estimate.low:.3f}, {estimate.high:.3f}], n = {estimate.n} prompts"
    about = interval if several else f"n = {estimate.n} of one subject, no interval"
    return f"<b>{shown}</b><br>after layer {layer}: {measure} {estimate.value:.3f}<br>{about}"


def _step_hover(label: str, row: int, step: AnswerStep) -> str:
    others = ", ".join(f"{escape(_visible(token))} ({probability:.3f})" for token, probability in step.alternatives)
    said = f"{escape(_visible(step.token))}, probability {step.probability:.3f}"
    return f"<b>{escape(label)}, token {row + 1}</b><br>{said}" + (f"<br>instead of {others}" if others else "")


def _visible(token: str) -> str:
    """A token's text, with its leading space and line breaks made visible."""
    shown = token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(
        "\t", "\N{RIGHTWARDS ARROW TO BAR}"
    )
    return f"\N{OPEN BOX}{shown[1:]}" if shown.startswith(" ") else shown


def _cut(text: str, width: int = 24) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}\N{HORIZONTAL ELLIPSIS}"


def _weight(weight: float) -> str:
    return f"{weight:.2f}" if weight >= 0.05 else ""
