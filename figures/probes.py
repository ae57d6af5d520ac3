"""Figures of probes and of activation patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil, floor, log10
from typing import Any, NamedTuple

import plotly.graph_objects as go
import polars as pl
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from figures.theme import (
    LABEL_COLOURS,
    LIGHT_THEME,
    OTHER_COLOUR,
    SERIES_COLOURS,
    escape,
    example_hover,
    integer_ticks,
    interval,
    label_symbol,
    measure_hover,
    translucent,
)
from interp.activations import SITE_KINDS, SiteKind, site_kind
from interp.errors import UserError
from interp.statistics import Estimate
from probes.linear import LinearProbe, ProbeSet
from probes.quality import ProbeScore

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star")
_KIND_COLOURS: dict[SiteKind, str] = dict(zip(SITE_KINDS, SERIES_COLOURS, strict=False))
_KIND_SYMBOLS: dict[SiteKind, str] = dict(zip(SITE_KINDS, _SYMBOLS, strict=False))
_DASHES = ("solid", "dash", "dot", "dashdot")
_PATTERN_TITLES = {
    "kurtosis": "excess kurtosis",
    "hoyer": "Hoyer index",
    "gini": "Gini index",
    "l1": "L1 norm",
    "l2": "L2 norm",
}
_LOG_RATIO = 10
_DIGITS = 3


def auroc_by_layer(
    scores: Mapping[str, Estimate],
    *,
    shuffled: Mapping[str, Estimate] | None = None,
    floor: Estimate | None = None,
    floor_label: str = "embedding floor",
    chosen: str | None = None,
) -> go.Figure:
    """AUROC of the probes against their layer, a line with its interval for each kind of site.

    Args:
        scores: AUROC by site; sites that are not of a layer are left out.
        shuffled: That of probes fitted to shuffled labels, drawn in grey for the residual stream, or for the first
            kind of site there is.
        floor: What a probe reaches that sees too little, drawn as a dotted line.
        floor_label: What the floor is called.
        chosen: The site to mark with a ring.

    Raises:
        UserError: If no site is of a layer, or ``chosen`` is not among the scores.
    """
    by_kind = _by_kind(scores)
    if not by_kind:
        raise UserError("None of the scores is of a layer's site; give sites such as those of sites_of(model).")
    figure = go.Figure()
    controls = _by_kind(shuffled or {})
    if kind := next(iter(controls), None):
        control = _Line("shuffled labels", f"{kind}, shuffled labels", "AUROC", OTHER_COLOUR)
        figure.add_traces(_line(control, controls[kind])).update_traces(legendrank=1001)
    for kind, by_layer in by_kind.items():
        line = _Line(kind, kind, "AUROC", _KIND_COLOURS[kind], symbol=_KIND_SYMBOLS[kind])
        figure.add_traces(_line(line, by_layer))
    drawn = [point for by_layer in (*controls.values(), *by_kind.values()) for point in by_layer.items()]
    reach = (min(layer for layer, _ in drawn) - 0.5, max(layer for layer, _ in drawn) + 0.5)
    bottom, top = min(0.4, *(estimate.low - 0.02 for _, estimate in drawn)), 1.02
    if floor is not None:
        _add_floor(figure, floor, floor_label, reach, drawn)
    if chosen is not None:
        _add_ring(figure, scores, chosen, reach)
        top = max(top, scores[chosen].high + 0.09)
    return figure.update_layout(
        template=LIGHT_THEME,
        height=380,
        margin_t=40,
        hovermode="closest",
        xaxis={"title": {"text": "layer"}, "range": reach, "zeroline": False} | integer_ticks(2 * round(reach[1])),
        yaxis={
            "title": {"text": "AUROC"},
            "range": [bottom, top],
            "tickvals": [n / 10 for n in range(11)],
            "tickformat": ".1f",
            "zeroline": False,
        },
    )


def reliability_curve(scores: Mapping[str, ProbeScore]) -> go.Figure:
    """How often the predicted class occurs against how probable the probes call it; on the diagonal they are right.

    Args:
        scores: By site or any other label; the legend adds the expected calibration error (ECE).
    """
    figure = go.Figure(
        go.Scatter(
            x=[0, 1],
            y=[0, 1],
            mode="lines",
            line={"color": OTHER_COLOUR, "dash": "dot", "width": 1.5},
            showlegend=False,
            hoverinfo="skip",
        )
    )
    for i, (label, score) in enumerate(scores.items()):
        colour = SERIES_COLOURS[i % len(SERIES_COLOURS)]
        name = _site_label(label)
        frequencies = [b.frequency for b in score.reliability]
        figure.add_scatter(
            x=[b.confidence for b in score.reliability],
            y=[frequency.value for frequency in frequencies],
            error_y=interval(frequencies) | {"color": colour, "thickness": 1, "width": 0},
            mode="lines+markers",
            line={"color": colour, "width": 1.5},
            marker={"color": colour, "symbol": _SYMBOLS[i % len(_SYMBOLS)], "size": 8},
            name=f"{escape(name)}, ECE {score.calibration_error.value:.3f}",
            hovertext=[
                measure_hover(f"{name}, predicted {b.confidence:.2f}", "observed frequency", b.frequency)
                for b in score.reliability
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            cliponaxis=False,
        )
    axis = {"range": [-0.02, 1.02], "tickformat": ".1f", "dtick": 0.2, "zeroline": False}
    return figure.update_layout(
        template=LIGHT_THEME,
        height=400,
        margin_t=40,
        hovermode="closest",
        showlegend=True,
        xaxis=axis | {"title": {"text": "predicted probability"}},
        yaxis=axis | {"title": {"text": "observed frequency"}},
    )


def projection_by_layer(
    features: Mapping[str, Tensor], probes: ProbeSet, labels: Sequence[str], texts: Sequence[str] | None = None
) -> go.Figure:
    """The examples in two projections of the residual stream, with a slider over the layers.

    On the left the first two principal components; on the right the probe's log odds of its second class against the
    first principal component of what is orthogonal to the probe's direction. A component's sign is the one that
    agrees with the layer before. The slider starts at the layer whose probe did best on validation.

    Args:
        features: By site ``(n, d)``; the residual-stream sites that have a probe are drawn.
        probes: Probes of two classes.
        labels: What colours the examples, ``n`` of them.
        texts: What hovering over an example shows, ``n`` of them.

    Raises:
        UserError: If the probes have more than two classes, or none is of a residual-stream site in ``features``.
    """
    places = {site: site_kind(site) for site in features if site in probes.probes}
    sites = {place[1]: site for site, place in places.items() if place and place[0] == "residual"}
    if not sites:
        raise UserError("No residual-stream site has both a probe and features; record and fit the same sites.")
    n = len(features[next(iter(sites.values()))])
    if len(labels) != n or (texts is not None and len(texts) != n):
        raise UserError(f"Give one label, and one text or none at all, for each of the {n} rows of the features.")
    views, before = {}, None
    for layer in sorted(sites):
        before = views[layer] = _views(features[sites[layer]], probes[sites[layer]], before)
    start = max(sites, key=lambda layer: probes[sites[layer]].validation_auroc)
    members = _members(labels)
    points = {layer: _points(view, list(members.values())) for layer, view in views.items()}
    figure = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.1, column_titles=["<b>principal components</b>", "<b>probe</b>"]
    )
    drawn = [(column, label) for column in (1, 2) for label in members]
    for (column, label), coordinates in zip(drawn, points[start], strict=True):
        figure.add_scatter(
            x=coordinates["x"],
            y=coordinates["y"],
            mode="markers",
            marker={"color": _colour(label, list(members)), "symbol": label_symbol(label), "size": 6, "opacity": 0.75},
            name=escape(label),
            legendgroup=label,
            showlegend=column == 1,
            hovertext=[example_hover(label, texts[i] if texts else "") for i in members[label]],
            hovertemplate="%{hovertext}<extra></extra>",
            row=1,
            col=column,
        )
    axes = {layer: _axes(view) for layer, view in views.items()}
    figure.frames = [go.Frame(name=str(layer), data=points[layer], layout=axes[layer]) for layer in views]
    hidden = {"showticklabels": False, "ticks": "", "zeroline": False}
    log_odds = torch.cat([view.log_odds for view in views.values()])
    figure.update_layout(
        template=LIGHT_THEME,
        height=430,
        margin_t=60,
        hovermode="closest",
        legend={"y": 1.1, "itemsizing": "constant"},
        sliders=[_slider(list(views), start)],
        xaxis=hidden | {"title": {"standoff": 30}},
        yaxis=hidden,
        xaxis2={"title": {"text": f"log odds of {escape(probes.classes[1])}"}, "range": _range(log_odds)},
        yaxis2=hidden | {"title": {"text": "PC 1 orthogonal to the probe"}},
    )
    return figure.update_annotations(font_size=13).update_layout(axes[start])


def activation_patterns(frame: pl.DataFrame) -> go.Figure:
    """Sparsity and norm of the activations against the layer, a panel for each pattern, a line for each group.

    Args:
        frame: What ``patterns_by_group`` gave. The residual stream is drawn, or where there is none the kind of site
            that has most layers.

    Raises:
        UserError: If no site is of a layer.
    """
    kind = _main_kind(frame["site"].unique().to_list())
    layers = {site: place[1] for site in frame["site"].unique() if (place := site_kind(site)) and place[0] == kind}
    drawn = (
        frame.filter(pl.col("site").is_in(list(layers)))
        .with_columns(layer=pl.col("site").replace_strict(layers, return_dtype=pl.Int64))
        .sort("layer", maintain_order=True)
    )
    patterns = drawn["pattern"].unique(maintain_order=True).to_list()
    groups = list(_members(drawn["group"].to_list()))
    n_rows = -(-len(patterns) // 2)
    titles = [_PATTERN_TITLES.get(pattern, escape(pattern)) for pattern in patterns]
    figure = make_subplots(
        rows=n_rows,
        cols=2,
        horizontal_spacing=0.16,
        vertical_spacing=0.27 / n_rows,
        subplot_titles=[f"<b>{title}</b>" for title in titles],
    )
    for i, (pattern, title) in enumerate(zip(patterns, titles, strict=True)):
        row, col = i // 2 + 1, i % 2 + 1
        panel = drawn.filter(pattern=pattern)
        for group, dash in zip(groups, cycle(_DASHES), strict=False):
            by_layer = {r["layer"]: _recorded(r) for r in panel.filter(group=group).iter_rows(named=True)}
            line = _Line(group, group, title, _colour(group, groups), dash=dash, in_legend=i == 0)
            figure.add_traces(_line(line, by_layer), rows=row, cols=col)
        figure.update_yaxes(_scale(panel), row=row, col=col)
        if i + 2 >= len(patterns):
            figure.update_xaxes(title_text=f"layer ({kind})", row=row, col=col)
    reach = [min(layers.values()) - 0.5, max(layers.values()) + 0.5]
    figure.update_xaxes({"range": reach, "zeroline": False, "tickangle": 0} | integer_ticks(4 * max(layers.values())))
    return figure.update_annotations(font_size=13).update_layout(
        template=LIGHT_THEME,
        height=190 * n_rows + 60,
        margin_t=50,
        hovermode="closest",
        legend={"y": 1 + 0.13 / n_rows},
    )


class _Line(NamedTuple):
    """What tells one line of a figure from the others."""

    name: str
    heading: str
    measure: str
    colour: str
    symbol: str | None = None
    dash: str = "solid"
    in_legend: bool = True


class _Views(NamedTuple):
    """The coordinates of one layer, each ``(n,)``, and the share of variance of each component."""

    components: tuple[Tensor, Tensor]
    log_odds: Tensor
    orthogonal: Tensor
    shares: tuple[float, float]


def _by_kind(estimates: Mapping[str, Estimate]) -> dict[SiteKind, dict[int, Estimate]]:
    """Estimates by kind of site and layer, kinds in the order of ``SITE_KINDS``, layers ascending."""
    found = {place: estimate for site, estimate in estimates.items() if (place := site_kind(site))}
    kinds: list[SiteKind] = [kind for kind in SITE_KINDS if any(kind == each for each, _ in found)]
    return {kind: {layer: found[kind, layer] for each, layer in sorted(found) if each == kind} for kind in kinds}


def _site_label(site: str) -> str:
    place = site_kind(site)
    return site if place is None else f"{place[0]} {place[1]}"


def _line(line: _Line, by_layer: Mapping[int, Estimate]) -> list[go.Scatter]:
    """A line and its interval as a band, of one legend entry."""
    layers, estimates = list(by_layer), list(by_layer.values())
    band = go.Scatter(
        x=layers + layers[::-1],
        y=[e.high for e in estimates] + [e.low for e in reversed(estimates)],
        mode="lines",
        fill="toself",
        fillcolor=translucent(line.colour),
        # The band of a single layer has no area and is seen by its outline alone.
        line={"color": translucent(line.colour), "width": 0 if len(layers) > 1 else 3},
        legendgroup=line.name,
        showlegend=False,
        hoverinfo="skip",
    )
    means = go.Scatter(
        x=layers,
        y=[e.value for e in estimates],
        mode="lines+markers" if line.symbol or len(layers) == 1 else "lines",
        line={"color": line.colour, "width": 2, "dash": line.dash},
        marker={"color": line.colour, "symbol": line.symbol, "size": 6},
        name=escape(line.name),
        legendgroup=line.name,
        showlegend=line.in_legend,
        hovertext=[measure_hover(f"{line.heading}, layer {layer}", line.measure, e) for layer, e in by_layer.items()],
        hovertemplate="%{hovertext}<extra></extra>",
    )
    return [band, means]


def _add_floor(
    figure: go.Figure,
    reached: Estimate,
    label: str,
    reach: tuple[float, float],
    drawn: Sequence[tuple[int, Estimate]],
) -> None:
    """A dotted line, labelled at its right end on the side where the lines are further away."""
    gaps = [estimate.value - reached.value for layer, estimate in drawn if layer >= sum(reach) / 2]
    above, below = min([gap for gap in gaps if gap >= 0], default=1), min([-gap for gap in gaps if gap < 0], default=1)
    figure.add_scatter(
        x=reach,
        y=[reached.value] * 2,
        mode="lines",
        line={"color": OTHER_COLOUR, "dash": "dot", "width": 1.5},
        name=escape(label),
        showlegend=False,
        hovertext=[measure_hover(label, "AUROC", reached)] * 2,
        hovertemplate="%{hovertext}<extra></extra>",
    )
    figure.add_annotation(
        text=f"{escape(label)}: {reached.value:.2f}",
        x=reach[1],
        y=reached.value,
        xanchor="right",
        yanchor="top" if below >= above else "bottom",
        showarrow=False,
        font_size=12,
    )


def _add_ring(figure: go.Figure, scores: Mapping[str, Estimate], site: str, reach: tuple[float, float]) -> None:
    place = site_kind(site)
    if site not in scores or place is None:
        raise UserError(f"The site {site!r} has no score by layer; choose one of {', '.join(scores)}.")
    estimate = scores[site]
    figure.add_scatter(
        x=[place[1]],
        y=[estimate.value],
        mode="markers",
        marker={"symbol": "circle-open", "size": 15, "line": {"width": 2.5}},
        name=site,
        showlegend=False,
        hoverinfo="skip",
        cliponaxis=False,
    )
    share = (place[1] - reach[0]) / (reach[1] - reach[0])
    figure.add_annotation(
        text=f"<b>{_site_label(site)}: {estimate.value:.2f}</b>",
        x=place[1],
        y=estimate.high,
        yshift=4,
        xanchor="left" if share < 0.25 else "right" if share > 0.75 else "center",
        yanchor="bottom",
        showarrow=False,
        font_size=12,
    )


def _views(features: Tensor, probe: LinearProbe, before: _Views | None) -> _Views:
    values = features.flatten(1).float().cpu()
    centred = values - values.mean(0)
    scores, shares = _components(centred, 2)
    direction = probe.direction.cpu()
    rest, _ = _components(centred - torch.outer(centred @ direction, direction), 1)
    first, second, orthogonal = scores[:, 0], scores[:, 1], rest[:, 0]
    if before is not None:
        first, second = _aligned(first, before.components[0]), _aligned(second, before.components[1])
        orthogonal = _aligned(orthogonal, before.orthogonal)
    return _Views((first, second), probe.logits(values)[:, 0], orthogonal, (shares[0].item(), shares[1].item()))


def _components(centred: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores of the first ``k`` principal components, ``(n, k)``, and their shares of the variance, ``(k,)``."""
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    return left[:, :k] * sizes[:k], sizes[:k].square() / sizes.square().sum()


