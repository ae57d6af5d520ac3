"""What the commands share: their common options, and how they talk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

PromptsArgument = Annotated[
    Path | None, typer.Argument(help="Prompts, one a line: a text, or a JSON object with a field prompt. - is stdin.")
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Prompts per batch.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="A registered name (see `conflictscope models`), a local directory or a hub id.")
]
RelationOption = Annotated[
    list[str] | None, typer.Option("--relation", help="A relation of the fact tables; repeatable.")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Conflict data (JSON lines from `conflictscope data`) instead of relations."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of splits and conflicts built here, and of random choices.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
RecordingOption = Annotated[Path, typer.Option("--recording", help="A folder that `conflictscope record` wrote.")]
ProbesOption = Annotated[Path, typer.Option("--probes", help="A folder that `conflictscope probe fit` wrote.")]
SaeOption = Annotated[
    str,
    typer.Option(
        "--sae",
        help="SAEs: a model they are shipped for, a folder (sae_lens or sparsify), or RELEASE:ID as sae_lens has them.",
    ),
]
ControlOption = Annotated[
    Path, typer.Option("--out", help="Folder of results and intervention files; finished steps in it are reused.")
]
TokensOption = Annotated[
    Literal["last_prompt", "answer"],
    typer.Option(
        help="The tokens that are edited: the prompt's last, or all that predict the answer, as caa always does."
    ),
]
TrustOption = Annotated[
    float | None, typer.Option(help="Setting of the file's dial, from -1 (memory) to 1 (context); else its own.")
]
DtypeOption = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_RELATION = "capital"

console = Console(stderr=True)


def say(message: str) -> None:
    """Tell people something; results go elsewhere."""
    console.print(message, markup=False, soft_wrap=True, highlight=False)
