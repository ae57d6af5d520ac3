import copy
from typing import Any

import pytest
import torch

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.inputs import encode
from interventions.base import applied
from interventions.heads import HeadScaling, ScaledHead
from tests.tiny import architecture_of, few_bridges, tiny_conflicts

tiny_bridge = few_bridges
HEADS = [(0, 1), (1, 0), (1, 3), (2, 2)]


@pytest.fixture(scope="module")
def inputs(tiny_bridge):
    return encode(tiny_bridge, [e.prompt for e in tiny_conflicts()])


@pytest.fixture(scope="module")
def plain(tiny_bridge, tiny_plain):
    """The same weights as a plain transformers model."""
    return tiny_plain(architecture_of(tiny_bridge))


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


def with_scaled_weights(plain, heads, scale):
    """Logits of the plain model with these heads' rows of W_O multiplied in the weights themselves."""
    anatomy = Anatomy(plain)
    edited = copy.deepcopy(plain)
    for layer, head in heads:
        projection: Any = edited.get_submodule(anatomy.path("output_projection", layer))
        columns = slice(head * anatomy.d_head, (head + 1) * anatomy.d_head)
        with torch.no_grad():
            if isinstance(projection, torch.nn.Linear):
                projection.weight[:, columns] *= scale
            else:
                projection.weight[columns] *= scale
    return edited


@pytest.mark.parametrize("scale", [0.0, -1.5, 3.0])
def test_scaling_heads_equals_scaling_their_output_weights(tiny_bridge, plain, inputs, scale):
    expected = logits(with_scaled_weights(plain, HEADS, scale), inputs)
    for model in (tiny_bridge.original_model, plain):
        with applied(model, HeadScaling.of(HEADS, scale)):
            torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_the_bridge_itself_is_edited_too(tiny_bridge, plain, inputs):
    expected = logits(with_scaled_weights(plain, HEADS, 0.0), inputs)
    with applied(tiny_bridge, HeadScaling.of(HEADS, 0.0)), torch.inference_mode():
        found = tiny_bridge(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], position_ids=inputs["position_ids"]
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_mean_ablation_replaces_z_by_the_mean(tiny_bridge, inputs):
    anatomy = Anatomy(tiny_bridge)
    means = torch.randn(anatomy.n_layers, anatomy.n_heads, anatomy.d_head)
    seen = {}
    with applied(tiny_bridge, HeadScaling.mean_ablation([(1, 2)], means)):
        handle = anatomy.module("output_projection", 1).register_forward_pre_hook(
            lambda _, args: seen.update(z=args[0])
        )
        logits(anatomy.model, inputs)
        handle.remove()
    z = seen["z"].unflatten(-1, (anatomy.n_heads, anatomy.d_head))
    torch.testing.assert_close(z[:, :, 2], means[1, 2].expand_as(z[:, :, 2]))


def test_scale_one_changes_no_bit(tiny_bridge, inputs):
    before = logits(tiny_bridge.original_model, inputs)
    with applied(tiny_bridge, HeadScaling.of(HEADS, 1.0)):
        assert torch.equal(logits(tiny_bridge.original_model, inputs), before)


def test_tokens_are_the_same_with_and_without_cache(tiny_bridge, plain, inputs):
    generated = []
    for model in (tiny_bridge.original_model, plain):
        with applied(model, HeadScaling.of(HEADS, -2.0)):
            for cached in (True, False):
                generated.append(
                    model.generate(
                        input_ids=inputs["input_ids"],
                        attention_mask=inputs["attention_mask"],
                        max_new_tokens=8,
                        do_sample=False,
                        use_cache=cached,
                    )
                )
    assert all(torch.equal(tokens, generated[0]) for tokens in generated)


def test_the_model_is_restored_bit_for_bit_after_an_exception(tiny_llama):
    batch = encode(tiny_llama, ["The capital of France is"])
    before = logits(tiny_llama.original_model, batch)
    with pytest.raises(RuntimeError), applied(tiny_llama, HeadScaling.of(HEADS, 0.0)):
        assert not torch.equal(logits(tiny_llama.original_model, batch), before)
        raise RuntimeError
    assert torch.equal(logits(tiny_llama.original_model, batch), before)


def test_a_handle_removes_only_its_own_intervention(tiny_llama):
    batch = encode(tiny_llama, ["The capital of France is"])
    with applied(tiny_llama, HeadScaling.of([(1, 1)], 0.0)):
        expected = logits(tiny_llama.original_model, batch)
    first = HeadScaling.of([(0, 0)], 0.0).attach(tiny_llama)
    second = HeadScaling.of([(1, 1)], 0.0).attach(tiny_llama)
    first.remove()
    first.remove()
    assert torch.equal(logits(tiny_llama.original_model, batch), expected)
    second.remove()


def test_composed_scales_multiply(tiny_llama):
    batch = encode(tiny_llama, ["The capital of France is"])
    with applied(tiny_llama, HeadScaling.of([(1, 1)], 3.0), HeadScaling.of([(1, 1)], -0.5)):
        found = logits(tiny_llama.original_model, batch)
    with applied(tiny_llama, HeadScaling.of([(1, 1)], -1.5)):
        expected = logits(tiny_llama.original_model, batch)
    torch.testing.assert_close(found, expected)


def test_one_that_does_not_fit_leaves_none_attached(tiny_llama):
    batch = encode(tiny_llama, ["The capital of France is"])
    before = logits(tiny_llama.original_model, batch)
    misfit = HeadScaling.of([(2, 9)], 0.0)
    with (
        pytest.raises(UserError, match=r"Head 2\.9 does not exist"),
        applied(tiny_llama, HeadScaling.of(HEADS, 0.0), misfit),
    ):
        pass
    assert torch.equal(logits(tiny_llama.original_model, batch), before)


def test_a_mean_of_the_wrong_length_is_an_error(tiny_llama):
    with pytest.raises(UserError, match=r"mean of head 0\.0 has 3 numbers"):
        HeadScaling((ScaledHead(0, 0, 0.0, (1.0, 2.0, 3.0)),)).attach(tiny_llama)


def test_a_head_listed_twice_is_an_error():
    with pytest.raises(UserError, match=r"Head 1\.2 is listed twice"):
        HeadScaling.of([(1, 2), (1, 2)], 0.0)
