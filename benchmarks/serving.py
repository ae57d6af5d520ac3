"""How many tokens a second a server of edits gives to many clients, against one request at a time and a loop by hand.

Run ``python -m benchmarks.serving --json``. Every client asks for one answer to a prompt of its own; requests choose
among four edits of 40 heads each, in turn:

    batching       conflictscope serve
    one_at_a_time  the same with --max-batch 1
    by_hand        a loop over transformers' generate, with each request's hooks

``--url http://localhost:8000/v1 --model NAME,NAME`` measures a server that runs already instead, any that speaks
OpenAI's completions: requests name its models in turn, with the same prompts. What answers one request at a time is
timed over its first answers only (``--few``), since how many others wait does not change its pace. Tokens per second
are medians over turns, and ratios, in the same turn, are against the loop by hand.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import httpx
import torch
import typer

from benchmarks import show
from benchmarks.runtime import random_heads
from interp.anatomy import Anatomy
from interp.facts import load_facts
from interp.inputs import padding_id
from interp.models import DEFAULT_MODEL, load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity

CLIENTS = (1, 8, 32)
FACTS = load_facts("capital")[: max(CLIENTS)]
# Such a tale goes on; a fact would soon be told, and a short answer says nothing of a full batch.
PROMPTS = [
    f"In a tale that travellers tell, the capital of {fact.subject} is Lima. Once upon a time a merchant from "
    f"{fact.subject} set out for Lima, and"
    for fact in FACTS
]


class Measured(NamedTuple):
    """An engine that is measured.

    Attributes:
        name: What it is called.
        rate: Tokens per second, from the number of clients and how many answers to wait for.
        serial: Whether it answers one request at a time.
    """

    name: str
    rate: Callable[[int, int], float]
    serial: bool


async def rate_of(http: httpx.AsyncClient, models: Sequence[str], clients: int, answers: int, tokens: int) -> float:
    """Tokens per second of a server's first ``answers`` answers to so many clients, who then hang up."""

    async def ask(number: int) -> int:
        body = {
            "model": models[number % len(models)],
            "prompt": PROMPTS[number % len(PROMPTS)],
            "max_tokens": tokens,
            "temperature": 0,
        }
        response = await http.post("completions", json=body)
        response.raise_for_status()
        return response.json()["usage"]["completion_tokens"]

    begin = time.perf_counter()
    tasks = [asyncio.create_task(ask(number)) for number in range(clients)]
    found = 0
    for done in islice(asyncio.as_completed(tasks), answers):
        found += await done
    seconds = time.perf_counter() - begin
    for task in tasks:
        task.cancel()
    return found / seconds


def server(name: str, url: str, models: Sequence[str], tokens: int, *, serial: bool) -> Measured:
    """A server of OpenAI's completions, whose models are asked in turn."""

    async def rate(clients: int, answers: int) -> float:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url.rstrip("/") + "/", timeout=None, limits=limits) as http:
            return await rate_of(http, models, clients, answers, tokens)

    return Measured(name, lambda clients, answers: asyncio.run(rate(clients, answers)), serial)


def by_hand(network: Any, edits: Sequence[HeadScaling], tokens: int) -> Measured:
    """A loop over ``generate``."""

    @torch.inference_mode()
    def rate(_: int, answers: int) -> float:
        begin, found = time.perf_counter(), 0
        for number in range(answers):
            ids = network.tokenizer(PROMPTS[number], return_tensors="pt").to(network.device)
            with applied(network, edits[number % len(edits)]):
                written = network.generate(
                    **ids, max_new_tokens=tokens, do_sample=False, pad_token_id=padding_id(network)
                )
            found += written.shape[1] - ids["input_ids"].shape[1]
        return found / (time.perf_counter() - begin)

    return Measured("by_hand", rate, serial=True)


@contextmanager
def started(files: Sequence[Path], *options: str) -> Iterator[str]:
    """A server in a process of its own, by its address."""
    command = [sys.executable, "-m", "conflictscope.cli", "serve", *map(str, files), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Uvicorn running on " in line:
                yield line.split("Uvicorn running on ")[1].split()[0] + "/v1"
                return
        raise RuntimeError("".join(lines))
    finally:
        process.kill()
        process.wait()


@contextmanager
def own_engines(model: str, device: str, dtype: str, tokens: int) -> Iterator[list[Measured]]:
    """Both servers and the loop, with the same edits."""
    network: Any = load_model(model, device=device, dtype=dtype)
    identity = ModelIdentity.of(network, model, network.tokenizer)
    whole = random_heads(Anatomy(network), 40)
    edits = [whole.scaled(strength) for strength in (1.0, 0.5, -0.5, 1.5)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = [folder / f"edit{number}.json" for number in range(len(edits))]
        for file, edit in zip(files, edits, strict=True):
            InterventionFile.of([edit], name=file.stem, model=identity).save(file)
        names = [f"{Path(model).name}:{file.stem}" for file in files]
        placed = ("--device", device, "--dtype", dtype)
        batching = stack.enter_context(started(files, *placed))
        alone = stack.enter_context(started(files, *placed, "--max-batch", "1"))
        yield [
            by_hand(network, edits, tokens),
            server("batching", batching, names, tokens, serial=False),
            server("one_at_a_time", alone, names, tokens, serial=True),
        ]


def rates_of(engines: Sequence[Measured], clients: Sequence[int], turns: int, few: int) -> dict[str, Any]:
    """Tokens per second of every engine for every number of clients, and ratios to the first engine's."""
    result: dict[str, Any] = {}
    for engine in engines:
        engine.rate(1, 1)
    for count in clients:
        rates: dict[str, list[float]] = defaultdict(list)
        for turn in range(turns):
            for engine in (*engines[turn % len(engines) :], *engines[: turn % len(engines)]):
                rates[engine.name].append(engine.rate(count, min(count, few) if engine.serial else count))
                # So that a server notices who has hung up.
                time.sleep(2 if engine.serial and few < count else 0)
        first = rates[engines[0].name]
        for name, found in rates.items():
            result[f"{name}_tokens_per_second_{count}"] = round(median(found), 2)
            if name != engines[0].name:
                result[f"{name}_ratio_{count}"] = round(median(a / b for a, b in zip(found, first, strict=True)), 2)
    return result


def main(
    model: Annotated[str, typer.Option(help="Model to measure on; with --url the server's names, by commas.")] = (
        DEFAULT_MODEL
    ),
    url: Annotated[str | None, typer.Option(help="Measure the server at this address, which ends in /v1.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each answer.")] = 64,
    turns: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    few: Annotated[int, typer.Option(min=1, help="Answers that are timed of one request at a time.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line last.")] = False,
) -> None:
    """Measure servers of edits with many clients."""
    about: dict[str, Any] = {"model": model, "tokens": tokens, "turns": turns}
    if url is not None:
        result = rates_of([server("url", url, model.split(","), tokens, serial=False)], CLIENTS, turns, few)
        about["url"] = url
    else:
        with own_engines(model, device, dtype, tokens) as engines:
            result = rates_of(engines, CLIENTS, turns, few)
        about |= {"device": device, "dtype": dtype, "threads": torch.get_num_threads(), "few": few}
    result |= about
    show(result, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
