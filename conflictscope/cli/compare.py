"""The command that measures methods side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from conflictscope.cli.cluster import Cluster
from conflictscope.cli.leaderboard import show_board
from conflictscope.cli.options import DEFAULT_MODEL, OutOption, SaeOption, say
from conflictscope.cli.studies import BudgetedStudy, command_line, study
from conflictscope.cli.tables import print_frame
from interp.errors import UserError

if TYPE_CHECKING:
    from conflictscope.report.board import Board
    from conflictscope.study.comparison import Comparing, Comparison
    from conflictscope.study.units import Done, Executor, Schedule

_NOT_OF_PLANS = {"plan", "out", "dry_run", "ray", "workers", "gpus"}
_SECONDS, _SHOWN_EVERY = 1.0, 600.0


def compare(
    *,
    plan: Annotated[
        Path | None, typer.Argument(help="A YAML file of models, data sets, methods and seeds, instead of options.")
    ] = None,
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be measured and what it takes; measure nothing.")
    ] = False,
    out: OutOption = Path("out/compare"),
    cluster: Cluster,
    asked: BudgetedStudy,
    context: typer.Context,
) -> None:
    """Compare methods on the same prompts: each at its best and within one damage budget, towards both sources.

    Without --data the prompts are about facts of four relations that the model knows. A plan compares on several
    models, data sets and seeds, and ranks the methods over all of them; so does --ray, with a plan of one study.
    """
    from conflictscope.study.data import RELATIONS
    from conflictscope.study.method import method_named

    for name in (*(method or ()), *(without or ())):
        method_named(name)
    if leave_out is not None and test_data is not None:
        raise UserError("Give --leave-out or --test-data, not both.")
    if test_format is not None and test_data is None:
        raise UserError("--test-format belongs to --test-data; give a file, or leave it out.")
    elsewhere: dict[str, Any] = {"leave_out": leave_out, "test_data": test_data, "test_format": test_format}
    if plan is not None:
        _refuse_options(plan, context)
        from conflictscope.study.comparison import Comparison

        wanted = Comparison.load(plan)
    else:
        wanted = _plan_of(asked, method, without, controls, sae, elsewhere)
    methods = wanted.chosen_methods
    cluster.check()
    if plan is None and not dry_run and cluster.ray is None:
        lab = asked.lab(out, default=RELATIONS, sae=sae, **elsewhere)
        study(lab, methods, "compare", out, controls=controls)
        return
    from functools import partial

    from conflictscope.study.comparison import Comparing, StudyWorker

    comparing = Comparing.of(wanted, out.resolve(), command_line())
    if dry_run:
        from conflictscope.study.costs import expected

        print_frame(expected(comparing))
        return
    _compare_all(comparing, cluster.executor(partial(StudyWorker, comparing), out.resolve()))


def _plan_of(
    asked: BudgetedStudy,
    method: list[str] | None,
    without: list[str] | None,
    controls: Literal["each", "kinds", "winners"],
    sae: str,
    elsewhere: dict[str, Any],
) -> Comparison:
    """The plan that options say: one study."""
    from conflictscope.study.comparison import Comparison
    from conflictscope.study.data import RELATIONS

    setting = asked.setting(RELATIONS, sae=sae, **elsewhere)
    shared = {name: getattr(setting, name) for name in ("quick", "budget", "context_budget", "sae")}
    return Comparison(
        models=(setting.model,),
        data=(setting.data,),
        methods=tuple(method or ()),
        without=tuple(without or ()),
        seeds=(setting.seed,),
        controls=controls,
        **shared,
    )


def _refuse_options(plan: Path, context: typer.Context) -> None:
    """Refuse options that a plan says itself.

    Raises:
        UserError: If one is given.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in _NOT_OF_PLANS:
            raise UserError(f"--{name.replace('_', '-')} and {plan} do not go together; write it into the plan.")


def _compare_all(comparing: Comparing, executor: Executor) -> None:
    """Do all units, as long as nobody else does them in the same folder.

    Raises:
        UserError: If somebody does.
        typer.Exit: If a study could not be made.
    """
    from filelock import FileLock, Timeout

    comparing.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(comparing.out / ".units.lock", timeout=0):
            _do_all(comparing, executor)
    except Timeout as error:
        raise UserError(f"Another compare works in {comparing.out}; wait for it, or give another --out.") from error


def _do_all(comparing: Comparing, executor: Executor) -> None:
    """Do all units, tell what they find, and keep the leaderboard up to date."""
    from conflictscope.study.comparison import save_plan
    from conflictscope.study.units import Journal, Schedule

    save_plan(comparing)
    journal = Journal(comparing.out / "units.jsonl")
    schedule = Schedule(comparing.units(), journal.read(comparing.has_record))
    if schedule.n_done:
        say(f"{schedule.n_done} units were done before.")
    unwritten: list[Done] = []
    written_at, shown_at = time.monotonic(), time.monotonic()
    try:
        for done in executor(schedule):
            unwritten.append(done)
            if time.monotonic() - written_at > _SECONDS:
                journal.append(unwritten)
                unwritten, written_at = [], time.monotonic()
            _tell(comparing, schedule, done)
            # Workers wait meanwhile.
            if schedule.units[done.id].step == "record" and time.monotonic() - shown_at > _SHOWN_EVERY:
                # What cannot be ranked is no reason to measure no more.
                try:
                    _show(comparing, schedule)
                except UserError as error:
                    say(str(error))
                shown_at = time.monotonic()
    finally:
        journal.append(unwritten)
    if len(schedule.failed) < len(comparing.settings):
        show_board(_show(comparing, schedule), comparing.out)
    for digest, reason in schedule.failed.items():
        say(f"{_called(comparing, digest)} could not be made: {reason}")
    if schedule.failed:
        raise typer.Exit(1)


def _tell(comparing: Comparing, schedule: Schedule, done: Done) -> None:
    """Say what a unit found, and how far all is after each study."""
    unit = schedule.units[done.id]
    for sentence in done.said:
        say(f"{_called(comparing, unit.study)}: {sentence}")
    if done.failed is not None or unit.step == "record":
        hours = sum(schedule.seconds.values()) / 3600
        how = "is done" if done.failed is None else f"could not be made: {done.failed}"
        say(
            f"{_called(comparing, unit.study)} {how}; {schedule.n_done} of {len(schedule.units)} units, "
            f"{hours:.2f} hours of work."
        )


def _called(comparing: Comparing, digest: str) -> str:
    setting = comparing.settings[digest]
    return f"{setting.model.name}, {setting.data.name}, seed {setting.seed}"


def _show(comparing: Comparing, schedule: Schedule) -> Board:
    """Write the leaderboard of the studies that are there, and where the hours went."""
    from conflictscope.report.board_files import write_board
    from conflictscope.study.comparison import finished
    from conflictscope.study.units import spent
    from interp.files import write_json

    write_json(comparing.out / "hours.json", spent(schedule))
    return write_board(comparing.out, finished(comparing, schedule))
