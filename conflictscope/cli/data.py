"""The commands that build, inspect and convert conflict data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from conflictscope.cli.options import Facts, Model, SeedOption, say
from interp.errors import UserError


def data_build(
    *,
    out: Annotated[Path, typer.Option(help="JSON lines file to write.")] = Path("out/conflicts.jsonl"),
    all_facts: Annotated[
        bool, typer.Option("--all-facts", help="Keep facts that no model was asked about; needs no model.")
    ] = False,
    source: Facts,
) -> None:
    """Build conflict data from the fact tables, of the facts that the model knows closed-book."""
    from interp.facts import build_conflicts, usable_facts

    if all_facts:
        if Model(source.model, source.device, source.dtype) != Model():
            raise UserError("--all-facts needs no model; leave out --model, --device and --dtype.")
        conflicts = build_conflicts({name: usable_facts(name) for name in source.relations()}, seed=source.seed)
    else:
        _, conflicts = source.conflicts()
    conflicts.save(out)
    say(f"Wrote {len(conflicts)} examples about {len(conflicts.subjects)} subjects to {out}")


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


_SHOWN_ROWS = 10


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
    seed: SeedOption = 0,
) -> None:
    """Convert a public data set to conflict data; leaves out, and counts, what could not be measured."""
    from interp.formats import convert_dataset

    converted = convert_dataset(files, format, out, on_error=on_error, seed=seed)
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
