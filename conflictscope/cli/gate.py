"""The command that puts an intervention behind a conflict detector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conflictscope.cli.options import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    RelationOption,
    SeedOption,
    TrustOption,
    say,
)
from conflictscope.cli.tables import print_frame

app = typer.Typer(help="Put an intervention behind a conflict detector.", no_args_is_help=True)


@app.command("fit")
def gate_fit(
    config: Annotated[Path, typer.Argument(help="The intervention file to put behind a gate.")],
    model: Annotated[
        str, typer.Option("--model", help="Its model: a registered name, a local directory or a hub id.")
    ] = DEFAULT_MODEL,
    relation: RelationOption = None,
    trust: TrustOption = None,
    keep: Annotated[
        float, typer.Option(help="Share of the conflict prompts on dev that the gate is to let pass.")
    ] = 0.95,
    subjects: Annotated[
        int, typer.Option(min=2, help="Subjects of each relation asked about at most, to learn from and to test on.")
    ] = 40,
    out: Annotated[Path, typer.Option(help="Folder for the results; finished steps in it are reused.")] = Path(
        "out/gate"
    ),
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Fit a gate that opens for conflicts, verify it, and write OUT/gated.json and OUT/summary.json."""
    from conflictscope.dialing import RELATIONS
    from conflictscope.gating import Gating, gating_lines, gating_table
    from interp.models import load_model
    from interventions.config import InterventionFile

    file = InterventionFile.load(config)
    file = file.at(trust=trust)
    bridge = load_model(model, device=device, dtype=dtype)
    gating = Gating(bridge, file, relations=relation or RELATIONS, out=out, keep=keep, subjects=subjects, seed=seed)
    summary = gating.run()
    print_frame(gating_table(summary))
    for line in gating_lines(summary):
        say(line)
    say(f"The gated intervention is {out / 'gated.json'}, all numbers are in {out / 'summary.json'}")
