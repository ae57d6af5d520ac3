"""How the commands of studies get their lab, keep their record and show it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conflictscope.cli.options import DEFAULT_RELATION, Asked, asked_option, say
from conflictscope.cli.tables import print_frame
from interp.errors import UserError

if TYPE_CHECKING:
    from conflictscope.study.data import Prompts
    from conflictscope.study.lab import Lab
    from conflictscope.study.method import Method
    from conflictscope.study.record import StudyRecord
    from interp.conflicts import ConflictSet
    from interp.records import Records

SUBJECTS, QUICK_SUBJECTS = 40, 12
_study_option = partial(typer.Option, rich_help_panel="Study")


@dataclass(frozen=True)
class StudyOptions(Asked):
    """What a study asks, and how much of it."""

    data_format: Annotated[str | None, asked_option(help="The public format of --data; a wrong name lists all.")] = None
    unknown_too: Annotated[
        bool,
        asked_option("--unknown-too", help="With --data: also ask what the model does not know closed-book."),
    ] = False
    subjects: Annotated[
        int, _study_option(min=4, help="Subjects of each relation to learn from, and to test on, at most.")
    ] = SUBJECTS
    quick: Annotated[
        bool, _study_option("--quick", help="Little of everything: checks that all runs; measures nothing.")
    ] = False

    def lab(
        self,
        out: Path,
        *,
        default: tuple[str, ...] = (DEFAULT_RELATION,),
        saes: Callable[[], Any] | None = None,
        tested_elsewhere: bool = False,
        model: Any = None,
    ) -> Lab:
        """Load the model, unless it is given, and get its prompts about some relations or from a file.

        Raises:
            UserError: If options do not go together, or the model knows too little.
        """
        if self.data is None and (self.data_format is not None or (self.unknown_too and not tested_elsewhere)):
            raise UserError("--data-format and --unknown-too belong to --data; give a file, or leave them out.")
        names = self.relations(default)
        from conflictscope.study.data import fact_prompts
        from conflictscope.study.lab import BUDGETS, Lab
        from interp.fingerprints import fingerprint
        from interp.records import Records

        model = self.load() if model is None else model
        records = Records(out / "records", model=fingerprint(model))
        if self.data is None:
            prompts = fact_prompts(
                model, names, records, subjects=self._most, seed=self.seed, asked=self._in_form(model)
            )
        else:
            prompts = self._all_prompts(model, records, self.data, self.data_format)
        counts = {split: len(prompts.part(split).subjects) for split in ("train", "dev", "test")}
        taken = "is asked about" if self.unknown_too else "knows"
        known = " whether it knows them or not." if self.unknown_too else " closed-book."
        say(f"{self.model} {taken} {sum(counts.values())} of {prompts.asked} subjects of {prompts.name}{known}")
        budgets = {**BUDGETS, **self.budgets()}
        prompts = prompts.few(self.seed) if self.quick else prompts
        return Lab(
            model,
            self.model,
            prompts,
            records,
            seed=self.seed,
            quick=self.quick,
            budgets=budgets,
            saes=saes,
            new_tokens=self.longest_answer(model),
        )

    def file_prompts(self, model: Any, records: Records, file: Path, format: str | None) -> Prompts:
        """Get prompts from a file.

        Raises:
            UserError: If it cannot be read, or the model knows too little of it.
        """
        prompts = self._all_prompts(model, records, file, format)
        return prompts.few(self.seed) if self.quick else prompts

    def budgets(self) -> dict[str, float]:
        """The damage that is allowed on dev, by guard, as far as it is said."""
        return {}

    def _all_prompts(self, model: Any, records: Records, file: Path, format: str | None) -> Prompts:
        from conflictscope.study.data import file_prompts

        return file_prompts(
            model,
            file,
            records,
            subjects=self._most,
            seed=self.seed,
            format=format,
            unknown_too=self.unknown_too,
            asked=self._in_form(model),
        )

    def _in_form(self, model: Any) -> Callable[[ConflictSet], ConflictSet]:
        """What asks a set of prompts in the form that is wanted."""
        return partial(self.asking.asked, model, self.model)

    @property
    def _most(self) -> int:
        return min(self.subjects, QUICK_SUBJECTS) if self.quick else self.subjects


@dataclass(frozen=True)
class BudgetedStudy(StudyOptions):
    """The same for studies whose methods are held to a budget."""

    budget: Annotated[
        float,
        _study_option(help="Damage allowed on dev: mean nats of KL divergence, without a context and on text."),
    ] = 0.02
    context_budget: Annotated[
        float, _study_option(help="The same for prompts with a context that agrees or is about something else.")
    ] = 0.2

    def budgets(self) -> dict[str, float]:
        """The damage that is allowed on dev, by guard."""
        named = {"none": self.budget, "neutral": self.budget}
        return {**named, "aligned": self.context_budget, "irrelevant": self.context_budget}


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    return shlex.join(["conflictscope", *sys.argv[1:]])


def study(lab: Lab, methods: Sequence[Method], kind: str, out: Path, **options: Any) -> StudyRecord:
    """Run a study, say what it finds, keep its page up to date, and print its leaderboard."""
    from conflictscope.report import read_runs, write_report
    from conflictscope.study.leaderboard import leaderboard
    from conflictscope.study.run import Study

    path = out / "report.html"

    def shown(record: StudyRecord) -> None:
        write_report(path, read_runs([out]), growing=True)
        say(f"{path} shows what was found so far; to come: {', '.join(record.to_come).replace('_', ' ')}.")

    record = Study(kind, command_line(), out, told=say, shown=shown, **options).run(lab, methods)
    for table in leaderboard(record):
        print_frame(table)
    for method, reason in record.not_run.items():
        say(f"{method.replace('_', ' ')} was not run: {reason}")
    write_report(path, read_runs([out]))
    say(f"Look at {path}; all numbers are in {out / 'study.json'}")
    return record
