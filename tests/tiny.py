"""Tiny random models of every architecture, with a tokenizer, as local directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from interp.conflicts import ConflictExample, ConflictSet, split_of
from interp.facts import load_facts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_SHARED: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
_CITIES = ("Rome", "Paris", "Tokyo", "Cairo", "Lima", "Oslo", "Quito", "Dakar")
_LANDS = ("Italy", "France", "Japan", "Egypt", "Peru", "Norway", "Ecuador", "Senegal")

CONFIGS: dict[str, Any] = {
    "gpt2": lambda size: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=size),
    "gpt-neox": lambda size: GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=size
    ),
    "gpt-neox-sequential": lambda size: GPTNeoXConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=size,
        use_parallel_residual=False,
    ),
    "llama": lambda size: LlamaConfig(**_SHARED, vocab_size=size),
    "mistral": lambda size: MistralConfig(**_SHARED, vocab_size=size, sliding_window=6),
    "qwen2": lambda size: Qwen2Config(**_SHARED, vocab_size=size),
    "qwen3": lambda size: Qwen3Config(**_SHARED, head_dim=16, vocab_size=size),
    "gemma2": lambda size: Gemma2Config(**_SHARED, head_dim=16, vocab_size=size, sliding_window=6),
    "gemma3": lambda size: Gemma3TextConfig(**_SHARED, head_dim=16, vocab_size=size, sliding_window=6),
}


FEW = ("gpt-neox", "mistral", "gemma2")
"""Blocks in parallel and with biases; k, v heads that are shared and a sliding window; norms after each part."""


@pytest.fixture(scope="session", params=FEW)
def few_bridges(request: pytest.FixtureRequest, tiny_model: Callable[[str], TransformerBridge]) -> TransformerBridge:
    """A few architectures in turn, for modules whose tests need no more: ``tiny_bridge = few_bridges``."""
    return tiny_model(request.param)


def architecture_of(bridge: TransformerBridge) -> str:
    """The name in ``CONFIGS`` of a tiny model."""
    network: Any = bridge.original_model
    return Path(network.config._name_or_path).name


def tiny_conflicts() -> ConflictSet:
    """Conflict prompts of different lengths about eight countries."""
    examples = []
    for i, (land, city) in enumerate(zip(_LANDS, _CITIES, strict=True)):
        other = _CITIES[(i + 3) % len(_CITIES)]
        for template, context in (
            ("short", f"The capital of {land} is {other}."),
            ("long", f"Note: {other} is, we hear, the capital of {land}. So"),
        ):
            examples.append(
                ConflictExample(
                    id=f"{land}/{template}",
                    subject=land,
                    relation="capital",
                    question=f"What is the capital of {land}?",
                    contexts=(context,),
                    memory_answers=(city,),
                    context_answers=(other,),
                    kind="conflict",
                    template=template,
                    source="tiny",
                    prompt=f"{context} The capital of {land} is",
                    bare_prompt=f"The capital of {land} is",
                    split=split_of(land, 0),
                )
            )
    return ConflictSet("tiny", tuple(examples))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the tiny prompts and the world's capitals."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{e.prompt} {e.memory_answers[0]}. {e.context_answers[0]}" for e in tiny_conflicts()]
    # Whole capitals, so that the answers of a study do not all start with the same token, a space.
    texts += [f" {fact.answers[0]}" for fact in load_facts("capital")] * 3
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>"
    )


def save_tiny(architecture: str, folder: Path) -> Path:
    """Write a tiny random model of ``architecture`` to ``folder``; every parameter is random, norms and biases too."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = CONFIGS[architecture](len(tokenizer))
    config.update({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the usual initialisation, so that attention patterns and norms are far from trivial.
            spread = 0.3 if parameter.ndim > 1 else 0.1
            centre = 1.0 if "norm" in name or (".ln_" in name and name.endswith("weight")) else 0.0
            if architecture.startswith("gemma"):
                centre = 0.0
            parameter.copy_(torch.randn_like(parameter) * spread + centre)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
