"""Tiny random models of the architectures that the whole suite does not run on, each with settings other than usual."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from interp.conflicts import ConflictExample, ConflictSet

_SHARED: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_GROUPED = {**_SHARED, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_OF_GPT_2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 40}
_FALCON = {**_SHARED, "ffn_hidden_size": 48}
_COHERE = {**_GROUPED, "logit_scale": 0.3}

TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", _GROUPED),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "cohere": ("Cohere", _COHERE),
    "cohere-untied": ("Cohere", {**_COHERE, "use_qk_norm": True, "tie_word_embeddings": False}),
    "cohere2": (
        "Cohere2",
        {
            **_COHERE,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "falcon-7b": ("Falcon", {**_FALCON, "multi_query": True, "parallel_attn": True, "bias": True}),
    "falcon-40b": ("Falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-11b": (
        "Falcon",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-alibi": ("Falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gemma": ("Gemma", {**_GROUPED, "head_dim": 16}),
    "gpt-bigcode": ("GPTBigCode", _OF_GPT_2),
    "gpt-bigcode-heads": ("GPTBigCode", {**_OF_GPT_2, "multi_query": False}),
    "gptj": ("GPTJ", {**_OF_GPT_2, "rotary_dim": 4}),
    "gpt-oss": ("GptOss", {**_GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": (
        "Granite",
        {
            **_GROUPED,
            "residual_multiplier": 0.6,
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.4,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama4": (
        "Llama4Text",
        {
            **_GROUPED,
            "head_dim": 8,
            "intermediate_size_mlp": 40,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
    ),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2", _GROUPED),
    "olmo3": ("Olmo3", {**_GROUPED, "sliding_window": 6}),
    "olmoe": ("Olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "phi": ("Phi", {**_GROUPED, "qk_layernorm": True}),
    "phi3": ("Phi3", {**_GROUPED, "sliding_window": 6}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    ),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16, "mlp_only_layers": [0]}),
    "seed-oss": ("SeedOss", {**_GROUPED, "head_dim": 16, "attention_bias": True, "attention_out_bias": True}),
    "smollm3": ("SmolLM3", {**_GROUPED, "no_rope_layer_interval": 2}),
    "stablelm": ("StableLm", {**_GROUPED, "use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", {**_GROUPED, "use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2", {**_GROUPED, "sliding_window": 6}),
}
"""By name: the beginning of the configuration's class name, and its settings."""

CENTRED_AT_ZERO = ("gemma",)
"""Those whose norms scale by one plus their weight."""


def random_model(name: str, size: int = 61) -> Any:
    """A tiny model with random parameters, norms and biases too, in float64 and evaluation mode."""
    family, settings = TABLE[name]
    return random_model_of(family, settings, size, centred_at_zero=name in CENTRED_AT_ZERO)


def random_model_of(family: str, settings: dict[str, Any], size: int = 61, *, centred_at_zero: bool = False) -> Any:
    """The same of any family, given the beginning of its configuration's class name."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **settings, vocab_size=size, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # The other ways to run experts do not know float64.
    model.set_experts_implementation("eager")
    model.double().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and parameter_name.endswith("weight")
            centre = 1.0 if is_norm and not centred_at_zero else 0.0
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.3) + centre)
    model.tokenizer = word_tokenizer(size)
    return model


def word_tokenizer(size: int = 61) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w1, w2, ... and of ``<end>``, one token each."""
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", pad_token="<end>", unk_token="<end>"
    )


def word_conflicts(count: int = 4) -> ConflictSet:
    """Conflict prompts of seven words each, so that none is padded: eager attention in float64 is not finite there."""
    examples = []
    for i in range(count):
        other, own, subject = f"w{20 + i}", f"w{30 + i}", f"w{10 + i}"
        examples.append(
            ConflictExample(
                id=str(i),
                subject=subject,
                relation="capital",
                question=f"w1 w2 {subject}",
                contexts=(f"w3 {subject} w4 {other}",),
                memory_answers=(own,),
                context_answers=(other,),
                kind="conflict",
                template="short",
                source="words",
                prompt=f"w3 {subject} w4 {other} w1 w2 {subject}",
                bare_prompt=f"w1 w2 {subject}",
                split="test",
            )
        )
    return ConflictSet("words", tuple(examples))
