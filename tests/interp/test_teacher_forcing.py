from typing import Any

import pytest
import torch

from interp.anatomy import Anatomy, transformers_model
from interp.inputs import encode
from interp.teacher_forcing import (
    Continued,
    continued,
    greedily_continued,
    item_residuals,
    text_tokens,
    token_batches,
)
from tests.tiny import few_bridges, tiny_conflicts

tiny_bridge = few_bridges


def prompts():
    return [(e.prompt, answer) for e in tiny_conflicts() for answer in (e.memory_answers[0], e.context_answers[0])]


def test_logits_of_the_looked_at_tokens_are_those_of_each_prompt_alone(tiny_bridge):
    check_against_each_prompt_alone(tiny_bridge)


def test_learned_positions_are_counted_from_the_first_token_and_not_from_the_padding(tiny_plain):
    """Rotary ones tell only how far tokens are apart."""
    check_against_each_prompt_alone(tiny_plain("gpt2"))


def check_against_each_prompt_alone(model):
    # So few that rows of several lengths share a batch.
    items = [continued(model, *prompt) for prompt in prompts()[::3]]
    assert any(len({len(items[i].tokens) for i in batch}) > 1 for batch in token_batches(model, items))
    for item, residual in zip(items, item_residuals(model, items), strict=True):
        with torch.inference_mode():
            alone = transformers_model(model)(input_ids=torch.tensor([item.tokens])).logits[0]
        start = len(item.tokens) - item.predicted - 1
        torch.testing.assert_close(Anatomy(model).logits(residual), alone[start:-1], rtol=1e-4, atol=1e-4)


def test_an_answer_follows_greedily_if_generate_begins_with_it(tiny_bridge):
    texts = [prompt for prompt, _ in prompts()]
    inputs = encode(tiny_bridge, texts)
    length = inputs["input_ids"].shape[1]
    network: Any = transformers_model(tiny_bridge)
    with torch.inference_mode():
        generated = network.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=3,
            pad_token_id=tiny_bridge.tokenizer.pad_token_id,
            eos_token_id=[],
        )[:, length:].tolist()
    bare = [tuple(tiny_bridge.tokenizer(text)["input_ids"]) for text in texts]
    right = [
        Continued((*ids, *new[:count]), count) for ids, new in zip(bare, generated, strict=True) for count in (1, 2, 3)
    ]
    assert all(greedily_continued(tiny_bridge, right))
    wrong = [Continued((*item.tokens[:-1], item.tokens[-1] ^ 1), item.predicted) for item in right]
    assert not any(greedily_continued(tiny_bridge, wrong))


def test_an_answer_s_tokens_are_those_that_the_tokenizer_makes_of_the_whole(tiny_llama):
    item = continued(tiny_llama, "The capital of Peru is", "Lima")
    assert tiny_llama.tokenizer.decode(item.answer) == " Lima"
    assert tiny_llama.tokenizer.decode(item.tokens) == "The capital of Peru is Lima"


def test_where_the_tokenizer_merges_across_the_border_the_answer_is_tokenised_alone(tiny_llama):
    tokenizer = tiny_llama.tokenizer
    prompt = "The capital of Peru is "
    item = continued(tiny_llama, prompt, "Lima")
    assert list(item.tokens[: len(item.tokens) - item.predicted]) == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(item.answer).strip() == "Lima"


def test_of_a_text_all_but_the_first_token_is_looked_at(tiny_llama):
    tokens = tiny_llama.tokenizer("Lima is in Peru and Cairo is in Egypt")["input_ids"]
    assert text_tokens(tiny_llama, "Lima is in Peru and Cairo is in Egypt", 4) == Continued(tuple(tokens[:4]), 3)


@pytest.mark.parametrize("longest", [3, 200, 600])
def test_every_item_is_in_one_batch_of_bounded_size(tiny_llama, longest):
    items = [Continued(tuple(range(1 + i % longest)), 1) for i in range(300)]
    batches = token_batches(tiny_llama, items)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(items[i].tokens) for i in batch) <= 512
