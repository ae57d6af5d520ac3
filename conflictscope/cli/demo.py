"""The command that does the whole job on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conflictscope.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_RELATION,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RelationOption,
    SeedOption,
    say,
)


def demo(
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; finished steps in it are reused.")] = Path(
        "out/demo"
    ),
    seed: SeedOption = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few facts: checks that all runs; measures little.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Do the whole job on one model: measure, locate, intervene, verify; then look at OUT/report.html."""
    from conflictscope.demo_study import headline, run_study

    summary = run_study(
        model, relations=relation or [DEFAULT_RELATION], out=out, seed=seed, quick=quick, device=device, dtype=dtype
    )
    for line in headline(summary):
        say(line)
    say(f"Look at {out / 'report.html'}")
