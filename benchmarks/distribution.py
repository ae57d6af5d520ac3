"""Measure what handing out units costs, and say how long a large comparison takes on many devices.

    python -m benchmarks.distribution --json
    python -m benchmarks.distribution --paper

The first gives units that only wait to workers on a Ray cluster on this machine, through the executor that comparisons
use: the overhead is the share of the workers' time in which they had none. ``--paper`` schedules a comparison of an 8B
model on ten data sets of 5,000 prompts with every method, of which it knows what each unit takes, by the same schedule.
"""

from __future__ import annotations

import heapq
import itertools
import random
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import show
from conflictscope.study.units import Done, Schedule, Unit

_CHOICES, _TESTS = 20, 77
# What a device really computes in a forward pass: an assumption.
_DEVICE_FLOPS = 300e12
# What a prompt takes in the records of a condition, as measured of 48 conditions on 50 prompts.
_ANSWER_BYTES = 175
_PROMPTS, _SETS, _TOKENS = 5000, 10, 200


class Waiting:
    """A worker that does nothing, for as long as a unit says; a file says that it is there."""

    def __init__(self, arrived: Path) -> None:
        (arrived / uuid.uuid4().hex).touch()

    def run(self, unit: Unit) -> Done:
        """Wait."""
        start = time.monotonic()
        time.sleep(unit.cost)
        new = _tests(unit) if unit.step == "tests" else ()
        return Done(unit.id, time.monotonic() - start, new=new)


def studies(count: int, seconds: float, *, models: int = 8) -> Iterator[Unit]:
    """The units of so many studies; each takes about so long."""
    rng = random.Random(0)
    for number in range(count):
        study, model = str(number), str(number % models)
        first = Unit(f"{study}/prompts", model, study, "prompts", cost=rng.uniform(0, 2 * seconds))
        choices = [
            Unit(f"{study}/choose/{n}", model, study, "choose", str(n), (first.id,), rng.uniform(0, 2 * seconds))
            for n in range(_CHOICES)
        ]
        yield from (first, *choices)
        yield Unit(f"{study}/tests", model, study, "tests", "", tuple(one.id for one in choices), seconds)


def _tests(unit: Unit) -> tuple[Unit, ...]:
    rng = random.Random(unit.study)
    tests = [
        Unit(f"{unit.study}/test/{n}", unit.model, unit.study, "test", str(n), cost=rng.uniform(0, 2 * unit.cost))
        for n in range(_TESTS)
    ]
    needs = tuple(one.id for one in tests)
    return (*tests, Unit(f"{unit.study}/record", unit.model, unit.study, "record", "", needs, unit.cost))


def on_ray_here(units: int, workers: int, seconds: float) -> dict[str, Any]:
    """Hand out units that wait, on a cluster on this machine."""
    from conflictscope.study.cluster import on_ray

    schedule = Schedule(studies(units // (_CHOICES + _TESTS + 3), seconds))
    with tempfile.TemporaryDirectory() as folder:
        run = on_ray(partial(Waiting, Path(folder)), Path(folder), workers=workers)
        worked, first = 0.0, None
        driver = time.process_time()
        for done in run(schedule):
            if first is not None:
                worked += done.seconds
            # Processes that start are no overhead of handing out; 64 of them take half a minute on two cores.
            elif len(list(Path(folder).iterdir())) == workers:
                first = time.monotonic()
        wall = time.monotonic() - (first or 0.0)
        driver = time.process_time() - driver
    return {
        "units": len(schedule.units),
        "workers": workers,
        "seconds_a_unit": round(worked / len(schedule.units), 4),
        "wall_seconds": round(wall, 1),
        "overhead": round(1 - worked / (workers * wall), 4),
        "driver_cpu_ms_a_unit": round(1000 * driver / len(schedule.units), 3),
    }


def on_paper(devices: int) -> dict[str, Any]:
    """Schedule the large comparison on so many devices, each unit taking what its FLOPs do."""
    from transformers import LlamaConfig

    from conflictscope.study.comparison import Comparing, Comparison
    from conflictscope.study.costs import choosing, measured, sharing
    from interp.answers import COMPLETION_TOKENS
    from interp.plan import Shapes, weight_bytes

    config = LlamaConfig(
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
        architectures=["LlamaForCausalLM"],
    )
    shapes, known = Shapes.of(config), measured()
    test_seconds = _PROMPTS * shapes.answer_flops(_TOKENS, COMPLETION_TOKENS) / _DEVICE_FLOPS
    data = [{"name": str(number), "relations": ["capital"]} for number in range(_SETS)]
    comparing = Comparing.of(Comparison.model_validate({"models": ["8B"], "data": data}), Path("paper"), "")
    schedule, tests = Schedule(comparing.units()), round(known["tests"] * len(comparing.plan.chosen_methods))

    def took(unit: Unit) -> float:
        if unit.step == "share":
            return test_seconds * sharing(unit.what, known["share"])
        if unit.step == "choose":
            return test_seconds * choosing(unit.what, known["choose"])
        return test_seconds * {"prompts": known["prompts"], "test": 1.0}.get(unit.step, 0.05)

    now, worked, number = 0.0, 0.0, itertools.count()
    free: list[tuple[str, str]] = [("", "")] * devices
    running: list[tuple[float, int, tuple[str, str], list[Unit]]] = []
    while not schedule.is_finished:
        while free and (units := schedule.take(free[-1])):
            free.pop()
            worked += sum(map(took, units))
            heapq.heappush(running, (now + sum(map(took, units)), next(number), ("8B", units[0].study), units))
        now, _, held, units = heapq.heappop(running)
        free.append(held)
        for unit in units:
            new = _paper_tests(unit, tests) if unit.step == "tests" else ()
            schedule.finish(Done(unit.id, 0.0, new=new))
    return {
        "devices": devices,
        "units": len(schedule.units),
        "test_seconds": round(test_seconds, 1),
        "device_hours": round(worked / 3600, 1),
        "hours": round(now / 3600, 2),
        "idle": round(1 - worked / (devices * now), 3),
        "weights_read_gb": round(devices * weight_bytes(shapes, 2) / 1e9, 1),
        "answers_written_gb": round(_SETS * tests * _PROMPTS * _ANSWER_BYTES / 1e9, 2),
    }


def _paper_tests(unit: Unit, count: int) -> tuple[Unit, ...]:
    tests = [Unit(f"{unit.study}/test/{n}", unit.model, unit.study, "test", str(n)) for n in range(count)]
    needs = tuple(one.id for one in tests)
    return (*tests, Unit(f"{unit.study}/record", unit.model, unit.study, "record", "", needs))


def main(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line.")] = False,
    units: Annotated[int, typer.Option(help="Units that wait.")] = 100_000,
    workers: Annotated[int, typer.Option(help="Workers.")] = 64,
    seconds: Annotated[float, typer.Option(help="How long a unit waits, on average.")] = 0.2,
    paper: Annotated[bool, typer.Option("--paper", help="Schedule a large comparison on paper instead.")] = False,
) -> None:
    """Measure the overhead of handing out units."""
    if paper:
        for devices in (1, 8, 64):
            show(on_paper(devices), as_json=json)
    else:
        show(on_ray_here(units, workers, seconds), as_json=json)


if __name__ == "__main__":
    typer.run(main)
