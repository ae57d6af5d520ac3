"""Say from a configuration alone what commands take: memory, matrix products and disk, before any weight is read.

1. The model is built without storage (PyTorch's "meta" device), which gives the shape of every parameter and of its keys
   and values.
2. FLOPs are twice the multiply-adds of matrix products, over all pairs of tokens in attention: what
   ``torch.utils.flop_counter`` counts. An expert counts for the tokens that are sent to it; in memory all experts do.
3. Memory is weights, keys and values, and the largest tensors that live at once while a command runs one batch.

Memory is an estimate: what allocators and kernels need comes on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.generation import BATCH_SIZE

ANSWER_TOKENS, ASK_TOKENS, GENERATE_TOKENS = 8, 12, 24
"""Longest answers of ``evaluate``, ``ask`` and ``generate``, in tokens, where no other is asked for."""

_FLOAT32 = 4
# Of a score of eager attention: what goes into the softmax, its float32 result, and that in the model's dtype.
_SCORE_BYTES = 8
# Rows of logits in float32 that choosing a token takes at once.
_CHOOSING = 3
# Path patching: bytes of a sweep, and rows of an MLP at least.
_SWEEP_BYTES, _SWEEP_ROWS = 2**29, 64
# A step of dial fit: prompts of each kind, tokens of bare prompts and texts, tokens of a batch, models that are kept.
_CONFLICTS, _WITH_CONTEXT, _BARE, _TEXTS = 36, 16, 16, 8
_BARE_TOKENS, _TEXT_TOKENS, _STEP_TOKENS, _AVERAGES = 16, 48, 512, 6


@dataclass(frozen=True)
class Shapes:
    """Shapes of a model, which decide what it takes.

    Attributes:
        architecture: Class name of the transformers model.
        parameters: How many there are; tied ones count once.
        outside: Of these, those outside the blocks: embedding, unembedding and final norm.
        n_layers, n_heads, d_head, d_model, d_mlp, d_vocab: As in ``Anatomy``.
        attention_weights: Multiply-adds of a token in the projections of attention, for each layer.
        output_weights: The same in the output projection of one layer.
        mlp_weights: The same in the MLP, for each layer; of experts those that a token is sent to.
        cached: Numbers that keys and values of a token take in the cache, for each layer.
        windows: Tokens that the cache of each layer keeps; ``None`` keeps all.
        positions: Tokens that the model reads at most; ``None`` where its configuration names no limit.
    """

    architecture: str
    parameters: int
    outside: int
    n_layers: int
    n_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    attention_weights: tuple[int, ...]
    output_weights: int
    mlp_weights: tuple[int, ...]
    cached: tuple[int, ...]
    windows: tuple[int | None, ...]
    positions: int | None

    @classmethod
    def of(cls, config: Any) -> Shapes:
        """Take the shapes of the model that a transformers configuration describes.

        Raises:
            UserError: If it describes no causal language model, or one of an architecture that is not known.
        """
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config).eval()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"No model can be built from this configuration ({reason}); give that of a causal language model."
            ) from error
        anatomy = Anatomy(model)
        chosen = _experts_of_a_token(model)
        blocks = [anatomy.module("block", layer) for layer in range(anatomy.n_layers)]
        attention = [_projections(anatomy, layer) for layer in range(anatomy.n_layers)]
        parameters = sum(weight.numel() for weight in model.parameters())
        with torch.inference_mode():
            token = torch.zeros(1, 1, dtype=torch.long, device="meta")
            cache = anatomy.body(token, use_cache=True).past_key_values.layers
        return cls(
            architecture=anatomy.architecture,
            parameters=parameters,
            outside=parameters - sum(weight.numel() for block in blocks for weight in block.parameters()),
            n_layers=anatomy.n_layers,
            n_heads=anatomy.n_heads,
            d_head=anatomy.d_head,
            d_model=anatomy.d_model,
            d_mlp=anatomy.d_mlp,
            d_vocab=anatomy.d_vocab,
            attention_weights=tuple(attention),
            output_weights=anatomy.output_matrix(0).numel(),
            mlp_weights=tuple(_multiplied(b, chosen) - a for b, a in zip(blocks, attention, strict=True)),
            cached=tuple(layer.keys.numel() + layer.values.numel() for layer in cache),
            windows=tuple(getattr(layer, "sliding_window", None) for layer in cache),
            positions=getattr(model.config, "max_position_embeddings", None),
        )

    @property
    def block_weights(self) -> int:
        """Multiply-adds of a token in all blocks, attention scores left out."""
        return sum(self.attention_weights) + sum(self.mlp_weights)

    @property
    def unembedding_flops(self) -> int:
        """FLOPs of one token's logits."""
        return 2 * self.d_model * self.d_vocab

    def pass_flops(self, tokens: int) -> int:
        """FLOPs of a forward pass over a prompt, without the unembedding."""
        return 2 * self.block_weights * tokens + self.n_layers * self._pair_flops * tokens**2

    def answer_flops(self, tokens: int, new_tokens: int) -> int:
        """FLOPs of reading a prompt and going on from it with keys and values kept."""
        reached = range(tokens + 1, tokens + new_tokens)
        pairs = sum(min(end, window or end) for end in reached for window in self.windows)
        decoded = 2 * self.block_weights * len(reached) + self._pair_flops * pairs
        return self.pass_flops(tokens) + decoded + new_tokens * self.unembedding_flops

    def sweep_flops(self) -> int:
        """FLOPs of path patching all heads of one prompt, once its forward pass is recorded."""
        streams = [1 + (layer + 1) * self.n_heads for layer in range(self.n_layers)]
        mlps = sum(2 * weights * count for weights, count in zip(self.mlp_weights, streams, strict=True))
        return mlps + 4 * self.output_weights * self.n_layers + 4 * self.d_model * streams[-1]

    def training_flops(self, tokens: int, predicted: int, losses: int, *, guarded: bool) -> int:
        """FLOPs of a prompt's losses and their gradients by the scales of all heads.

        Args:
            tokens: Tokens of the prompt.
            predicted: Tokens whose logits are taken.
            losses: How many, each with a backward pass of its own.
            guarded: Whether the unedited model's logits are computed too.
        """
        # Weights have no gradients, and nothing before the first layer's scales has.
        first = self.attention_weights[0] - self.output_weights
        pairs = 2 * self._pair_flops * tokens**2
        backward = 2 * (self.block_weights - first) * tokens + (self.n_layers - 1) * pairs
        logits = (1 + losses + guarded) * predicted * self.unembedding_flops
        return self.pass_flops(tokens) + losses * backward + logits

    def pass_bytes(self, tokens: int, itemsize: int, *, eager: bool = True) -> int:
        """Bytes of the tensors that live at once in a forward pass over a prompt, weights and cache left out.

        Args:
            tokens: Tokens of the prompt.
            itemsize: Bytes of a number.
            eager: Whether attention weights are written out, as they are where they can be looked at.
        """
        pairs = self.n_heads * tokens**2 if eager else 0
        heads = tokens * 4 * self.n_heads * self.d_head * itemsize
        widest = tokens * max(self.mlp_weights) // self.d_model * itemsize
        in_norm = tokens * 3 * self.d_model * _FLOAT32
        largest = max(heads + _SCORE_BYTES * pairs, widest + itemsize * pairs, in_norm)
        return largest + 2 * tokens * self.d_model * itemsize + (itemsize * tokens**2 if eager else 0)

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        kept = (min(tokens, window or tokens) for window in self.windows)
        return itemsize * sum(numbers * count for numbers, count in zip(self.cached, kept, strict=True))

    def training_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes that a forward pass over a prompt keeps for the backward pass, with eager attention."""
        heads = 5 * self.n_layers * self.n_heads * self.d_head
        mlps = sum(self.mlp_weights) // self.d_model
        norms = 2 * self.n_layers * self.d_model * _FLOAT32
        scores = _FLOAT32 + (itemsize if itemsize < _FLOAT32 else 0)
        pairs = self.n_layers * self.n_heads * tokens**2
        return tokens * (itemsize * (heads + mlps) + norms) + scores * pairs + _SCORE_BYTES * self.n_heads * tokens**2

    def sweep_bytes(self, itemsize: int) -> int:
        """Bytes of the streams that path patching sweeps over the layers at once, and of one step of them."""
        half, streams = _SWEEP_BYTES // (2 * itemsize), 1 + self.n_layers * self.n_heads
        stream, row = 4 * self.d_model, 3 * self.d_mlp + 4 * self.d_model
        prompts = max(1, half // (stream * streams))
        rows = min(max(_SWEEP_ROWS, half // row), prompts * streams)
        return itemsize * (prompts * streams * stream + rows * row)

    @property
    def _pair_flops(self) -> int:
        """FLOPs of one layer's attention from one token to another: their score, and a value that is added."""
        return 4 * self.n_heads * self.d_head


