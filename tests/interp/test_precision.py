"""Rough numbers against exact ones: near where the CPU multiplies bfloat16, the same where it does not."""

import pytest
import torch

from interp import precision, teacher_forcing
from interp.evaluation import divergence
from interp.generation import gathered_logits, next_logits
from interp.models import load_model
from interp.precision import can_be_rough, rough
from interp.reading import ReadPrompts
from interp.teacher_forcing import continued, predicting_residuals
from interventions.base import applied, changed_by
from interventions.heads import HeadScaling
from tests.tiny import tiny_conflicts

PROMPTS = [example.prompt for example in tiny_conflicts()]


def ends(model, prompts=PROMPTS):
    return gathered_logits(next_logits(model, prompts), len(prompts))


@pytest.fixture
def multiplies(monkeypatch):
    """A CPU that multiplies bfloat16."""
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox", "gemma2"])
def test_blocks_are_rough_and_logits_are_float32(architecture, tiny_plain, multiplies):
    model = tiny_plain(architecture)
    exact = ends(model)
    with rough(model):
        seen = []
        handle = model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[2].dtype))
        found = ends(model)
        handle.remove()
    assert set(seen) == {torch.float32}
    assert not torch.equal(found, exact)
    assert divergence(exact, found).max() < 5e-3
    assert torch.equal(ends(model), exact)


def test_an_error_in_the_unembedding_leaves_nothing_behind(tiny_plain, multiplies):
    model = tiny_plain("llama")
    exact = ends(model)

    def fail(*_):
        raise RuntimeError

    with rough(model):
        handle = model.get_output_embeddings().register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            ends(model)
        handle.remove()
        assert torch.is_autocast_enabled("cpu")
        assert not torch.equal(ends(model), exact)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(ends(model), exact)


def test_where_the_cpu_cannot_and_around_bridges_numbers_are_exact(tiny_plain, tiny_llama, monkeypatch):
    model = tiny_plain("llama")
    exact = ends(model)
    with rough(model):
        assert torch.equal(ends(model), exact)
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: True)
    assert not can_be_rough(tiny_llama)
    exact = ends(tiny_llama)
    with rough(tiny_llama):
        assert torch.equal(ends(tiny_llama), exact)


def test_prompts_that_were_read_roughly_are_gone_on_with(tiny_plain, multiplies):
    model = tiny_plain("llama")
    edits = [HeadScaling.of([(1, 0)], 0.0)]
    with applied(model, *edits):
        exact = ends(model)
    with rough(model):
        read = ReadPrompts(model, PROMPTS, batch_size=5)
        with applied(model, *edits):
            found = gathered_logits(read.next_logits(changed_by(edits)), len(PROMPTS))
    assert divergence(exact, found).max() < 5e-3


def test_what_leaves_the_range_is_computed_exactly(tiny_plain, multiplies, monkeypatch):
    model = tiny_plain("llama")
    items = [continued(model, e.prompt, e.memory_answers[0]) for e in list(tiny_conflicts())[:3]]
    exact = predicting_residuals(model, items)
    assert not torch.equal(predicting_residuals(model, items, roughly=True), exact)
    padded = teacher_forcing.padded

    def overflowing(*given):
        # The last norm's input is what the residuals are.
        handle = model.model.norm.register_forward_pre_hook(
            lambda _, given: (given[0] * (torch.inf if torch.is_autocast_enabled("cpu") else 1), *given[1:]),
            prepend=True,
        )
        handles.append(handle)
        return padded(*given)

    handles = []
    monkeypatch.setattr(teacher_forcing, "padded", overflowing)
    found = predicting_residuals(model, items, roughly=True)
    for handle in handles:
        handle.remove()
    assert torch.equal(found, exact)


def test_the_real_models_choices_stay(capital_conflicts, monkeypatch):
    model = load_model(device="cpu")
    prompts = [e.prompt for e in capital_conflicts if e.kind in ("conflict", "none")][:16]
    exact = ends(model, prompts)
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: True)
    with rough(model):
        found = ends(model, prompts)
    assert divergence(exact, found).mean() < 3e-3
    assert (found.argmax(-1) == exact.argmax(-1)).float().mean() > 0.93
