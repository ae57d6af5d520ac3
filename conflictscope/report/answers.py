"""What the page's example browser works on: the answers of every run as compact JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import polars as pl

from conflictscope.report.runs import Run
from conflictscope.study.record import UNEDITED
from interp.errors import UserError

_LETTERS = {"memory": "m", "context": "c", "both": "b", "other": "o", "empty": "e"}


def answers_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each run that left its answers: the prompts once, and per condition only what was answered.

    Returns:
        Records with ``name``; ``held_out``; ``shown``, the edit to show first; ``prompts``, columns of equal length,
        where a prompt's ``kind``, ``relation`` and ``template`` are numbers in ``names``; and ``conditions``, the
        unedited model first, with ``name``, ``answer``, ``usage`` (one letter a prompt) and ``logit`` (differences;
        null where there is none).
    """
    return [_answers(run, run.examples) for run in runs if run.examples is not None]


def _answers(run: Run, examples: pl.DataFrame) -> dict[str, Any]:
    by_condition = {str(key[0]): part for key, part in examples.partition_by("condition", as_dict=True).items()}
    if UNEDITED not in by_condition:
        raise UserError(f"The examples of {run.name} lack the unedited model; run the study again.")
    known = [c.name for c in run.conditions if c.name in by_condition]
    prompts = by_condition[UNEDITED]
    ids = prompts["id"].to_list()
    names: dict[str, list[str]] = {}
    columns: dict[str, Any] = {}
    for column in ("kind", "relation", "template"):
        names[column] = prompts[column].unique(maintain_order=True).to_list()
        numbers = {name: number for number, name in enumerate(names[column])}
        columns[column] = [numbers[value] for value in prompts[column]]
    for source in ("memory", "context"):
        columns[source] = [" / ".join(answers or ()) for answers in prompts[f"{source}_answers"].to_list()]
    conditions = []
    for name in known:
        rows = pl.DataFrame({"id": ids}).join(by_condition[name], on="id", how="left", maintain_order="left")
        if rows["usage"].null_count() or rows.height != len(ids):
            raise UserError(f"The examples of {run.name} have other prompts of {name}; run the study again.")
        conditions.append(
            {
                "name": name,
                "answer": rows["answer"].to_list(),
                "usage": "".join(_LETTERS[usage] for usage in rows["usage"]),
                "logit": [_rounded(value) for value in rows["logit_difference"]],
            }
        )
    return {
        "name": run.name,
        "held_out": run.held_out,
        "shown": next((c.name for c in run.winners.values() if c.name in known), known[-1]),
        "names": names,
        "prompts": {**columns, "prompt": prompts["prompt"].to_list(), "subject": prompts["subject"].to_list()},
        "conditions": conditions,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 2)