def _aligned(scores: Tensor, before: Tensor) -> Tensor:
    return -scores if scores @ before < 0 else scores


def _members(labels: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each label, in the order of the known labels, others by name."""
    known = [label for label in LABEL_COLOURS if label in labels]
    order = [*known, *sorted(set(labels) - set(known))]
    return {label: [i for i, each in enumerate(labels) if each == label] for label in order}


def _colour(label: str, labels: Sequence[str]) -> str:
    others = [each for each in labels if each not in LABEL_COLOURS]
    return LABEL_COLOURS.get(label) or SERIES_COLOURS[others.index(label) % len(SERIES_COLOURS)]


def _points(view: _Views, members: Sequence[list[int]]) -> list[dict[str, Any]]:
    """What a layer changes in the traces: the coordinates of each panel's labels."""
    panels = (view.components, (view.log_odds, view.orthogonal))
    return [{"type": "scatter", "x": _rounded(x[rows]), "y": _rounded(y[rows])} for x, y in panels for rows in members]


def _axes(view: _Views) -> dict[str, Any]:
    """What a layer changes in the axes."""
    (first, second), shares = view.components, [f"{100 * share:.0f}%" for share in view.shares]
    return {
        "xaxis": {"range": _range(first), "title": {"text": f"PC 1 ({shares[0]})"}},
        "yaxis": {"range": _range(second), "title": {"text": f"PC 2 ({shares[1]})"}},
        "yaxis2": {"range": _range(view.orthogonal)},
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]


def _range(values: Tensor) -> list[float]:
    low, high = values.min().item(), values.max().item()
    margin = 0.06 * (high - low) or 1.0
    return _rounded(torch.tensor([low - margin, high + margin]))


def _slider(layers: Sequence[int], start: int) -> dict[str, Any]:
    at_once = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    return {
        "active": list(layers).index(start),
        "steps": [{"label": str(n), "method": "animate", "args": [[str(n)], at_once]} for n in layers],
        "currentvalue": {"prefix": "layer ", "xanchor": "left", "font": {"size": 13}},
        "font": {"size": 11},
        "bgcolor": OTHER_COLOUR,
        "activebgcolor": OTHER_COLOUR,
        "bordercolor": OTHER_COLOUR,
        "tickcolor": OTHER_COLOUR,
        "pad": {"t": 50, "b": 0},
        "len": 1,
        "x": 0,
    }


def _main_kind(sites: Sequence[str]) -> SiteKind:
    kinds: list[SiteKind] = [place[0] for site in sites if (place := site_kind(site))]
    if not kinds:
        raise UserError("None of the patterns is of a layer's site; give sites such as those of sites_of(model).")
    return "residual" if "residual" in kinds else max(SITE_KINDS, key=kinds.count)


def _recorded(row: Mapping[str, Any]) -> Estimate:
    return Estimate(row["value"], row["low"], row["high"], row["n"])


def _scale(panel: pl.DataFrame) -> dict[str, Any]:
    """A logarithmic axis for values that grow manyfold, else a linear one."""
    low, high = panel["low"].to_numpy().min(), panel["high"].to_numpy().max()
    if not 0 < low < high / _LOG_RATIO:
        return {"nticks": 6, "zeroline": False}
    steps = (1, 2, 5) if high < 100 * low else (1,)
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    return {"type": "log", "tickvals": [step * 10.0**n for n in decades for step in steps], "tickformat": "~s"}
