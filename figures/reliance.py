"""A figure of answers, token by token: which of them the context makes likelier."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from figures.theme import LIGHT_THEME, escape
from interp.errors import UserError

_ROW, _SHOWN, _LONGEST, _MOST = 30, 16, 16, 6.0


def reliance_map(frame: pl.DataFrame, *, count: int = _SHOWN, longest: int = _LONGEST) -> go.Figure:
    """Answers, one a row, with their tokens coloured by what the context adds to their probability.

    Vermillion tokens come from the context; blue ones are less likely with it.

    Args:
        frame: What ``interp.reliance.token_reliance`` gives.
        count: How many answers are shown, the first ones.
        longest: How many tokens of each.

    Raises:
        UserError: If there is no answer.
    """
    answers = frame["id"].unique(maintain_order=True).to_list()[:count]
    if not answers:
        raise UserError("There is no answer to draw; give at least one.")
    parts = {name: frame.filter((pl.col("id") == name) & (pl.col("position") < longest)) for name in answers}
    width = max(len(part) for part in parts.values())

    def cells(column: str, empty: object) -> list[list[object]]:
        return [[*part[column].to_list(), *[empty] * (width - len(part))] for part in parts.values()]

    hover = [
        [
            f"{escape(repr(row['token']))}<br>adds {row['gain']:+.2f} nats<br>divergence {row['divergence']:.2f} nats"
            for row in part.iter_rows(named=True)
        ]
        + [""] * (width - len(part))
        for part in parts.values()
    ]
    texts = [[escape(str(token)) for token in row] for row in cells("token", "")]
    labels = [escape(f"{part['subject'][0]} ({part['kind'][0]})") for part in parts.values()]
    figure = go.Figure(
        go.Heatmap(
            z=cells("gain", None),
            y=[f"{number}" for number in range(len(labels))],
            text=texts,
            texttemplate="%{text}",
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            coloraxis="coloraxis",
            xgap=2,
            ygap=3,
        )
    )
    return figure.update_layout(
        template=LIGHT_THEME,
        height=_ROW * len(answers) + 110,
        xaxis={
            "title": {"text": "token of the answer"},
            "showgrid": False,
            "zeroline": False,
            "dtick": max(1, width // 8),
        },
        yaxis={
            "autorange": "reversed",
            "tickvals": [f"{number}" for number in range(len(labels))],
            "ticktext": labels,
            "showgrid": False,
            "zeroline": False,
        },
        coloraxis={
            "cmin": -_MOST,
            "cmax": _MOST,
            "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": "nats", "font": {"size": 12}}},
        },
    )
