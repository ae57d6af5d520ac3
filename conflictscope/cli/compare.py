"""The command that measures methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conflictscope.cli.options import (
    DEFAULT_MODEL,
    DataOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RelationOption,
    SaeOption,
    SeedOption,
)
from conflictscope.cli.studies import (
    SUBJECTS,
    BudgetOption,
    ContextBudgetOption,
    QuickOption,
    SubjectsOption,
    make_lab,
    show_page,
    study,
)
from interp.errors import UserError


def compare(
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    data: DataOption = None,
    format: Annotated[
        str | None, typer.Option("--format", help="The public format of --data; a wrong name lists all.")
    ] = None,
    unknown_too: Annotated[
        bool, typer.Option("--unknown-too", help="With --data: also ask what the model does not know closed-book.")
    ] = False,
    leave_out: Annotated[
        str | None, typer.Option("--leave-out", help="Test on this relation; learn from the others alone.")
    ] = None,
    test_data: Annotated[
        Path | None, typer.Option("--test-data", help="Test on this file instead; learn from the relations or --data.")
    ] = None,
    test_format: Annotated[str | None, typer.Option("--test-format", help="The public format of --test-data.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method; repeatable; all by default. A wrong name lists all.")
    ] = None,
    sae: SaeOption = DEFAULT_MODEL,
    subjects: SubjectsOption = SUBJECTS,
    budget: BudgetOption = 0.02,
    context_budget: ContextBudgetOption = 0.2,
    out: Annotated[Path, typer.Option(help="Folder for the results; finished steps in it are reused.")] = Path(
        "out/compare"
    ),
    quick: QuickOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Compare methods on the same prompts: each at its best and within one damage budget, towards both sources.

    Without --data the prompts are about facts of four relations that the model knows.
    """
    from conflictscope.study.data import RELATIONS, file_prompts
    from conflictscope.study.method import method_named, registered
    from interp.sae import load_saes

    methods = [method_named(name) for name in dict.fromkeys(method or registered())]
    if leave_out is not None and test_data is not None:
        raise UserError("Give --leave-out or --test-data, not both.")
    if test_format is not None and test_data is None:
        raise UserError("--test-format belongs to --test-data; give a file, or leave it out.")
    lab = make_lab(
        model,
        out,
        relation=relation,
        data=data,
        format=format,
        # Without --data it may be meant for --test-data alone.
        unknown_too=unknown_too and (data is not None or test_data is None),
        default=RELATIONS,
        subjects=subjects,
        seed=seed,
        quick=quick,
        budgets=(budget, context_budget),
        saes=lambda: load_saes(sae),
        device=device,
        dtype=dtype,
    )
    if leave_out is not None:
        lab = lab.on(lab.prompts.left_out(leave_out))
    if test_data is not None:
        other = file_prompts(
            lab.model, test_data, lab.records, subjects=subjects, seed=seed, format=test_format, unknown_too=unknown_too
        )
        lab = lab.on(lab.prompts.tested_on(other.test, other.name))
    study(lab, methods, "compare", out)
    show_page(out)
