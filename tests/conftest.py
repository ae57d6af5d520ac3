"""Models that the tests share: one tiny random model per architecture, and the real default model."""

from __future__ import annotations

import os

# Read when huggingface_hub is imported: no test may ask the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer.main
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp import precision
from interp.anatomy import BLUEPRINTS
from interp.bridges import load_bridge
from interp.conflicts import ConflictSet
from interp.facts import build_conflicts, load_facts
from interp.fingerprints import fingerprint
from tests.tiny import CONFIGS, save_tiny

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_SHARED: list[tuple[Any, object]] = []
"""Models that tests share, and their states when they were loaded."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: at the end, one worker would run them while the other waits."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint directory for every architecture."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(name, root / name) for name in CONFIGS}


@pytest.fixture(autouse=True)
def this_cpu_multiplies_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let choices be the same on every machine, and as exact as those that tests make without our code."""
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: False)


@pytest.fixture(autouse=True)
def what_models_know_is_kept_for_one_test(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave the cache of whoever runs the tests alone."""
    monkeypatch.setattr("interp.known._cache", cache(lambda: tmp_path_factory.mktemp("known")))


@pytest.fixture(scope="session", autouse=True)
def commands_are_made_once() -> Iterator[None]:
    """Makes click's commands of a Typer application once, not for every call in this process: a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        made = cache(typer.main.get_command)
        patch.setattr("typer.main.get_command", made)
        patch.setattr("typer.testing._get_command", made)
        yield


@pytest.fixture(scope="module", autouse=True)
def shared_models_are_left_as_they_were() -> Iterator[None]:
    yield
    assert [model for model, before in _SHARED if _state(model) != before] == []


@pytest.fixture
def architectures_are_left_as_they_were() -> Iterator[None]:
    """Forgets blueprints that a test proposed or gave."""
    before = dict(BLUEPRINTS)
    yield
    BLUEPRINTS.clear()
    BLUEPRINTS.update(before)


def _state(model: Any) -> object:
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    # Those that transformers leaves where attention or hidden states were asked for once.
    ours = [hook for hook in hooks if "output_capturing_hook" not in getattr(hook, "__qualname__", "")]
    return fingerprint(model), len(ours)


def _shared(model: Any) -> Any:
    _SHARED.append((model, _state(model)))
    return model


@pytest.fixture(scope="session")
def tiny_model(tiny_directories: dict[str, Path]) -> Callable[[str], TransformerBridge]:
    """Loads an architecture's tiny model as a bridge on the CPU, once. Of fixtures with parameters pytest keeps one."""
    return cache(lambda architecture: _shared(load_bridge(str(tiny_directories[architecture]), device="cpu")))


@pytest.fixture(scope="session")
def tiny_plain(tiny_directories: dict[str, Path]) -> Callable[[str], Any]:
    """Loads the same as a plain transformers model with a tokenizer, once."""

    @cache
    def load(architecture: str) -> Any:
        directory = tiny_directories[architecture]
        network = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        network.tokenizer = AutoTokenizer.from_pretrained(directory)
        return _shared(network)

    return load


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str], TransformerBridge]) -> TransformerBridge:
    """A tiny Llama on the CPU."""
    return tiny_model("llama")


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def tiny_bridge(request: pytest.FixtureRequest, tiny_model: Callable[[str], TransformerBridge]) -> TransformerBridge:
    """Each architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    """The real default model, on the CPU in float32."""
    return _shared(load_bridge(device="cpu"))


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