@dataclass(frozen=True)
class Setting:
    """What is asked.

    Attributes:
        prompt_tokens: Tokens of a prompt.
        itemsize: Bytes of a number of the model: 4 in float32, 2 in bfloat16 and float16.
        new_tokens: Longest answer; ``None`` is each command's own.
        batch_size: Prompts per batch; ``None`` is each command's own.
        prompts: How many there are.
    """

    prompt_tokens: int
    itemsize: int = 4
    new_tokens: int | None = None
    batch_size: int | None = None
    prompts: int = 256


@dataclass(frozen=True)
class Need:
    """What a command takes.

    Attributes:
        command: The command, and how it is used.
        prompt_tokens: Tokens of a prompt.
        batch: Prompts per batch.
        flops: Of one prompt; of ``dial fit`` those of one step.
        batch_bytes: Of a batch, for each of its prompts.
        other_bytes: What another part of the command takes when there is no batch.
        kept_bytes: What is there all the time beside the weights.
        disk_bytes: What is written to disk for all prompts.
    """

    command: str
    prompt_tokens: int
    batch: int
    flops: int
    batch_bytes: int
    other_bytes: int = 0
    kept_bytes: int = 0
    disk_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that the command takes beside the weights."""
        return self.kept_bytes + max(self.other_bytes, self.batch * self.batch_bytes)


def needs(shapes: Shapes, setting: Setting) -> list[Need]:
    """Say what each command takes.

    Args:
        shapes: The model.
        setting: What is asked.

    Raises:
        UserError: If a number is below 1, or the model cannot read so many tokens.
    """
    given = {name: value for name, value in vars(setting).items() if value is not None}
    if wrong := [name for name, value in given.items() if value < 1]:
        raise UserError(f"{wrong[0].replace('_', ' ').capitalize()} must be 1 or more, not {given[wrong[0]]}.")
    longest = setting.prompt_tokens + max(setting.new_tokens or GENERATE_TOKENS, 1)
    if shapes.positions is not None and longest > shapes.positions:
        raise UserError(
            f"A prompt of {setting.prompt_tokens} tokens and {longest - setting.prompt_tokens} more do not fit into the "
            f"{shapes.positions} positions of this {shapes.architecture}; give fewer tokens."
        )
    return list(_needs(shapes, setting))


def _needs(shapes: Shapes, setting: Setting) -> Iterator[Need]:
    tokens, size, batch = setting.prompt_tokens, setting.itemsize, setting.batch_size or BATCH_SIZE
    forward, forward_bytes = shapes.pass_flops(tokens), shapes.pass_bytes(tokens, size)

    def answering(default: int, *, eager: bool = True, keeps_scores: bool = True) -> tuple[int, int]:
        new = setting.new_tokens or default
        scores = shapes.d_vocab * _FLOAT32 * (_CHOOSING + new * keeps_scores)
        cache = shapes.cache_bytes(tokens + new, size)
        return shapes.answer_flops(tokens, new), shapes.pass_bytes(tokens, size, eager=eager) + cache + scores

    flops, space = answering(ANSWER_TOKENS)
    yield Need("evaluate", tokens, batch, flops, space)
    yield Need("evaluate, two streams", tokens, batch, 2 * flops, 2 * space)
    values = (3 * shapes.n_layers + 1) * shapes.d_model
    disk = setting.prompts * values * _FLOAT32
    yield Need("record", tokens, batch, forward + flops, space + values * _FLOAT32, disk_bytes=disk)
    states = shapes.n_layers * shapes.n_heads * shapes.d_head + 2 * shapes.d_model
    yield Need(
        "attribute",
        tokens,
        BATCH_SIZE,
        forward + shapes.sweep_flops(),
        forward_bytes,
        other_bytes=shapes.sweep_bytes(size),
        kept_bytes=2 * setting.prompts * states * size,
    )
    flops, space = answering(ASK_TOKENS)
    lens = shapes.n_layers * shapes.unembedding_flops
    yield Need("ask", tokens, 2, 5 * flops + 2 * forward + lens, space)
    flops, space = answering(GENERATE_TOKENS, eager=False, keeps_scores=False)
    yield Need("generate", tokens, 1, 2 * flops, space)
    yield _dial_step(shapes, tokens, size)


def _dial_step(shapes: Shapes, tokens: int, size: int) -> Need:
    """What a step of ``dial fit`` takes, which runs other prompts and texts too."""
    bare, text = min(tokens, _BARE_TOKENS), min(tokens, _TEXT_TOKENS)
    flops = (
        _CONFLICTS * shapes.training_flops(tokens, 1, 1, guarded=False)
        + _WITH_CONTEXT * shapes.training_flops(tokens, 1, 3, guarded=True)
        + _BARE * shapes.training_flops(bare, 1, 3, guarded=True)
        + _TEXTS * shapes.training_flops(text, text - 1, 3, guarded=True)
    )
    scales = shapes.n_layers * shapes.n_heads
    return Need(
        "dial fit, a step",
        tokens,
        max(1, min(_CONFLICTS, _STEP_TOKENS // tokens)),
        flops,
        shapes.training_bytes(tokens, size),
        disk_bytes=_AVERAGES * scales**2 * _FLOAT32,
    )


def weight_bytes(shapes: Shapes, itemsize: int, devices: int = 1) -> int:
    """Bytes of weights on the fullest of some devices, each with as many whole blocks as the others, or one more.

    Args:
        shapes: The model.
        itemsize: Bytes of a number.
        devices: How many; with two or more embedding and unembedding lie on different ones.
    """
    block = (shapes.parameters - shapes.outside) / shapes.n_layers
    outside = shapes.outside / min(devices, 2)
    return round(itemsize * (-(-shapes.n_layers // devices) * block + outside))


def devices_needed(shapes: Shapes, need: Need, itemsize: int, memory: int) -> int | None:
    """Say how many devices a command needs; ``None`` where one batch does not fit beside a single block.

    A block is not split, so that each device must hold its blocks and the tensors of one batch.

    Args:
        shapes: The model.
        need: The command.
        itemsize: Bytes of a number.
        memory: Bytes of one device.
    """
    counts = range(1, shapes.n_layers + 1)
    return next((n for n in counts if weight_bytes(shapes, itemsize, n) + need.bytes <= memory), None)


def largest_batch(shapes: Shapes, need: Need, itemsize: int, memory: int, devices: int = 1) -> int:
    """Say how many prompts fit into one batch at most, 0 if none.

    Args:
        shapes: The model.
        need: The command.
        itemsize: Bytes of a number.
        memory: Bytes of one device.
        devices: How many there are.
    """
    free = memory - weight_bytes(shapes, itemsize, min(devices, shapes.n_layers)) - need.kept_bytes
    return max(0, free // need.batch_bytes) if need.other_bytes <= free else 0


def _projections(anatomy: Anatomy, layer: int) -> int:
    """Multiply-adds of a token in attention's projections; those that are fused count once."""
    modules = {anatomy.module(part, layer) for part in ("query", "key", "value", "output_projection")}
    return sum(_multiplied(module, None) for module in modules)


def _multiplied(module: nn.Module, chosen: int | None) -> int:
    """Numbers of all matrices in a module that a token is multiplied by.

    Args:
        module: The module.
        chosen: How many experts a token is sent to; ``None`` is all.
    """
    found = 0
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            # Gains and biases of heads or experts have two dimensions, too.
            if weight.ndim > 1 and not name.endswith("bias") and "Norm" not in type(part).__name__:
                experts = weight.shape[0] if weight.ndim > 2 else 1
                found += weight.numel() // experts * min(experts, chosen or experts)
    return found


def _experts_of_a_token(model: Any) -> int | None:
    """How many experts read a token; ``None`` where all do, or there are none."""
    try:
        model.set_experts_implementation("grouped_mm")
    except ValueError:
        return None
    # Another way to run them, which asks no tensor for its values: of a model without storage there are none.
    model.set_experts_implementation("batched_mm")
    return getattr(model.config, "num_experts_per_tok", None)
