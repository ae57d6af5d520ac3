"""Make a small random copy of a model: the same class and settings, few layers, few heads, in float64.

What a model computes, other than how well, depends on its class and its settings, not on how large it is. The copy
keeps a layer of every kind, the width of a head, and how many heads share a key and value.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 7
"""How many tokens of a random prompt a copy reads at most."""
_VOCABULARY = 61
_MOST_EXPERTS = 16
_OF_MLP = ("intermediate", "ffn", "n_inner")


class Misfit(Exception):
    """What a model does that is not as expected: a part of a sentence, without a full stop."""


def small_copy(network: Any) -> Any:
    """Make a small random model of the same class and settings as a model.

    Args:
        network: A transformers model; its weights are not read.

    Returns:
        A model in float64 on the CPU, in evaluation mode, with eager attention. All of its parameters are random, those
        of norms and biases too: what is 1 or 0 when a model is made would hide what it does.

    Raises:
        Misfit: If there can be no such copy.
    """
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if not isinstance(getattr(network.config, name, None), int):
            raise Misfit(f"its configuration has no number {name}, as that of blocks with attention heads has")
    config = _shallow(network)
    narrow = copy.deepcopy(config)
    for name, value in _widths(config).items():
        setattr(narrow, name, value)
    try:
        return _made(type(network), narrow)
    except Misfit:
        # Some widths go together in ways that only the class knows.
        return _made(type(network), config)


def random_ids(network: Any, seed: int, length: int = LENGTH) -> Tensor:
    """Draw token ids, all different and none of them 0, ``(1, length)``, on the model's device."""
    embedding = network.get_input_embeddings().weight
    ids = torch.randperm(min(len(embedding), 1000) - 1, generator=torch.Generator().manual_seed(seed))[:length] + 1
    return ids[None].to(embedding.device)


def _made(kind: type[Any], config: Any) -> Any:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            small = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
            # The other ways to run experts do not know float64.
            small.set_experts_implementation("eager")
            small = small.double().eval().requires_grad_(False)
            _randomise(small)
            with torch.inference_mode():
                logits = small(input_ids=random_ids(small, 0), use_cache=False).logits
    # Whatever a model stumbles over that was not made to be this small.
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise Misfit(f"no small copy of it runs in float64 ({reason or type(error).__name__})") from error
    if not logits.isfinite().all():
        raise Misfit("a small random copy of it gives no numbers in float64")
    return small


def _shallow(network: Any) -> Any:
    """The configuration with few layers and tokens."""
    count, config = network.config.num_hidden_layers, copy.deepcopy(network.config)
    depth = _depth(network)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, value[:depth])
    config.num_hidden_layers = depth
    config.vocab_size = min(config.vocab_size, _VOCABULARY)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    return config


def _depth(network: Any) -> int:
    """How many of the first layers it takes to have one of every kind, two at least."""
    count = network.config.num_hidden_layers
    lists = [value for value in network.config.to_dict().values() if isinstance(value, list) and len(value) == count]
    stacks = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    kinds = [
        (*(str(values[layer]) for values in lists), *(_kind(stack[layer]) for stack in stacks))
        for layer in range(count)
    ]
    return min(count, max(2, *(1 + kinds.index(kind) for kind in set(kinds))))


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What tells a kind of block: its modules, their shapes, and what is switched on or named in them."""
    return tuple(
        (
            path,
            type(module).__name__,
            tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False)),
            tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, bool | str) and k != "training")),
        )
        for path, module in block.named_modules()
    )


def _widths(config: Any) -> dict[str, int]:
    """Smaller numbers for all settings that count heads or experts, or are widths of the stream or of MLPs."""
    settings = {name: value for name, value in config.to_dict().items() if type(value) is int}
    heads = {n: v for n, v in settings.items() if "head" in n and not ("dim" in n or "size" in n) and v > 1}
    if not heads:
        return {}
    # With two heads, or one key for all, other orders of heads would be rare or look the same.
    most, fewest = max(heads.values()), min(heads.values())
    factors = [d for d in range(1, fewest + 1) if all(n % d == 0 for n in heads.values())]
    factor = max(d for d in factors if d == 1 or (fewest // d >= 2 and most // d >= 4))
    widths = {n: v for n, v in settings.items() if v == config.hidden_size or any(part in n for part in _OF_MLP)}
    experts = {n: v for n, v in settings.items() if "experts" in n and v > _MOST_EXPERTS and v % _MOST_EXPERTS == 0}
    narrow = {name: value // factor for name, value in {**heads, **widths}.items() if value % factor == 0}
    return {**narrow, **dict.fromkeys(experts, _MOST_EXPERTS)}


def _randomise(network: Any) -> None:
    for value in network.state_dict().values():
        if value.is_floating_point() and value.ndim < 2:
            value += torch.randn_like(value) * (0.1 + 0.1 * value.abs().clamp(max=1))
        elif value.is_floating_point():
            # Small enough for attention to look at more than one token.
            value.copy_(torch.randn_like(value) * 0.7 * value.shape[-1] ** -0.5)
