"""The report of a study: one HTML page that holds its figures, its numbers and how they were measured.

The page needs nothing but itself: plotly.js is part of it, and it loads nothing over the network.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.basedatatypes import BaseFigure
from plotly.offline import get_plotlyjs

from interp.attribution.scores import DIRECTIONS, Direction, HeadScores, RankedHead
from interp.files import assets_directory, write_text
from interp.plots import (
    CONTEXT_COLOUR,
    DARK_THEME,
    LIGHT_THEME,
    MEMORY_COLOUR,
    OTHER_COLOUR,
    gain_and_damage,
    head_map,
    percent,
    top_heads_bars,
    usage_bars,
    usage_by_template,
)

_STRONGEST = 8
_LISTED = 12
_CONDITIONS = {
    "baseline": "unedited",
    **{f"towards_{d}": f"towards {d}" for d in DIRECTIONS},
    "random_heads": "random heads",
}


class _Change(NamedTuple):
    """One measure before and after an edit."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """What the two intervals allow to say: ``rises``, ``falls``, or ``unclear`` where they overlap."""
        if self.after["low"] > self.before["high"]:
            return "rises"
        return "falls" if self.after["high"] < self.before["low"] else "unclear"


class _Plot(NamedTuple):
    """A figure of the page: what to draw, and what it shows in words for those who do not see it."""

    figure: BaseFigure
    alt: str


class _Row(NamedTuple):
    """One row of the damage table."""

    label: str
    edit: str
    exported: bool
    test: Mapping[str, Any]


def write_report(path: str | Path, summary: Mapping[str, Any], scores: HeadScores) -> None:
    """Write the report of a study as one self-contained HTML file, atomically.

    Args:
        path: The file to write.
        summary: What ``summary.json`` holds.
        scores: The head scores that the edited heads were chosen by.

    Raises:
        UserError: If ``scores`` lack an edited head, or the file cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(assets_directory() / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "interval": _interval,
        "edit": _edit,
        "edits": _edits,
        "scale": _scale,
        "signed": _signed,
        "words": _words,
    }
    plots = _plots(summary, scores)
    page = environment.get_template("template.html").render(
        summary=summary,
        scores=scores,
        directions=DIRECTIONS,
        colours={"memory": MEMORY_COLOUR, "context": CONTEXT_COLOUR, "other": OTHER_COLOUR},
        change=partial(_change, summary),
        both_rates=_both_rates(summary),
        conditions=_CONDITIONS,
        rows=_rows(summary),
        edited_heads=partial(_edited_heads, summary, scores),
        listed=_LISTED,
        alt={name: plot.alt for name, plot in plots.items()},
        figures={name: _plain(plot.figure) for name, plot in plots.items()},
        themes={"light": LIGHT_THEME.to_plotly_json(), "dark": DARK_THEME.to_plotly_json()},
        command=_command(summary),
        model_literal=repr(summary["model"]["name"]),
        plotly_js=get_plotlyjs(),
    )
    write_text(path, page)


def _change(summary: Mapping[str, Any], condition: str, measure: str) -> _Change:
    return _Change(summary["baseline"]["test"][measure], summary[condition]["test"][measure])


def _both_rates(summary: Mapping[str, Any]) -> str:
    """The smallest to the largest share of answers that name both sources, over all conditions."""
    rates = [summary[condition]["test"]["both_rate"]["value"] for condition in _CONDITIONS]
    return "\N{EN DASH}".join(dict.fromkeys(percent(rate) for rate in (min(rates), max(rates))))


