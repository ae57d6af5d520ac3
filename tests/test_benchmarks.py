"""The accelerator's benchmark, on the CPU and a small shape, and what clients of a server measure."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks import gpu, serving
from tests.tiny import tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Words of tiny prompts; the models are of their size, and what takes turns takes one."""
    monkeypatch.setattr(gpu, "SMALL", gpu.Shape((16, 32, 2, 4, 2, 8), 8, 40, 20, 2, 2, 1))
    monkeypatch.setattr(gpu, "REPEATS", 1)
    return tiny_tokenizer()


@pytest.mark.filterwarnings("ignore::interp.errors.Caution")
def test_every_path_is_timed_and_compared(tokenizer: Any) -> None:
    """The CPU agrees with itself in float32, rounds in bfloat16, and every path has its seconds."""
    errors = gpu.errors(CPU, tokenizer)
    assert set(errors["float32"].values()) == {0.0}
    assert 0 < float(errors["bfloat16"]["path_patching"]) < 0.1
    times = gpu.speeds(gpu.SMALL, CPU, torch.float32, tokenizer) | gpu.compiled(
        gpu.SMALL, CPU, torch.float32, tokenizer
    )
    seconds = {name: value for name, value in times.items() if name.endswith("_seconds")}
    assert seconds.keys() > {
        f"{name}_seconds" for name in ("forward", "recording", "path_patching", "dial_step", "hooked")
    }
    assert all(isinstance(value, float) and math.isfinite(value) for value in seconds.values())


def test_a_path_that_fails_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its sentence stands in its place."""

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no such kernel\non this device")

    monkeypatch.setattr(gpu, "generate", fails)
    row: dict[str, Any] = {}
    with gpu.named(row, "two_streams"):
        gpu.two_prompts(gpu._small(CPU, tokenizer), 2, gpu.CAD(1.0), 2)
    assert row == {"two_streams": "ValueError: no such kernel"}


def test_a_server_s_rate_counts_the_tokens_of_its_first_answers() -> None:
    """Ten tokens an answer, each a tenth of a second after the one before."""
    asked: list[str] = []
    turn = asyncio.Lock()

    async def respond(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content)["model"])
        async with turn:
            await asyncio.sleep(0.1)
        return httpx.Response(200, json={"usage": {"completion_tokens": 10}})

    async def measured(clients: int, answers: int) -> float:
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://tiny/v1/") as http:
            return await serving.rate_of(http, ["first", "second"], clients, answers, 10)

    assert asyncio.run(measured(5, 3)) == pytest.approx(100, rel=0.3)
    assert sorted(asked) == ["first"] * 3 + ["second"] * 2
