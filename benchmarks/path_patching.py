"""Path patching in one sweep against full forward passes with hooks, in the same run on the same prompts.

Run ``python -m benchmarks.path_patching --json``. Attribution patching, the usual short cut, runs beside them.
Both sides start from prompts and end with every head's change of the logit difference; both record z first, and
the corrupted prompts are other prompts of the set. The slow side is timed on ``--heads`` heads spread over all
layers and extrapolated to all of them, and says so.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.reference import full_forward_patch, z_of
from interp.anatomy import Anatomy
from interp.attribution.attribution_patching import attribution_patching
from interp.attribution.examples import corrupted_partners, scorable
from interp.attribution.path_patching import path_patching
from interp.bridges import load_bridge
from interp.conflicts import ConflictExample, ConflictSet
from interp.facts import build_conflicts, usable_facts
from interp.models import DEFAULT_MODEL


def capital_prompts(count: int) -> ConflictSet:
    """The first ``count`` conflict prompts about capitals, all phrasings in turn."""
    conflicts = build_conflicts({"capital": usable_facts("capital")}).select(kind="conflict")
    return ConflictSet("capitals", conflicts.examples[:count])


def spread_heads(anatomy: Anatomy, count: int) -> list[tuple[int, int]]:
    """``count`` heads, evenly spread over the layers."""
    layers = torch.linspace(0, anatomy.n_layers - 1, count).round().int().tolist()
    return [(layer, index % anatomy.n_heads) for index, layer in enumerate(layers)]


def run_full_forwards(
    bridge: Any,
    examples: list[ConflictExample],
    token_ids: torch.Tensor,
    partners: list[int],
    heads: list[tuple[int, int]],
    batch: int,
) -> tuple[torch.Tensor, float, float]:
    """Scores ``(n, n_heads_given)``, seconds of recording, and seconds of the patched forward passes."""
    anatomy = Anatomy(bridge)
    # Batches of similar length, as a careful user would make them.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    scores = torch.zeros(len(examples), len(heads))
    recording = patching = 0.0
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        prompts = [examples[i].prompt for i in rows]
        begin = time.perf_counter()
        clean_z = z_of(bridge, prompts)
        corrupted_z = z_of(bridge, [examples[partners[i]].prompt for i in rows])
        with torch.inference_mode():
            ids = token_ids[rows]
            untouched = clean_z[0][:, -1, : anatomy.d_head]
            clean = full_forward_patch(bridge, prompts, clean_z, untouched, 0, 0).gather(1, ids)
        recording += time.perf_counter() - begin
        begin = time.perf_counter()
        for column, (layer, head) in enumerate(heads):
            replacement = corrupted_z[layer][:, -1].unflatten(-1, (anatomy.n_heads, anatomy.d_head))[:, head]
            patched = full_forward_patch(bridge, prompts, clean_z, replacement, layer, head).gather(1, ids)
            scores[rows, column] = ((clean[:, 0] - clean[:, 1]) - (patched[:, 0] - patched[:, 1])).cpu()
        patching += time.perf_counter() - begin
    return scores, recording, patching


class PeakMemory:
    """Highest resident memory of this process while the block runs, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        page = resource.getpagesize()
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, int(Path("/proc/self/statm").read_text().split()[1]) * page)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()


def main(
    model: Annotated[str, typer.Option(help="Model to measure on.")] = DEFAULT_MODEL,
    prompts: Annotated[int, typer.Option(help="Number of conflict prompts.")] = 32,
    heads: Annotated[int, typer.Option(help="Heads that the slow side is timed on.")] = 15,
    batch: Annotated[int, typer.Option(help="Prompts per forward pass of the slow side.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line last.")] = False,
) -> None:
    """Time both sides and compare their scores."""
    bridge = load_bridge(model, device=device)
    anatomy = Anatomy(bridge)
    n_heads = anatomy.n_layers * anatomy.n_heads
    conflicts = capital_prompts(prompts)
    examples, token_ids = scorable(bridge, conflicts)
    measured = spread_heads(anatomy, heads)
    sweep_seconds: list[float] = []
    with PeakMemory() as peak:
        exact = path_patching(bridge, conflicts, name=model)["logit_diff"]
        for _ in range(3):
            begin = time.perf_counter()
            path_patching(bridge, conflicts, name=model)
            sweep_seconds.append(time.perf_counter() - begin)
    partners = corrupted_partners(examples, 0)
    expected, recording, patching = run_full_forwards(bridge, examples, token_ids, partners, measured, batch)
    full_seconds = recording + patching / len(measured) * n_heads
    found = torch.stack([exact.values[:, layer, head] for layer, head in measured], 1)
    sweep = sorted(sweep_seconds)[1]
    begin = time.perf_counter()
    estimated = attribution_patching(bridge, conflicts, name=model)
    estimate_seconds = time.perf_counter() - begin
    result = {
        "ratio": round(full_seconds / sweep, 1),
        "max_relative_error": ((found - expected).abs().max() / expected.abs().max()).item(),
        "heads": n_heads,
        "prompts": len(examples),
        "sweep_seconds": round(sweep, 2),
        "full_forward_seconds": round(full_seconds, 1),
        "full_forward_extrapolated_from_heads": len(measured),
        "peak_memory_gib": round(peak.bytes / 2**30, 2),
        "attribution_patching_seconds": round(estimate_seconds, 2),
        "attribution_patching_rank_correlation": round(estimated.rank_correlation(exact), 3),
        "model": model,
        "device": str(anatomy.device),
        "threads": torch.get_num_threads(),
    }
    if not as_json:
        print(f"One sweep:     {sweep:8.2f} s for {n_heads} heads on {len(examples)} prompts")
        print(f"Full forwards: {full_seconds:8.1f} s, extrapolated from {len(measured)} heads")
        print(f"{result['ratio']} times fewer seconds; largest relative error {result['max_relative_error']:.1e}")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
