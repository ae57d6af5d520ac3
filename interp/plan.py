"""Say from a configuration alone what a model takes: memory and matrix products, before any weight is read.

1. The model is built without storage, on PyTorch's "meta" device: that gives the shape of every parameter, and of keys
   and values.
2. FLOPs are twice the multiply-adds of matrix products, over all pairs of tokens in attention: what
   ``torch.utils.flop_counter`` counts. An expert counts for the tokens that are sent to it; in memory all experts do.
3. Memory is weights, keys and values, and the largest tensors that live at once in a pass. Linear maps of blocks that
   the configuration says are quantised take the bits that it names.

Memory is an estimate: what allocators and kernels need comes on top.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.quiet import quiet_transformers

_FLOAT32 = 4
# Of a score of eager attention: what goes into the softmax, its float32 result, and that in the model's dtype.
_SCORE_BYTES = 8
# What a sweep of path patching may take, and rows of an MLP that it runs at least.
_SWEEP_BYTES, _SWEEP_ROWS = 2**29, 64


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
        fused: Whether transformers computes attention without writing its weights out, where nothing else is asked for.
        positions: Tokens that the model reads at most; ``None`` where its configuration names no limit.
        quantised: Numbers in the blocks' linear maps that the configuration says are quantised.
        quantised_bits: What each of these takes, with its share of scales.
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
    fused: bool
    positions: int | None
    quantised: int = 0
    quantised_bits: float = 0.0

    @classmethod
    def of(cls, config: Any) -> Shapes:
        """Take the shapes of the model that a transformers configuration describes.

        Raises:
            UserError: If it describes no causal language model, or one of an architecture that is not known.
        """
        from transformers import AutoModelForCausalLM

        try:
            with quiet_transformers(), torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"No model can be built from this configuration ({reason}); give that of a causal language model."
            ) from error
        anatomy = Anatomy(model)
        chosen = _experts_of_a_token(model)
        blocks = [anatomy.module("block", layer) for layer in range(anatomy.n_layers)]
        attention = [_projections(anatomy, layer) for layer in range(anatomy.n_layers)]
        parameters = sum(weight.numel() for weight in model.parameters())
        is_fused = model.config._attn_implementation != "eager"
        with anatomy.eager_attention(), torch.inference_mode():
            token = torch.zeros(1, 1, dtype=torch.long, device="meta")
            # Eager attention with a mask asks no tensor for its values, which there are none of.
            read = anatomy.body(input_ids=token, attention_mask=torch.ones_like(token), use_cache=True)
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
            output_weights=_multiplied(anatomy.module("output_projection", 0), None),
            mlp_weights=tuple(_multiplied(b, chosen) - a for b, a in zip(blocks, attention, strict=True)),
            cached=tuple(layer.keys.numel() + layer.values.numel() for layer in read.past_key_values.layers),
            windows=tuple(getattr(layer, "sliding_window", None) for layer in read.past_key_values.layers),
            fused=is_fused,
            positions=getattr(model.config, "max_position_embeddings", None),
            **_quantised(config, model, blocks),
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
        """FLOPs of path patching all heads of one prompt, once its last token is recorded."""
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

    def pass_bytes(self, tokens: int, itemsize: int, *, eager: bool, padded: bool = True) -> int:
        """Bytes of the tensors that live at once in a forward pass over a prompt, weights and cache left out.

        Args:
            tokens: Tokens of the prompt.
            itemsize: Bytes of a number.
            eager: Whether attention weights are written out; fused attention does not.
            padded: Whether the prompt is one of several of different lengths, for which there is a mask.
        """
        pairs = self.n_heads * tokens**2 if eager else 0
        heads = tokens * 4 * self.n_heads * self.d_head * itemsize
        # As wide as all its matrices together, and once more within the activation function.
        widest = tokens * (max(self.mlp_weights) // self.d_model + self.d_mlp) * itemsize
        in_norm = tokens * 3 * self.d_model * _FLOAT32
        largest = max(heads + _SCORE_BYTES * pairs, widest + itemsize * pairs, in_norm)
        # What may be looked at, and what is added to the scores where it may not.
        mask = (1 + itemsize) * tokens**2 if padded else 0
        return largest + 2 * tokens * self.d_model * itemsize + mask

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        kept = (min(tokens, window or tokens) for window in self.windows)
        return itemsize * sum(numbers * count for numbers, count in zip(self.cached, kept, strict=True))

    def training_bytes(self, tokens: int, itemsize: int, *, eager: bool) -> int:
        """Bytes that a forward pass over a prompt keeps in all layers for a backward pass."""
        heads = 5 * self.n_layers * self.n_heads * self.d_head
        mlps = sum(self.mlp_weights) // self.d_model
        norms = 2 * self.n_layers * self.d_model * _FLOAT32
        weights = _FLOAT32 + (itemsize if itemsize < _FLOAT32 else 0) if eager else 0
        return tokens * (itemsize * (heads + mlps) + norms) + weights * self.n_layers * self.n_heads * tokens**2

    def sweep_bytes(self, prompts: int, itemsize: int) -> int:
        """Bytes of the streams of prompts that path patching sweeps over the layers at once, and of one step."""
        half, streams = _SWEEP_BYTES // (2 * itemsize), 1 + self.n_layers * self.n_heads
        stream, row = 4 * self.d_model, 3 * self.d_mlp + 4 * self.d_model
        at_once = min(prompts, max(1, half // (stream * streams)))
        rows = min(max(_SWEEP_ROWS, half // row), at_once * streams)
        return itemsize * (at_once * streams * stream + rows * row)

    @property
    def _pair_flops(self) -> int:
        """FLOPs of one layer's attention from one token to another: their score, and a value that is added."""
        return 4 * self.n_heads * self.d_head


