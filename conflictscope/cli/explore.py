"""The command that starts the interactive view."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from conflictscope.addresses import is_local
from conflictscope.cli.options import DEFAULT_MODEL, MODEL_HELP, Form, Model, say
from interp.errors import UserError


@dataclass(frozen=True)
class Explored(Model):
    """The model to look at, named first or by a file."""

    model: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        str | None, typer.Argument(help=f"{MODEL_HELP} By default what the first file was made with.")
    ] = None


def explore(
    *,
    config: Annotated[
        list[Path] | None, typer.Option("--config", help="Intervention file to choose on the page; repeatable.")
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option(help="A folder with a conflict detector; out/probes/detector by default, if it fits the model."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; other than this machine's own needs --public.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8050,
    public: Annotated[bool, typer.Option("--public", help="Let others use the page: it has no password.")] = False,
    form: Form,
    explored: Explored,
) -> None:
    """Open a local page to ask a model live: its answers, their race by layer, its heads, and what edits change."""
    from conflictscope.explore.looks import Explorer, find_detector
    from conflictscope.explore.page import build_app, listening
    from interventions.config import named

    if not public and not is_local(host):
        raise UserError(
            f"{host} can be reached from elsewhere and the page has no password; add --public if that is meant, or "
            "listen at 127.0.0.1."
        )
    files = named(config or [])
    name = explored.model or next((file.model.name for file in files.values()), DEFAULT_MODEL)
    model = replace(explored, model=name).load()
    found, no_detector = find_detector(model, detector)
    explorer = Explorer(model, name=name, files=files, detector=found, asking=form.asking)
    app = build_app(explorer, no_detector=no_detector, local_only=not public)
    # One line for every request would bury what matters.
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with listening(app, host, port) as server:
        say(f"Open {server.address} in a browser; Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            server.wait()
