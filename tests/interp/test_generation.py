from typing import Any

import torch
from transformers import AutoModelForCausalLM

from interp.answers import first_sentence
from interp.generation import continue_greedily, first_token_id
from interp.models import cached_path


def test_batched_answers_equal_those_of_plain_transformers_one_by_one(smollm2, capital_conflicts):
    prompts = [e.prompt for e in capital_conflicts.examples[::23]]
    plain: Any = AutoModelForCausalLM.from_pretrained(cached_path("smollm2-135m"), dtype=torch.float32)
    expected = []
    for prompt in prompts:
        tokens = smollm2.tokenizer(prompt, return_tensors="pt")
        output = plain.generate(**tokens, max_new_tokens=8, do_sample=False, use_cache=False)
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
