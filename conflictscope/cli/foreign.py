"""The command that takes edits which other programs wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conflictscope.cli.inputs import layers_of
from conflictscope.cli.options import DEFAULT_MODEL, MODEL_HELP, BlueprintOption, register_blueprint, say


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            help="A control vector or adapter (GGUF), the folder of a PEFT adapter, or one that `export` wrote."
        ),
    ],
    model: Annotated[str, typer.Option(help=f"The model that it is for. {MODEL_HELP}")] = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="The intervention file to write.")] = Path("out/imported.json"),
    strength: Annotated[float, typer.Option(help="How far the edit goes: 1 is what the file says.")] = 1.0,
    layers: Annotated[
        str | None, typer.Option(help="Layers whose changes are taken, for example 10-20; all by default.")
    ] = None,
    blueprint: BlueprintOption = None,
) -> None:
    """Import directions or scaled heads that another program wrote, to measure them here."""
    from interp.models import load_checkpoint
    from interventions.foreign import imported

    register_blueprint(blueprint)
    network, tokenizer = load_checkpoint(model)
    edit = imported(file, network, tokenizer, model=model, strength=strength, layers=layers_of(layers))
    edit.save(out)
    said = [line for part in edit.build() for line in part.described()]
    say(f"Wrote {out}: {'; '.join(said[:3])}{f' and {len(said) - 3} more' if len(said) > 3 else ''}")
