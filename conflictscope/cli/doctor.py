"""The command that says what is installed, where models run and lie, and what is missing for which command."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import typer

_NEEDED_FOR = {
    "": "what applies an intervention file",
    "study": "demo, compare, ask and all that measures",
    "sae": "sae train, and public SAEs",
    "explore": "explore",
    "serve": "serve",
    "adapters": "verify, with PEFT",
    "notebooks": "the notebooks",
    "images": "figures as PNG, SVG and PDF",
}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_ABOUT_MODELS = ("torch", "transformers", "tokenizers", "safetensors", "transformer-lens")


def doctor() -> None:
    """Say what is installed, where models run and lie, and what is missing for which command.

    Ends with 1 where something is missing that most commands need.
    """
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

    from interp.models import resolve_device

    device = resolve_device()
    yield f"Models run on {device}, unless --device says otherwise; the CPU has {torch.get_num_threads()} threads."
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        yield f"{torch.cuda.get_device_name(device)} has {_gib(free)} of {_gib(total)} free."
    if (found := memory()) is not None:
        yield f"This machine has {_gib(found)} of memory; the default model takes 0.5 GiB in float32."


def memory() -> int | None:
    """Bytes of memory, where the system says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


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
