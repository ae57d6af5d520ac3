"""What commands are said to take is what their own functions do."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conflictscope.cli import ship
from conflictscope.explore.looks import Asked, Explorer
from conflictscope.plan import GENERATE_TOKENS, Need, Setting, device_bytes, devices_needed, largest_batch, needs
from docs.plan import CONFIGS as LARGE
from interp import generation
from interp.activation_store import ActivationStore
from interp.activations import sites_of
from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.generation import BATCH_SIZE, continue_greedily, generated
from interp.inputs import BATCH_TOKENS, prompt_batches, token_ids
from interp.plan import Shapes, weight_bytes
from interp.teacher_forcing import Continued, token_batches
from interventions.fitting.gauss_newton import GaussNewton
from interventions.fitting.scale_data import GUARDS, Guarded, guard_count
from interventions.fitting.scale_training import ScaleTraining
from tests.allocated import peak_bytes
from tests.architectures import random_model, word_conflicts
from tests.interp.test_plan import wide

GIB = 2**30


def need(shapes: Shapes, command: str, tokens: int, **settings: Any) -> Need:
    return next(need for need in needs(shapes, Setting(tokens, **settings)) if need.command == command)


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture
def never_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers go on until they are as long as they may be."""
    monkeypatch.setattr(generation, "is_complete", lambda _: False)


@pytest.fixture
def words() -> Any:
    """A tiny model of words, which never ends by itself."""
    model = random_model("stablelm").float().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.usefixtures("never_done")
def test_evaluate_and_two_streams(words):
    prompts = [example.prompt for example in word_conflicts(3)]
    shapes = Shapes.of(words.config)
    found = counted(lambda: continue_greedily(words, prompts))
    assert 3 * need(shapes, "evaluate", 7).flops == pytest.approx(found, rel=0.02)
    bare = [example.bare_prompt for example in word_conflicts(3)]
    found = counted(lambda: continue_greedily(words, prompts, without=bare, combined=lambda first, _: first))
    assert 3 * need(shapes, "two streams", 7).flops == pytest.approx(found, rel=0.02)


@pytest.mark.usefixtures("never_done")
def test_ask(tiny_plain):
    model = tiny_plain("gemma2")
    asked = Asked("The capital of Japan is", "The capital of Japan is Lima.", context_answer="Lima")
    explorer = Explorer(model, name="tiny")
    found = counted(lambda: explorer.look(asked))
    look = explorer.look(asked)
    assert look.unedited.lens is not None
    tokens = len(token_ids(model.tokenizer, [look.example.prompt])[0])
    assert need(Shapes.of(model.config), "ask", tokens).flops == pytest.approx(found, rel=0.02)


@pytest.mark.usefixtures("never_done")
def test_record_and_what_it_writes(words, tmp_path):
    prompts, sites = word_conflicts(3), [Anatomy(words).model_site("embedding"), *sites_of(words)]
    found = counted(lambda: ActivationStore.record(tmp_path / "s", words, prompts, sites, name="w", answers=True))
    said = need(Shapes.of(words.config), "record", 7, prompts=3)
    assert 3 * said.flops == pytest.approx(found, rel=0.02)
    written = (tmp_path / "s/shards/00000/activations.safetensors").read_bytes()
    header = 8 + int.from_bytes(written[:8], "little")
    assert said.disk_bytes == len(written) - header


def test_a_step_of_dial_fit(words):
    settings = ScaleTraining()
    wanted = [Continued(tuple(range(1, 41)), 1)] * settings.conflicts
    width = Anatomy(words).d_model
    lengths = {"none": 16, "neutral": 48}

    def guard(kind: Any) -> list[Guarded]:
        tokens = lengths.get(kind, 40)
        predicted = tokens - 1 if kind == "neutral" else 1
        item = Guarded(Continued(tuple(range(1, tokens + 1)), predicted), torch.zeros(predicted, width))
        return [item] * guard_count(kind, settings.guards)

    learner = GaussNewton(words, settings)
    data: Any = SimpleNamespace(model=words, guards={kind: guard(kind) for kind in GUARDS}, unedited_gradients={})
    found = counted(lambda: learner._look(wanted, data))
    said = need(Shapes.of(words.config), "dial fit, step", 40)
    assert said.flops == pytest.approx(found, rel=0.02)
    curvatures = [tensor for tensor in learner.tensors().values() if tensor.ndim == 2]
    assert said.disk_bytes == sum(tensor.nbytes for tensor in curvatures)


def test_generate_is_as_long_as_the_command_says():
    assert inspect.signature(ship.generate).parameters["max_new_tokens"].default == GENERATE_TOKENS


@pytest.mark.usefixtures("never_done")
def test_answers_allocate_about_what_is_said():
    model = wide("llama", torch.float32)
    model.generation_config.eos_token_id = None
    tokens = [[1 + i % 60 for i in range(300)]] * 4
    said = need(Shapes.of(model.config), "evaluate", 300, batch_size=4)
    assert said.batch == 4
    found = peak_bytes(lambda: generated(model, tokens, 8))
    assert 1 / 1.5 < 4 * (said.prompt_bytes + said.layer_bytes) / found < 1.5


@pytest.mark.parametrize(("tokens", "settings"), [(7, {}), (100, {"batch_tokens": 250}), (100, {"batch_tokens": 50})])
def test_batches_are_as_large_as_those_that_run(words, tokens, settings):
    prompts = [" ".join(["w1"] * tokens)] * 40
    words.batch_tokens = settings.get("batch_tokens", BATCH_TOKENS)
    first, *_ = prompt_batches(words, prompts, BATCH_SIZE)
    shapes = Shapes.of(words.config)
    for command in ("evaluate", "two streams", "attribute"):
        assert need(shapes, command, tokens, **settings).batch == len(first.numbers)
    items = [Continued((1,) * tokens, 1)] * ScaleTraining().conflicts
    assert need(shapes, "dial fit, step", tokens, **settings).batch == len(token_batches(words, items)[0])


def test_what_fits_by_hand():
    shapes = Shapes.of(LARGE["Llama-3.1-70B"])
    command = Need("by hand", batch=3, flops=0, prompt_bytes=2 * GIB, layer_bytes=8 * GIB, kept_bytes=GIB)
    weights = 2 * shapes.parameters
    assert device_bytes(shapes, command, 2) == weights + 31 * GIB
    # On two devices half of the weights each, and half of what lies with the layers.
    assert device_bytes(shapes, command, 2, 2) == weight_bytes(shapes, 2, 2) + 19 * GIB
    assert devices_needed(shapes, command, 2, weights + 31 * GIB) == 1
    assert devices_needed(shapes, command, 2, weights + 31 * GIB - 1) == 2
    assert devices_needed(shapes, command, 2, 8 * GIB) is None
    assert largest_batch(shapes, command, 2, weights + 31 * GIB) == 3
    assert largest_batch(shapes, command, 2, weights + 31 * GIB - 1) == 2
    assert largest_batch(shapes, command, 2, weights, devices=1) == 0


def test_wrong_settings_are_refused_in_a_sentence():
    shapes = Shapes.of(LARGE["Llama-3.1-8B"])
    with pytest.raises(UserError, match=r"^Prompt tokens must be 1 or more, not 0; give another\.$"):
        needs(shapes, Setting(0))
    with pytest.raises(UserError, match=r"^131072 tokens of a prompt and 24 of its answer do not fit into the 131072"):
        needs(shapes, Setting(131_072))
