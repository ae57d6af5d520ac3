"""How the commands of studies get their lab, keep their record and show it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conflictscope.cli.options import DEFAULT_RELATION, Asked, asked_option, say
from conflictscope.cli.tables import print_frame
from interp.errors import UserError

if TYPE_CHECKING:
    from conflictscope.study.lab import Lab
    from conflictscope.study.method import Method
    from conflictscope.study.record import StudyRecord
    from conflictscope.study.setting import StudySetting

SUBJECTS = 40
_DATA = (
    *("data_format", "unknown_too", "most_words", "subjects", "families"),
    *("format", "system", "answer_prefix", "shots"),
)
_MODEL = (
    *("device", "dtype", "attention", "revision", "subfolder", "device_map"),
    *("trust_remote_code", "batch_tokens"),
)
_study_option = partial(typer.Option, rich_help_panel="Study")


@dataclass(frozen=True)
class StudyOptions(Asked):
    """What a study asks, and how much of it."""

    data_format: Annotated[str | None, asked_option(help="The public format of --data; a wrong name lists all.")] = None
    unknown_too: Annotated[
        bool,
        asked_option("--unknown-too", help="With --data: also ask what the model does not know closed-book."),
    ] = False
    most_words: Annotated[
        int | None, asked_option(min=1, help="With --data: leave out prompts of more words than this.")
    ] = None
    subjects: Annotated[
        int, _study_option(min=4, help="Subjects of each relation to learn from, and to test on, at most.")
    ] = SUBJECTS
    families: Annotated[
        int,
        _study_option(
            min=0,
            help="Learn each fact in so many phrasings made from parts, and test in unseen ones; 0 takes the tables'.",
        ),
    ] = 0
    abilities: Annotated[
        bool,
        _study_option("--abilities", help="Ask agreement, order, copying and sums too: edits should leave them alone."),
    ] = False
    quick: Annotated[
        bool, _study_option("--quick", help="Little of everything: checks that all runs; measures nothing.")
    ] = False

    def lab(
        self, out: Path, *, default: tuple[str, ...] = (DEFAULT_RELATION,), model: Any = None, **of_study: Any
    ) -> Lab:
        """Load the model, unless it is given, and get its prompts about some relations or from a file.

        Args:
            out: The folder of the study.
            default: The relations where none is said.
            model: The model, where it is loaded already.
            **of_study: What ``setting`` takes besides.

        Raises:
            UserError: If options do not go together, or the model knows too little.
        """
        setting = self.setting(default, **of_study)
        lab = setting.lab(out / "records", model)
        prompts = lab.prompts
        taken = "is asked about" if self.unknown_too else "knows"
        known = " whether it knows them or not." if self.unknown_too else " closed-book."
        say(f"{self.model} {taken} {prompts.known} of {prompts.asked} subjects of {prompts.name}{known}")
        return lab

    def setting(
        self,
        default: tuple[str, ...] = (DEFAULT_RELATION,),
        *,
        leave_out: str | None = None,
        test_data: Path | None = None,
        test_format: str | None = None,
        sae: str | None = None,
    ) -> StudySetting:
        """What the options say, in plain values that any process can make the same lab from.

        Args:
            default: The relations where none is said.
            leave_out: The relation that is tested on, and not learned from.
            test_data: The file that is tested on instead.
            test_format: Its public format.
            sae: Where autoencoders of the model are; ``None`` takes those that are shipped for it.

        Raises:
            UserError: If options do not go together.
        """
        of_files = self.unknown_too or self.most_words is not None
        if self.data is None and (self.data_format is not None or (of_files and test_data is None)):
            raise UserError(
                "--data-format, --unknown-too and --most-words belong to --data; give a file, or leave them out."
            )
        as_it_is = ("completion", "", "", 0)
        how = (self.format, self.system, self.answer_prefix, self.shots)
        if self.families and (self.data is not None or how != as_it_is):
            raise UserError(
                "--families makes prompts about relations, in forms of its own; leave out --data, --format, --system, "
                "--answer-prefix and --shots."
            )
        relations = self.relations(default)
        from conflictscope.study.setting import DataSetting, ModelSetting, StudySetting

        if min(budgets := [*self.budgets().values(), 1]) <= 0:
            raise UserError(
                f"--budget and --context-budget are above 0, not {min(budgets):g}; give what may be damaged."
            )
        data = DataSetting(
            relations=tuple(relations) if self.data is None else (),
            data=None if self.data is None else str(self.data),
            leave_out=leave_out,
            test_data=None if test_data is None else str(test_data),
            test_format=test_format,
            **{name: getattr(self, name) for name in _DATA},
        )
        blueprint = None if self.blueprint is None else str(self.blueprint)
        model = ModelSetting(name=self.model, blueprint=blueprint, **{name: getattr(self, name) for name in _MODEL})
        same: dict[str, Any] = {name: getattr(self, name) for name in ("seed", "quick", "abilities")}
        return StudySetting(model=model, data=data, sae=sae, **(same | self.budgets()))

    def budgets(self) -> dict[str, Any]:
        """The damage that is allowed on dev, as far as it is said."""
        return {}


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

    def budgets(self) -> dict[str, Any]:
        """The damage that is allowed on dev."""
        return {"budget": self.budget, "context_budget": self.context_budget}


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
