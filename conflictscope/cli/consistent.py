"""The command that asks one question in many words: does the model always say the same?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from conflictscope.cli.inputs import check_parquet, columns_of
from conflictscope.cli.options import Asked, SplitOption, say
from conflictscope.cli.tables import print_frame
from interp.errors import UserError


def consistency(
    *,
    by: Annotated[
        str, typer.Option(help="Columns to break the table down by (relation, split, right), separated by commas.")
    ] = "relation",
    split: SplitOption = "all",
    samples: Annotated[
        int, typer.Option(min=0, help="Answers that are sampled to each wording besides the greedy one; 0 is none.")
    ] = 0,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Temperature of the sampling; else 0.5.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; else as for evaluate.")
    ] = None,
    entailment: Annotated[
        str | None,
        typer.Option(help="A classifier with the label entailment, which says what answers mean the same."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Parquet file for the answers and measures, one row per question.")] = Path(
        "out/consistency.parquet"
    ),
    source: Asked,
) -> None:
    """Ask each question in every wording, without a context: does the model contradict itself?

    Asks all facts of the relations, also those that the model gets wrong. Prints in how many questions all wordings get
    one answer, the share of the largest group of answers, and the share of pairs that agree (ParaRel); with --samples
    semantic entropy too.
    """
    from interp.consistency import PARTS, consistency, estimates
    from interp.entailment import Entailment
    from interp.files import write_parquet
    from interp.persuasion import TEMPERATURE, Sampling

    columns = columns_of(by, PARTS)
    if samples == 1 or (temperature is not None and not samples):
        raise UserError(
            "Sampling takes two answers or more; give --samples 10, or leave out --samples and --temperature."
        )
    check_parquet(out)
    same = None if entailment is None else Entailment(entailment)
    model, conflicts = _asked(source)
    part = conflicts.select(split=None if split == "all" else split)
    longest = source.longest_answer(model, part, max_new_tokens)
    sampling = Sampling(samples, temperature or TEMPERATURE, longest, source.seed) if samples else None
    frame = consistency(model, part, sampling, max_new_tokens=longest, same=same, progress="Asking")
    write_parquet(out, frame)
    print_frame(estimates(frame, columns))
    say(f"Answers to {len(frame)} questions in {frame['prompts'].list.len().sum()} wordings are in {out}")


def _asked(source: Asked) -> tuple[Any, Any]:
    """The model, and what it is asked: a file, or all facts of the relations, known or not."""
    from interp.conflicts import ConflictSet
    from interp.consistency import closed_book
    from interp.facts import usable_facts

    facts = {name: usable_facts(name) for name in source.relations()}
    conflicts = closed_book(facts, seed=source.seed) if source.data is None else ConflictSet.load(source.data)
    model = source.load()
    return model, source.asking.asked(model, source.model, conflicts)
