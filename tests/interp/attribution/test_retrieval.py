"""Retrieval scores against transformers' own attention, one prompt at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from interp.anatomy import Anatomy
from interp.attribution.retrieval import retrieval_scores
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.inputs import continuation_ids
from interp.models import load_model
from tests.tiny import tiny_conflicts


def longer() -> ConflictSet:
    """Conflict prompts whose context's answers have several tokens, as the prompts hold them."""
    conflicts = tiny_conflicts().select(kind="conflict")
    return ConflictSet(
        "longer",
        tuple(
            dataclasses.replace(e, prompt=f"{e.context_answers[0]} and more. {e.prompt}"[i:], context_answers=(answer,))
            for i, e in enumerate(conflicts)
            for answer in [f"{e.context_answers[0]} and"]
        ),
    )


def by_hand(model: Any, prompt: str, answer: str) -> torch.Tensor | None:
    """Of each head the share of the answer's tokens that it looks at most, in the prompt, just before them."""
    before, after = continuation_ids(model, prompt, answer)
    if not set(after) <= set(before):
        return None
    with Anatomy(model).eager_attention(), torch.inference_mode():
        attentions = model(torch.tensor([[*before, *after]]), output_attentions=True).attentions
    hits = torch.zeros(len(attentions), attentions[0].shape[1])
    for layer, weights in enumerate(attentions):
        for head in range(weights.shape[1]):
            for step, token in enumerate(after):
                place = int(weights[0, head, len(before) - 1 + step].argmax())
                hits[layer, head] += place < len(before) and before[place] == token
    return hits / len(after)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-neox"])
def test_scores_are_the_shares_of_tokens_that_heads_look_at(tiny_model, tiny_plain, tiny_directories, architecture):
    plain = load_model(str(tiny_directories[architecture]), device="cpu")
    conflicts = longer()
    expected = [by_hand(plain, e.prompt, e.context_answers[0]) for e in conflicts]
    found = retrieval_scores(tiny_model(architecture), conflicts, name="tiny")
    kept = [values for values in expected if values is not None]
    assert found.example_ids == tuple(e.id for e, v in zip(conflicts, expected, strict=True) if v is not None)
    torch.testing.assert_close(found.values, torch.stack(kept))
    assert 0 < found.values.mean() < 1
    assert not found.signed
    assert found.settings["left_out"] == len(expected) - len(kept)


def test_few_heads_of_the_real_model_retrieve(smollm2, capital_conflicts):
    """Published: in every model fewer than 5 % of the heads."""
    some = ConflictSet("some", capital_conflicts.select(kind="conflict", split="train").examples[:8])
    mean = retrieval_scores(smollm2, some, name="smollm2-135m").mean()
    assert 0 < (mean > 0.25).float().mean() < 0.05


def test_prompts_without_the_answer_are_refused(tiny_llama):
    with pytest.raises(UserError, match="give prompts with a context"):
        retrieval_scores(tiny_llama, tiny_conflicts().select(kind="none"), name="tiny")
