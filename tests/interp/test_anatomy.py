import pytest
import torch
from transformers import AutoModelForCausalLM, CTRLConfig, CTRLLMHeadModel

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.inputs import encode
from tests.tiny import tiny_conflicts


@pytest.fixture(scope="module")
def inputs(tiny_bridge):
    return encode(tiny_bridge, [e.prompt for e in tiny_conflicts()])


def recorded(bridge, inputs, sites):
    """What transformer_lens records at ``sites``."""
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            names_filter=sites,
        )
    return [cache[site] for site in sites]


def test_head_writes_sum_to_what_attention_wrote(tiny_bridge, inputs):
    anatomy = Anatomy(tiny_bridge)
    for layer in range(anatomy.n_layers):
        post_normed = anatomy.blueprint.attention_post_norm is not None
        written = f"blocks.{layer}.{'ln1_post' if post_normed else 'attn'}.hook_out"
        z, expected = recorded(tiny_bridge, inputs, [anatomy.site("output_projection", layer), written])
        heads, bias = anatomy.head_writes(layer, z.flatten(2).unflatten(-1, (anatomy.n_heads, anatomy.d_head)))
        torch.testing.assert_close(heads.sum(-2) + bias, expected, rtol=1e-4, atol=1e-5)


def test_a_step_gives_the_next_residual_stream(tiny_bridge, inputs):
    anatomy = Anatomy(tiny_bridge)
    for layer in range(anatomy.n_layers):
        sites = [f"blocks.{layer}.hook_in", anatomy.site("output_projection", layer), anatomy.site("block", layer)]
        residual, z, expected = recorded(tiny_bridge, inputs, sites)
        write = anatomy.attention_write(layer, z.flatten(2).unflatten(-1, (anatomy.n_heads, anatomy.d_head)))
        with torch.inference_mode():
            torch.testing.assert_close(anatomy.step(layer, residual, write), expected, rtol=1e-4, atol=1e-5)


def test_logits_of_the_final_residual_stream_are_the_models(tiny_bridge, inputs):
    anatomy = Anatomy(tiny_bridge)
    (final,) = recorded(tiny_bridge, inputs, [anatomy.site("block", anatomy.n_layers - 1)])
    with torch.inference_mode():
        expected = anatomy.model(**inputs).logits
        torch.testing.assert_close(anatomy.logits(final), expected, rtol=1e-4, atol=1e-5)
        chosen = torch.tensor([3, 5])
        torch.testing.assert_close(anatomy.logits(final, chosen), expected[..., chosen], rtol=1e-4, atol=1e-5)


def test_what_parts_write_to_the_logits_sums_to_the_models_up_to_biases(tiny_bridge, inputs):
    anatomy = Anatomy(tiny_bridge)
    (final,) = recorded(tiny_bridge, inputs, [anatomy.site("block", anatomy.n_layers - 1)])
    part = torch.randn(final.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, cap = anatomy.model(**inputs).logits, anatomy.logit_softcap
        expected = expected if cap is None else cap * torch.atanh(expected / cap)
        written = anatomy.written_logits(part, final) + anatomy.written_logits(final - part, final)
    biases = expected - written
    torch.testing.assert_close(biases, biases[:1, -1:].expand_as(biases), rtol=1e-3, atol=1e-3)


def test_module_paths_and_sites_name_the_same_tensors(tiny_bridge, inputs):
    anatomy = Anatomy(tiny_bridge)
    plain = plain_model(tiny_bridge).eval()
    seen = {}
    path = anatomy.path("output_projection", 1)
    plain.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
    plain.get_submodule(anatomy.path("mlp", 1)).register_forward_hook(lambda *args: seen.update(mlp=args[2]))
    with torch.inference_mode():
        plain(**inputs)
    z, mlp = recorded(tiny_bridge, inputs, [anatomy.site("output_projection", 1), anatomy.site("mlp", 1)])
    torch.testing.assert_close(seen["z"], z.flatten(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["mlp"], mlp, rtol=1e-4, atol=1e-5)


def test_every_part_is_a_module_and_a_site(tiny_bridge):
    anatomy = Anatomy(tiny_bridge)
    paths = [anatomy.path(part, layer) for part in anatomy.parts for layer in range(anatomy.n_layers)]
    sites = [anatomy.site(part, layer) for part in anatomy.parts for layer in range(anatomy.n_layers)]
    for part in ("embedding", "final_norm", "unembedding"):
        paths.append(anatomy.model_path(part))
        sites.append(anatomy.model_site(part))
    assert set(paths) <= {name for name, _ in plain_model(tiny_bridge).named_modules()}
    assert set(sites) <= set(tiny_bridge.hook_dict)


def test_a_part_that_the_architecture_lacks_is_an_error(tiny_llama):
    with pytest.raises(UserError, match="LlamaForCausalLM has no part 'mlp_post_norm'; it has block, attention_norm"):
        Anatomy(tiny_llama).path("mlp_post_norm", 0)


def plain_model(bridge):
    """The bridge's checkpoint as a plain transformers model."""
    return AutoModelForCausalLM.from_pretrained(bridge.original_model.config._name_or_path, attn_implementation="eager")


def test_unknown_architecture_lists_the_known_ones():
    config = CTRLConfig(n_embd=16, n_layer=1, n_head=2, dff=16, vocab_size=10)
    with pytest.raises(UserError, match=r"CTRLLMHeadModel is not known; known are .*LlamaForCausalLM"):
        Anatomy(CTRLLMHeadModel(config))


def test_a_layer_that_does_not_exist_is_an_error(tiny_llama):
    with pytest.raises(UserError, match="layers 0 to 2"):
        Anatomy(tiny_llama).path("mlp", 3)


def test_a_head_that_does_not_exist_is_an_error(tiny_llama):
    with pytest.raises(UserError, match="heads 0 to 3"):
        Anatomy(tiny_llama).checked_head(0, 4)
