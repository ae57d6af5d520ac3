from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from interp.answers import first_sentence
from interp.errors import UserError
from interp.generation import answer_steps, continue_greedily
from interp.inputs import first_token_id
from interp.models import cached_path
from tests.interp.two_streams import two_passes_a_token
from tests.tiny import architecture_of, few_bridges, tiny_conflicts

tiny_bridge = few_bridges


def test_batched_answers_equal_those_of_plain_transformers_one_by_one(smollm2, capital_conflicts):
    prompts = [e.prompt for e in capital_conflicts.examples[::23]]
    plain: Any = AutoModelForCausalLM.from_pretrained(cached_path("smollm2-135m"), dtype=torch.float32)
    expected = []
    for prompt in prompts:
        tokens = smollm2.tokenizer(prompt, return_tensors="pt")
        output = plain.generate(**tokens, max_new_tokens=8, do_sample=False)
        text = smollm2.tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(first_sentence(text))
    assert continue_greedily(smollm2, prompts, batch_size=4).answers == expected


def test_watched_logits_are_those_of_the_first_step(smollm2):
    prompts = ["The capital of France is", "Two and two make"]
    watch = torch.tensor([[10, 20], [30, 40]])
    with torch.inference_mode():
        expected = torch.stack(
            [
                smollm2.original_model(**smollm2.tokenizer(prompt, return_tensors="pt")).logits[0, -1, ids]
                for prompt, ids in zip(prompts, watch, strict=True)
            ]
        )
    found = continue_greedily(smollm2, prompts, watch=watch, max_new_tokens=1).first_logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_the_first_token_of_an_answer_carries_its_space(smollm2):
    assert smollm2.tokenizer.decode(first_token_id(smollm2, "The capital of France is", "Paris")) == " Paris"


def test_no_prompts_give_no_answers(smollm2):
    assert continue_greedily(smollm2, []).answers == []


def test_the_steps_of_an_answer_are_its_tokens_with_the_models_own_probabilities(smollm2):
    prompt = "Fact: the capital of Japan is Lima. Fact: the capital of Japan is"
    steps = answer_steps(smollm2, prompt, max_new_tokens=4)
    written = prompt
    for step in steps:
        with torch.inference_mode():
            logits = smollm2.original_model(**smollm2.tokenizer(written, return_tensors="pt")).logits[0, -1]
        best = logits.softmax(-1).topk(4)
        expected = [smollm2.tokenizer.decode([token]) for token in best.indices]
        assert [step.token, *(token for token, _ in step.alternatives)] == expected
        found = [step.probability, *(probability for _, probability in step.alternatives)]
        assert found == pytest.approx(best.values.tolist(), rel=1e-3, abs=1e-5)
        written += step.token
    answered = continue_greedily(smollm2, [prompt], max_new_tokens=4).answers[0]
    assert first_sentence(written[len(prompt) :]) == answered


# Two prompts side by side


def mixed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first.softmax(-1) + 2 * second.softmax(-1)


def test_two_streams_in_padded_batches_answer_as_two_passes_a_token(tiny_bridge, tiny_plain):
    """Prompts of different lengths, each pair too; some have no context and are left alone."""
    pairs = [(e.prompt, str(e.bare_prompt)) for e in tiny_conflicts()]
    pairs += [(bare, bare) for _, bare in pairs[::5]]
    plain = tiny_plain(architecture_of(tiny_bridge))
    expected = [
        two_passes_a_token(plain, *pair, mixed if pair[0] != pair[1] else lambda first, _: first) for pair in pairs
    ]
    prompts, without = zip(*pairs, strict=True)
    found = continue_greedily(tiny_bridge, prompts, without=without, combined=mixed, batch_size=7)
    assert found.answers == expected


def test_the_watched_logits_of_two_streams_are_the_rule_s_scores(tiny_llama):
    pairs = [(e.prompt, str(e.bare_prompt)) for e in tiny_conflicts()]
    prompts, without = zip(*pairs, strict=True)
    watch = torch.tensor([[3, 7]] * len(pairs))
    found = continue_greedily(tiny_llama, prompts, watch=watch, without=without, combined=mixed, max_new_tokens=1)
    for i, pair in enumerate(pairs):
        with torch.inference_mode():
            ends = [
                tiny_llama.original_model(torch.tensor([tiny_llama.tokenizer(text)["input_ids"]])).logits[:, -1]
                for text in pair
            ]
        scores = mixed(*ends)[0]
        torch.testing.assert_close(found.first_logits[i], scores[[3, 7]], rtol=1e-4, atol=1e-6)
        assert found.first_tokens[i] == scores.argmax()


def test_a_rule_without_second_prompts_is_refused_and_second_prompts_without_a_rule(tiny_llama):
    with pytest.raises(UserError, match="needs the prompts without their contexts"):
        continue_greedily(tiny_llama, ["Rome"], combined=mixed)
    with pytest.raises(UserError, match="needs the prompts without their contexts"):
        continue_greedily(tiny_llama, ["Rome"], without=["Rome"])
