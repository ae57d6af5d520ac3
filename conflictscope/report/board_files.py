"""Write a leaderboard: its page, and its numbers as CSV, Parquet, Markdown and LaTeX."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from conflictscope.report.board import CHOICES, Board, Cell, Numbers, Row, View, board_of, control_rows, is_derived
from conflictscope.report.board_page import said_of_ranks, write_page
from conflictscope.report.runs import read_runs
from conflictscope.study.leaderboard import LOSSES
from conflictscope.study.record import RECORD
from conflictscope.tables import written
from interp.answers import DIRECTIONS
from interp.errors import UserError
from interp.files import write_parquet, write_text
from interp.statistics import Estimate

_NAME = "leaderboard"
_ABOUT = {
    **dict.fromkeys(("model", "data", "towards", "choice", "kind", "method", "control_of", "seeds"), pl.String),
    **dict.fromkeys(("studies", "applied"), pl.Int64),
    **dict.fromkeys(("derived",), pl.Boolean),
}
_MEASURES = ("gain", *(f"{label.replace('-', '_')}_loss" for label in LOSSES), "neutral_kl", "speed")
SCHEMA: Mapping[str, Any] = {
    **_ABOUT,
    "largest_loss": pl.Float64,
    **{
        f"{measure}{end}": pl.Int64 if end == "_n" else pl.Float64
        for measure in _MEASURES
        for end in ("", "_low", "_high", "_n")
    },
    "reason": pl.String,
}
"""The columns of the long table: a measure with the ends of its interval and its number of values."""

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def write_board(out: Path, folders: Sequence[Path]) -> Board:
    """Rank the methods of all studies below some folders, and write page and tables.

    Args:
        out: The folder for ``leaderboard.html`` with its answers, ``.csv``, ``.parquet``, ``.md`` and ``.tex``.
        folders: Folders that hold studies, at any depth.

    Returns:
        What was written.

    Raises:
        UserError: If there is no study, studies do not go together, or a file cannot be read or written.
    """
    paths = studies_below(folders)
    # Folders of a plan have the same names, such as those of seeds.
    runs = [replace(run, name=str(path)) for path, run in zip(paths, read_runs(paths), strict=True)]
    board = board_of(runs)
    frame = long_table(board)
    csv = io.StringIO()
    frame.write_csv(csv)
    write_text(out / f"{_NAME}.csv", csv.getvalue())
    write_parquet(out / f"{_NAME}.parquet", frame)
    views = main_views(board)
    write_text(out / f"{_NAME}.md", "\n".join(_markdown(view) for view in views))
    write_text(out / f"{_NAME}.tex", "\n".join(_latex(view) for view in views))
    write_page(out, board)
    return board


def studies_below(folders: Sequence[Path]) -> list[Path]:
    """Find the folders below some folders that hold a study, each once.

    Raises:
        UserError: If a folder is not there, or there is no study below it.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        below = sorted(path.parent for path in folder.rglob(RECORD))
        if not below:
            raise UserError(f"There is no {RECORD} below {folder}; give a folder that compare or a plan wrote into.")
        found |= {path.resolve(): path for path in below}
    return list(found.values())


def main_views(board: Board) -> list[View]:
    """Rank over all models and data sets, for each source: at equal damage, or where no study has that, at the best."""
    found = []
    for towards in DIRECTIONS:
        views = (board.view(towards, choice) for choice in CHOICES)
        found += [view for view in views if view is not None][:1]
    return found


def long_table(board: Board) -> pl.DataFrame:
    """Put all numbers into one table: a row a cell, a random control, and a method that did not run in a study.

    Returns:
        The columns of ``SCHEMA``. ``kind`` is method, random control or not run; ``applied`` says in how many of the
        ``studies`` something fits the budget; ``neutral_kl_n`` and ``speed_n`` count texts and studies.
    """
    rows: list[dict[str, Any]] = []
    for cell in board.cells:
        rows += _cell_rows(cell)
    for method, study, towards, reason in board.refused:
        about = {"model": study.block.model, "data": study.block.data, "towards": towards, "seeds": str(study.seed)}
        rows.append({**about, "kind": "not run", "method": method, "reason": reason})
    return pl.DataFrame([{name: row.get(name) for name in SCHEMA} for row in rows], schema=SCHEMA)