def weight_bytes(shapes: Shapes, itemsize: int, devices: int = 1) -> int:
    """Count the bytes of weights on the fullest of some devices, over which whole blocks are spread evenly.

    Args:
        shapes: The model.
        itemsize: Bytes of a number.
        devices: How many; from two on, embedding and unembedding lie on different ones.
    """
    plain = itemsize * (shapes.parameters - shapes.outside - shapes.quantised)
    block = (plain + shapes.quantised_bits / 8 * shapes.quantised) / shapes.n_layers
    blocks = -(-shapes.n_layers // devices)
    return round(blocks * block + itemsize * shapes.outside / min(devices, 2))


def quantised_bits(config: Any) -> float | None:
    """Bits that a number of a quantised linear map takes, with its share of scales and zero points.

    Args:
        config: A transformers configuration, with what quantised it as ``quantization_config``.

    Returns:
        ``None`` where nothing is quantised, or in a way that is not known here.
    """
    given = getattr(config, "quantization_config", None)
    about: Mapping[str, Any] = given if isinstance(given, Mapping) else given.to_dict() if given is not None else {}
    method = str(getattr(about.get("quant_method"), "value", about.get("quant_method", "")))
    if method == "bitsandbytes":
        # Of each 64 numbers there is the largest in float32, or that in 8 bits, of 256 of which there is a scale.
        four = 4 + (8 / 64 + 32 / (64 * 256) if about.get("bnb_4bit_use_double_quant") else 32 / 64)
        return 8.0 if about.get("load_in_8bit") else four
    if method in ("gptq", "awq"):
        bits, group = about.get("bits", about.get("w_bit")), about.get("group_size", about.get("q_group_size", -1))
        # A scale in float16 and a zero point for each group.
        return None if bits is None else bits + (16 + bits) / group if group and group > 0 else float(bits)
    if method == "compressed-tensors":
        return _widest(
            weights["num_bits"] + 16 / (weights.get("group_size") or math.inf)
            for group in about.get("config_groups", {}).values()
            if (weights := group.get("weights")) and weights.get("num_bits")
        )
    if method in ("fp8", "fbgemm_fp8"):
        return 8.0
    if method in ("quanto", "torchao"):
        # As in qint4, Int8WeightOnlyConfig, float8.
        said = str(about.get("weights", about.get("quant_type", "")))
        return _widest(map(float, re.findall(r"(?:int|float)(\d)", said, re.IGNORECASE)))
    return None


def _widest(bits: Iterable[float]) -> float | None:
    return max(bits, default=None)


def _quantised(config: Any, model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, Any]:
    """How many numbers of blocks are quantised, and what each takes."""
    if (bits := quantised_bits(config)) is None:
        return {}
    given = config.quantization_config
    about = given if isinstance(given, Mapping) else given.to_dict()
    left = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")
    kept = [name for key in left for name in about.get(key) or ()]
    names = {module: name for name, module in model.named_modules()}
    linear = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
    some = [m for m in linear if not any(name in names[m] for name in kept)]
    return {"quantised": sum(m.weight.numel() for m in some), "quantised_bits": bits}


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
    # The same for experts.
    model.set_experts_implementation("batched_mm")
    return getattr(model.config, "num_experts_per_tok", None)
