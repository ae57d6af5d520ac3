"""The leaderboard's page, and the answers beside it.

The page holds the numbers of every view that its filters can ask for, and needs nothing else to show them. The answers
behind a cell are too many for that: those of study n lie in ``answers-n.js``, which is loaded when they are asked for,
also from the file system, where a page may read no other file than a script.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from conflictscope.report.answers import answers_of
from conflictscope.report.board import CHOICES, Board, Cell, Numbers, Row, View
from conflictscope.report.page import COLOURS, environment, plain
from conflictscope.report.runs import SIGNIFICANT
from conflictscope.report.words import words
from figures.leaderboard import Competitor, critical_differences, gain_against_loss
from figures.theme import DARK_THEME, LIGHT_THEME
from interp.answers import DIRECTIONS
from interp.files import write_text
from interp.ranks import Ranks
from interp.statistics import Estimate

PAGE = "leaderboard.html"
_ANSWERS = "answers-{}.js"


def write_page(out: Path, board: Board) -> None:
    """Write ``leaderboard.html`` and an ``answers-n.js`` for each study, each file atomically; the page comes last.

    Args:
        out: The folder.
        board: What is shown.

    Raises:
        UserError: If a file cannot be written.
    """
    for study in board.studies:
        (answers,) = answers_of([study.run])
        shown = {part: answers[part] for part in ("names", "held_out", "prompts", "conditions")}
        record = json.dumps(shown, separators=(",", ":"), allow_nan=False)
        write_text(out / _ANSWERS.format(study.number), f"(globalThis.answers ??= {{}})[{study.number}] = {record};\n")
    left = len(board.studies)
    # What a larger board left.
    while (old := out / _ANSWERS.format(left)).exists():
        with contextlib.suppress(OSError):
            old.unlink()
        left += 1
    views = {key: _shown(view) for key, view in _views(board)}
    page = (
        environment()
        .get_template("board.html")
        .render(
            board=board,
            directions=[d for d in DIRECTIONS if any(f"-{d}-" in key for key in views)],
            choices=[c for c in CHOICES if any(key.endswith(c) for key in views)],
            colours=COLOURS,
            shown={
                "models": board.models,
                "datasets": board.data_sets,
                "views": views,
                "cells": [_cell(board, cell) for cell in board.cells],
                "seeds": [study.seed for study in board.studies],
            },
            themes={"light": LIGHT_THEME.to_plotly_json(), "dark": DARK_THEME.to_plotly_json()},
            plotly_js=get_plotlyjs(),
        )
    )
    write_text(out / PAGE, page)


def _views(board: Board) -> Iterator[tuple[str, View]]:
    """The views that the filters can ask for, by the values of the filters: ``MODEL-DATA-TOWARDS-CHOICE``."""
    models, data_sets = _filters(board.models), _filters(board.data_sets)
    for (m, model), (d, data), towards, choice in product(models, data_sets, DIRECTIONS, CHOICES):
        if (view := board.view(towards, choice, model=model, data=data)) is not None:
            yield f"{m}-{d}-{towards}-{choice}", view


def _filters(names: Sequence[str]) -> list[tuple[str, str | None]]:
    """What a filter of these names offers, by number; all of them where there are several."""
    every: list[tuple[str, str | None]] = [("all", None)] if len(names) > 1 else []
    return [*every, *((str(number), name) for number, name in enumerate(names))]


def _shown(view: View) -> dict[str, Any]:
    """What the page says of a view."""
    shown = {"blocks": len(view.blocks), "rows": [_row(r) for r in view.rows], "controls": [*map(_row, view.controls)]}
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for method, study, _, reason in view.refused:
        where = (words(method), f"{study.block.data}, {study.block.model}", reason)
        seeds.setdefault(where, []).append(str(study.seed))
    shown["refused"] = [
        [method, f"{where}, seed{'s' * (len(own) > 1)} {', '.join(own)}", reason]
        for (method, where, reason), own in seeds.items()
    ]
    shown["figures"] = {"gain": plain(_gain_figure(view))}
    if isinstance(view.ranks, Ranks):
        shown["figures"]["ranks"] = plain(critical_differences(_worded(view.ranks)))
    shown["said"] = said_of_ranks(view.ranks)
    return shown


def said_of_ranks(ranks: Ranks | str) -> str:
    """Say what the test of ranks found."""
    if isinstance(ranks, str):
        return ranks
    best, *like = map(words, ranks.like_the_best)
    p = "p < 0.001" if ranks.p < 0.001 else f"p = {ranks.p:.3f}"
    finds = (
        "the methods' ranks differ" if ranks.p <= SIGNIFICANT else "no difference between the methods' ranks is shown"
    )
    others = f"cannot be told from it: {', '.join(like)}" if like else "all others rank clearly below it"
    return (
        f"Over {ranks.n_blocks} data sets (counted once for each model) {finds} (Friedman's test, {p}). {best} has the "
        f"best mean rank; by Nemenyi's critical difference of {ranks.difference:.2f}, {others}."
    )


def _worded(ranks: Ranks) -> Ranks:
    named = {words(name): mean for name, mean in ranks.means.items()}
    return Ranks(named, ranks.p, ranks.difference, ranks.n_blocks)


def _gain_figure(view: View) -> Any:
    points = [
        Competitor(
            row.name,
            row.numbers.gain,
            row.numbers.damage,
            None if row.numbers.speed is None else row.numbers.speed.value,
            "control" if row.control_of is not None else "front" if row.on_front else "edit",
        )
        for row in (*view.rows, *view.controls)
        if row.numbers.damage is not None
    ]
    return gain_against_loss(points)


def _row(row: Row) -> dict[str, Any]:
    return {
        "method": row.name,
        "of": row.control_of and words(row.control_of),
        "rank": row.rank,
        "cells": row.cells,
        "applied": row.applied,
        "studies": row.studies,
        "front": row.on_front,
        "derived": row.is_derived,
        **_numbers(row.numbers),
    }


def _cell(board: Board, cell: Cell) -> dict[str, Any]:
    return {
        "model": board.models.index(cell.block.model),
        "data": board.data_sets.index(cell.block.data),
        "view": f"{cell.towards}-{cell.choice}",
        "method": words(cell.method),
        "gain": _ends(cell.numbers.gain),
        "seeds": cell.seeds,
        "sources": [
            [source.study.number, None if source.condition is None else source.condition.name]
            for source in cell.sources
        ],
    }


def _numbers(numbers: Numbers) -> dict[str, Any]:
    return {
        "gain": _ends(numbers.gain),
        "damage": _rounded(numbers.damage),
        "losses": [_ends(loss) for loss in numbers.losses.values()],
        "kl": _ends(numbers.kl),
        "speed": _ends(numbers.speed),
    }


def _ends(estimate: Estimate | None) -> list[float | None] | None:
    return None if estimate is None else [_rounded(end) for end in (estimate.value, estimate.low, estimate.high)]


def _rounded(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else round(number, 4)
