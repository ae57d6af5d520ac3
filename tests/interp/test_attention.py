from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from interp.anatomy import Anatomy
from interp.attention import attention_from_last
from interp.errors import UserError
from interp.models import cached_path, load_model
from tests.architectures import random_model, word_tokenizer
from tests.tiny import architecture_of

PROMPT = "The capital of Italy is Lima. The capital of Italy is"


def plain_attention(folder: Any, tokenizer: Any, prompt: str) -> torch.Tensor:
    """transformers' own weights of the last token, ``(n_layers, n_heads, n_tokens)``."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        attentions = plain(**tokenizer(prompt, return_tensors="pt"), output_attentions=True).attentions
    return torch.stack([weights[0, :, -1] for weights in attentions])


def test_weights_are_those_that_transformers_gives(tiny_bridge, tiny_plain):
    expected = plain_attention(tiny_bridge.original_model.config._name_or_path, tiny_bridge.tokenizer, PROMPT)
    heads = [(2, 3), (0, 1), (2, 0)]
    for model in (tiny_bridge, tiny_plain(architecture_of(tiny_bridge))):
        found = attention_from_last(model, PROMPT, heads)
        for row, (layer, head) in zip(found.weights, heads, strict=True):
            torch.testing.assert_close(row, expected[layer, head], rtol=1e-4, atol=1e-5)


def test_context_heads_of_the_real_model_look_at_the_contexts_answer(smollm2):
    prompt = "Fact: the capital of Japan is Lima. Fact: the capital of Japan is"
    found = attention_from_last(smollm2, prompt, [(23, 2), (28, 2), (23, 4)])
    assert "".join(found.tokens) == prompt
    without_first = found.weights[:, 1:].argmax(1) + 1
    assert [found.tokens[token] for token in without_first] == [" Lima", " Lima", " Japan"]
    torch.testing.assert_close(found.weights, plain_rows(smollm2, prompt, found.heads), rtol=1e-3, atol=1e-4)


def plain_rows(bridge: Any, prompt: str, heads: Any) -> torch.Tensor:
    expected = plain_attention(cached_path("smollm2-135m"), bridge.tokenizer, prompt)
    return torch.stack([expected[layer, head] for layer, head in heads])


def test_fused_attention_is_eager_while_its_weights_are_looked_at(tiny_directories):
    model = load_model(str(tiny_directories["llama"]), device="cpu")
    assert model.config._attn_implementation == "sdpa"
    expected = plain_attention(tiny_directories["llama"], model.tokenizer, PROMPT)
    weights = attention_from_last(model, PROMPT, [(1, 0)]).weights
    torch.testing.assert_close(weights[0], expected[1, 0], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_threads_that_look_at_attention_do_not_end_it_for_one_another(tiny_directories):
    model = load_model(str(tiny_directories["llama"]), device="cpu")
    first, inside = (Anatomy(model).eager_attention() for _ in range(2))
    with first:
        inside.__enter__()
    # The first is over, the second is not.
    assert model.config._attn_implementation == "eager"
    inside.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"


def test_fused_attention_that_cannot_be_chosen_anew_is_one_sentence():
    config: Any = random_model("falcon-7b").config
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.tokenizer = word_tokenizer()
    with pytest.raises(UserError, match=r'FalconForCausalLM .*without keeping its weights; .* attention="eager"'):
        attention_from_last(model, "w1 w2 w3", [(0, 0)])


def test_a_head_that_does_not_exist_is_refused(tiny_llama):
    with pytest.raises(UserError, match="layer"):
        attention_from_last(tiny_llama, PROMPT, [(9, 0)])
    with pytest.raises(UserError, match="No head is given"):
        attention_from_last(tiny_llama, PROMPT, [])
