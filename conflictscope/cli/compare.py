"""The command that measures methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from conflictscope.cli.options import DEFAULT_MODEL, OutOption, SaeOption
from conflictscope.cli.studies import BudgetedStudy, study
from interp.errors import UserError


def compare(
    *,
    method: Annotated[
        list[str] | None, typer.Option(help="A method; repeatable; all by default. A wrong name lists all.")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="A method to leave out; repeatable.")] = None,
    controls: Annotated[
        Literal["each", "kinds", "winners"],
        typer.Option(
            help="Random controls of each method, of the best that shares a kind of control, or of the best alone."
        ),
    ] = "kinds",
    leave_out: Annotated[str | None, typer.Option(help="Test on this relation; learn from the others alone.")] = None,
    test_data: Annotated[
        Path | None, typer.Option(help="Test on this file instead; learn from the relations or --data.")
    ] = None,
    test_format: Annotated[str | None, typer.Option(help="The public format of --test-data.")] = None,
    sae: SaeOption = DEFAULT_MODEL,
    out: OutOption = Path("out/compare"),
    asked: BudgetedStudy,
) -> None:
    """Compare methods on the same prompts: each at its best and within one damage budget, towards both sources.

    Without --data the prompts are about facts of four relations that the model knows.
    """
    from conflictscope.study.data import RELATIONS
    from conflictscope.study.method import method_named, registered
    from interp.sae import load_saes

    left_out = {method_named(name).name for name in without or ()}
    methods = [method_named(name) for name in dict.fromkeys(method or registered()) if name not in left_out]
    if not methods:
        raise UserError("No method is left to measure; leave out fewer.")
    if leave_out is not None and test_data is not None:
        raise UserError("Give --leave-out or --test-data, not both.")
    if test_format is not None and test_data is None:
        raise UserError("--test-format belongs to --test-data; give a file, or leave it out.")
    lab = asked.lab(out, default=RELATIONS, saes=lambda: load_saes(sae), tested_elsewhere=test_data is not None)
    if leave_out is not None:
        lab = lab.on(lab.prompts.left_out(leave_out))
    if test_data is not None:
        lab = lab.on(lab.prompts.tested_on(asked.file_prompts(lab.model, lab.records, test_data, test_format)))
    study(lab, methods, "compare", out, controls=controls)
