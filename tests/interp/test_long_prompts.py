"""Memory grows with the tokens of a batch, not with the number of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from interp.activations import record, sites_of
from interp.attribution.path_patching import path_patching
from interp.conflicts import ConflictSet
from interp.evaluation import measure_usage
from interp.models import load_model
from tests.allocated import peak_bytes
from tests.tiny import tiny_conflicts

LONG = 600


@pytest.fixture(scope="module")
def model(tiny_directories) -> Any:
    return load_model(str(tiny_directories["llama"]), device="cpu")


def long_prompts(count: int) -> ConflictSet:
    """Conflict prompts of one length that begin with 600 tokens of something else."""
    example = next(iter(tiny_conflicts().select(kind="conflict")))
    prompt = "Rome " * LONG + example.prompt
    return ConflictSet("long", tuple(replace(example, id=str(i), prompt=prompt) for i in range(count)))


def recorded(model: Any, conflicts: ConflictSet) -> Any:
    prompts = [example.prompt for example in conflicts]
    return record(model, prompts, sites_of(model, ["residual"])[:1], positions="last")


COMMANDS: dict[str, Callable[[Any, ConflictSet], Any]] = {
    "evaluate": measure_usage,
    "attribute": lambda model, conflicts: path_patching(model, conflicts, name="tiny", baseline="zero"),
    "record": recorded,
}


@pytest.mark.parametrize("run", COMMANDS.values(), ids=COMMANDS)
def test_memory_grows_with_the_tokens_of_one_batch(model, monkeypatch, run):
    monkeypatch.setattr(model, "batch_tokens", 4 * LONG)
    few, many = (peak_bytes(lambda count=count: run(model, long_prompts(count))) for count in (8, 24))
    assert many < 1.3 * few
    monkeypatch.setattr(model, "batch_tokens", 16 * LONG)
    assert peak_bytes(lambda: run(model, long_prompts(24))) > 2 * few