def _plots(summary: Mapping[str, Any], scores: HeadScores) -> dict[str, _Plot]:
    tests = {label: summary[condition]["test"] for condition, label in _CONDITIONS.items()}
    by_template = {label: test["by_template"] for label, test in tests.items() if label != _CONDITIONS["random_heads"]}
    edits: dict[str, dict[Direction, Mapping[str, Any]]] = {
        _words(method): {d: by[f"towards_{d}"]["test"] for d in DIRECTIONS if f"towards_{d}" in by}
        for method, by in summary["methods"].items()
    }
    edited = [(layer, head) for d in DIRECTIONS for layer, head, _ in summary[f"towards_{d}"]["heads"]]
    strongest = "; ".join(
        f"towards {d}: " + ", ".join(f"{h.layer}.{h.head} ({h.score:+.2f})" for h in scores.ranked(d)[:_STRONGEST])
        for d in DIRECTIONS
    )

    def rates(test: Mapping[str, Any]) -> str:
        return ", ".join(f"{usage} {_percent(test[f'{usage}_rate'])}" for usage in ("memory", "context", "other"))

    return {
        "usage": _Plot(
            usage_bars(tests),
            "Bar chart of usage. " + "; ".join(f"{label}: {rates(test)}" for label, test in tests.items()),
        ),
        "templates": _Plot(
            usage_by_template(by_template, held_out=[summary["data"]["phrasings"]["held_out"]]),
            "Dot chart of usage by phrasing family; the table that follows holds its numbers",
        ),
        "map": _Plot(
            head_map(scores, highlighted=edited), f"Heat map of head scores, layer by head. Strongest {strongest}"
        ),
        "top": _Plot(top_heads_bars(scores, _STRONGEST), f"Bar chart of the strongest heads, {strongest}"),
        "cost": _Plot(
            gain_and_damage(summary["baseline"]["test"], edits, control=summary["random_heads"]["test"]),
            "Scatter chart of the wanted rate against closed-book accuracy; the table that follows holds its numbers",
        ),
    }


def _rows(summary: Mapping[str, Any]) -> list[_Row]:
    return [
        _Row("unedited", "", False, summary["baseline"]["test"]),
        *(
            _Row(
                f"{_words(method)}, towards {d}",
                _edit(edit),
                summary[f"towards_{d}"]["method"] == method,
                edit["test"],
            )
            for d in DIRECTIONS
            for method, by in summary["methods"].items()
            if (edit := by.get(f"towards_{d}"))
        ),
        _Row("random heads", _edits(summary["random_heads"]["draws"]), False, summary["random_heads"]["test"]),
    ]


def _edited_heads(
    summary: Mapping[str, Any], scores: HeadScores, direction: Direction
) -> list[tuple[RankedHead, float]]:
    """The heads of the exported edit with their scores and scales, strongest first."""
    scales = {(layer, head): scale for layer, head, scale in summary[f"towards_{direction}"]["heads"]}
    edited = [head for head in scores.ranked("context") if (head.layer, head.head) in scales]
    return [(head, scales[head.layer, head.head]) for head in sorted(edited, key=lambda head: -abs(head.score))]


def _plain(figure: BaseFigure) -> dict[str, Any]:
    """The figure without its theme, which the page chooses."""
    record = json.loads(figure.to_json() or "{}")
    del record["layout"]["template"]
    return record


def _command(summary: Mapping[str, Any]) -> str:
    arguments = ["conflictscope", "demo", "--model", summary["model"]["name"]]
    for relation in summary["data"]["relations"]:
        arguments += ["--relation", relation]
    arguments += ["--seed", str(summary["settings"]["seed"]), "--dtype", summary["settings"]["dtype"]]
    return shlex.join(arguments + ["--quick"] * bool(summary["settings"]["quick"]))


def _edit(condition: Mapping[str, Any]) -> str:
    """What is done to the heads, for example ``5 heads pruned and 2 amplified``."""
    removed = "held at their mean" if condition["around"] == "mean" else "pruned"
    counts = dict.fromkeys((removed, "inverted", "damped", "amplified"), 0)
    for _, _, scale in condition["heads"]:
        counts[removed if scale == 0 else "inverted" if scale < 0 else "damped" if scale < 1 else "amplified"] += 1
    done = [(count, verb) for verb, count in counts.items() if count]
    if not done:
        return "no head edited"
    (count, verb), *others = done
    parts = [f"{count} {'head' if count == 1 else 'heads'} {verb}", *(f"{count} {verb}" for count, verb in others)]
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _edits(draws: Sequence[Mapping[str, Any]]) -> str:
    """What is done in each draw, said once where it is the same."""
    return "; ".join(dict.fromkeys(_edit(draw) for draw in draws))


def _percent(estimate: Mapping[str, Any]) -> str:
    return percent(estimate["value"])


def _interval(estimate: Mapping[str, Any]) -> str:
    return f"{percent(estimate['low']).removesuffix('%')}\N{EN DASH}{percent(estimate['high'])}"


def _signed(score: float) -> str:
    return f"{score:+.2f}".replace("-", "\N{MINUS SIGN}")


def _scale(scale: float) -> str:
    """A scale with at most two decimals: 0, 1.5, 0.99."""
    return f"{round(scale, 2):g}".replace("-", "\N{MINUS SIGN}")


def _words(name: str) -> str:
    return name.replace("_", " ")
