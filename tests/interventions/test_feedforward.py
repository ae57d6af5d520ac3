import copy
from typing import Any

import pytest
import torch

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.inputs import encode
from interventions.base import applied
from interventions.feedforward import FeedForwardScaling
from tests.tiny import architecture_of, few_bridges, tiny_conflicts

tiny_bridge = few_bridges
LAST_LINEAR = {
    "GPTNeoXForCausalLM": "mlp.dense_4h_to_h",
    "Gemma2ForCausalLM": "post_feedforward_layernorm",
}


@pytest.fixture(scope="module")
def inputs(tiny_bridge):
    return encode(tiny_bridge, [e.prompt for e in tiny_conflicts()])


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scaling_a_layer_equals_scaling_the_weights_that_write_to_the_stream(tiny_bridge, tiny_plain, inputs, scale):
    """In Gemma these are the post norm's gains, 1 + weight; elsewhere the last linear map's weight and bias."""
    plain = tiny_plain(architecture_of(tiny_bridge))
    edited = copy.deepcopy(plain)
    anatomy = Anatomy(edited)
    path = LAST_LINEAR.get(anatomy.architecture, "mlp.down_proj")
    writer: Any = edited.get_submodule(f"{anatomy.path('block', 1)}.{path}")
    with torch.no_grad():
        if "norm" in path:
            writer.weight.copy_((1 + writer.weight) * scale - 1)
        else:
            for parameter in writer.parameters():
                parameter *= scale
    expected = logits(edited, inputs)
    for model in (tiny_bridge.original_model, plain):
        with applied(model, FeedForwardScaling(((1, scale),))):
            torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_the_model_is_as_before_afterwards(tiny_llama):
    batch = encode(tiny_llama, ["The capital of France is"])
    before = logits(tiny_llama.original_model, batch)
    with applied(tiny_llama, FeedForwardScaling(((0, 0.0), (2, 3.0)))):
        assert not torch.equal(logits(tiny_llama.original_model, batch), before)
    assert torch.equal(logits(tiny_llama.original_model, batch), before)


def test_a_layer_that_is_listed_twice_or_missing_is_refused(tiny_llama):
    with pytest.raises(UserError, match="layer 1 is listed twice"):
        FeedForwardScaling(((1, 0.0), (1, 1.0)))
    with pytest.raises(UserError, match="Layer 3 does not exist"):
        FeedForwardScaling(((3, 0.0),)).attach(tiny_llama)
