from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp.bridges import bridge_around, load_bridge
from interp.errors import UserError
from interp.models import DTYPES, load_model
from tests.tiny import CONFIGS, save_tiny


def test_prompts_are_tokenised_as_the_models_own_tokenizer_does(smollm2):
    text = "The capital of France is"
    assert smollm2.to_tokens(text)[0].tolist() == smollm2.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_bridge_has_the_hooks_of_one_that_transformer_lens_loads_itself(tiny_directories, architecture):
    folder = str(tiny_directories[architecture])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs: Any = TransformerBridge.boot_transformers(folder, device="cpu", tokenizer=tokenizer)
    ours = load_bridge(folder, device="cpu")
    assert ours.hook_dict.keys() == theirs.hook_dict.keys()
    ids = torch.arange(1, 13).view(2, 6)
    own, cache = ours.run_with_cache(ids)
    expected, expected_cache = theirs.run_with_cache(ids)
    assert cache.keys() == expected_cache.keys()
    assert "blocks.1.attn.hook_pattern" in cache
    torch.testing.assert_close(own, expected)
    for site in expected_cache:
        torch.testing.assert_close(cache[site], expected_cache[site])


def test_a_bridge_is_made_on_the_same_weights_and_the_model_goes_on_working(tiny_directories):
    model: Any = load_model(str(tiny_directories["mistral"]), device="cpu")
    weights = {weight.data_ptr() for weight in model.parameters()}
    ids = torch.arange(1, 7)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        bridge = bridge_around(model)
        torch.testing.assert_close(model(ids).logits, expected)
    assert bridge.original_model is model
    assert bridge.tokenizer is model.tokenizer
    # transformer_lens gives the unembedding a bias of zeros.
    new = [name for name, weight in bridge.named_parameters() if weight.data_ptr() not in weights]
    assert all(name.endswith("bias") for name in new)


def odd(folder: Path, architecture: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    usual = CONFIGS[architecture]

    def config(size: int) -> Any:
        return type(usual(size)).from_dict(usual(size).to_dict() | options)

    monkeypatch.setitem(CONFIGS, architecture, config)
    return str(save_tiny(architecture, folder))


@pytest.mark.parametrize(
    ("architecture", "option", "value"),
    [("gpt2", "scale_attn_weights", False), ("gemma3", "attn_logit_softcapping", 2.0)],
)
def test_an_option_that_transformer_lens_ignores_is_an_error(tmp_path, monkeypatch, architecture, option, value):
    name = odd(tmp_path, architecture, monkeypatch, **{option: value})
    way_out = "load the model again, and work without a bridge"
    found = rf"its logits are \d+\.\d% off\).* perhaps one of {option}={value}; {way_out}"
    with pytest.raises(UserError, match=found):
        load_bridge(name, device="cpu")
    load_model(name, device="cpu")


def test_how_far_a_bridge_is_off_is_what_a_user_would_measure(tmp_path, monkeypatch):
    name = odd(tmp_path, "gpt2", monkeypatch, scale_attn_weights=False)
    ids = torch.arange(8).view(2, 4) * 7919 % 1096
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]])
    own: Any = AutoModelForCausalLM.from_pretrained(name)
    bridge: Any = TransformerBridge.boot_transformers(name, device="cpu", tokenizer=AutoTokenizer.from_pretrained(name))
    with torch.inference_mode():
        theirs, ours = (
            model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
            for model in (own, bridge.original_model)
        )
    distance = (theirs - ours).norm() / theirs.norm()
    with pytest.raises(UserError, match=rf"logits are {distance:.1%} off"):
        load_bridge(name, device="cpu")


def test_a_model_that_transformer_lens_stumbles_over_is_one_sentence(tmp_path, monkeypatch):
    name = odd(tmp_path, "gpt-neox", monkeypatch, attention_bias=False)
    with pytest.raises(
        UserError,
        match=r"cannot wrap the model .* \(AssertionError\).* attention_bias=False; load the model again, and work",
    ):
        load_bridge(name, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_bridge_computes_what_the_model_computes(tiny_directories, architecture, dtype):
    ids = torch.arange(1, 13).view(2, 6)
    own: Any = AutoModelForCausalLM.from_pretrained(
        tiny_directories[architecture], dtype=DTYPES[dtype], attn_implementation="eager"
    )
    bridge: Any = load_bridge(str(tiny_directories[architecture]), device="cpu", dtype=dtype)
    with torch.inference_mode():
        found, expected = bridge.original_model(ids).logits.float(), own(ids).logits.float()
    assert (found - expected).norm() < 16 * torch.finfo(DTYPES[dtype]).eps * expected.norm()
