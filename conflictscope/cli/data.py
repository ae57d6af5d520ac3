"""The commands that build, inspect and convert conflict data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from conflictscope.cli.options import Facts, Model, SeedOption, say
from interp.errors import UserError

_SHOWN_ROWS = 10
_table_option = partial(typer.Option, rich_help_panel="Your own table")
_documents_option = partial(typer.Option, rich_help_panel="Several documents")
_cause_option = partial(typer.Option, rich_help_panel="Causes and tasks")


@dataclass(frozen=True)
class OwnTable:
    """A table of a person's own, and how it is read."""

    path: Annotated[
        Path | None,
        _table_option(
            "--from",
            help="Your own table: questions, documents, answers. CSV, TSV, JSON, JSONL, Parquet, or a folder of these.",
        ),
    ] = None
    column: Annotated[
        list[str] | None,
        _table_option(
            metavar="ROLE=NAME",
            help="Which column holds the question, context, answer, memory, subject or id, where names do not say it.",
        ),
    ] = None
    limit: Annotated[int | None, _table_option(min=1, help="Rows that are read at most.")] = None
    sample: Annotated[int | None, _table_option(min=1, help="Rows that are kept at most, at random.")] = None

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are said, by role.

        Raises:
            UserError: If one is not said as ROLE=NAME.
        """
        pairs = [text.partition("=") for text in self.column or ()]
        if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
            raise UserError(f"--column takes ROLE=NAME, for example question=Frage, not {wrong[0]!r}.")
        return {role.strip(): name for role, _, name in pairs}


@dataclass(frozen=True)
class ManyDocuments:
    """How many documents a prompt about a fact shows; none said is one."""

    against: Annotated[int | None, _documents_option(min=0, help="Documents that contradict memory.")] = None
    agreeing: Annotated[int | None, _documents_option(min=0, help="Documents that agree with memory.")] = None
    beside: Annotated[int | None, _documents_option(min=0, help="Documents about something else.")] = None
    position: Annotated[
        Literal["first", "last", "mixed"], _documents_option(help="Where those that contradict stand.")
    ] = "mixed"

    def put(self, conflicts: Any, seed: int) -> Any:
        """The prompts with so many documents; as they are where no number is said."""
        from interp.documents import Documents

        if (self.against, self.agreeing, self.beside) == (None, None, None):
            if self.position != "mixed":
                raise UserError("--position says where documents stand; say how many: --against 1 --agreeing 2.")
            return conflicts
        return Documents(self.against or 0, self.agreeing or 0, self.beside or 0, self.position, seed).of(conflicts)


@dataclass(frozen=True)
class CausesAndTasks:
    """Why the contexts of facts contradict memory, and what is asked about them."""

    cause: Annotated[
        Literal["misinformation", "temporal", "semantic"] | None,
        _cause_option(
            metavar="CAUSE",
            help="Why contexts contradict memory: misinformation, temporal (it changed), semantic (it is a namesake).",
        ),
    ] = None
    plausibility: Annotated[
        Literal["high", "low"] | None,
        _cause_option(help="With --cause: explain the contradiction, or give it a doubtful source."),
    ] = None
    task: Annotated[
        list[str] | None,
        _cause_option(help="Which knowledge the answer takes: none (copying), context, memory or both; repeatable."),
    ] = None

    def check(self) -> None:
        """See that these go together.

        Raises:
            UserError: If not, or if there is no such task.
        """
        from interp.tasks import task_named

        if self.cause is None and self.plausibility is not None:
            raise UserError("--plausibility is that of a cause; say which: --cause misinformation.")
        for name in self.task or ():
            task_named(name)

    def put(self, conflicts: Any) -> Any:
        """The prompts with contexts of the cause, asked by the tasks; as they are where nothing is said."""
        from interp.causes import Cause
        from interp.tasks import asked_by

        if self.cause is not None:
            conflicts = Cause(self.cause, self.plausibility).of(conflicts)
        return asked_by(conflicts, self.task) if self.task else conflicts


def data_build(
    *,
    out: Annotated[Path, typer.Option(help="JSON lines file to write.")] = Path("out/conflicts.jsonl"),
    all_facts: Annotated[
        bool, typer.Option("--all-facts", help="Keep facts that no model was asked about; needs no model.")
    ] = False,
    table: OwnTable,
    documents: ManyDocuments,
    causes: CausesAndTasks,
    source: Facts,
) -> None:
    """Build conflict data from a table of your own, or from the fact tables, of what the model knows closed-book.

    From a table: what memory answers, where no column says it, is what the model says to the question alone; prompts
    with an agreeing context, with one about something else and without one are made from the rows.
    """
    if all_facts and Model(source.model, source.device, source.dtype) != Model():
        raise UserError("--all-facts needs no model; leave out --model, --device and --dtype.")
    if table.path is None and table != OwnTable():
        raise UserError("--column, --limit and --sample belong to --from; give a table, or leave them out.")
    if table.path is not None and source.relation:
        raise UserError("Give --from or --relation, not both.")
    if table.path is not None and documents != ManyDocuments():
        raise UserError("--against, --agreeing, --beside and --position are for facts; a table has its own documents.")
    if causes != CausesAndTasks() and (table.path is not None or documents != ManyDocuments()):
        raise UserError(
            "--cause, --plausibility and --task are for facts with one document; leave them out, or --from and the "
            "numbers of documents."
        )
    causes.check()
    if table.path is None:
        conflicts = causes.put(documents.put(_from_facts(source, all_facts), source.seed))
    else:
        conflicts = _from_table(table, source, all_facts)
    conflicts.save(out)
    say(f"Wrote {len(conflicts)} examples about {len(conflicts.subjects)} subjects to {out}")


def _from_facts(source: Facts, all_facts: bool) -> Any:
    from interp.facts import build_conflicts, usable_facts

    if all_facts:
        return build_conflicts({name: usable_facts(name) for name in source.relations()}, seed=source.seed)
    return source.conflicts()[1]


def _from_table(own: OwnTable, source: Facts, all_facts: bool) -> Any:
    table = read_own(own, source.seed)
    is_asked = not all_facts and any(not row.memory for row in table.rows)
    return built_of(table, source.load() if is_asked else None, source)


def read_own(own: OwnTable, seed: int) -> Any:
    """Read a table, and say what was left out of it and why.

    Raises:
        UserError: If nothing can be read, or columns are missing.
    """
    from interp.tables import read_table

    assert own.path is not None
    table = read_table(own.path, own.columns, limit=own.limit, sample=own.sample, seed=seed)
    columns = ", ".join(f"{role} from {name!r}" for role, name in table.columns.items())
    say(f"Read {len(table.rows)} rows of {own.path}: {columns}.")
    for sentence in table.left_out[:_SHOWN_ROWS]:
        say(f"Left out: {sentence}")
    if len(table.left_out) > _SHOWN_ROWS:
        say(f"Left out {len(table.left_out)} rows in all.")
    return table


def built_of(table: Any, model: Any, source: Facts) -> Any:
    """Build the prompts of a table, and say what could not be made.

    Args:
        table: The table.
        model: The model that is asked what memory answers; ``None`` asks none.
        source: What the model is called, and the seed.

    Raises:
        UserError: If nothing can be made of it.
    """
    from interp.tables import table_conflicts

    built = table_conflicts(table, model, seed=source.seed, progress="Closed-book")
    if built.asked:
        say(
            f"Asked {source.model} {built.asked} questions closed-book, after short examples, for what memory answers; "
            "it may answer otherwise without them: --shots 4 asks the prompts after examples too."
        )
    for reason, count in built.reasons.most_common():
        say(f"{count} rows: {reason}.")
    return built.conflicts


def data_inspect(
    file: Annotated[Path, typer.Argument(help="JSON lines from `conflictscope data`.")],
    show: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 2,
) -> None:
    """Say what is in a file of conflict data, and how often its answers are hard to tell apart."""
    from interp.answers import ambiguous
    from interp.conflicts import ConflictSet

    conflicts = ConflictSet.load(file)
    output = Console()
    output.print_json(json.dumps(conflicts.counts()))
    unclear = ambiguous(conflicts)
    output.print(
        f"Of {unclear['prompts']} conflict prompts, {unclear['same']} have the same answer on both sides, "
        f"{unclear['contained']} have one answer within the other (the longer match counts), and "
        f"{unclear['both_in_context']} have both answers in their context.",
        soft_wrap=True,
        highlight=False,
    )
    for example in conflicts.examples[:show]:
        output.rule(f"{example.id}  ({example.kind}, {example.split})")
        output.print(example.prompt, markup=False)
        if example.kind != "none":
            output.print(f"without context: {example.bare_prompt or 'not known'}", markup=False)
        output.print(
            f"memory: {', '.join(example.memory_answers)}   context: {', '.join(example.context_answers)}", markup=False
        )


def data_convert(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="A data set in its native format: JSON, JSONL, CSV, TSV or Parquet."),
    ],
    format: Annotated[str, typer.Option("--format", help="Its format; a wrong name lists the known ones.")],
    out: Annotated[Path, typer.Option(help="JSON lines file to write.")] = Path("out/conflicts.jsonl"),
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="What to do with a malformed row: stop, or skip and count it.")
    ] = "stop",
    markup: Annotated[
        Literal["keep", "clean"],
        typer.Option(help="What becomes of tags, entities and spaces before punctuation, in all texts alike."),
    ] = "keep",
    seed: SeedOption = 0,
) -> None:
    """Convert a public data set to conflict data; leaves out, and counts, what could not be measured."""
    from interp.formats import convert_dataset

    converted = convert_dataset(files, format, out, on_error=on_error, seed=seed, markup=markup)
    for sentence in converted.skipped[:_SHOWN_ROWS]:
        say(f"Skipped: {sentence}")
    for sentence in converted.left_out[:_SHOWN_ROWS]:
        say(f"Left out: {sentence}")
    for reason, count in converted.reasons.most_common():
        say(f"Left out {count} items: {reason}")
    say(
        f"Wrote {converted.examples} examples to {out}; skipped {len(converted.skipped)} rows, "
        f"left out {len(converted.left_out)} items"
    )


def data_tasks(
    file: Annotated[Path, typer.Argument(help="JSON lines from `conflictscope data`.")],
    out: Annotated[Path, typer.Argument(help="New folder, for the option --include_path of lm_eval.")],
    split: Annotated[
        Literal["train", "dev", "test", "all"],
        typer.Option(help="Whose questions are asked; edits are learned and chosen on train and dev."),
    ] = "test",
    seed: SeedOption = 0,
) -> None:
    """Write conflict data as tasks of lm-evaluation-harness, which need no network: an edit's gain and damage."""
    from conflictscope.elsewhere.tasks import write_tasks
    from interp.conflicts import ConflictSet

    conflicts = ConflictSet.load(file)
    counts = write_tasks(out, conflicts if split == "all" else conflicts.select(split=split), seed=seed)
    for name, count in counts.items():
        say(f"{name}: {count}")
    say(f"Wrote {out}; with lm_eval: --include_path {out} --tasks conflictscope")
