"""The answers behind a study's numbers, prompt by prompt: ``examples.parquet`` in its folder.

What was drawn several times (random heads, random features) is left out; single controls are in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from interp.answers import USAGES, Direction
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.files import write_parquet

EXAMPLES = "examples.parquet"
UNEDITED = "unedited"

_COLUMNS = {
    *("condition", "id", "subject", "relation", "template", "kind", "split", "prompt", "answer", "usage"),
    *("logit_difference", "memory_answers", "context_answers"),
}


def condition_of(method: str, towards: Direction) -> str:
    """What a method's edit is called in ``examples.parquet``, for example ``value scaling, towards memory``."""
    return f"{method.replace('_', ' ')}, towards {towards}"


def example_frame(asked: ConflictSet, reports: Mapping[str, UsageReport]) -> pl.DataFrame:
    """One row per condition and prompt.

    Args:
        asked: What was asked.
        reports: What was answered, by condition.

    Returns:
        ``condition``, the columns of ``UsageReport``, and the lists ``memory_answers`` and ``context_answers`` of what
        each source would answer.
    """
    expected = pl.DataFrame(
        {
            "id": [example.id for example in asked],
            "memory_answers": [list(example.memory_answers) for example in asked],
            "context_answers": [list(example.context_answers) for example in asked],
        },
        schema_overrides={"memory_answers": pl.List(pl.String), "context_answers": pl.List(pl.String)},
    )
    rows = [report.frame.select(pl.lit(name).alias("condition"), pl.all()) for name, report in reports.items()]
    return pl.concat(rows).join(expected, on="id", how="left", maintain_order="left")


def write_examples(folder: Path, frame: pl.DataFrame) -> None:
    """Write ``examples.parquet`` to a study's folder, atomically."""
    write_parquet(folder / EXAMPLES, frame)


def read_examples(folder: Path) -> pl.DataFrame | None:
    """What ``write_examples`` wrote; ``None`` where a study left no such file, as older ones did.

    Raises:
        UserError: If the file is damaged or another one.
    """
    path = folder / EXAMPLES
    if not path.exists():
        return None
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run the study again.") from error
    if missing := _COLUMNS - set(frame.columns):
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; remove it and run the study again.")
    text = frame.schema["logit_difference"] not in (pl.Float64, pl.Null)
    if text or not frame["usage"].is_in(USAGES).all():
        raise UserError(f"{path} holds usages or logit differences that are none; remove it and run the study again.")
    return frame
