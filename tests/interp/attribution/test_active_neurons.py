"""Shares of active neurons against the activation written out by hand, one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.attribution.active_neurons import active_shares
from interp.teacher_forcing import Continued, continued
from tests.tiny import tiny_conflicts

# The MLP's first map, by architecture: of a gated MLP its gate. Every activation here is above 0 exactly where that is.
FIRST = {"llama": "gate_proj", "gemma2": "gate_proj", "gpt2": "c_fc", "gpt-neox": "dense_h_to_4h"}


def by_hand(model: Any, first: str, item: Continued) -> torch.Tensor:
    """Of each layer the share of positive pre-activations where the answer is predicted, without padding."""
    blocks: Any = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    seen: list[torch.Tensor] = []
    handles = [
        block.mlp.get_submodule(first).register_forward_hook(lambda _, __, output: seen.append(output[0]))
        for block in blocks
    ]
    with torch.no_grad():
        model(torch.tensor([item.tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    start = len(item.tokens) - item.predicted - 1
    return torch.stack([(layer[start : start + item.predicted] > 0).float().mean() for layer in seen])


@pytest.mark.parametrize("architecture", FIRST)
def test_shares_are_those_of_positive_pre_activations(tiny_plain, tiny_model, architecture):
    model = tiny_plain(architecture)
    examples = list(tiny_conflicts())[:5]
    items = [continued(model, e.prompt, f"{e.memory_answers[0]} and more" * (i + 1)) for i, e in enumerate(examples)]
    assert len({len(item.tokens) for item in items}) > 1
    expected = torch.stack([by_hand(model, FIRST[architecture], item) for item in items])
    assert 0.1 < expected.mean() < 0.9
    torch.testing.assert_close(active_shares(model, items), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(active_shares(tiny_model(architecture), items), expected, atol=1e-3, rtol=0)
