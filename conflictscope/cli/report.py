"""The command that makes a page of a study's records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conflictscope.cli.options import say


def report(
    run_dir: Annotated[
        list[Path],
        typer.Argument(
            help="Folders that a study (demo, compare, dial fit, ...) or probe score wrote; several are compared."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page; by default report.html in the folder, or out/report.html for several."),
    ] = None,
) -> None:
    """Write one HTML page about a study, or about several next to each other; it works offline."""
    from conflictscope.report import read_runs, write_report

    runs = read_runs(run_dir)
    path = out or (run_dir[0] if len(run_dir) == 1 else Path("out")) / "report.html"
    write_report(path, runs)
    for run in runs:
        if run.examples is None and run.conditions:
            say(f"{run.name} left no answers to browse; the command that wrote it adds them when it runs again.")
    say(f"Look at {path}")
