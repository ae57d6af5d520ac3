"""The command that says what a model takes and what fits, before any of its weights is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from conflictscope.cli.doctor import memory as own_memory
from conflictscope.cli.options import ModelArgument, say
from interp.errors import UserError

if TYPE_CHECKING:
    from interp.plan import Shapes

_DEFAULT_TOKENS = (128, 4096)
_LEGEND = (
    "TFLOP: of a prompt, or of a step. GiB: with the weights, on one device. Devices: how many the batch needs, blocks "
    "spread over them; - where it does not fit beside one block. At once: prompts in the largest batch that fits."
)


@dataclass(frozen=True)
class Machine:
    """Where a model is to run.

    Attributes:
        memory: Bytes of one device.
        devices: How many there are.
        tflops: FLOPs of one of them in a second, in units of 10^12; ``None`` is not known.
    """

    memory: int
    devices: int
    tflops: float | None


def plan(
    *,
    model: ModelArgument,
    memory: Annotated[
        str | None, typer.Option(help="Memory of one device, for example 80GiB; by default this machine's own.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many devices there are.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a prompt; repeatable. 128 and 4096 by default.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer; by default as many as each command takes.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts per batch of evaluate and record, instead of their own.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts there are.")] = 256,
    tflops: Annotated[
        float | None, typer.Option(help="What a device really computes, in 10^12 FLOPs a second, to be told seconds.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say from a model's configuration alone what commands take, and what fits.

    Nothing else of a model on the hub is downloaded. Memory is an estimate, in which prompts fill their batches.
    """
    from conflictscope.plan import GENERATE_TOKENS, Setting
    from interp.models import REGISTERED, dtype_named, is_cached, load_config
    from interp.plan import Shapes, weight_bytes

    size = dtype_named(dtype).itemsize
    if tflops is not None and not 0 < tflops < float("inf"):
        raise UserError(f"--tflops is a number above 0, not {tflops:g}; give what the device computes.")
    machine = Machine(_bytes(memory), devices, tflops)
    if model in REGISTERED and not is_cached(model):
        say(f"{model} comes with its weights, which are fetched first.")
    shapes = Shapes.of(load_config(model))
    longest = (shapes.positions or _DEFAULT_TOKENS[-1] * 2) - (new_tokens or GENERATE_TOKENS)
    lengths = prompt_tokens or [n for n in _DEFAULT_TOKENS if n <= longest] or _DEFAULT_TOKENS[:1]
    settings = [Setting(n, size, new_tokens, batch_size, prompts) for n in dict.fromkeys(lengths)]
    rows = [_rows(shapes, setting, machine) for setting in settings]
    about: dict[str, Any] = {"model": model, "architecture": shapes.architecture, "parameters": shapes.parameters}
    about |= {"dtype": dtype, "weight_bytes": weight_bytes(shapes, size), "prompts": prompts, **vars(machine)}
    if as_json:
        typer.echo(json.dumps({**about, "commands": [row for part in rows for row in part]}))
        return
    output = Console()
    weights = f"{shapes.parameters / 1e9:.2f} billion parameters, {_size(about['weight_bytes'])} in {dtype}"
    found = f"{model}: {shapes.architecture}, {weights}; {devices} x {_size(machine.memory)}"
    output.print(found, markup=False, highlight=False)
    for setting, part in zip(settings, rows, strict=True):
        output.print(_table(part, f"Prompts of {setting.prompt_tokens:,} tokens", prompts, tflops))
    written = [f"{row['command']} {_size(row['disk_bytes'])}" for row in rows[0] if row["disk_bytes"]]
    output.print(f"{_LEGEND} Written to disk for {prompts} prompts: {', '.join(written)}.", highlight=False)


def _bytes(text: str | None) -> int:
    """The bytes that a text like 80GiB says, or this machine's own."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if text is None:
        found = _own()
        if found is None:
            raise UserError("This machine does not say how much memory it has; give --memory, for example 80GiB.")
        return found
    try:
        found = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        found = 0
    if found < 1:
        raise UserError(f"--memory is a size such as 80GiB or 24GB, not {text!r}; give one.")
    return found


def _own() -> int | None:
    """Bytes of this machine's accelerator, or of the machine where it has none with memory of its own."""
    import torch

    from interp.models import resolve_device

    device = resolve_device()
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else own_memory()


def _rows(shapes: Shapes, setting: Any, machine: Machine) -> list[dict[str, Any]]:
    from conflictscope.plan import device_bytes, devices_needed, largest_batch, needs

    size, rows = setting.itemsize, []
    for need in needs(shapes, setting):
        times = 1 if need.command.endswith("step") else setting.prompts
        rows.append(
            {
                "command": need.command,
                "prompt_tokens": setting.prompt_tokens,
                "batch": need.batch,
                "flops": need.flops,
                "bytes": device_bytes(shapes, need, size),
                "devices_needed": devices_needed(shapes, need, size, machine.memory),
                "largest_batch": largest_batch(shapes, need, size, machine.memory, machine.devices),
                "disk_bytes": need.disk_bytes,
                "seconds": None if machine.tflops is None else times * need.flops / (1e12 * machine.tflops),
            }
        )
    return rows


def _table(rows: Sequence[dict[str, Any]], title: str, prompts: int, tflops: float | None) -> Table:
    table = Table("command", title=title, title_justify="left")
    timed = [] if tflops is None else [f"s of {prompts}"]
    for name in ("batch", "TFLOP", "GiB", "devices", "at once", *timed):
        table.add_column(name, justify="right")
    for row in rows:
        needed = "-" if row["devices_needed"] is None else str(row["devices_needed"])
        numbers = [str(row["batch"]), number(row["flops"] / 1e12), number(row["bytes"] / 2**30), needed]
        seconds = [] if tflops is None else [number(row["seconds"])]
        table.add_row(row["command"], *numbers, str(row["largest_batch"]), *seconds)
    return table


def number(value: float) -> str:
    """Write a number with three digits, or all that stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
