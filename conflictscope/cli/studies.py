"""How the commands of studies get their lab, keep their record and show it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conflictscope.cli.options import say
from conflictscope.cli.tables import print_frame
from interp.errors import UserError

if TYPE_CHECKING:
    from conflictscope.study.lab import Lab
    from conflictscope.study.method import Method
    from conflictscope.study.record import StudyRecord

SubjectsOption = Annotated[
    int,
    typer.Option(min=4, help="Subjects of each relation to learn from, and to test on, at most."),
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Little of everything: checks that all runs; measures nothing.")
]
BudgetOption = Annotated[
    float, typer.Option(help="Damage allowed on dev: mean nats of KL divergence, without a context and on text.")
]
ContextBudgetOption = Annotated[
    float, typer.Option(help="The same for prompts with a context that agrees or is about something else.")
]
SUBJECTS, QUICK_SUBJECTS = 40, 12


def make_lab(
    model: str,
    out: Path,
    *,
    relation: Sequence[str] | None = None,
    data: Path | None = None,
    format: str | None = None,
    unknown_too: bool = False,
    default: Sequence[str] = (),
    subjects: int = SUBJECTS,
    seed: int = 0,
    quick: bool = False,
    budgets: tuple[float, float] | None = None,
    saes: Callable[[], Any] | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Lab:
    """The model, and its prompts about some relations or from a file.

    Raises:
        UserError: If both a file and relations are given, one of them cannot be used, or the model knows too little.
    """
    if data is not None and relation:
        raise UserError("Give --data or --relation, not both.")
    if data is None and (format is not None or unknown_too):
        raise UserError("--format and --unknown-too belong to --data; give a file, or leave them out.")
    from interp.facts import relation_named

    names = [relation_named(name).name for name in relation or default]
    from conflictscope.study.data import fact_prompts, file_prompts
    from conflictscope.study.lab import BUDGETS, Lab
    from interp.models import fingerprint, load_model
    from interp.records import Records

    bridge = load_model(model, device=device, dtype=dtype)
    records = Records(out / "records", model=fingerprint(bridge))
    most = min(subjects, QUICK_SUBJECTS) if quick else subjects
    if data is None:
        prompts = fact_prompts(bridge, names, records, subjects=most, seed=seed)
    else:
        prompts = file_prompts(bridge, data, records, subjects=most, seed=seed, format=format, unknown_too=unknown_too)
    counts = {split: len(prompts.part(split).subjects) for split in ("train", "dev", "test")}
    say(f"{model} knows {sum(counts.values())} of {prompts.asked} subjects of {prompts.name} closed-book.")
    allowed = BUDGETS if budgets is None else dict(zip(BUDGETS, [budgets[0]] * 2 + [budgets[1]] * 2, strict=True))
    return Lab(bridge, model, prompts, records, seed=seed, quick=quick, budgets=allowed, saes=saes)


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    return shlex.join(["conflictscope", *sys.argv[1:]])


def study(lab: Lab, methods: Sequence[Method], kind: str, out: Path, **options: Any) -> StudyRecord:
    """Run a study, write its page, print its leaderboard."""
    from conflictscope.study.leaderboard import leaderboard
    from conflictscope.study.run import Study

    record = Study(kind, command_line(), out, **options).run(lab, methods)
    for table in leaderboard(record):
        print_frame(table)
    for method, reason in record.not_run.items():
        say(f"{method.replace('_', ' ')} was not run: {reason}")
    return record


def show_page(out: Path) -> None:
    """Write a study's page, and say where it is."""
    from conflictscope.report import read_runs, write_report

    path = out / "report.html"
    write_report(path, read_runs([out]))
    say(f"Look at {path}; all numbers are in {out / 'study.json'}")
