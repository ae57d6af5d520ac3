"""The command that serves a model with interventions, by transformers or by vLLM."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from conflictscope.addresses import is_local
from conflictscope.cli.options import MODEL_HELP, Model, say
from conflictscope.cli.verify import recorded
from interp.errors import UserError

_engine_option = partial(typer.Option, rich_help_panel="Engine")
_bound_option = partial(typer.Option, rich_help_panel="With transformers")


@dataclass(frozen=True)
class Served(Model):
    """The model to serve, by default that of a file."""

    model: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        str | None, typer.Option(help=f"{MODEL_HELP} By default what the first file was made with.")
    ] = None


@dataclass(frozen=True)
class Address:
    """Where a server listens, and to whom."""

    host: Annotated[str, typer.Option(help="Address to listen at; other than this machine's own needs --api-key.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000
    api_key: Annotated[
        str | None, typer.Option(envvar="CONFLICTSCOPE_API_KEY", help="What clients send as a bearer token.")
    ] = None


@dataclass(frozen=True)
class Bounds:
    """What requests may ask for, of transformers."""

    max_prompt_tokens: Annotated[int, _bound_option(min=1, help="Longest prompt.")] = 2048
    max_new_tokens: Annotated[int, _bound_option(min=1, help="Longest answer.")] = 512
    max_waiting: Annotated[int, _bound_option(min=1, help="How many answers may wait; more are refused.")] = 256
    max_batch: Annotated[
        int, _bound_option(min=1, help="Rows that share the model's passes; rules for the next token take two.")
    ] = 32
    max_cache_tokens: Annotated[
        int, _bound_option(min=1, help="Tokens of all rows that keys and values are kept of, padding included.")
    ] = 32768
    journal: Annotated[
        Path | None,
        _bound_option(help="File to append every answer to, as a line of JSON, before it (or a stream's end) is sent."),
    ] = None


@dataclass(frozen=True)
class Engine:
    """What answers."""

    engine: Annotated[
        Literal["transformers", "vllm"],
        _engine_option(help="vllm: start vLLM, with edits of heads as adapters; transformers serves every edit."),
    ] = "transformers"
    adapters: Annotated[Path, _engine_option(help="With vllm: the folder for the adapters.")] = Path("out/adapters")
    vllm_python: Annotated[
        str, _engine_option(help="With vllm: the interpreter of the environment that has it; else this one.")
    ] = field(default=sys.executable)
    vllm_options: Annotated[str, _engine_option(help="With vllm: more of its options, as one text.")] = ""


def serve(
    *,
    config: Annotated[
        list[Path],
        typer.Argument(help="Intervention files for one model; requests choose among them by file name."),
    ],
    address: Address,
    engine: Engine,
    bounds: Bounds,
    served: Served,
) -> None:
    """Serve a model with interventions in the shape of OpenAI's API; each request chooses its own.

    By transformers a request that names none gets the first file's, by vLLM the unedited model's.
    """
    from interventions.config import named

    if not address.api_key and not is_local(address.host):
        raise UserError(f"{address.host} can be reached from elsewhere; give --api-key too, or listen at 127.0.0.1.")
    if engine.engine == "vllm" and bounds != Bounds():
        raise UserError("Bounds and --journal are for --engine transformers; give vLLM's own with --vllm-options.")
    if engine.engine == "transformers" and replace(engine, engine="vllm") != Engine("vllm"):
        raise UserError("--adapters, --vllm-python and --vllm-options are for --engine vllm; give that too.")
    files = named(config)
    chosen = replace(served, model=served.model or next(iter(files.values())).model.name)
    if engine.engine == "vllm":
        _by_vllm(files, chosen, address, engine)
    else:
        _by_transformers(files, chosen, address, bounds)


def _by_transformers(files: Mapping[str, Any], served: Model, address: Address, bounds: Bounds) -> None:
    import uvicorn

    from conflictscope.serve.app import build_app
    from conflictscope.serve.engine import Engine
    from conflictscope.serve.requests import Limits

    network = served.load()
    limits = Limits(
        prompt_tokens=bounds.max_prompt_tokens,
        new_tokens=bounds.max_new_tokens,
        waiting=bounds.max_waiting,
        rows=bounds.max_batch,
        cache_tokens=bounds.max_cache_tokens,
    )
    name = Path(served.model).name
    engine = Engine(
        network, network.tokenizer, name=name, interventions=dict(files), limits=limits, journal=bounds.journal
    )
    say(f"Serving {', '.join(engine.models())}")
    app = build_app(engine, api_key=address.api_key or None)
    uvicorn.run(app, host=address.host, port=address.port, log_level="info", timeout_graceful_shutdown=60)


def _by_vllm(files: Mapping[str, Any], served: Model, address: Address, engine: Engine) -> None:
    from conflictscope.serve import vllm

    usual = type(served)(served.model)
    own = ("device", "device_map", "attention", "revision", "subfolder", "trust_remote_code", "batch_tokens")
    if changed := [name for name in own if getattr(served, name) != getattr(usual, name)]:
        raise UserError(
            f"vLLM loads models its own way; leave out --{changed[0].replace('_', '-')}, or give vLLM's options with "
            "--vllm-options."
        )
    can_resolve = vllm.check_installed(engine.vllm_python)
    names = vllm.write_edits(served.model, files, engine.adapters, recorded(None))
    name = Path(served.model).name
    say(f"Serving {name}, with adapters as models: {', '.join(names)}")
    if not can_resolve:
        say(
            "Other settings, like dial@0.5, are not found on demand: ConflictScope is not installed for "
            f"{engine.vllm_python}; install it there, from its checkout, with pip install --no-deps ."
        )
    how = vllm.Served(
        model=served.model,
        name=name,
        dtype=served.dtype,
        host=address.host,
        port=address.port,
        api_key=address.api_key,
        python=engine.vllm_python,
        options=tuple(shlex.split(engine.vllm_options)),
    )
    vllm.start(how, engine.adapters, names)
