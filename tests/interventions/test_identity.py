import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp.bridges import load_bridge
from interp.errors import UserError
from interp.models import load_checkpoint
from interventions.bake import fold
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity, tokenizer_hash
from tests.tiny import CONFIGS


@pytest.fixture
def llama(tiny_directories) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_directories["llama"])


@pytest.fixture
def identity(llama) -> ModelIdentity:
    return ModelIdentity.of(llama, "tiny")


@pytest.mark.parametrize("architecture", CONFIGS)
def test_bridge_and_plain_model_are_the_same_and_so_is_any_half_precision_copy(tiny_directories, architecture):
    folder = str(tiny_directories[architecture])
    bridge = load_bridge(folder, device="cpu")
    model, tokenizer = load_checkpoint(folder)
    identity = ModelIdentity.of(bridge, "tiny")
    assert identity == ModelIdentity.of(model, "tiny", tokenizer)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = copy.deepcopy(model).to(dtype)
        identity.check(rounded, tokenizer)
        ModelIdentity.of(rounded, "tiny").check(model)


def test_the_real_model_is_told_from_a_copy_with_one_percent_of_noise(smollm2):
    identity = ModelIdentity.of(smollm2, "smollm2-135m")
    copied = copy.deepcopy(smollm2.original_model).to(torch.bfloat16)
    identity.check(copied)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.mul_(1 + 0.01 * torch.randn_like(weight))
    with pytest.raises(UserError, match="sampled weights differ"):
        identity.check(copied)


def test_another_model_of_the_shape_is_refused(llama, identity):
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(llama.config)
    with pytest.raises(UserError, match="62 sampled weights differ"):
        identity.check(other)


@pytest.mark.parametrize("part", ["q_proj", "v_proj", "o_proj", "down_proj", "embed_tokens"])
def test_one_changed_matrix_is_enough_to_be_another_model(llama, identity, part):
    changed = next(module for name, module in llama.named_modules() if name.endswith(part))
    with torch.no_grad():
        changed.weight.mul_(1.02)
    with pytest.raises(UserError, match="the model is another one of its shape, fine-tuned, or edited already"):
        identity.check(llama)


@pytest.mark.parametrize("scale", [0.0, 0.99, -1.0])
@pytest.mark.parametrize("head", [(0, 0), (0, 3), (1, 2), (2, 1)])
def test_a_model_with_one_scaled_head_folded_in_is_refused(llama, identity, head, scale):
    fold(llama, [HeadScaling.of([head], scale)])
    with pytest.raises(UserError, match="edited already"):
        identity.check(llama)


def test_rows_for_new_tokens_do_not_matter(llama, identity):
    llama.resize_token_embeddings(len(llama.get_input_embeddings().weight) + 7)
    identity.check(llama)


def test_another_tokenizer_is_refused(tiny_directories, llama):
    own: Any = AutoTokenizer.from_pretrained(tiny_directories["llama"])
    identity = ModelIdentity.of(llama, "tiny", own)
    identity.check(llama, AutoTokenizer.from_pretrained(tiny_directories["llama"]))
    own.add_tokens(["<|other|>"])
    assert tokenizer_hash(own) != identity.tokenizer
    with pytest.raises(UserError, match="with another tokenizer"):
        identity.check(llama, own)


def test_quantised_weights_are_passed_over_but_something_must_be_readable(llama, identity):
    layer = llama.model.layers[0].self_attn.o_proj
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.int8), requires_grad=False)
    identity.check(llama)
    # As GPTQ and AWQ do it: the module has no plain weight at all.
    del llama.model.layers[1].self_attn.q_proj.weight
    identity.check(llama)
    assert ModelIdentity.of(llama, "tiny").expected_weights().shape == (62,)
    with pytest.raises(UserError, match="cannot be read"):
        identity.check(llama.to("meta"))


@pytest.mark.parametrize("sample", ["", "AAAA", "A" * 301, "====", "gH8A" * 100])
def test_a_damaged_sample_is_refused(llama, identity, sample):
    damaged = identity.model_copy(update={"weights": sample})
    with pytest.raises(UserError, match="is damaged: it should hold 62 numbers"):
        damaged.check(llama)
