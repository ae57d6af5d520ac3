"""Models that the tests share: one tiny random model per architecture, and the real default model."""

from __future__ import annotations

import os

# Read when huggingface_hub is imported: no test may ask the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from interp.bridges import load_bridge
from interp.conflicts import ConflictSet
from interp.facts import build_conflicts, load_facts
from tests.tiny import CONFIGS, save_tiny

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: at the end, one worker would run it while the others wait."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint directory for every architecture."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(name, root / name) for name in CONFIGS}


@pytest.fixture(scope="session")
def tiny_llama(tiny_directories: dict[str, Path]) -> TransformerBridge:
    """A tiny Llama on the CPU."""
    return load_bridge(str(tiny_directories["llama"]), device="cpu")


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def tiny_bridge(request: pytest.FixtureRequest, tiny_directories: dict[str, Path]) -> TransformerBridge:
    """Each architecture in turn, on the CPU."""
    return load_bridge(str(tiny_directories[request.param]), device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    """The real default model, on the CPU in float32."""
    return load_bridge(device="cpu")


@pytest.fixture(scope="session")
def capital_conflicts() -> ConflictSet:
    """Prompts about capitals of well-known countries, of every kind and phrasing."""
    known = {
        "France",
        "Italy",
        "Spain",
        "Japan",
        "Germany",
        "Russia",
        "Egypt",
        "Greece",
        "Sweden",
        "Norway",
        "Cuba",
        "Iran",
    }
    return build_conflicts({"capital": [fact for fact in load_facts("capital") if fact.subject in known]})
