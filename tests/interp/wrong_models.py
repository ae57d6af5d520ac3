"""Models that look like Llama and compute something else: what a blueprint cannot say, each in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm


class _Layer(LlamaDecoderLayer):
    """Llama's block, in steps that others replace."""

    scale = 1.0

    def forward(self, hidden_states: Any, *_: Any, **named: Any) -> Any:
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        stream = self.scale * hidden_states + self.on_attention(attention)
        return stream + self.on_mlp(self.mlp(self.post_attention_layernorm(stream)), hidden_states)

    def on_attention(self, write: torch.Tensor) -> torch.Tensor:
        return write

    def on_mlp(self, write: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return write


class _Scaled(_Layer):
    scale = 0.9


class _ScaledALittle(_Layer):
    scale = 0.9999


class _OwnEmbedding(_Layer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.own = nn.Parameter(torch.zeros(config.hidden_size))

    def on_mlp(self, write: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return write + self.own


class _Gains(_Layer):
    """One at first, like those that some models learn."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gain = nn.Parameter(torch.ones(config.hidden_size))

    def on_attention(self, write: torch.Tensor) -> torch.Tensor:
        return self.gain * write


class _Buffered(_Layer):
    """A checkpoint may hold another number than the one that a new model has."""

    factor: torch.Tensor

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.register_buffer("factor", torch.ones(1))

    def on_mlp(self, write: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return self.factor * write


class _ReadsItself(_Layer):
    """The MLP's output depends on the stream also past the norm."""

    def on_mlp(self, write: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return write * torch.sigmoid(stream)


class _OnZ(LlamaAttention):
    """Attention whose heads' outputs are changed before the output projection."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.o_proj.register_forward_pre_hook(lambda _, given: (self.on_z(given[0]),))

    def on_z(self, z: torch.Tensor) -> torch.Tensor:
        return z


class _Reversed(_OnZ):
    """The last head comes first."""

    def on_z(self, z: torch.Tensor) -> torch.Tensor:
        return z.unflatten(-1, (-1, self.head_dim)).flip(-2).flatten(-2)


class _Interleaved(_OnZ):
    """The first numbers of all heads come first."""

    def on_z(self, z: torch.Tensor) -> torch.Tensor:
        return z.unflatten(-1, (-1, self.head_dim)).transpose(-1, -2).flatten(-2)


class _Mixed(_OnZ):
    """Heads hear each other a little."""

    def on_z(self, z: torch.Tensor) -> torch.Tensor:
        return z + 1e-3 * z.unflatten(-1, (-1, self.head_dim)).roll(1, -2).flatten(-2)


class _ReversedInside(LlamaAttention):
    """The query projection holds heads in the opposite order; keys and values do not."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_proj = nn.Sequential(self.q_proj, _Flip(self.head_dim))


class _Flip(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(-1, (-1, self.width)).flip(-2).flatten(-2)


class _Recurrent(nn.Module):
    """A running mean of values, as wide as heads would be, with a projection that is called like theirs."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        values = self.v_proj(hidden_states).cumsum(1) * torch.sigmoid(self.q_proj(hidden_states))
        return self.o_proj(values + self.k_proj(hidden_states)), None


class _OtherNorm(LlamaRMSNorm):
    """Divides by the mean size of numbers, not by the root of their mean square."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states / (hidden_states.abs().mean(-1, keepdim=True) + self.variance_epsilon)


class _Wrong(LlamaForCausalLM):
    layer: type[nn.Module] = _Layer
    attention: type[nn.Module] | None = None
    norm: type[nn.Module] | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(self.layer(config, at) for at in range(config.num_hidden_layers))
        for at, block in enumerate(self.model.layers):
            if self.attention is not None:
                block.self_attn = self.attention(config, at)
            if self.norm is not None:
                block.post_attention_layernorm = self.norm(config.hidden_size)
        self.post_init()


class RightForCausalLM(_Wrong):
    """Nothing is wrong with this one: what is refused of the others is not refused because of how they are made."""


class ScaledForCausalLM(_Wrong):
    """The stream is multiplied by 0.9 in each block."""

    layer = _Scaled


class ScaledALittleForCausalLM(_Wrong):
    """The stream is multiplied by 0.9999 in each block."""

    layer = _ScaledALittle


class OwnEmbeddingForCausalLM(_Wrong):
    """Each block adds a learned vector of its own."""

    layer = _OwnEmbedding


class GainsForCausalLM(_Wrong):
    """What attention writes is multiplied by learned gains."""

    layer = _Gains


class BufferedForCausalLM(_Wrong):
    """What the MLP writes is multiplied by a number that is saved with the model."""

    layer = _Buffered


class ReadsItselfForCausalLM(_Wrong):
    """What the MLP writes is gated by the stream."""

    layer = _ReadsItself


class ReversedForCausalLM(_Wrong):
    """Heads are in the opposite order where the output projection reads them."""

    attention = _Reversed


class InterleavedForCausalLM(_Wrong):
    """Numbers of heads alternate where the output projection reads them."""

    attention = _Interleaved


class MixedForCausalLM(_Wrong):
    """Heads' outputs are mixed where the output projection reads them."""

    attention = _Mixed


class ReversedInsideForCausalLM(_Wrong):
    """Heads' queries are in the opposite order."""

    attention = _ReversedInside


class RecurrentForCausalLM(_Wrong):
    """There is no attention."""

    attention = _Recurrent


class OtherNormForCausalLM(_Wrong):
    """The norm of what the MLP reads is of no kind that a blueprint knows."""

    norm = _OtherNorm


class BetweenForCausalLM(LlamaForCausalLM):
    """Something is added to the stream between blocks."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.between = nn.Parameter(torch.zeros(config.hidden_size))
        self.model.layers[1].register_forward_pre_hook(lambda _, given: (given[0] + self.between, *given[1:]))
        self.post_init()


class ShiftedLogitsForCausalLM(LlamaForCausalLM):
    """Logits are capped by a number that no setting names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda _, __, output: 5 * torch.tanh(output / 5))


class NoisyForCausalLM(LlamaForCausalLM):
    """Each pass differs."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        first: Any = self.model.layers[0]
        first.mlp.register_forward_hook(lambda _, __, output: output + torch.randn_like(output))


def made(kind: type[Any], **settings: Any) -> Any:
    """A tiny model of one of these classes, in float32 and evaluation mode."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(**{**shape, "num_key_value_heads": 2, "vocab_size": 61, **settings})
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation="eager").eval().requires_grad_(False)
