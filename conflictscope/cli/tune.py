"""The command that gets from a person's own data to one edit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from conflictscope.cli.data import OwnTable, built_of, read_own
from conflictscope.cli.options import ModelArgument, OutOption, asked_option, say
from conflictscope.cli.studies import BudgetedStudy, command_line
from interp.errors import UserError

if TYPE_CHECKING:
    from conflictscope.study.method import Method

# Fields that conflict data has, and no table of questions.
_CONFLICT_DATA = {"prompt", "kind", "split", "memory_answers", "context_answers"}


@dataclass(frozen=True)
class TunedOn(BudgetedStudy):
    """Which model is tuned on what: a table, conflict data, a public set, or relations of facts."""

    # Without a value, which the group has.
    model: ModelArgument = field()
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Your own table (see `data build --from`), conflict data, or a public set with --data-format; "
            "else relations."
        ),
    ] = None
    # Without examples many models begin with other words than the answer, and dev sees first tokens alone.
    shots: Annotated[int, asked_option(min=0, help="Answered examples of train before each prompt.")] = 2
    column: Annotated[
        list[str] | None,
        asked_option(
            metavar="ROLE=NAME",
            help="Which column of a table holds the question, context, answer, memory, subject or id.",
        ),
    ] = None

    @property
    def is_table(self) -> bool:
        """Whether the data is a table of questions."""
        from interp.rows import data_files, read_rows

        if self.data is None or self.data_format is not None:
            return False
        _, row = next(read_rows(data_files(self.data)[0]), ("", None))
        return not (isinstance(row, dict) and row.keys() >= _CONFLICT_DATA)

    def of_table(self, model: Any, out: Path) -> TunedOn:
        """The same with the table made into conflict data, which is kept in a folder.

        What memory answers, where the table does not say it, is what the model says; so it is not asked whether the
        model knows it.

        Raises:
            UserError: If the table cannot be read, or nothing can be made of it.
        """
        from interp.evaluation import ANSWERS_VERSION
        from interp.fingerprints import fingerprint
        from interp.records import Records

        table = read_own(OwnTable(self.data, self.column), self.seed)
        basis = [[vars(row) for row in table.rows], self.seed]
        records = Records(out / "records", model=fingerprint(model))
        file = records.place("table", basis, "", version=ANSWERS_VERSION) / f"{table.name}.jsonl"
        if not file.exists():
            built_of(table, model, self).save(file)
        is_said = all(row.memory for row in table.rows)
        return replace(self, data=file, unknown_too=self.unknown_too or not is_said)


def tune(
    *,
    towards: Annotated[Literal["memory", "context"], typer.Option(help="The source that answers are to follow.")],
    goal: Annotated[
        str | None, typer.Option(help='Stop where this is reached, for example "context >= .9" of conflict prompts.')
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds of edits that can be served: lora, bake, vector, decoding, prompt, hooks; repeatable, or with "
            "commas; all by default."
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method; repeatable; all by default. A wrong name lists all.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Time after which nothing new is begun.")] = 15,
    out: OutOption = Path("out/tune"),
    asked: TunedOn,
) -> None:
    """Find one edit for your own data: try methods in order of cost, verify the best on unseen subjects, write it.

    Writes OUT/edit.json where an edit helps, OUT/study.json and OUT/report.html; says what it found, what it costs, and
    what it does not fix.
    """
    from conflictscope.report import read_runs, write_report
    from conflictscope.study.tune import Clock, Tuning
    from conflictscope.study.verdict import Goal

    clock = Clock(60 * minutes)
    tuning = Tuning(
        towards,
        out,
        command_line(),
        goal=None if goal is None else Goal.parse(goal),
        allow=_kinds(allow),
        clock=clock,
        told=say,
    )
    methods = _methods(method)
    if asked.column and not asked.is_table:
        raise UserError("--column names columns of a table of your own; give one, or leave it out.")
    model = None
    if asked.is_table:
        model = asked.load()
        asked = asked.of_table(model, out)
    lab = asked.lab(out, model=model)
    tuned = tuning.run(lab, methods)
    for sentence in tuned.sentences:
        typer.echo(sentence)
    for kind, command in tuned.exports.items():
        typer.echo(f"{kind}: {command}")
    if tuned.record is not None:
        write_report(out / "report.html", read_runs([out]))
        say(f"Look at {out / 'report.html'}; all numbers are in {out / 'study.json'}")
    if tuned.file is not None:
        say(f"The edit is {tuned.file}")
    say(f"It took {clock.spent / 60:.1f} minutes.")


def _methods(names: list[str] | None) -> list[Method]:
    """The methods of these names; without any all but ablations."""
    from conflictscope.study.method import method_named, registered

    if names:
        return [method_named(name) for name in dict.fromkeys(names)]
    return [kind() for kind in registered().values() if not kind.derived]


def _kinds(texts: list[str] | None) -> tuple[Any, ...]:
    """The kinds that --allow names.

    Raises:
        UserError: If there is no such kind.
    """
    from conflictscope.study.tune import KINDS

    named = [name.strip() for text in texts or KINDS for name in text.split(",")]
    if unknown := [name for name in named if name not in KINDS]:
        raise UserError(f"--allow knows no kind {unknown[0]!r}; choose among {', '.join(KINDS)}.")
    return tuple(dict.fromkeys(named))
