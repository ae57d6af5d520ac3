from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import answer_token_ids
from interp.lens import LogitLens, logit_lens
from interp.models import cached_path
from interventions.base import applied
from interventions.heads import HeadScaling
from tests.tiny import tiny_conflicts


def by_hidden_states(plain: Any, tokenizer: Any, prompt: str, norm: Any) -> torch.Tensor:
    """The lens from what transformers itself gives: hidden states after each block, the last one normed already."""
    with torch.inference_mode():
        states = plain(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True).hidden_states[1:]
        normed = [norm(state[0, -1]) for state in states[:-1]] + [states[-1][0, -1]]
        return torch.stack([plain.lm_head(state).float().log_softmax(-1) for state in normed])


def test_every_layer_is_read_with_the_models_own_norm_and_unembedding(smollm2, capital_conflicts):
    conflicts = ConflictSet("some", capital_conflicts.select(kind="conflict").examples[:3])
    lens = logit_lens(smollm2, conflicts)
    plain: Any = AutoModelForCausalLM.from_pretrained(cached_path("smollm2-135m"), dtype=torch.float32)
    for row, example in enumerate(conflicts):
        expected = by_hidden_states(plain, smollm2.tokenizer, example.prompt, plain.model.norm)
        ids = answer_token_ids(smollm2, example)
        assert ids is not None
        torch.testing.assert_close(lens.log_probabilities[row], expected[:, list(ids)], rtol=1e-4, atol=1e-3)


def test_after_the_last_layer_it_is_what_the_model_says(tiny_bridge):
    conflicts = tiny_conflicts()
    lens = logit_lens(tiny_bridge, conflicts, batch_size=3)
    for row, example in zip(lens.log_probabilities, [e for e in conflicts if e.id in lens.example_ids], strict=True):
        with torch.inference_mode():
            logits = tiny_bridge.original_model(**tiny_bridge.tokenizer(example.prompt, return_tensors="pt")).logits
        ids = answer_token_ids(tiny_bridge, example)
        assert ids is not None
        said = logits[0, -1].float().log_softmax(-1)[list(ids)]
        torch.testing.assert_close(row[-1], said, rtol=1e-4, atol=1e-5)


def test_an_edit_is_seen_from_its_layer_on(tiny_llama):
    unedited = logit_lens(tiny_llama, tiny_conflicts()).log_probabilities
    with applied(tiny_llama, HeadScaling.of([(1, 2)], 0.0)):
        edited = logit_lens(tiny_llama, tiny_conflicts()).log_probabilities
    assert torch.equal(edited[:, 0], unedited[:, 0])
    assert not torch.allclose(edited[:, 1:], unedited[:, 1:])


def test_means_are_those_of_the_probabilities_and_differences():
    lens = LogitLens(torch.tensor([[[0.5, 0.25]], [[0.1, 0.2]]]).log(), ("a", "b"), ("A", "B"))
    assert [e.value for e in lens.probability("context")] == pytest.approx([0.3])
    assert [e.value for e in lens.probability("memory")] == pytest.approx([0.225])
    assert [e.value for e in lens.difference()] == pytest.approx([0.0], abs=1e-6)
    assert [e.value for e in lens.select(["b"]).probability("context")] == pytest.approx([0.1])
    with pytest.raises(UserError, match="None of these ids"):
        lens.select(["c"])
