"""The command that compares ways to find heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conflictscope.cli.options import OutOption, say
from conflictscope.cli.studies import BudgetedStudy, study
from conflictscope.cli.tables import print_frame
from interp.errors import UserError


def locate(
    *,
    way: Annotated[
        list[str] | None, typer.Option(help="A way to score heads; repeatable; all by default. A wrong name lists all.")
    ] = None,
    out: OutOption = Path("out/locate"),
    asked: BudgetedStudy,
) -> None:
    """Compare ways to find the heads that decide: how far they agree, and what pruning their first heads does.

    A way's agreement with itself is that of two halves of its subjects.
    """
    import polars as pl

    from conflictscope.methods.pruning_by import pruning_by, way_scores
    from interp.attribution.scores import HeadScores
    from interp.attribution.ways import WAYS, agreement

    if unknown := set(way or ()) - set(WAYS):
        raise UserError(f"There is no way {min(unknown)!r} to score heads; choose among {', '.join(WAYS)}.")
    chosen = [name for name in WAYS if not way or name in way]
    lab = asked.lab(out)
    scores: dict[str, HeadScores] = {}
    for name in chosen:
        try:
            scores[name] = way_scores(lab, name)
        except UserError as error:
            # The study says so in its record too.
            say(f"{name} cannot score heads here: {error}")
    agreeing = agreement(scores)
    if agreeing:
        print_frame(pl.DataFrame([{"rank correlation": one, **others} for one, others in agreeing.items()]))
    methods = [pruning_by(name) for name in chosen]
    study(lab, methods, "locate", out, controls="kinds", details={"agreement": agreeing})
