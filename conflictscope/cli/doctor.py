"""The command that says what is installed, where models run and lie, and what is missing for which command.

With a model it says what the model's architecture looks like, and whether that is so.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from conflictscope.cli.options import MODEL_HELP, Model

_NEEDED_FOR = {
    "": "what applies an intervention file",
    "study": "demo, compare, ask and all that measures",
    "sae": "sae train, and public SAEs",
    "explore": "explore",
    "serve": "serve",
    "adapters": "verify, with PEFT; models with adapters",
    "large": "several devices; models in 4 and 8 bit",
    "notebooks": "the notebooks",
    "images": "figures as PNG, SVG and PDF",
}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_ABOUT_MODELS = ("torch", "transformers", "tokenizers", "safetensors", "transformer-lens")


@dataclass(frozen=True)
class LookedAt(Model):
    """Which model is looked at, if one is."""

    model: Annotated[str, typer.Argument(help=f"Look at this model instead. {MODEL_HELP}", show_default=False)] = ""


def doctor(
    source: LookedAt,
    out: Annotated[
        Path | None, typer.Option(help="With a model: write its blueprint to this file, which --blueprint takes.")
    ] = None,
) -> None:
    """Say what is installed, where models run and lie, and what is missing for which command.

    Ends with 1 where something is missing that most commands need.

    With a model: say what its architecture looks like, and how far the model's own forward passes are from that.
    """
    from interp.errors import UserError

    if source.model:
        _look_at(source, out)
    elif out is not None:
        raise UserError("--out is for the blueprint of a model; name the model too.")
    elif source != LookedAt():
        raise UserError("The options of a model are for looking at one; name the model too.")
    else:
        _look_around()


def _look_at(source: LookedAt, out: Path | None) -> None:
    """Say what a model's architecture looks like, and whether that is so."""
    from interp.anatomy import BLUEPRINTS
    from interp.blueprints import blueprint_from
    from interp.errors import UserError
    from interp.files import write_json
    from interp.fit import checked
    from interp.proposal import is_proposed, written
    from interp.small import Misfit

    network: Any = source.load()
    name = type(network).__name__
    given = source.blueprint is not None and blueprint_from(source.blueprint)[0] == name
    state = "proposed from its modules" if is_proposed(name) else "given with --blueprint" if given else "known"
    typer.echo(f"{name}: {state}\n")
    record = written(name, BLUEPRINTS[name])
    typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
    try:
        fit = checked(network, BLUEPRINTS[name])
    except Misfit as error:
        raise UserError(f"The blueprint of {name} does not fit {source.model}: {error}; give another one.") from error
    typer.echo(
        f"\nHow far the model is from what follows, relative (a small copy in float64; itself, in {network.dtype})"
    )
    for check, off in fit.small.items():
        typer.echo(f"{check:12}{off:8.0e}" + (f"{fit.own[check]:8.0e}" if check in fit.own else "       -"))
    typer.echo(f"{fit.n_heads} heads of the small copy give the values that their attention weighs.")
    if out is not None:
        write_json(out, record)
        typer.echo(f"Wrote {out}")


def _look_around() -> None:
    """Say what is installed, and end with 1 where something is missing that most commands need."""
    from conflictscope import __version__

    versions = ", ".join(f"{name} {found}" for name in _ABOUT_MODELS if (found := _version(name)))
    typer.echo(f"conflictscope {__version__}, Python {platform.python_version()} on {platform.platform(terse=True)}")
    typer.echo(f"with {versions}\n")
    try:
        for line in (*_devices(), *_cache()):
            typer.echo(line)
    except ImportError as error:
        typer.echo(f"Where models run and lie is not known: {error}.")
    typer.echo()
    broken = []
    for extra, commands in _NEEDED_FOR.items():
        wrong = list(_wrong(extra))
        broken += [extra] if wrong else []
        named = f"conflictscope[{extra}]" if extra else "conflictscope"
        state = f"{'; '.join(wrong)}: pip install '{named}'" if wrong else "ready"
        if extra == "images" and not any(map(shutil.which, _BROWSERS)):
            state += "; Chrome or Chromium was not found, which you install yourself"
        typer.echo(f"{commands}: {state}")
    raise typer.Exit(int("" in broken or "study" in broken))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _wrong(extra: str) -> Iterator[str]:
    """What is missing of an extra, or of a version that it does not go with."""
    from packaging.requirements import Requirement

    from conflictscope import __version__

    try:
        declared = [Requirement(line) for line in metadata.requires("conflictscope") or ()]
    except metadata.PackageNotFoundError:
        yield f"conflictscope {__version__} runs without being installed, so that its needs are not known"
        return
    for needed in declared:
        is_core = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if is_core == bool(extra) or (needed.marker and not needed.marker.evaluate({"extra": extra})):
            continue
        if needed.name == "conflictscope":
            for part in needed.extras:
                yield from _wrong(part)
        elif (found := _version(needed.name)) is None:
            yield f"{needed.name} is missing"
        elif not needed.specifier.contains(found, prereleases=True):
            yield f"{needed.name} is {found}, not {needed.specifier}"


def _devices() -> Iterator[str]:
    """Where models run, and how much memory there is."""
    import torch

    from interp.models import device_memory, resolve_device

    device = resolve_device()
    yield f"Models run on {device}, unless --device says otherwise; the CPU has {torch.get_num_threads()} threads."
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        yield f"{torch.cuda.get_device_name(device)} has {_gib(free)} of {_gib(total)} free."
    if (found := device_memory(torch.device("cpu"))) is not None:
        yield f"This machine has {_gib(found)} of memory; the default model takes 0.5 GiB in float32."


def _cache() -> Iterator[str]:
    """Where fetched models lie, and whether they are there."""
    from interp.models import REGISTERED, cache_directory, is_cached

    folder = cache_directory()
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    yield f"Fetched models lie in {folder}, with {_gib(shutil.disk_usage(there).free)} free."
    for name in REGISTERED:
        where = (
            f"is there, {_gib(_size(folder / 'models' / name))}" if is_cached(name) else "is fetched when first used"
        )
        yield f"{name} {where}."


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
