"""The command that ranks methods over many studies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflictscope.cli.options import say
from conflictscope.cli.tables import print_frame

if TYPE_CHECKING:
    from conflictscope.report.board import Board


def leaderboard(
    folder: Annotated[list[Path], typer.Argument(help="Folders below which studies lie, at any depth.")],
    out: Annotated[Path, typer.Option(help="Folder for the page and the tables.")] = Path("out/leaderboard"),
) -> None:
    """Rank methods over all studies below some folders: models, data sets and seeds, at equal damage.

    Writes leaderboard.html, whose cells open the prompts behind them, and the numbers as CSV, Parquet, Markdown and
    LaTeX.
    """
    from conflictscope.report.board_files import write_board

    show_board(write_board(out, folder), out)


def show_board(board: Board, out: Path) -> None:
    """Print the ranked tables of a leaderboard that was written, and say what to know about them."""
    import polars as pl

    from conflictscope.report.board_files import main_views, ranking, title
    from conflictscope.report.board_page import PAGE, said_of_ranks

    for view in main_views(board):
        header, rows = ranking(view)
        say(title(view))
        print_frame(pl.DataFrame(rows, schema=header, orient="row"))
        say(said_of_ranks(view.ranks))
    if board.is_quick:
        say("These studies were made with --quick, which asks too few prompts to rank anything.")
    if board.missing:
        missing = "; ".join(f"{model} on {data} with seed {seed}" for model, data, seed in board.missing)
        say(f"Missing of the studies that these models, data sets and seeds make: {missing}.")
    if board.unfinished:
        say(f"Methods are still to come in {', '.join(study.run.name for study in board.unfinished)}.")
    say(f"Look at {out / PAGE}")
