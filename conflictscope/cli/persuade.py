"""The command that measures how far contexts move a model's answers, by DYNAMICQA's measures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conflictscope.cli.inputs import check_parquet, columns_of
from conflictscope.cli.options import Asked, SplitOption, say
from conflictscope.cli.tables import print_frame

if TYPE_CHECKING:
    import polars as pl

_MEASURES = ("coherent_persuasion", "semantic_entropy", "semantic_entropy_without", "confidence_gain", "divergence")
_COMPARED = ("coherent_persuasion", "semantic_entropy")
_PARTS = ("kind", "template", "relation")


def persuasion(
    *,
    by: Annotated[str, typer.Option(help="Columns to break the table down by, separated by commas.")] = "template,kind",
    split: SplitOption = "all",
    samples: Annotated[int, typer.Option(min=2, help="Answers that are sampled to each prompt.")] = 10,
    temperature: Annotated[float, typer.Option(min=0.01, help="Temperature of the sampling.")] = 0.5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 20,
    entailment: Annotated[
        str | None,
        typer.Option(help="A classifier with the label entailment, which says what answers mean the same."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Parquet file for the measures, one row per prompt.")] = Path(
        "out/persuasion.parquet"
    ),
    source: Asked,
) -> None:
    """Sample answers with and without each context: how far does it move them, and how sure is the model?

    Prints coherent persuasion and semantic entropy (DYNAMICQA), the confidence gain and the divergence of the first
    token, how the entropy changes prompt by prompt, and how the groups differ, with tests that deal subjects out anew.
    """
    from interp.entailment import Entailment
    from interp.files import write_parquet
    from interp.persuasion import Sampling, persuasion

    columns = columns_of(by, _PARTS)
    check_parquet(out)
    same = None if entailment is None else Entailment(entailment)
    model, conflicts = source.conflicts()
    asked = conflicts.select(split=None if split == "all" else split)
    sampling = Sampling(samples, temperature, max_new_tokens, source.seed)
    frame = persuasion(model, asked, sampling, same=same, progress="Sampling")
    write_parquet(out, frame)
    print_frame(_summary(frame, columns))
    if columns and not (compared := _compared(frame, columns)).is_empty():
        print_frame(compared)
    say(f"Measures of {len(frame)} prompts are in {out}")


def _summary(frame: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """Means with intervals by subject, and the paired change of the entropy, by group."""
    import polars as pl

    groups = frame.group_by(by, maintain_order=True) if by else [((), frame)]
    rows = [
        {**dict(zip(by, key, strict=True)), "measure": measure, **record}
        for key, part in groups
        for measure, record in _measured(part)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _compared(frame: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """How any two groups differ in DYNAMICQA's measures, with a test."""
    import polars as pl

    from interp.statistics import group_difference

    parts = {", ".join(map(str, key)): part for key, part in frame.group_by(by, maintain_order=True)}
    rows = []
    for (first, one), (second, other) in combinations(parts.items(), 2):
        subjects = one["subject"].to_list(), other["subject"].to_list()
        for measure in _COMPARED:
            found = group_difference(one[measure].to_numpy(), other[measure].to_numpy(), *subjects)
            rows.append({"measure": measure, "of": second, "less that of": first, **found.to_record()})
    return pl.DataFrame(rows)


def _measured(part: pl.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    from interp.statistics import bootstrap_mean, paired_difference

    subjects = part["subject"].to_list()
    for measure in _MEASURES:
        yield measure, {**bootstrap_mean(part[measure].to_list(), subjects).to_record(), "p": None}
    before, after = part["semantic_entropy_without"].to_numpy(), part["semantic_entropy"].to_numpy()
    yield "change of semantic_entropy", paired_difference(before, after, subjects).to_record()
