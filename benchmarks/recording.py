"""What recording costs: against a bare forward pass, against ``run_with_cache``, and in memory.

Run ``python -m benchmarks.recording --json``. Three sides take turns on the same batches, so that whatever else the
machine does hits all alike; the ratios are medians over the rounds.

    recording         the residual stream after layers 0 to L at the last token, in memory
    bare forward      transformers' own base model cut after layer L, with its default attention; nothing is kept
    run_with_cache    what transformer_lens does when it is not told what is wanted

Peak memory is that of two fresh processes, which load the model and record 1,000 and 10,000 prompts to a store.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.path_patching import capital_prompts
from interp.activation_store import ActivationStore
from interp.activations import observations, observe, sites_of
from interp.anatomy import Anatomy
from interp.bridges import load_bridge
from interp.facts import PHRASINGS, closed_book_prompt, relations, usable_facts
from interp.inputs import padded, prompt_batches
from interp.models import DEFAULT_MODEL, REGISTERED, cached_path, load_model

BATCH_SIZE = 32
PEAK_LAYERS = 4


def truncated_base(name: str, layer: int, device: torch.device) -> nn.Module:
    """Transformers' base model of a checkpoint without the layers after ``layer`` and without the unembedding."""
    source = cached_path(name) if name in REGISTERED else name
    network: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    path, _, attribute = Anatomy(network).blueprint.blocks.rpartition(".")
    base = network.get_submodule(path)
    setattr(base, attribute, getattr(base, attribute)[: layer + 1])
    return base.to(device).eval()


def milliseconds(side: Callable[[dict[str, Tensor]], object], batches: list[dict[str, Tensor]]) -> float:
    """Mean time of ``side`` on one batch."""
    device = batches[0]["input_ids"].device
    begin = time.perf_counter()
    for inputs in batches:
        side(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / len(batches) * 1000


def distinct_texts(count: int) -> list[str]:
    """``count`` short texts: all facts in all phrasings, over and over, each with its number."""
    facts = [(relation, fact.subject) for name, relation in relations().items() for fact in usable_facts(name)]
    asked = islice(cycle(product(PHRASINGS, facts)), count)
    return [
        f"{closed_book_prompt(relation, subject, phrasing)} {number}"
        for number, (phrasing, (relation, subject)) in enumerate(asked)
    ]


def record_and_measure(model: str, count: int, device: str) -> float:
    """Record ``count`` prompts to a store and give the peak resident memory of this process in MiB."""
    bridge = load_model(model, device=device)
    sites = sites_of(bridge, ["residual"], range(min(PEAK_LAYERS, Anatomy(bridge).n_layers)))
    with tempfile.TemporaryDirectory() as folder:
        ActivationStore.record(Path(folder) / "store", bridge, distinct_texts(count), sites, name=model)
    # The kernel counts in KiB, but on macOS in bytes.
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mib


def peak_mib(model: str, count: int, device: str) -> int:
    """Peak resident memory of a fresh process that records ``count`` prompts, in MiB."""
    command = [sys.executable, "-m", "benchmarks.recording", "--peak", str(count), "--model", model, "--device", device]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return round(json.loads(result.stdout.splitlines()[-1]))


def main(
    model: Annotated[str, typer.Option(help="Model to measure on.")] = DEFAULT_MODEL,
    layer: Annotated[int, typer.Option(help="Last layer that is recorded.")] = 14,
    prompts: Annotated[int, typer.Option(help="Number of conflict prompts.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often each side runs.")] = 9,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    few: Annotated[int, typer.Option(help="Prompts of the smaller recording whose memory is measured.")] = 1_000,
    many: Annotated[int, typer.Option(help="Prompts of the larger one.")] = 10_000,
    peak: Annotated[int, typer.Option(hidden=True)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line last.")] = False,
) -> None:
    """Measure peak memory, then time the three sides in turn."""
    if peak:
        print(json.dumps(record_and_measure(model, peak, device)))
        return
    # First: the system counts what this process holds when it starts another one as that one's, too.
    peaks = {"peak_mib_1k": peak_mib(model, few, device), "peak_mib_10k": peak_mib(model, many, device)}
    bridge = load_bridge(model, device=device)
    anatomy = Anatomy(bridge)
    where = observations(bridge, sites_of(bridge, ["residual"], range(anatomy.checked_layer(layer) + 1)))
    base = truncated_base(model, layer, anatomy.device)
    texts = [example.prompt for example in capital_prompts(prompts)]
    batches = [padded(bridge, batch.tokens) for batch in prompt_batches(bridge, texts, BATCH_SIZE)]

    def recording(inputs: dict[str, Tensor]) -> object:
        rows = torch.arange(len(inputs["input_ids"]), device=anatomy.device)
        last = torch.full_like(rows, inputs["input_ids"].shape[1] - 1)
        return observe(bridge, inputs, rows, last, where, torch.float32)

    @torch.inference_mode()
    def bare_forward(inputs: dict[str, Tensor]) -> object:
        return base(**inputs, use_cache=False)

    @torch.inference_mode()
    def run_with_cache(inputs: dict[str, Tensor]) -> object:
        rest: Any = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
        return bridge.run_with_cache(inputs["input_ids"], **rest)

    sides = (recording, bare_forward, run_with_cache)
    for side in sides:
        milliseconds(side, batches)
    times = [[milliseconds(side, batches) for side in sides] for _ in range(rounds)]
    recorded, bare, cached = (median(column) for column in zip(*times, strict=True))
    result: dict[str, Any] = {
        "ratio_to_bare_forward": round(median(a / b for a, b, _ in times), 3),
        "ratio_to_run_with_cache": round(median(a / c for a, _, c in times), 3),
        **peaks,
        "recording_milliseconds": round(recorded, 1),
        "bare_forward_milliseconds": round(bare, 1),
        "run_with_cache_milliseconds": round(cached, 1),
        "layer": layer,
        "prompts": len(texts),
        "rounds": rounds,
        "model": model,
        "device": str(anatomy.device),
        "threads": torch.get_num_threads(),
    }
    if not as_json:
        print(f"Recording:      {recorded:8.1f} ms for {BATCH_SIZE} prompts, layers 0 to {layer} of {anatomy.n_layers}")
        print(f"Bare forward:   {bare:8.1f} ms, {result['ratio_to_bare_forward']} times as long is recording")
        print(f"run_with_cache: {cached:8.1f} ms, {result['ratio_to_run_with_cache']} times as long is recording")
        print(f"Peak memory:    {result['peak_mib_1k']} MiB for {few} prompts, {result['peak_mib_10k']} for {many}")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
