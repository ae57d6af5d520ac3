"""Measure what the steps of a comparison take on the default model, for ``conflictscope compare --dry-run``.

    conflictscope compare docs/comparison.yaml --out out/comparison
    python -m benchmarks.costs out/comparison --json

Steps and methods are told in units of measuring one condition on test, medians over the finished studies of that
folder; the efficiency is the share of this machine's speed at products of matrices at which a condition was measured.
``--write`` puts the result where the command reads it.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import show
from conflictscope.study.comparison import Comparing, Comparison
from conflictscope.study.costs import flops_a_second, ratios, size
from conflictscope.study.units import Journal, Schedule
from interp.answers import COMPLETION_TOKENS
from interp.conflicts import ConflictSet
from interp.files import assets_directory, read_json, write_json
from interp.models import load_config
from interp.plan import Shapes


def main(
    folder: Annotated[Path, typer.Argument(help="What `conflictscope compare` wrote of a plan.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write assets/costs.json.")] = False,
) -> None:
    """Measure what steps of a comparison take."""
    plan = Comparison.model_validate(read_json(folder / "plan.json"))
    comparing = Comparing.of(plan, folder, "")
    found = Journal(folder / "units.jsonl").read()
    schedule = Schedule(comparing.units(), found)
    # Units that were not done tell nothing.
    done = {one.id: one for one in found if one.id in schedule.units}
    record = ratios(done, schedule.units)
    speeds = []
    for digest, setting in comparing.settings.items():
        if seconds := [one.seconds for name, one in done.items() if _is_test(schedule, name, digest)]:
            # What the model knows, which is less than all.
            tested = len(ConflictSet.load(comparing.folder(setting) / "prompts" / "test.jsonl"))
            _, tokens = size(setting)
            shapes = Shapes.of(load_config(setting.model.name))
            speeds.append(tested * shapes.answer_flops(round(tokens), COMPLETION_TOKENS) / statistics.median(seconds))
    record["efficiency"] = round(statistics.median(speeds) / flops_a_second(), 3)
    if write:
        write_json(assets_directory() / "costs.json", record)
    show(record, as_json=json)


def _is_test(schedule: Schedule, name: str, study: str) -> bool:
    unit = schedule.units[name]
    return unit.step == "test" and unit.study == study


if __name__ == "__main__":
    typer.run(main)
