from typing import Any

import pytest
import torch
from torch import Tensor

from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interp.inputs import encode
from interventions.base import applied
from interventions.steering import Steering
from tests.tiny import few_bridges, tiny_conflicts

tiny_bridge = few_bridges
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def inputs(tiny_bridge):
    return encode(tiny_bridge, [e.prompt for e in tiny_conflicts()][:4])


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    network: Any = transformers_model(model)
    with torch.inference_mode():
        return network(**inputs).logits


def with_last_residual(model: Any, inputs: dict[str, Tensor], layer: int, change: Any) -> Tensor:
    """Logits with the residual stream of the last token after a block put through ``change``."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        residual = (output[0] if isinstance(output, tuple) else output).clone()
        residual[:, -1] = change(residual[:, -1])
        return (residual, *output[1:]) if isinstance(output, tuple) else residual

    handle = Anatomy(model).module("block", layer).register_forward_hook(hook)
    try:
        return logits(model, inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("strength", [1.0, -2.5])
def test_adding_is_adding_strength_times_the_vector(tiny_bridge, inputs, layer, strength):
    expected = with_last_residual(tiny_bridge, inputs, layer, lambda h: h + strength * VECTOR)
    with applied(tiny_bridge, Steering(layer, VECTOR, strength)):
        torch.testing.assert_close(logits(tiny_bridge, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_replacing_goes_a_share_of_the_way_to_the_vector(tiny_bridge, inputs, strength):
    expected = with_last_residual(tiny_bridge, inputs, 1, lambda h: (1 - strength) * h + strength * VECTOR)
    with applied(tiny_bridge, Steering(1, VECTOR, strength, mode="replace")):
        torch.testing.assert_close(logits(tiny_bridge, inputs), expected, rtol=1e-4, atol=1e-4)


def test_after_replacing_all_of_it_in_the_last_layer_every_prompt_predicts_the_same(tiny_bridge, inputs):
    before = logits(tiny_bridge, inputs)[:, -1]
    with applied(tiny_bridge, Steering(2, VECTOR, mode="replace")):
        after = logits(tiny_bridge, inputs)[:, -1]
    assert (before - before[:1]).abs().max() > 0.1
    torch.testing.assert_close(after, after[:1].expand_as(after), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", ["last_prompt", "all"])
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_strength_zero_changes_no_bit(tiny_bridge, inputs, mode, tokens):
    before = logits(tiny_bridge, inputs)
    with applied(tiny_bridge, Steering(1, VECTOR, 0.0, tokens, mode)):
        assert torch.equal(logits(tiny_bridge, inputs), before)


def test_steering_twice_adds_up(tiny_bridge, inputs):
    other = VECTOR.flip(0)
    with applied(tiny_bridge, Steering(1, VECTOR), Steering(1, other, 2.0)):
        found = logits(tiny_bridge, inputs)
    with applied(tiny_bridge, Steering(1, VECTOR + 2 * other)):
        torch.testing.assert_close(found, logits(tiny_bridge, inputs), rtol=1e-4, atol=1e-4)


def test_the_model_is_restored_bit_for_bit(tiny_bridge, inputs):
    before = logits(tiny_bridge, inputs)
    handle = Steering(1, VECTOR).attach(tiny_bridge)
    assert not torch.equal(logits(tiny_bridge, inputs), before)
    handle.remove()
    assert torch.equal(logits(tiny_bridge, inputs), before)


def test_a_vector_in_half_precision_steers_a_model_in_float32(tiny_llama):
    batch = encode(tiny_llama, ["The capital of France is"])
    half = VECTOR.half()
    with applied(tiny_llama, Steering(1, half)):
        found = logits(tiny_llama, batch)
    with applied(tiny_llama, Steering(1, half.float())):
        assert torch.equal(found, logits(tiny_llama, batch))


@pytest.mark.parametrize("width", [1, 31, 33])
def test_a_vector_of_another_width_is_refused(tiny_llama, width):
    with pytest.raises(UserError, match=f"has {width} numbers, but the residual stream of this model has 32"):
        Steering(1, torch.ones(width)).attach(tiny_llama)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_does_not_exist_is_refused(tiny_llama, layer):
    with pytest.raises(UserError, match=f"Layer {layer} does not exist"):
        Steering(layer, VECTOR).attach(tiny_llama)


@pytest.mark.parametrize(
    "vector",
    [
        torch.full((32,), float("nan")),
        torch.cat([torch.ones(31), torch.tensor([float("inf")])]),
        torch.ones(1, 32),
        torch.tensor(1.0),
    ],
    ids=["NaN", "infinity", "matrix", "number"],
)
def test_a_vector_that_is_no_row_of_finite_numbers_is_refused(vector):
    with pytest.raises(UserError, match="A steering vector is a row of finite numbers"):
        Steering(1, vector)


def test_a_choice_of_tokens_that_does_not_exist_is_refused():
    unknown: Any = "first"
    with pytest.raises(UserError, match="no choice of tokens 'first'; choose among last_prompt"):
        Steering(1, VECTOR, tokens=unknown)


def test_a_mode_that_does_not_exist_is_refused():
    unknown: Any = "rotate"
    with pytest.raises(UserError, match="cannot 'rotate'; choose add or replace"):
        Steering(1, VECTOR, mode=unknown)
