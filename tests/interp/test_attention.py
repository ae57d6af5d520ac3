from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from interp.attention import attention_from_last
from interp.errors import UserError
from interp.models import cached_path, load_model
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


def test_a_model_that_keeps_no_attention_weights_is_one_sentence(tiny_directories):
    model = load_model(str(tiny_directories["llama"]), device="cpu")
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match=r'without keeping its weights; .* model.set_attn_implementation\("eager"\)'):
        attention_from_last(model, PROMPT, [(0, 0)])


def test_a_head_that_does_not_exist_is_refused(tiny_llama):
    with pytest.raises(UserError, match="layer"):
        attention_from_last(tiny_llama, PROMPT, [(9, 0)])
    with pytest.raises(UserError, match="No head is given"):
        attention_from_last(tiny_llama, PROMPT, [])
