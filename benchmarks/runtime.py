"""What an edit costs while text is generated: hooked, behind a gate, folded into the weights, or read twice.

Run ``python -m benchmarks.runtime --json``; ``--side gated`` measures fewer. All sides take turns on the same prompts
of 64 tokens, each turn generating as many tokens with transformers' ``generate`` and a KV cache:

    plain       the model as it is
    hooked      40 heads of the upper third of the layers scaled by hooks (interventions.runtime)
    gated       the same heads behind a gate that reads z of the middle third and opens for every row, the dearest case
    baked       the same heads folded into the weights of a copy
    suppressed  4 feed-forward layers scaled by 0 by hooks
    dropped     a copy without these layers
    cad         context-aware decoding: the prompt with its context and without, side by side
    juice       10 heads with outputs of a first reading added
    decore      contrast with a reading without 10 heads

A ratio is the median over turns of tokens per second, against plain in the same turn; ``gated_time_of_hooked`` is that
of seconds behind the gate, against hooked. Heads and probe are random; the cost does not depend on which they are.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks import show
from interp.anatomy import Anatomy
from interp.models import DEFAULT_MODEL, DTYPES, decode_plainly, load_checkpoint, resolve_device
from interventions.bake import fold
from interventions.base import Attachable, applied
from interventions.decoding import CAD
from interventions.decore import DeCoRe
from interventions.dropping import drop
from interventions.feedforward import FeedForwardScaling
from interventions.gate import ConflictGate, Familiar, GateReading
from interventions.heads import HeadScaling, ScaledHead
from interventions.juice import AddedHead, JuICE
from interventions.two_streams import generate

BARE = "Fact: the capital of Japan is"
CONTEXT = "Fact: the capital of Japan is Lima. Fact: the official language of Brazil is Portuguese. "
_ALWAYS = ("plain", "hooked")


def random_heads(anatomy: Anatomy, count: int, lowest: int | None = None) -> HeadScaling:
    """Heads of a layer and those above it, by default of the upper two thirds, each with a scale of its own."""
    rng, lowest = random.Random(0), anatomy.n_layers // 3 if lowest is None else lowest
    places = [(layer, h) for layer in range(lowest, anatomy.n_layers) for h in range(anatomy.n_heads)]
    chosen = sorted(rng.sample(places, min(count, len(places))))
    return HeadScaling(tuple(ScaledHead(layer, head, rng.uniform(0.5, 1.5)) for layer, head in chosen))


def tokens_per_second(written_by: Callable[..., Any], batch: dict[str, torch.Tensor], tokens: int) -> float:
    """Generated tokens of all rows, per second."""
    begin = time.perf_counter()
    written = written_by(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    rate = len(written) * tokens
    if written.is_cuda:
        torch.cuda.synchronize()
    return rate / (time.perf_counter() - begin)


@torch.inference_mode()
def main(
    model: Annotated[str, typer.Option(help="Model to measure on.")] = DEFAULT_MODEL,
    side: Annotated[list[str] | None, typer.Option(help="A side beside plain and hooked; repeatable. All.")] = None,
    heads: Annotated[int, typer.Option(min=1, help="How many heads are scaled.")] = 40,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated in each turn.")] = 32,
    turns: Annotated[int, typer.Option(min=1, help="How often each side generates.")] = 15,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line last.")] = False,
) -> None:
    """Time generation in turn."""
    network, tokenizer = load_checkpoint(model)
    network.to(resolve_device(device), DTYPES[dtype]).eval()
    decode_plainly(network)
    anatomy = Anatomy(network)
    third, upper = anatomy.n_layers // 3, 2 * anatomy.n_layers // 3
    scaling = random_heads(anatomy, heads, upper)
    probe = torch.ones(anatomy.n_heads * anatomy.d_head)
    also = tuple(GateReading("output_projection", layer, probe) for layer in range(third, upper - 1))
    familiar = Familiar(torch.zeros_like(probe), torch.ones_like(probe), 1e9)
    gate = ConflictGate("output_projection", upper - 1, probe, 0.0, -1e9, (scaling,), also, familiar=familiar)
    baked, dropped = copy.deepcopy(network), copy.deepcopy(network)
    fold(baked, [scaling])
    layers = range(anatomy.n_layers // 2, anatomy.n_layers)[:4]
    drop(dropped, layers)
    some = [(h.layer, h.head) for h in scaling.heads[:10]]

    def generating(network: Any, *edits: Attachable) -> Callable[[dict[str, torch.Tensor]], float]:
        def side(batch: dict[str, torch.Tensor]) -> float:
            with applied(network, *edits):
                return tokens_per_second(network.generate, batch, tokens)

        return side

    def two_streams(batch: dict[str, torch.Tensor]) -> float:
        rows = len(batch["input_ids"])
        bare = tokenizer([BARE] * rows, return_tensors="pt").to(anatomy.device)
        return tokens_per_second(partial(generate, network, CAD(1.0), without=bare), batch, tokens)

    sides = {
        "plain": generating(network),
        "hooked": generating(network, scaling),
        "gated": generating(network, gate),
        "baked": generating(baked),
        "suppressed": generating(network, FeedForwardScaling(tuple((layer, 0.0) for layer in layers))),
        "dropped": generating(dropped),
        "cad": two_streams,
        "juice": generating(network, JuICE(tuple(AddedHead(*head, 1.0) for head in some))),
        "decore": generating(network, DeCoRe(tuple(some))),
    }
    if side is not None:
        if unknown := [name for name in side if name not in sides]:
            raise typer.BadParameter(f"There is no side {unknown[0]}; give some of {', '.join(sides)}.")
        sides = {name: run for name, run in sides.items() if name in (*_ALWAYS, *side)}
    result: dict[str, Any] = {}
    text = CONTEXT * prompt_tokens + BARE
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, -prompt_tokens:].to(anatomy.device)
    for rows in (1, 16):
        batch = {"input_ids": ids.expand(rows, -1), "attention_mask": torch.ones_like(ids).expand(rows, -1)}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        names = list(sides)
        for turn in range(turns + 1):
            # Another side is first in every turn, and the first turn only warms up.
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                rate = sides[name](batch)
                if turn:
                    rates[name].append(rate)
        for name in names[1:]:
            ratios = [edited / plain for edited, plain in zip(rates[name], rates["plain"], strict=True)]
            result[f"{name}_ratio" if rows == 1 else f"{name}_ratio_batch_{rows}"] = round(median(ratios), 3)
        if "gated" in rates:
            times = [hooked / gated for hooked, gated in zip(rates["hooked"], rates["gated"], strict=True)]
            result[f"gated_time_of_hooked_batch_{rows}"] = round(median(times), 3)
        result |= {f"{name}_tokens_per_second_batch_{rows}": round(median(rates[name]), 1) for name in names}
    result |= {
        "heads": scaling.n_moved,
        "turns": turns,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "model": model,
        "device": str(anatomy.device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    show(result, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
