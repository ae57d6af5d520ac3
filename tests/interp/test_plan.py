"""What a configuration says a model takes is what PyTorch counts and allocates when that model runs."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    T5Config,
)

from docs.plan import CONFIGS as LARGE
from interp import plan
from interp.anatomy import Anatomy
from interp.attribution.path_patching import path_patching
from interp.errors import UserError
from interp.models import load_config
from interp.plan import Shapes, weight_bytes
from interp.teacher_forcing import Continued
from interventions.fitting.gauss_newton import gradients_by_row
from interventions.fitting.scale_data import answer_losses, scale_places
from tests.allocated import peak_bytes
from tests.architectures import TABLE, random_model, word_conflicts, word_tokenizer
from tests.tiny import CONFIGS

_WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
}
_TOKENS: dict[str, Any] = {"vocab_size": 5000, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
WIDE = {
    "llama": LlamaConfig(**_WIDE, **_TOKENS),
    "gemma2": Gemma2Config(**_WIDE, **_TOKENS, head_dim=32),
    "gpt2": GPT2Config(n_embd=128, n_layer=4, n_head=8, n_positions=1024, **_TOKENS),
    "mixtral": MixtralConfig(**_WIDE, **_TOKENS),
}


def tiny(name: str) -> Any:
    """A tiny model of any architecture, in float32."""
    if name in TABLE:
        return random_model(name).float().requires_grad_(False)
    config = CONFIGS[name](200)
    config.update({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def wide(name: str, dtype: torch.dtype, attention: str = "eager") -> Any:
    """A model whose activations are tens of megabytes."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(WIDE[name]), attn_implementation=attention, dtype=dtype)
    model.tokenizer = word_tokenizer()
    return model.eval().requires_grad_(False)


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [*TABLE, *CONFIGS])
def test_passes_take_what_pytorch_counts_in_every_architecture(name):
    model = tiny(name)
    shapes = Shapes.of(model.config)
    assert shapes.parameters == sum(weight.numel() for weight in model.parameters())
    ids = torch.randint(1, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    body = Anatomy(model).body
    with torch.inference_mode():
        assert shapes.pass_flops(40) == pytest.approx(counted(lambda: body(ids, use_cache=False)), rel=0.01)
        cache = body(ids[:, :5], use_cache=True).past_key_values.layers
    assert shapes.cache_bytes(5, 4) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "falcon-40b", "mixtral", "gpt-oss"])
def test_answers_take_what_pytorch_counts(name):
    model = tiny(name)
    ids = torch.randint(1, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = counted(lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))
    assert Shapes.of(model.config).answer_flops(20, 8) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("name", ["gpt-bigcode", "llama4", "mixtral", "phi", "qwen2-moe", "stablelm"])
def test_path_patching_takes_what_pytorch_counts(name):
    model, prompts = random_model(name), word_conflicts(4)
    shapes = Shapes.of(model.config)
    expected = shapes.pass_flops(7) + shapes.sweep_flops() + shapes.unembedding_flops
    assert 4 * expected == pytest.approx(counted(lambda: path_patching(model, prompts, name=name)), rel=0.02)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "llama", "phi", "stablelm"])
def test_gradients_by_scales_take_what_pytorch_counts(name):
    model = tiny(name)
    expected = 5 * Shapes.of(model.config).training_flops(30, 1, 1, guarded=False)
    assert expected == pytest.approx(counted(lambda: _trained(model, 30, 5)), rel=0.1)


def _trained(model: Any, tokens: int, count: int) -> None:
    items = [Continued(tuple(range(1, tokens + 1)), 1)] * count
    places = scale_places(model, feed_forward=False)
    scales = torch.ones(len(places))
    gradients_by_row(
        model, places, scales, items, lambda log_p, batch: [answer_losses(log_p, [items[i] for i in batch])]
    )


# GPT-2's eager softmax stays in bfloat16, so that it takes less than is said; Gemma 2 has no fused attention.
@pytest.mark.parametrize(
    ("name", "dtype", "attention"),
    [
        *((name, torch.float32, "eager") for name in WIDE),
        *((name, torch.bfloat16, "eager") for name in WIDE if name != "gpt2"),
        *((name, dtype, "sdpa") for name in ("llama", "gpt2") for dtype in (torch.float32, torch.bfloat16)),
    ],
)
@pytest.mark.parametrize(("tokens", "rows"), [(64, 4), (480, 1)])
def test_a_pass_allocates_about_what_is_said(name, dtype, attention, tokens, rows):
    body = Anatomy(wide(name, dtype, attention)).body
    ids = torch.randint(1, 5000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    @torch.inference_mode()
    def run() -> None:
        body(input_ids=ids, attention_mask=mask, use_cache=False)

    said = rows * Shapes.of(WIDE[name]).pass_bytes(tokens, dtype.itemsize, eager=attention == "eager")
    assert 1 / 1.5 < said / peak_bytes(run) < 1.5


@pytest.mark.parametrize(("tokens", "rows"), [(32, 16), (480, 1)])
@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager"), ("gpt2", "eager")]
)
def test_training_allocates_about_what_is_said(name, attention, tokens, rows):
    model, shapes, eager = wide(name, torch.float32, attention), Shapes.of(WIDE[name]), attention == "eager"
    said = rows * (shapes.training_bytes(tokens, 4, eager=eager) + shapes.pass_bytes(tokens, 4, eager=eager))
    assert 1 / 1.5 < said / peak_bytes(lambda: _trained(model, tokens, rows)) < 1.5