def ranking(view: View) -> tuple[list[str], list[list[str]]]:
    """Write a view as cells of text: its header, and a row a method, random controls below theirs."""
    losses = [f"{label} loss" for label in LOSSES]
    header = ["rank", "method", "gain", "largest loss", *losses, "KL on text", "speed", "cells", "applied"]
    rows = []
    for row in view.rows:
        rows.append(_cells_of(row, len(view.blocks)))
        rows += [_cells_of(c, len(view.blocks)) for c in view.controls if c.control_of == row.method]
    return header, rows


def title(view: View) -> str:
    """Say what a view ranks."""
    models = len({block.model for block in view.blocks})
    data = len({block.data for block in view.blocks})
    choice = "within the budget (equal damage)" if view.choice == "within_budget" else "each at its best"
    over = f"{models} model{'s' * (models > 1)}, {data} data set{'s' * (data > 1)}"
    return f"Towards {view.towards}, {choice}: {over}"


def _cell_rows(cell: Cell) -> Iterator[dict[str, Any]]:
    about = {
        **cell.block._asdict(),
        "towards": cell.towards,
        "choice": cell.choice,
        "seeds": " ".join(str(source.study.seed) for source in cell.sources),
    }
    yield {
        **about,
        "kind": "method",
        "method": cell.method,
        "studies": len(cell.sources),
        "applied": cell.applied,
        "derived": is_derived(cell.method),
        **_numbers(cell.numbers),
    }
    for row in control_rows([cell]):
        named = {"kind": "random control", "method": row.method, "control_of": row.control_of}
        yield {**about, **named, "studies": row.studies, "applied": row.applied, **_numbers(row.numbers)}


def _numbers(numbers: Numbers) -> dict[str, Any]:
    found: dict[str, Any] = {"largest_loss": numbers.damage}
    estimates = (numbers.gain, *numbers.losses.values(), numbers.kl, numbers.speed)
    for measure, estimate in zip(_MEASURES, estimates, strict=True):
        if estimate is not None:
            found |= {measure: estimate.value, f"{measure}_n": estimate.n}
            found |= {f"{measure}_low": estimate.low, f"{measure}_high": estimate.high}
    return found


def _cells_of(row: Row, blocks: int) -> list[str]:
    def text(estimate: Estimate | None, decimals: int = 2) -> str:
        return written(None if estimate is None else estimate.to_record(), decimals)

    numbers = row.numbers
    marks = ["front"] * row.on_front + ["ablation"] * row.is_derived
    return [
        "" if row.rank is None else str(row.rank),
        row.name + (f" ({', '.join(marks)})" if marks else ""),
        text(numbers.gain),
        "n/a" if numbers.damage is None else f"{numbers.damage:z.2f}",
        *(text(loss) for loss in numbers.losses.values()),
        text(numbers.kl, 3),
        text(numbers.speed),
        f"{row.cells} of {blocks}",
        f"{row.applied} of {row.studies}",
    ]


def _markdown(view: View) -> str:
    header, rows = ranking(view)
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title(view)}\n\n{table}\n\n{said_of_ranks(view.ranks)}\n"


def _latex(view: View) -> str:
    header, rows = ranking(view)
    lines = [" & ".join(map(escape_latex, line)) + r" \\" for line in (header, *rows)]
    return "\n".join(
        [
            "% Needs \\usepackage{booktabs}",
            r"\begin{table}",
            rf"\caption{{{escape_latex(title(view))}. {escape_latex(said_of_ranks(view.ranks))}}}",
            rf"\begin{{tabular}}{{rl{'r' * (len(header) - 2)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escape_latex(text: str) -> str:
    """Write a text so that LaTeX shows it as it is."""
    return "".join(_LATEX.get(character, character) for character in text)
