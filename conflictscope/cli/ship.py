"""The commands that ship an intervention: look at a file, try it, fold it into weights, serve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from conflictscope.addresses import is_local
from conflictscope.cli.options import MODEL_HELP, Form, Model, ModelArgument, NamedModel, TrustOption, say
from interp.errors import UserError

StrengthOption = Annotated[
    float, typer.Option(help="How far the edit goes: 0 changes nothing, 1 is what the file says; not for a dial.")
]


def inspect(
    config: Annotated[Path, typer.Argument(help="An intervention file, or the folder that it is alone in.")],
) -> None:
    """Say what an intervention file changes, in which model, and what it was measured to do."""
    from conflictscope.tables import MEASURES
    from interventions.config import InterventionFile

    file = InterventionFile.load(config)
    output = Console()
    about = Table(show_header=False, box=None, title=file.name, title_justify="left")
    shape = file.model
    about.add_row("strengthens", file.towards or "-")
    about.add_row("model", f"{shape.name}: {shape.architecture}, {shape.n_layers} layers x {shape.n_heads} heads")
    known = [name for name in ("weights", "tokenizer") if getattr(shape, name) is not None]
    about.add_row("recognised by", ", ".join(["shape", *known]))
    for intervention in file.build():
        about.add_row("changes", "; ".join(intervention.described()))
    about.add_row("at", ", ".join(place.module for place in file.sites))
    source = file.provenance
    details = [
        f"{name} {value}" for name in ("method", "chosen_on", "seed") if (value := getattr(source, name)) is not None
    ]
    about.add_row("made by", ", ".join(details) or "-")
    about.add_row("data", (source.data or "-")[:16])
    about.add_row("with", ", ".join(f"{name} {version}" for name, version in source.versions.items()) or "-")
    output.print(about, markup=False)
    conditions = {name: found for name, found in file.measured.items() if isinstance(found, Mapping)}
    columns = [name for name in MEASURES if any(_is_estimate(found.get(name)) for found in conditions.values())]
    if not columns:
        output.print("Nothing was measured of this file as it is.")
        return
    table = Table("measured", *(name.replace("_", " ") for name in columns))
    for name, found in conditions.items():
        table.add_row(name, *(_estimate(found.get(column)) for column in columns))
    output.print(table, markup=False)


def generate(
    *,
    loaded: NamedModel,
    prompt: Annotated[list[str], typer.Argument(help="Prompts; each is one argument.")],
    config: Annotated[Path, typer.Option("--config", help="An intervention file for that model.")],
    trust: TrustOption = None,
    strength: StrengthOption = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 24,
    form: Form,
) -> None:
    """Answer prompts without an intervention and with it, side by side."""
    from interp.generation import greedy_texts
    from interventions.config import InterventionFile
    from interventions.runtime import apply

    file = InterventionFile.load(config)
    network = loaded.load(attention=None)
    tokenizer = network.tokenizer
    table = Table("prompt", "without", "with", title=file.name, show_lines=True)
    asking = form.asking.settled(network, loaded.model)
    asked = [asking.said(network, text) for text in prompt]
    plain = greedy_texts(network, tokenizer, asked, max_new_tokens=max_new_tokens)
    with apply(network, file, tokenizer=tokenizer, trust=trust, strength=strength):
        edited = greedy_texts(network, tokenizer, asked, max_new_tokens=max_new_tokens)
    for row in zip(prompt, plain, edited, strict=True):
        table.add_row(*row)
    Console().print(table, markup=False)


def export(
    model: ModelArgument,
    config: Annotated[Path, typer.Argument(help="An intervention file for that model.")],
    out: Annotated[Path, typer.Argument(help="What to write: an intervention file, or with --bake a new folder.")],
    bake: Annotated[
        bool,
        typer.Option("--bake", help="Fold the edit into the weights and write a checkpoint that any engine loads."),
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop", help="With --bake: leave out feed-forward layers that are scaled by 0.")
    ] = False,
    trust: TrustOption = None,
    strength: StrengthOption = 1.0,
) -> None:
    """Write an edit at one setting: as an intervention file, or folded into the weights of its model."""
    from interp.models import load_checkpoint
    from interventions.bake import write_folded
    from interventions.config import InterventionFile

    if drop and not bake:
        raise UserError("--drop leaves weights out of a checkpoint; give --bake as well.")
    file = InterventionFile.load(config)
    if bake:
        write_folded(model, file, out, trust=trust, strength=strength, drop=drop)
    else:
        file.model.check(*load_checkpoint(model))
        file.at(trust=trust, strength=strength).save(out)
    say(f"Wrote {out}")


@dataclass(frozen=True)
class Served(Model):
    """The model to serve, by default that of a file."""

    model: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        str | None, typer.Option(help=f"{MODEL_HELP} By default what the first file was made with.")
    ] = None


def serve(
    *,
    config: Annotated[
        list[Path],
        typer.Argument(
            help="Intervention files for one model; requests choose among them by file name, first is default."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; other than this machine's own needs --api-key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="CONFLICTSCOPE_API_KEY", help="What clients send as a bearer token.")
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    max_waiting: Annotated[int, typer.Option(min=1, help="How many answers may wait; more are refused.")] = 256,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Rows that share the model's passes; rules for the next token take two.")
    ] = 32,
    max_cache_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of all rows that keys and values are kept of, padding included.")
    ] = 32768,
    journal: Annotated[
        Path | None,
        typer.Option(help="File to append every answer to, as a line of JSON, before it (or a stream's end) is sent."),
    ] = None,
    served: Served,
) -> None:
    """Serve a model with interventions in the shape of OpenAI's API; each request chooses its own."""
    import uvicorn

    from conflictscope.serve.app import build_app
    from conflictscope.serve.engine import Engine
    from conflictscope.serve.requests import Limits
    from interventions.config import named

    if not api_key and not is_local(host):
        raise UserError(f"{host} can be reached from elsewhere; give --api-key too, or listen at 127.0.0.1.")
    files = named(config)
    name = served.model or next(iter(files.values())).model.name
    network = replace(served, model=name).load(attention=None)
    limits = Limits(
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        waiting=max_waiting,
        rows=max_batch,
        cache_tokens=max_cache_tokens,
    )
    engine = Engine(
        network, network.tokenizer, name=Path(name).name, interventions=files, limits=limits, journal=journal
    )
    say(f"Serving {', '.join(engine.models())}")
    app = build_app(engine, api_key=api_key or None)
    uvicorn.run(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=60)


def _is_estimate(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(k), int | float) for k in ("value", "low", "high"))


def _estimate(value: Any) -> str:
    from conflictscope.tables import written

    return written(value, 3) if _is_estimate(value) else "-"
