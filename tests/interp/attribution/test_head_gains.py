"""Gains of heads against a whole pass for each head, factor and prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.anatomy import Anatomy
from interp.attribution.head_gains import head_gains
from interp.inputs import encode
from tests.tiny import few_bridges, tiny_conflicts

tiny_bridge = few_bridges


@pytest.mark.parametrize("whole", [False, True])
def test_gains_are_those_of_whole_passes_with_the_last_token_scaled(tiny_bridge, whole, monkeypatch):
    if whole:
        # A few ways to scale heads at once, and not all of a layer.
        monkeypatch.setattr("interp.attribution.head_gains.batch_tokens_of", lambda _: 200)
    anatomy = Anatomy(tiny_bridge)
    network: Any = anatomy.model
    # With a prompt of one token nothing is read ahead.
    prompts = [e.prompt for e in list(tiny_conflicts())[:3]] + ([tiny_bridge.tokenizer.decode([44])] if whole else [])
    tokens, factors = [3, 17, 40, 8][: len(prompts)], [1.0, -2.0]
    assert not whole or len(encode(tiny_bridge, prompts[-1:])["input_ids"][0]) == 1

    def probability(prompt: str, token: int) -> float:
        with torch.inference_mode():
            return network(**encode(tiny_bridge, [prompt])).logits[0, -1].softmax(-1)[token].item()

    found = head_gains(tiny_bridge, prompts, tokens, factors)
    assert found.shape == (len(prompts), anatomy.n_layers, anatomy.n_heads)
    for layer, head in anatomy.heads:
        changes = torch.zeros(len(prompts))
        for factor in factors:

            def scale(_: Any, inputs: Any, factor: float = factor, head: int = head) -> Any:
                z = inputs[0].clone()
                z[0, -1, head * anatomy.d_head : (head + 1) * anatomy.d_head] *= 1 + factor
                return (z, *inputs[1:])

            for i, (prompt, token) in enumerate(zip(prompts, tokens, strict=True)):
                before = probability(prompt, token)
                handle = anatomy.module("output_projection", layer).register_forward_pre_hook(scale)
                changes[i] += (probability(prompt, token) - before) / len(factors)
                handle.remove()
        torch.testing.assert_close(found[:, layer, head], changes, rtol=1e-3, atol=1e-6)
    assert found.abs().max() > 1e-5
