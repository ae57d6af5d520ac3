"""The command that asks a question of one's own: the answers without and with a context, and which heads push."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from conflictscope.cli.options import Form, Model, say
from interp.errors import UserError

if TYPE_CHECKING:
    from conflictscope.explore.looks import Look
    from interp.conflicts import ConflictSet

_HEADS = 4


def ask(
    *,
    question: Annotated[
        str, typer.Argument(help="A question that ends with a question mark, or the start of a sentence to complete.")
    ],
    context: Annotated[str, typer.Option(help="What the model reads before it answers.")],
    memory_answer: Annotated[
        str, typer.Option(help="What memory answers; by default what the model says without the context.")
    ] = "",
    context_answer: Annotated[
        str, typer.Option(help="What the context answers; by default what the model says, if the context says so.")
    ] = "",
    config: Annotated[Path | None, typer.Option("--config", help="Intervention file to try as well.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines file to write: the question as conflict data, for --data.")
    ] = None,
    form: Form,
    loaded: Model,
) -> None:
    """Ask a question without its context and with it: which source wins, how clearly, and which heads push."""
    from conflictscope.explore.looks import UNEDITED, Asked, Edit, Explorer
    from interp.answers import DIRECTIONS
    from interventions.config import InterventionFile

    edits = {} if config is None else {"edit": InterventionFile.load(config)}
    model = loaded.load()
    explorer = Explorer(model, name=loaded.model, files=edits, asking=form.asking, bounded=False)
    look = explorer.look(Asked(question, context, memory_answer, context_answer), Edit(next(iter(edits), UNEDITED)))
    output = Console()
    output.print(_table(look), markup=False)
    if look.heads is not None:
        for towards in DIRECTIONS:
            ranked = look.heads.ranked(towards)[:_HEADS]
            listed = ", ".join(f"{head.layer}.{head.head} ({head.score:+.2f})" for head in ranked)
            output.print(f"Heads that write most towards {towards}: {listed}", markup=False, highlight=False)
    if look.no_race:
        say(f"{look.no_race} (--memory-answer, --context-answer)" if look.example.kind == "conflict" else look.no_race)
    if out is not None:
        _as_data(look).save(out)
        say(f"The question is in {out}, for --data of other commands")


def _table(look: Look) -> Table:
    """What was answered, and the probabilities of the two answers' first tokens after the context."""
    answers = {"memory": look.example.memory_answers, "context": look.example.context_answers}
    columns = [f"P({found[0]}), {source}" for source, found in answers.items() if found]
    table = Table("", "without context", "with context", "uses", *(() if look.no_race else columns))
    for label, reading in (("unedited", look.unedited), ("edited", look.edited)):
        if reading is not None:
            lens = reading.lens
            numbers = [] if lens is None else lens.log_probabilities[0, -1].exp().flip(0).tolist()
            used = reading.with_context_usage
            table.add_row(label, reading.closed_book, reading.with_context, used, *(f"{p:.2g}" for p in numbers))
    return table


def _as_data(look: Look) -> ConflictSet:
    """The prompt, and the same question without its context."""
    from interp.conflicts import ConflictSet

    for source, answers in (("memory", look.example.memory_answers), ("context", look.example.context_answers)):
        if not answers:
            raise UserError(
                f"What the {source} answers is not known; say it with --{source}-answer to keep the question."
            )
    bare = replace(
        look.example, id="closed-book", kind="none", contexts=(), context_answers=(), prompt=look.example.bare_prompt
    )
    return ConflictSet("asked", (look.example, bare))
