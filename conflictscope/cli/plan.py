"""The command that says what a model takes and what fits, before any of its weights is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from conflictscope.cli.options import BlueprintOption, ModelArgument, register_blueprint, say
from interp.errors import UserError

if TYPE_CHECKING:
    from conflictscope.plan import Setting
    from interp.plan import Shapes

_USUAL_TOKENS = (128, 4096)
# A number without a unit is bytes, which nobody means.
_LEAST = 2**20
_LEGEND = (
    "TFLOP: of a prompt, or of a step. GiB: with the weights, on one device. Devices: how many the batch needs, blocks "
    "spread over them; - where it does not fit beside one block. At once: prompts in the largest batch that fits."
)


@dataclass(frozen=True)
class Machine:
    """Where a model is to run, and in which dtype."""

    memory: Annotated[
        str | None, typer.Option(help="Memory of one device, for example 80GiB; by default this machine's own.")
    ] = None
    devices: Annotated[int, typer.Option(min=1, help="How many devices there are.")] = 1
    tflops: Annotated[
        float | None, typer.Option(help="What a device really computes, in 10^12 FLOPs a second, to be told seconds.")
    ] = None
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32"

    def __post_init__(self) -> None:
        if self.tflops is not None and not 0 < self.tflops < float("inf"):
            raise UserError(f"--tflops is a number above 0, not {self.tflops:g}; give what the device computes.")

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the model.

        Raises:
            UserError: If the dtype is not known.
        """
        from interp.models import dtype_named

        return dtype_named(self.dtype).itemsize

    @cached_property
    def bytes(self) -> int:
        """Bytes of one device's memory.

        Raises:
            UserError: If what was given is no size, or the machine does not say.
        """
        from pydantic import ByteSize, TypeAdapter, ValidationError

        if self.memory is None:
            found = _own()
            if found is None:
                raise UserError("This machine does not say how much memory it has; give --memory, for example 80GiB.")
            return found
        try:
            found = int(TypeAdapter(ByteSize).validate_python(self.memory))
        except ValidationError:
            found = 0
        if found < _LEAST:
            raise UserError(f"--memory is a size with its unit such as 80GiB or 24GB, not {self.memory!r}; give one.")
        return found


@dataclass(frozen=True)
class Prompts:
    """What the model is given, and how it runs."""

    prompt_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a prompt; repeatable. 128 and 4096 by default.")
    ] = None
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer; by default as many as each command takes.")
    ] = None
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts there are.")] = 256
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts of a batch of evaluate and record at most; 32 by default.")
    ] = None
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a batch at most, but for those of record and dial fit.")
    ] = 8192
    attention: Annotated[
        Literal["eager"] | None,
        typer.Option(help="Write attention weights out; else attention is fused where transformers can."),
    ] = None

    def settings(self, shapes: Shapes, itemsize: int) -> list[Setting]:
        """The setting for each length of prompts; without any given, those of the usual ones that the model reads."""
        from conflictscope.plan import GENERATE_TOKENS, Setting

        longest = (shapes.positions or 2**62) - (self.new_tokens or GENERATE_TOKENS)
        usual = [tokens for tokens in _USUAL_TOKENS if tokens <= longest] or _USUAL_TOKENS[:1]
        how: dict[str, Any] = {name: getattr(self, name) for name in ("new_tokens", "prompts", "batch_size")}
        how |= {"batch_tokens": self.batch_tokens, "eager": self.attention == "eager"}
        return [Setting(tokens, itemsize, **how) for tokens in dict.fromkeys(self.prompt_tokens or usual)]


def plan(
    *,
    model: ModelArgument,
    machine: Machine,
    prompts: Prompts,
    blueprint: BlueprintOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say from a model's configuration alone what commands take, and what fits.

    Nothing else of a model on the hub is downloaded. Memory is an estimate, in which prompts fill their batches.
    """
    from interp.models import REGISTERED, is_cached, load_config
    from interp.plan import Shapes, weight_bytes

    size, memory = machine.itemsize, machine.bytes
    register_blueprint(blueprint)
    if model in REGISTERED and not is_cached(model):
        say(f"{model} comes with its weights, which are fetched first.")
    config = load_config(model)
    shapes = Shapes.of(config)
    if getattr(config, "quantization_config", None) is not None and not as_json:
        bits = f"{shapes.quantised_bits:.3g} bits" if shapes.quantised else machine.dtype
        say(f"{model} is quantised; what follows counts the linear maps of its blocks in {bits}.")
    settings = prompts.settings(shapes, size)
    rows = [_rows(shapes, setting, machine) for setting in settings]
    attention = "eager" if settings[0].writes_attention(shapes) else "fused"
    weights = weight_bytes(shapes, size)
    if as_json:
        about = {"model": model, "architecture": shapes.architecture, "parameters": shapes.parameters}
        about |= {"dtype": machine.dtype, "weight_bytes": weights, "attention": attention, "prompts": prompts.prompts}
        about |= {"memory": memory, "devices": machine.devices, "tflops": machine.tflops}
        typer.echo(json.dumps({**about, "commands": [row for part in rows for row in part]}))
        return
    output = Console()
    sizes = f"{shapes.parameters / 1e9:.2f} billion parameters, {_size(weights)} in {machine.dtype}"
    where = f"{attention} attention, {machine.devices} x {_size(memory)}"
    output.print(f"{model}: {shapes.architecture}, {sizes}; {where}", markup=False, highlight=False)
    for setting, part in zip(settings, rows, strict=True):
        output.print(_table(part, f"Prompts of {setting.prompt_tokens:,} tokens", prompts.prompts))
    written = ", ".join(f"{row['command']} {_size(row['disk_bytes'])}" for row in rows[0] if row["disk_bytes"])
    output.print(f"{_LEGEND} Written to disk for {prompts.prompts} prompts: {written}.", highlight=False)


def _own() -> int | None:
    """Bytes of this machine's accelerator, or of the machine where it has none with memory of its own."""
    from interp.models import device_memory, resolve_device

    return device_memory(resolve_device())


def _rows(shapes: Shapes, setting: Setting, machine: Machine) -> list[dict[str, Any]]:
    from conflictscope.plan import device_bytes, devices_needed, largest_batch, needs

    size, memory, rows = setting.itemsize, machine.bytes, []
    for need in needs(shapes, setting):
        times = 1 if need.command.endswith("step") else setting.prompts
        rows.append(
            {
                "command": need.command,
                "prompt_tokens": setting.prompt_tokens,
                "batch": need.batch,
                "flops": need.flops,
                "bytes": device_bytes(shapes, need, size),
                "devices_needed": devices_needed(shapes, need, size, memory),
                "largest_batch": largest_batch(shapes, need, size, memory, machine.devices),
                "disk_bytes": need.disk_bytes,
                "seconds": None if machine.tflops is None else times * need.flops / (1e12 * machine.tflops),
            }
        )
    return rows


def _table(rows: Sequence[dict[str, Any]], title: str, prompts: int) -> Table:
    table = Table("command", title=title, title_justify="left")
    timed = rows[0]["seconds"] is not None
    for name in ("batch", "TFLOP", "GiB", "devices", "at once", *([f"s of {prompts}"] if timed else [])):
        table.add_column(name, justify="right")
    for row in rows:
        needed = "-" if row["devices_needed"] is None else str(row["devices_needed"])
        cells = [str(row["batch"]), number(row["flops"] / 1e12), number(row["bytes"] / 2**30), needed]
        table.add_row(row["command"], *cells, str(row["largest_batch"]), *([number(row["seconds"])] if timed else []))
    return table


def number(value: float) -> str:
    """Write a number with three digits, or all that stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
