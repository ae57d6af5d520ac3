"""The commands that ship an intervention: look at a file, try it, fold it into weights, serve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from conflictscope.cli.options import (
    BlueprintOption,
    Form,
    ModelArgument,
    NamedModel,
    TrustOption,
    register_blueprint,
    say,
)
from conflictscope.cli.verify import recorded
from interp.errors import UserError

_form_option = partial(typer.Option, rich_help_panel="Form")
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
    about.add_row("at", _places(file.sites))
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
    network = loaded.load()
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


@dataclass(frozen=True)
class Shipped:
    """In which form an edit is written."""

    bake: Annotated[
        bool, _form_option("--bake", help="Fold the edit into the weights: a checkpoint that any engine loads.")
    ] = False
    drop: Annotated[
        bool, _form_option("--drop", help="With --bake: leave out feed-forward layers that are scaled by 0.")
    ] = False
    lora: Annotated[
        bool, _form_option("--lora", help="Write the edit of heads as a LoRA adapter, for vLLM, PEFT and transformers.")
    ] = False
    gguf: Annotated[bool, _form_option("--gguf", help="With --lora: write each adapter for llama.cpp too.")] = False
    vector: Annotated[
        Literal["gguf", "peft"] | None,
        _form_option(help="Write directions at all tokens as a control vector of llama.cpp, or as biases for PEFT."),
    ] = None
    prompts: Annotated[
        Path | None, _form_option(help="What `verify` asks of the new folder, one a line; else facts in conflict.")
    ] = None

    def check(self, settings: int) -> None:
        """See that options go together.

        Raises:
            UserError: If they do not.
        """
        if self.drop and not self.bake:
            raise UserError("--drop leaves weights out of a checkpoint; give --bake as well.")
        if self.gguf and not self.lora:
            raise UserError(
                "--gguf writes adapters for llama.cpp: give --lora as well, or --vector gguf for directions."
            )
        if self.bake + self.lora + (self.vector is not None) > 1:
            raise UserError("--bake, --lora and --vector are three forms; give one.")
        if self.prompts is not None and not (self.bake or self.lora or self.vector):
            raise UserError("--prompts are for `verify` of an exported folder; give --bake, --lora or --vector too.")
        if settings > 1 and not self.lora:
            raise UserError("Several settings at once are written as adapters only; give --lora, or one --trust.")


def export(
    *,
    model: ModelArgument,
    config: Annotated[Path, typer.Argument(help="An intervention file for that model.")],
    out: Annotated[Path, typer.Argument(help="What to write: an intervention file, or in another form a new folder.")],
    trust: Annotated[
        list[float] | None,
        typer.Option(
            help="Setting of the file's dial, from -1 (memory) to 1 (context); else its own. With --lora repeatable."
        ),
    ] = None,
    strength: StrengthOption = 1.0,
    blueprint: BlueprintOption = None,
    form: Shipped,
) -> None:
    """Write an edit at one setting: as an intervention file, folded into the weights, or as an adapter."""
    from interp.models import load_checkpoint
    from interventions.bake import write_folded
    from interventions.config import InterventionFile
    from interventions.export.lora import write_adapters
    from interventions.export.vectors import write_vectors

    settings = trust or []
    form.check(len(settings))
    register_blueprint(blueprint)
    file = InterventionFile.load(config)
    one = settings[0] if settings else None
    if form.lora:
        name = config.resolve().name if config.is_dir() else config.stem
        asked = recorded(form.prompts)
        write_adapters(model, file, out, name=name, trusts=settings, strength=strength, prompts=asked, gguf=form.gguf)
    elif form.bake:
        asked = recorded(form.prompts)
        write_folded(model, file, out, trust=one, strength=strength, drop=form.drop, prompts=asked)
    elif form.vector is not None:
        asked = recorded(form.prompts)
        write_vectors(model, file, out, form=form.vector, trust=one, strength=strength, prompts=asked)
    else:
        file.check(*load_checkpoint(model))
        file.at(trust=one, strength=strength).save(out)
    say(f"Wrote {out}")


def _places(sites: list[Any]) -> str:
    """The modules that a file reads and writes; those that several layers have once, with their layers."""
    alike: dict[str, list[str]] = {}
    for place in sites:
        layer = next(part for part in place.module.split(".") if part.isdecimal())
        alike.setdefault(place.module.replace(f".{layer}", ".N", 1), []).append(layer)
    return "; ".join(
        f"{module}, N = {', '.join(layers)}" if len(layers) > 1 else module.replace(".N", f".{layers[0]}", 1)
        for module, layers in alike.items()
    )


def _is_estimate(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(k), int | float) for k in ("value", "low", "high"))


def _estimate(value: Any) -> str:
    from conflictscope.tables import written

    return written(value, 3) if _is_estimate(value) else "-"
