"""The page: templates of ``assets/report`` filled with one run or several.

The page needs nothing but itself: plotly.js is part of it, and it loads nothing over the network. What models and data
say is text and stays text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from plotly.basedatatypes import BaseFigure
from plotly.offline import get_plotlyjs

from conflictscope.report import words
from conflictscope.report.answers import answers_of
from conflictscope.report.figures import best_probes, compared, plots_of
from conflictscope.report.runs import Run
from conflictscope.study.record import EXAMPLES, Measured
from figures.theme import CONTEXT_COLOUR, DARK_THEME, LIGHT_THEME, MEMORY_COLOUR, OTHER_COLOUR, percent
from interp.answers import DIRECTIONS, Direction
from interp.attribution.scores import RankedHead
from interp.errors import UserError
from interp.files import assets_directory, write_text
from probes.scoring import score_table

COLOURS = {"memory": MEMORY_COLOUR, "context": CONTEXT_COLOUR, "other": OTHER_COLOUR}
"""What pages colour sources with."""

_LISTED = 12
_FILTERS = {
    "percent": words.share,
    "interval": words.interval,
    "decimals": words.decimals,
    "defined": words.defined,
    "points": words.points,
    "edit": words.edit,
    "scale": words.scale,
    "signed": words.signed,
    "words": words.words,
    "literal": repr,
}


def write_report(path: str | Path, runs: Sequence[Run], *, growing: bool = False) -> None:
    """Write the report of one run, or of several next to each other, as one self-contained HTML file, atomically.

    Args:
        path: The file to write.
        runs: What ``read_runs`` gave.
        growing: Whether the file will be written again, so that the page is to load itself again.

    Raises:
        UserError: If a run's records do not fit together or lack something, or the file cannot be written.
    """
    prefixes = [f"run{number}-" if len(runs) > 1 else "" for number in range(1, len(runs) + 1)]
    try:
        plots = {
            f"{prefix}{name}": plot
            for prefix, run in zip(prefixes, runs, strict=True)
            for name, plot in plots_of(run).items()
        }
        if len(runs) > 1 and (over_all := compared(runs)):
            plots["compared"] = over_all
        page = (
            environment()
            .get_template("page.html")
            .render(
                runs=runs,
                growing=growing,
                prefixes=prefixes,
                differing=_differing(runs),
                strongest=_strongest(runs),
                best_probes=best_probes,
                probe_table=score_table,
                directions=DIRECTIONS,
                colours=COLOURS,
                over_cards=_over_cards,
                edited_heads=_edited_heads,
                listed=_LISTED,
                alt={name: plot.alt for name, plot in plots.items()},
                figures={name: plain(plot.figure) for name, plot in plots.items()},
                themes={"light": LIGHT_THEME.to_plotly_json(), "dark": DARK_THEME.to_plotly_json()},
                answers=answers_of(runs),
                examples_file=EXAMPLES,
                plotly_js=get_plotlyjs(),
            )
        )
    except (UndefinedError, KeyError) as error:
        raise UserError(f"The records lack something that the report shows ({error}); run the study again.") from error
    write_text(path, page)


@cache
def environment() -> Environment:
    """The templates of ``assets/report``, with the filters that they use."""
    found = Environment(
        loader=FileSystemLoader(assets_directory() / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= _FILTERS
    return found


def _differing(runs: Sequence[Run]) -> list[str]:
    """What keeps the numbers of several runs from being compared one to one."""
    models = {run.record.model.get("fingerprint", run.record.model["name"]) for run in runs}
    data = {run.record.data.get("digest") for run in runs if run.conditions}
    return ["models"] * (len(models) > 1) + ["data"] * (len(data) > 1)


def _strongest(runs: Sequence[Run]) -> dict[Direction, tuple[Run, Measured]]:
    """Of the runs' winners the one with the highest rate of each direction."""
    won: dict[Direction, list[tuple[Run, Measured]]] = {
        d: [(run, run.winners[d]) for run in runs if d in run.winners] for d in DIRECTIONS
    }
    return {d: max(own, key=lambda of: of[1].test[f"{d}_rate"]["value"]) for d, own in won.items() if own}


def _over_cards(run: Run, rate: str) -> str:
    """The smallest to the largest value of a rate over the key conditions."""
    rates = [condition.test[rate]["value"] for condition in run.cards]
    return "\N{EN DASH}".join(dict.fromkeys(percent(rate) for rate in (min(rates), max(rates))))


def _edited_heads(run: Run, condition: Measured) -> list[tuple[RankedHead, float]]:
    """The heads that a condition scales with their scores and scales, strongest first."""
    assert run.scores is not None
    scales = {(layer, head): factor for layer, head, factor in condition.heads}
    edited = [head for head in run.scores.ranked("context") if (head.layer, head.head) in scales]
    return [(head, scales[head.layer, head.head]) for head in sorted(edited, key=lambda head: -abs(head.score))]


def plain(figure: BaseFigure) -> dict[str, Any]:
    """A figure as JSON without its theme, which the page chooses."""
    record = json.loads(figure.to_json() or "{}")
    del record["layout"]["template"]
    return record