def test_attention_is_fused_where_transformers_fuses_it():
    for config in WIDE.values():
        loaded = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        assert Shapes.of(config).fused == (loaded.config._attn_implementation == "sdpa")
    assert [name for name, config in WIDE.items() if not Shapes.of(config).fused] == ["gemma2"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_sweep_allocates_no_more_than_is_said(name, monkeypatch):
    model, prompts, budget = wide(name, torch.float32), word_conflicts(32), 2**24
    assert inspect.signature(path_patching).parameters["memory_budget"].default == plan._SWEEP_BYTES
    monkeypatch.setattr(plan, "_SWEEP_BYTES", budget)
    said = Shapes.of(WIDE[name]).sweep_bytes(32, 4)
    with pytest.warns(UserWarning, match="start with the first token"):
        found = peak_bytes(lambda: path_patching(model, prompts, name=name, memory_budget=budget))
    assert said / 2 < found < said * 1.1


def test_models_have_the_parameters_that_were_published():
    """Numbers of parameters as the checkpoints' own metadata counts them."""
    configs = LARGE | {"SmolLM2-135M": load_config("smollm2-135m")}
    counts = {name: Shapes.of(config).parameters for name, config in configs.items()}
    assert counts == {"Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496, "SmolLM2-135M": 134_515_008}


def test_tied_weights_count_once():
    separate, tied = (Shapes.of(LlamaConfig(**_WIDE, **_TOKENS, tie_word_embeddings=tie)) for tie in (False, True))
    assert separate.parameters - tied.parameters == separate.outside - tied.outside == 128 * 5000


def test_weights_are_spread_by_whole_blocks():
    shapes = Shapes.of(LARGE["Llama-3.1-8B"])
    assert weight_bytes(shapes, 2) == 2 * shapes.parameters
    block = (shapes.parameters - shapes.outside) // 32
    # Seven blocks on the fullest of five devices; the embedding on the first, the unembedding on the last.
    assert weight_bytes(shapes, 2, 5) == 2 * (7 * block + shapes.outside // 2)


@pytest.mark.parametrize(
    ("about", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        # As the paper counts it: 0.127 bits a number (Dettmers et al. 2023, 2305.14314, section 3).
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4.127),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, 8),
        ({"quant_method": "quanto", "weights": "int4"}, 4),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 8),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}},
                "ignore": ["lm_head"],
            },
            4.125,
        ),
    ],
)
def test_quantised_weights_take_the_bits_that_the_configuration_says(about, bits):
    config = copy.deepcopy(LARGE["Llama-3.1-8B"])
    plain = Shapes.of(config)
    config.quantization_config = about
    shapes = Shapes.of(config)
    # Four projections of attention, of which two have a quarter of the heads, and three of the MLP.
    numbers = 32 * (4096 * 4096 * 5 // 2 + 3 * 4096 * 14336)
    assert shapes.quantised == numbers
    assert weight_bytes(shapes, 2) == pytest.approx(2 * (plain.parameters - numbers) + bits / 8 * numbers, rel=1e-4)


def test_what_is_left_unquantised_or_is_not_known_counts_in_the_dtype():
    config = copy.deepcopy(LARGE["Llama-3.1-8B"])
    config.quantization_config = {"quant_method": "gptq", "bits": 4, "modules_to_not_convert": ["mlp"]}
    assert Shapes.of(config).quantised == 32 * 4096 * 4096 * 5 // 2
    config.quantization_config = {"quant_method": "of tomorrow", "bits": 4}
    assert Shapes.of(config).quantised == 0


def test_the_configuration_is_left_as_it_was():
    config = copy.deepcopy(WIDE["mixtral"])
    before = copy.deepcopy(config.__dict__)
    Shapes.of(config)
    assert config.__dict__ == before


def test_of_a_directory_only_the_configuration_is_read(tmp_path):
    config = LlamaConfig(**_WIDE, **_TOKENS, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert Shapes.of(load_config(str(tmp_path))) == Shapes.of(config)


def test_wrong_configurations_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"^No model can be built from this configuration \(.*; give that of"):
        Shapes.of(T5Config())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^Could not read the configuration of .*; give one of smollm2-135m"):
        load_config(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_config(str(tmp_path / "empty"))


def test_an_adapter_and_a_vision_language_model_have_the_configuration_of_their_language_model(tmp_path):
    text = LlamaConfig(**_WIDE, **_TOKENS, architectures=["LlamaForCausalLM"])
    text.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    record = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(record))
    assert Shapes.of(load_config(str(tmp_path / "adapter"))) == Shapes.of(text)
    LlavaConfig(text_config=text, architectures=["LlavaForConditionalGeneration"]).save_pretrained(tmp_path / "whole")
    assert Shapes.of(load_config(str(tmp_path / "whole"))) == Shapes.of(text)
