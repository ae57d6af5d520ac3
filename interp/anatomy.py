"""Where things are in a causal language model, and the few computations that depend on the architecture.

This is the only module that knows Llama from Gemma from GPT-2. A ``Blueprint`` is what one architecture
looks like (paths of its parts, kind of norm); an ``Anatomy`` is the blueprint laid over a loaded model. It
works alike on a plain transformers model and on a ``TransformerBridge``, because a bridge keeps the module
paths of the transformers model that it wraps.

A decoder layer, with ``x`` the residual stream (``d_model``) and ``z`` the heads' outputs before the output
projection (``n_heads * d_head``):

    attention write   a = c post_norm(z @ W_O + b_O)
    sequential        m = x + a,  x' = m + mlp_write(m)      mlp_write = c post_norm(mlp(norm(m)))
    parallel          x' = x + a + mlp_write(x)

Norms before (``norm``) and after (``post_norm``) are there or not, the factor c is 1 in most architectures, and what
the MLP is made of does not matter: experts are one MLP.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interp.errors import UserError
from interp.linear_maps import bias_of, device_of, inner, linear_part, mapped, matrix_of, own_parameter, plain_weight
from interp.quiet import quiet_transformers

Part = Literal[
    "block",
    "attention_norm",
    "attention",
    "query",
    "key",
    "value",
    "output_projection",
    "attention_post_norm",
    "mlp_norm",
    "mlp",
    "mlp_post_norm",
]
ModelPart = Literal["embedding", "final_norm", "unembedding"]
NormKind = Literal["layer", "rms", "rms_plus_one"]


@dataclass(frozen=True)
class Variant:
    """What differs where a model's configuration says so.

    Attributes:
        when: Settings of the configuration, all of which must be these.
        fields: Fields of the ``Blueprint`` that are others then; none of the parts that write to the residual stream.
        refused: What such a model does that a ``Blueprint`` cannot say; the model is refused then.
    """

    when: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None

    def holds(self, config: Any) -> bool:
        """Whether a model with this configuration is one."""
        return all(getattr(config, name, None) == value for name, value in self.when.items())


@dataclass(frozen=True)
class Blueprint:
    """What one architecture looks like. Paths are transformers module paths; block parts are relative to a block.

    Where query, key and value are one fused module, all three name it; where attention and MLP share one norm, both do.

    Attributes:
        attention_norm: Norm of what attention reads; ``None`` where it reads the residual stream as it is.
        attention: The module whose output is what attention writes, before any post norm.
        mlp_norm: The same as ``attention_norm`` for the MLP.
        mlp: The module whose output is what the MLP writes, before any post norm.
        mlp_activation: What makes neurons of the MLP's first linear map; of a gated MLP those of its gate. ``None``, or
            missing in a layer, where neurons are those of experts.
        mlp_output: The MLP's last linear map; ``None``, or missing in a layer, where that is one of each expert.
        norm: ``layer`` centres, with a bias or without; ``rms`` scales by ``weight``; ``rms_plus_one`` by
            ``1 + weight``.
        attention_post_norm: Norm of the attention output before it joins the residual stream, if there is one.
        mlp_post_norm: The same for the MLP output.
        parallel: Whether the MLP reads what attention reads, and not what attention made of it.
        attention_weights: The module whose second output are attention weights, where ``attention`` is another.
        mlp_steps: The modules that make up the MLP, where none of their own holds them; the last one is ``mlp``.
        mlp_experts: The parameter that holds the experts' last linear maps, where there are experts.
        overwritten: Parts whose output the block writes over later in the pass.
        flat: Parts that are given the tokens of all rows in one line, ``(n * n_tokens, d_model)``.
        n_kv_heads: The number of key-value heads, or the name that it has in the configuration; all heads if missing.
        d_mlp: The name of the MLP's width in the configuration; four times ``d_model`` if missing.
        residual_multiplier: The name of the factor on all that attention and MLP add, if there is one.
        logit_multiplier: The name of a factor on the logits, if there is one.
        logit_divisor: The name of a divisor of the logits, if there is one.
        variants: What depends on settings; later ones come on top of earlier ones.
    """

    embedding: str
    blocks: str
    attention_norm: str | None
    attention: str
    query: str
    key: str
    value: str
    output_projection: str
    mlp_norm: str | None
    mlp: str
    mlp_activation: str | None
    mlp_output: str | None
    final_norm: str
    unembedding: str
    norm: NormKind
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    parallel: bool = False
    attention_weights: str | None = None
    mlp_steps: tuple[str, ...] = ()
    mlp_experts: str | None = None
    overwritten: tuple[Part, ...] = ()
    flat: tuple[Part, ...] = ()
    n_kv_heads: str | int = "num_key_value_heads"
    d_mlp: str = "intermediate_size"
    residual_multiplier: str | None = None
    logit_multiplier: str | None = None
    logit_divisor: str | None = None
    variants: tuple[Variant, ...] = ()

    def of(self, config: Any) -> Blueprint:
        """The blueprint of a model with this configuration.

        Raises:
            UserError: If such a model does what a blueprint cannot say.
        """
        found = self
        for variant in self.variants:
            if variant.holds(config):
                if variant.refused is not None:
                    settings = ", ".join(f"{name} = {value}" for name, value in variant.when.items())
                    raise UserError(f"This model ({settings}) {variant.refused}; choose another model.")
                found = replace(found, **variant.fields)
        return found

    @property
    def parts(self) -> list[Part]:
        """The parts that a block of this architecture has."""
        return [part for part in get_args(Part) if part == "block" or getattr(self, part) is not None]

    def path(self, part: Part, layer: int) -> str:
        """The transformers module path of a block's part, for example ``model.layers.3.self_attn.o_proj``."""
        block = f"{self.blocks}.{layer}"
        return block if part == "block" else f"{block}.{getattr(self, part)}"

    def writing_part(self, part: Literal["attention", "mlp"]) -> Part:
        """The part whose output attention or the MLP adds to the residual stream: its post norm, where it has one."""
        post: Part = "attention_post_norm" if part == "attention" else "mlp_post_norm"
        return post if post in self.parts else part


@dataclass(frozen=True)
class Observation:
    """Where the values of a site pass by.

    Attributes:
        path: Module path in the transformers model.
        is_input: Whether they are the module's input (z), not its output.
        n_heads: Heads that the last dimension holds side by side, or ``None``.
        place: Part and layer, or ``None`` outside the blocks.
    """

    path: str
    is_input: bool
    n_heads: int | None = None
    place: tuple[Part, int] | None = None


_LLAMA = Blueprint(
    embedding="model.embed_tokens",
    blocks="model.layers",
    attention_norm="input_layernorm",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output_projection="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    mlp_activation="mlp.act_fn",
    mlp_output="mlp.down_proj",
    final_norm="model.norm",
    unembedding="lm_head",
    norm="rms",
)
_FUSED = {"query": "self_attn.qkv_proj", "key": "self_attn.qkv_proj", "value": "self_attn.qkv_proj"}
_OUTPUT_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GEMMA = replace(_LLAMA, norm="rms_plus_one")
_GEMMA_2 = replace(_GEMMA, mlp_norm="pre_feedforward_layernorm", **_OUTPUT_NORMS)
_OLMO_2 = replace(_LLAMA, attention_norm=None, mlp_norm=None, **_OUTPUT_NORMS)
# Paths of the dense MLP hold for layers that have one.
_EXPERTS = replace(_LLAMA, mlp_experts="mlp.experts.down_proj")
_COHERE = replace(_LLAMA, mlp_norm="input_layernorm", norm="layer", parallel=True, logit_multiplier="logit_scale")
_GPT_2 = Blueprint(
    embedding="transformer.wte",
    blocks="transformer.h",
    attention_norm="ln_1",
    attention="attn",
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    output_projection="attn.c_proj",
    mlp_norm="ln_2",
    mlp="mlp",
    mlp_activation="mlp.act",
    mlp_output="mlp.c_proj",
    final_norm="transformer.ln_f",
    unembedding="lm_head",
    norm="layer",
    d_mlp="n_inner",
)
_BLOOM = replace(
    _GPT_2,
    embedding="transformer.word_embeddings",
    attention_norm="input_layernorm",
    query="self_attention.query_key_value",
    key="self_attention.query_key_value",
    value="self_attention.query_key_value",
    # Attention and MLP add to the residual stream themselves; these are what they add.
    attention="self_attention.dense",
    attention_weights="self_attention",
    output_projection="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp="mlp.dense_4h_to_h",
    mlp_steps=("mlp.dense_h_to_4h", "mlp.gelu_impl", "mlp.dense_4h_to_h"),
    mlp_activation="mlp.gelu_impl",
    mlp_output="mlp.dense_4h_to_h",
    variants=(
        Variant(
            {"apply_residual_connection_post_layernorm": True},
            refused="adds to the normed residual stream, which a Blueprint cannot say",
        ),
        Variant({"slow_but_exact": True}, refused="multiplies by its weights without their modules"),
    ),
)

BLUEPRINTS: dict[str, Blueprint] = {
    "ApertusForCausalLM": replace(_LLAMA, attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"),
    "BloomForCausalLM": _BLOOM,
    "CohereForCausalLM": _COHERE,
    "Cohere2ForCausalLM": _COHERE,
    "FalconForCausalLM": replace(
        _BLOOM,
        attention="self_attention",
        attention_weights=None,
        mlp="mlp",
        mlp_steps=(),
        mlp_activation="mlp.act",
        overwritten=("mlp",),
        d_mlp="ffn_hidden_size",
        n_kv_heads="num_kv_heads",
        variants=(
            Variant({"parallel_attn": True}, {"parallel": True, "mlp_norm": "input_layernorm"}),
            Variant({"new_decoder_architecture": True}, {"parallel": True, "mlp_norm": "input_layernorm"}),
            Variant(
                {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
                {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
            ),
            Variant({"new_decoder_architecture": False, "multi_query": True}, {"n_kv_heads": 1}),
        ),
    ),
    "GPT2LMHeadModel": _GPT_2,
    "GPTBigCodeForCausalLM": replace(_GPT_2, variants=(Variant({"multi_query": True}, {"n_kv_heads": 1}),)),
    "GPTJForCausalLM": replace(
        _GPT_2,
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        output_projection="attn.out_proj",
        mlp_norm="ln_1",
        mlp_output="mlp.fc_out",
        parallel=True,
    ),
    "GPTNeoXForCausalLM": Blueprint(
        embedding="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        attention_norm="input_layernorm",
        attention="attention",
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        output_projection="attention.dense",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        mlp_activation="mlp.act",
        mlp_output="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        unembedding="lm_head",
        norm="layer",
        variants=(Variant({"use_parallel_residual": True}, {"parallel": True}),),
    ),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA_2,
    "Gemma3ForCausalLM": _GEMMA_2,
    "GptOssForCausalLM": _EXPERTS,
    "GraniteForCausalLM": replace(_LLAMA, residual_multiplier="residual_multiplier", logit_divisor="logits_scaling"),
    "LlamaForCausalLM": _LLAMA,
    "Llama4ForCausalLM": replace(
        _LLAMA,
        mlp="feed_forward",
        mlp_activation="feed_forward.activation_fn",
        mlp_output="feed_forward.down_proj",
        mlp_experts="feed_forward.experts.down_proj",
        flat=("mlp",),
        d_mlp="intermediate_size_mlp",
    ),
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _EXPERTS,
    "OPTForCausalLM": replace(
        _LLAMA,
        embedding="model.decoder.embed_tokens",
        blocks="model.decoder.layers",
        attention_norm="self_attn_layer_norm",
        output_projection="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp="fc2",
        mlp_steps=("fc1", "activation_fn", "fc2"),
        flat=("mlp",),
        mlp_activation="activation_fn",
        mlp_output="fc2",
        final_norm="model.decoder.final_layer_norm",
        norm="layer",
        d_mlp="ffn_dim",
        variants=(
            Variant(
                {"do_layer_norm_before": False},
                refused="normalises the residual stream after each addition, which a Blueprint cannot say",
            ),
            Variant({"_remove_final_layer_norm": True}, refused="has no norm before its unembedding"),
            Variant({"layer_norm_elementwise_affine": False}, refused="has norms without weights"),
        ),
    ),
    "Olmo2ForCausalLM": _OLMO_2,
    "Olmo3ForCausalLM": _OLMO_2,
    "OlmoeForCausalLM": _EXPERTS,
    "PhiForCausalLM": replace(
        _LLAMA,
        output_projection="self_attn.dense",
        mlp_norm="input_layernorm",
        mlp_activation="mlp.activation_fn",
        mlp_output="mlp.fc2",
        final_norm="model.final_layernorm",
        norm="layer",
        parallel=True,
    ),
    "Phi3ForCausalLM": replace(_LLAMA, mlp_activation="mlp.activation_fn", **_FUSED),
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3ForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "SeedOssForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": _LLAMA,
    "StableLmForCausalLM": replace(
        _LLAMA,
        norm="layer",
        variants=(Variant({"use_parallel_residual": True}, {"parallel": True, "mlp_norm": "input_layernorm"}),),
    ),
    "Starcoder2ForCausalLM": replace(_LLAMA, norm="layer", mlp_activation="mlp.act", mlp_output="mlp.c_proj"),
}

SHIPPED = frozenset(BLUEPRINTS)
"""Architectures that are known without being given or proposed."""

_RECURRENT = "has recurrent blocks, which have no attention heads"
_PER_LAYER = "feeds its blocks an embedding each, besides the residual stream"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        (
            "BambaForCausalLM",
            "FalconH1ForCausalLM",
            "FalconMambaForCausalLM",
            "GraniteMoeHybridForCausalLM",
            "JambaForCausalLM",
            "KimiLinearForCausalLM",
            "Lfm2ForCausalLM",
            "Lfm2MoeForCausalLM",
            "MambaForCausalLM",
            "Mamba2ForCausalLM",
            "MiniMaxForCausalLM",
            "NemotronHForCausalLM",
            "OlmoHybridForCausalLM",
            "Qwen3NextForCausalLM",
            "Qwen3_5ForCausalLM",
            "Qwen3_5MoeForCausalLM",
            "RecurrentGemmaForCausalLM",
            "RwkvForCausalLM",
            "ZambaForCausalLM",
            "Zamba2ForCausalLM",
            "xLSTMForCausalLM",
        ),
        _RECURRENT,
    ),
    **dict.fromkeys(("Gemma3nForCausalLM", "Gemma4ForCausalLM"), _PER_LAYER),
}
"""Architectures that no ``Blueprint`` can describe, and what they do."""

_SITES: dict[Part, str] = {
    "block": "hook_out",
    "attention_norm": "ln1.hook_out",
    "attention": "attn.hook_out",
    "query": "attn.q.hook_out",
    "key": "attn.k.hook_out",
    "value": "attn.v.hook_out",
    "output_projection": "attn.o.hook_in",
    "attention_post_norm": "ln1_post.hook_out",
    "mlp_norm": "ln2.hook_out",
    "mlp": "mlp.hook_out",
    "mlp_post_norm": "ln2_post.hook_out",
}
_MODEL_SITES: dict[ModelPart, str] = {
    "embedding": "embed.hook_out",
    "final_norm": "ln_final.hook_out",
    "unembedding": "unembed.hook_out",
}
_ROWS_AT_ONCE = 2**15
# Models whose attention is eager for a time, with how many want it so, and what it was before.
_EAGER: weakref.WeakKeyDictionary[nn.Module, tuple[int, str]] = weakref.WeakKeyDictionary()
_SWITCHING = threading.Lock()


def site(part: Part, layer: int) -> str:
    """The transformer_lens site of a block's part: its output, for the output projection its input ``z``."""
    return f"blocks.{layer}.{_SITES[part]}"


def located(name: str) -> tuple[Part, int]:
    """Part and layer of a site in a block, by its name alone; where parts share a site, the first of them.

    Raises:
        UserError: If that is no site in a block.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    part: Part | None = next((part for part in get_args(Part) if match and _SITES[part] == match[2]), None)
    if match is None or part is None:
        raise UserError(f"{name!r} is no site in a block; these are named like {site('block', 3)}.")
    return part, int(match[1])


def transformers_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a ``TransformerBridge`` or PEFT's wrapper, or ``model`` itself if it is one.

    Adapters stay in it: they are modules in place of those that they change.

    Raises:
        UserError: If PEFT puts tokens before each prompt, which is nothing inside the model.
    """
    wrapper: Any = model
    if hasattr(wrapper, "get_base_model"):
        if wrapper.active_peft_config.is_prompt_learning:
            raise UserError(
                f"The adapter {wrapper.active_adapter!r} puts tokens of its own before each prompt, which no part of "
                "the model shows; give the model without it, or an adapter of its weights such as LoRA."
            )
        return wrapper.get_base_model()
    return getattr(model, "original_model", model)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer by its name in the transformers model, which a bridge around it changes."""
    module = inner(transformers_model(model))
    own = {**module._parameters, **module._buffers}
    found = {name: own[name] for name in own.keys() - module._non_persistent_buffers_set if own[name] is not None}
    for name, child in module.named_children():
        found |= {f"{name}.{below}": weight for below, weight in named_weights(child).items()}
    return found


def unknown_architecture(name: str) -> str:
    """The sentence that refuses the architecture ``name``."""
    if name in UNSUPPORTED:
        return f"The architecture {name} {UNSUPPORTED[name]}, so that it cannot be taken apart; choose another model."
    return (
        f"The architecture {name} is not known; known are {', '.join(sorted(BLUEPRINTS))}. "
        "Load the model with load_model, or call interp.proposal.adopt, which propose a Blueprint, or give --blueprint."
    )


def _or_one(factor: float | None) -> float:
    return 1.0 if factor is None else factor


@dataclass(frozen=True)
class Hooks:
    """Hooks that belong together."""

    handles: tuple[Any, ...]

    def remove(self) -> None:
        """Take all of them off."""
        for handle in self.handles:
            handle.remove()


class Anatomy:
    """The parts of one loaded model.

    Args:
        model: A transformers causal language model, or a ``TransformerBridge`` around one.
        blueprint: What its architecture looks like; ``None`` takes what ``BLUEPRINTS`` says.

    Attributes:
        architecture: Class name of the transformers model, the key into ``BLUEPRINTS``.
        blueprint: What a model of this architecture and configuration looks like.
        n_layers, n_heads, n_kv_heads, d_head, d_model, d_mlp: Shapes.
        parallel: Whether attention and MLP read the same residual stream.
        residual_multiplier: The factor on all that attention and MLP add to the residual stream (Granite), mostly 1.
        logit_multiplier: The factor on the logits (Cohere, Granite), mostly 1.
        logit_softcap: Cap of the final ``cap * tanh(logits / cap)`` (Gemma 2), or ``None``.

    Raises:
        UserError: If the architecture is not in ``BLUEPRINTS``, or the model does what a blueprint cannot say.
    """

    def __init__(self, model: nn.Module, blueprint: Blueprint | None = None) -> None:
        self.model = transformers_model(model)
        self.architecture = type(self.model).__name__
        given = BLUEPRINTS.get(self.architecture) if blueprint is None else blueprint
        if given is None:
            raise UserError(unknown_architecture(self.architecture))
        config: Any = self.model.config
        self.blueprint = blueprint = given.of(config)

        def setting(name: str | None) -> Any:
            return None if name is None else getattr(config, name, None)

        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        kv_heads = blueprint.n_kv_heads
        self.n_kv_heads: int = (kv_heads if isinstance(kv_heads, int) else setting(kv_heads)) or self.n_heads
        self.d_model: int = config.hidden_size
        self.d_head: int = setting("head_dim") or self.d_model // self.n_heads
        self.d_mlp: int = setting(blueprint.d_mlp) or 4 * self.d_model
        self.parallel: bool = blueprint.parallel
        self.residual_multiplier: float = _or_one(setting(blueprint.residual_multiplier))
        divisor = _or_one(setting(blueprint.logit_divisor))
        self.logit_multiplier: float = _or_one(setting(blueprint.logit_multiplier)) / divisor
        self.logit_softcap: float | None = setting("final_logit_softcapping")
        embedding: Any = self.model.get_submodule(blueprint.embedding)
        width = getattr(embedding, "embedding_dim", self.d_model)
        if width != self.d_model:
            raise UserError(
                f"This {self.architecture} projects embeddings of width {width} to a residual stream of width "
                f"{self.d_model}, which a Blueprint cannot say; choose another model."
            )

    @property
    def device(self) -> torch.device:
        """Where the unembedding, and so the last steps of the model, are computed."""
        return device_of(self._unembedding)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream: that of the weights, where these are not quantised."""
        weight = plain_weight(self._unembedding)
        return self.model.dtype if weight is None else weight.dtype  # pyright: ignore[reportReturnType]

    @property
    def d_vocab(self) -> int:
        """Rows of the unembedding."""
        found: Any = inner(self._unembedding)
        return found.out_features

    @property
    def _unembedding(self) -> nn.Module:
        return self.model.get_submodule(self.blueprint.unembedding)

    @property
    def body(self) -> Any:
        """The model without its unembedding, which runs a third as long again where many prompts end."""
        return self.model.get_submodule(self.blueprint.blocks.rpartition(".")[0])

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the unembedding."""
        return self.model.get_submodule(self.blueprint.final_norm)

    @property
    def parts(self) -> list[Part]:
        """The parts that a block of this architecture has."""
        return self.blueprint.parts

    def path(self, part: Part, layer: int) -> str:
        """The transformers module path of a block's part, for example ``model.layers.3.self_attn.o_proj``.

        Raises:
            UserError: If there is no such layer, or this architecture has no such part.
        """
        return self.blueprint.path(self._checked_part(part), self.checked_layer(layer))

    def site(self, part: Part, layer: int) -> str:
        """The transformer_lens site of a block's part: its output, for the output projection its input ``z``.

        Raises:
            UserError: If there is no such layer, or this architecture has no such part.
        """
        return site(self._checked_part(part), self.checked_layer(layer))

    def model_path(self, part: ModelPart) -> str:
        """The transformers module path of a part outside the blocks."""
        return getattr(self.blueprint, part)

    def model_site(self, part: ModelPart) -> str:
        """The transformer_lens site of a part outside the blocks: its output."""
        return _MODEL_SITES[part]

    @property
    def heads(self) -> list[tuple[int, int]]:
        """``(layer, head)`` of every head."""
        return [(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]

    def observed(self) -> dict[str, Observation]:
        """Every site at which activations can be recorded, and where its values pass by, in the order of the layers.

        Queries, keys and values are left out: some architectures compute them in one fused module.
        """
        found = {self.model_site("embedding"): Observation(self.model_path("embedding"), False)}
        for layer in range(self.n_layers):
            for part in self.parts:
                if part not in ("query", "key", "value"):
                    is_z = part == "output_projection"
                    heads = self.n_heads if is_z else None
                    found[self.site(part, layer)] = Observation(self.path(part, layer), is_z, heads, (part, layer))
        found[self.model_site("final_norm")] = Observation(self.model_path("final_norm"), False)
        return found

    def written_site(self, part: Literal["attention", "mlp"], layer: int) -> str:
        """The site of what attention or the MLP adds to the residual stream: after its post norm, where it has one."""
        return self.site(self.writing_part(part), layer)

    def writing_part(self, part: Literal["attention", "mlp"]) -> Part:
        """The part whose output attention or the MLP adds to the residual stream: its post norm, where it has one."""
        return self.blueprint.writing_part(part)

    def _checked_part(self, part: Part) -> Part:
        if part not in self.parts:
            raise UserError(f"{self.architecture} has no part {part!r}; it has {', '.join(self.parts)}.")
        return part

    def module(self, part: Part, layer: int) -> nn.Module:
        """The module at ``path(part, layer)``; on a bridge this is the bridge component, so hooks on it fire."""
        return self.model.get_submodule(self.path(part, layer))

    def on_output(self, part: Part, layer: int, see: Callable[[Tensor], Tensor | None]) -> Hooks:
        """Show ``see`` what a part gives in every pass, until the hooks are removed.

        Args:
            part: The part.
            layer: The layer.
            see: Is given ``(n, n_tokens, width)``. What it returns takes the place of these values, if it is not
                ``None``.
        """
        passing = threading.local()
        is_kept, is_flat = (part in parts for parts in (self.blueprint.overwritten, self.blueprint.flat))

        def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            passing.rows = len(given[0] if given else named["hidden_states"])

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            values = output[0] if isinstance(output, tuple) else output
            apart = values.unflatten(0, (passing.rows, -1)) if is_flat and values.ndim == 2 else values
            seen = see(apart.clone() if is_kept else apart)
            if seen is None:
                return None
            seen = seen.reshape(values.shape)
            return (seen, *output[1:]) if isinstance(output, tuple) else seen

        handles = [self.module(part, layer).register_forward_hook(hook)]
        if is_flat:
            handles.append(self.module("block", layer).register_forward_pre_hook(note, with_kwargs=True))
        return Hooks(tuple(handles))

    def attention_module(self, layer: int) -> nn.Module:
        """The module whose second output are attention weights ``(n, n_heads, n_tokens, n_tokens)``, or ``None``."""
        path = self.blueprint.attention_weights
        return self.module("attention", layer) if path is None else self._block_part(layer, path)

    @contextmanager
    def eager_attention(self) -> Iterator[None]:
        """Let attention be computed step by step, with weights that can be looked at, where it can be chosen so.

        Some architectures take what they were loaded with.
        """
        network: Any = self.model
        with _SWITCHING:
            inside, own = _EAGER.get(network, (0, network.config._attn_implementation))
            _EAGER[network] = inside + 1, own
            if inside == 0 and own != "eager":
                with quiet_transformers():
                    network.set_attn_implementation("eager")
        try:
            yield
        finally:
            with _SWITCHING:
                inside, own = _EAGER.pop(network)
                if inside > 1:
                    _EAGER[network] = inside - 1, own
                elif own != "eager":
                    with quiet_transformers():
                        network.set_attn_implementation(own)

    @property
    def transposed(self) -> bool:
        """Whether linear maps keep their weights as ``(d_in, d_out)``, as GPT-2's do."""
        projection: Any = inner(self.module("output_projection", 0))
        return isinstance(getattr(projection, "base_layer", projection), Conv1D)

    def checked_layer(self, layer: int) -> int:
        """``layer`` if the model has it.

        Raises:
            UserError: If it does not.
        """
        if not 0 <= layer < self.n_layers:
            raise UserError(
                f"Layer {layer} does not exist: {self.architecture} here has layers 0 to {self.n_layers - 1}."
            )
        return layer

    def checked_head(self, layer: int, head: int) -> tuple[int, int]:
        """``(layer, head)`` if the model has it.

        Raises:
            UserError: If it does not.
        """
        self.checked_layer(layer)
        if not 0 <= head < self.n_heads:
            raise UserError(
                f"Head {layer}.{head} does not exist: {self.architecture} here has heads 0 to {self.n_heads - 1} "
                f"in each of its layers 0 to {self.n_layers - 1}."
            )
        return layer, head

    def output_matrix(self, layer: int) -> Tensor:
        """W_O of all heads, ``(n_heads, d_head, d_model)``: head h writes ``z_h @ W_O[h]``.

        It is a view of the weights where these are plain (``has_plain_output``), else what the output projection makes
        of unit vectors.
        """
        projection = self.module("output_projection", layer)
        return matrix_of(projection, self._d_z, self.dtype).reshape(self.n_heads, self.d_head, self.d_model)

    def has_plain_output(self, layer: int) -> bool:
        """Whether the output projection is its weight and bias: neither quantised, nor offloaded, nor with adapters."""
        return plain_weight(self.module("output_projection", layer)) is not None

    def check_writable(self) -> None:
        """Refuse a model whose weights are more than plain tensors: an edit of them cannot be written down.

        Raises:
            UserError: If those of an output projection or of an MLP's last linear map are.
        """
        for layer in range(self.n_layers):
            for module in (self.module("output_projection", layer), self._mlp_output(layer)):
                if module is not None and plain_weight(module) is None:
                    raise UserError(
                        f"The weights of layer {layer} are quantised, offloaded or have an adapter beside them "
                        f"({type(inner(module)).__name__}), so no edit can be folded into them or made an adapter; "
                        "load the model unquantised, on one device, and with its adapters merged."
                    )

    @property
    def is_quantised(self) -> bool:
        """Whether the weights are held in fewer bits than they are computed with."""
        return getattr(self.model, "is_quantized", False)

    def check_differentiable(self) -> None:
        """Refuse a model without gradients: kernels of quantised maps may have none.

        Raises:
            UserError: If a gradient does not pass an output projection.
        """
        if not self.is_quantised:
            return
        projection = self.module("output_projection", 0)
        z = torch.zeros(2, self._d_z, dtype=self.dtype, device=device_of(projection))
        # Some are packed by their first pass, and have none from then on.
        mapped(projection, z)
        try:
            with torch.enable_grad():
                torch.autograd.grad(mapped(projection, z.requires_grad_()).sum(), z)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"No gradient passes the quantised maps of this model ({type(inner(projection)).__name__}) here; give "
                "the unquantised model, or take path patching, which needs none."
            ) from error

    @property
    def _d_z(self) -> int:
        return self.n_heads * self.d_head

    def sampled_weights(self) -> list[tuple[str, Tensor]]:
        """Weights that tell models of one shape apart: the embedding's, and four matrices of every block.

        Returns:
            ``(name, weight)``, always in the same order; a quantised weight is what its module holds, or empty.
        """
        blueprint = self.blueprint
        found = [(blueprint.embedding, self._weight_at(blueprint.embedding))]
        for layer in range(self.n_layers):
            is_dense = self._mlp_output(layer) is not None
            last = blueprint.mlp_output if is_dense else blueprint.mlp_experts
            block = f"{blueprint.blocks}.{layer}"
            for part in (blueprint.query, blueprint.value, blueprint.output_projection, last):
                found.append((f"{block}.{part}", self._weight_at(f"{block}.{part}")))
        return found

    def _weight_at(self, path: str) -> Tensor:
        """The parameter at a path, or the weight of the module there; empty where it is held in another way."""
        parent, _, name = path.rpartition(".")
        found: Any = getattr(inner(self.model.get_submodule(parent)), name, None)
        weight = found
        if isinstance(found, nn.Module):
            # An adapter's module has the weight of the one that it changes, and not as its own.
            weight = own_parameter(found, "weight")
            weight = getattr(inner(found), "weight", None) if weight is None else weight
        return weight if isinstance(weight, Tensor) else torch.empty(0)

    def weight_entries(self, name: str, weight: Tensor, places: Tensor) -> Tensor:
        """Numbers of one of the ``sampled_weights``, with what adapters add to it: float32 on the CPU.

        Args:
            name: Its name.
            weight: The weight.
            places: Which ones, in the order in which they lie in the memory of a weight of this shape.
        """
        parent, _, last = name.rpartition(".")
        found: Any = getattr(inner(self.model.get_submodule(parent)), last)
        if not hasattr(inner(found), "base_layer") or weight.ndim != 2:
            return weight.detach().flatten()[places].float().cpu()
        rows, columns = places // weight.shape[1], places % weight.shape[1]
        if name == self.blueprint.embedding:
            with torch.no_grad():
                return mapped(found, rows[:, None])[:, 0].gather(1, columns[:, None])[:, 0].float().cpu()
        # What the map makes of unit vectors.
        inputs, outputs = (rows, columns) if self.transposed else (columns, rows)
        d_in = weight.shape[0] if self.transposed else weight.shape[1]
        with torch.no_grad():
            made = linear_part(found, nn.functional.one_hot(inputs, d_in).to(self.dtype))
        return made.gather(1, outputs[:, None])[:, 0].float().cpu()

    def mlp_weights(self, layer: int) -> tuple[list[Tensor], int]:
        """What the MLP adds to the residual stream is linear in these weights plus this number, which is 0 or 1.

        The weights are those of the MLP's last linear map, bias included, or of its post norm, where it has one.

        Raises:
            UserError: If the layer has experts, whose last linear maps are many.
        """
        post_norm = self.blueprint.mlp_post_norm
        module = self._mlp_output(layer) if post_norm is None else self._block_part(layer, post_norm)
        if module is None:
            raise UserError(
                f"The feed-forward part of layer {layer} of this {self.architecture} has experts, not one last linear "
                "map that a scale could be folded into; apply the intervention while the model runs."
            )
        offset = int(post_norm is not None and self.blueprint.norm == "rms_plus_one")
        return list(inner(module).parameters()), offset

    def mlp_activation(self, layer: int) -> nn.Module:
        """The module whose outputs are the MLP's neurons ``(..., d_mlp)``: of a gated MLP the activated gate.

        Raises:
            UserError: If the layer has experts, of which each token sees a few.
        """
        module = self._part_if_there(layer, self.blueprint.mlp_activation)
        if module is None:
            raise UserError(
                f"The feed-forward part of layer {layer} of this {self.architecture} has experts, whose neurons are "
                "not there for every token; choose a method that does not look at neurons."
            )
        return module

    def mlp_output_path(self, layer: int) -> str | None:
        """The transformers module path of the MLP's last linear map, or ``None`` where that is one of each expert.

        Raises:
            UserError: If there is no such layer.
        """
        block = self.path("block", layer)
        return None if self._mlp_output(layer) is None else f"{block}.{self.blueprint.mlp_output}"

    def mlp_bias(self, layer: int) -> Tensor | None:
        """The bias of the MLP's last linear map, ``(d_model,)``, or ``None``.

        There is none where the map has none, a norm follows, or there are experts.
        """
        if self.blueprint.mlp_post_norm is not None:
            return None
        module = self._mlp_output(layer)
        bias: Any = None if module is None else getattr(inner(module), "bias", None)
        return bias

    def _mlp_output(self, layer: int) -> nn.Module | None:
        """The MLP's last linear map, or ``None`` where there are experts."""
        return self._part_if_there(layer, self.blueprint.mlp_output)

    def _part_if_there(self, layer: int, path: str | None) -> nn.Module | None:
        if path is None:
            return None
        try:
            return self._block_part(layer, path)
        except AttributeError:
            return None

    def output_bias(self, layer: int) -> Tensor | None:
        """b_O, ``(d_model,)``, or ``None`` where the output projection has none."""
        return bias_of(self.module("output_projection", layer), self._d_z, self.dtype)

    def attention_write(self, layer: int, z: Tensor) -> Tensor:
        """What attention adds to the residual stream: z ``(..., n_heads, d_head)`` -> ``(..., d_model)``."""
        return self.added_by_attention(layer, self.attention_output(layer, z))

    def attention_output(self, layer: int, z: Tensor) -> Tensor:
        """``z @ W_O + b_O``, before any post norm: ``(..., n_heads, d_head)`` -> ``(..., d_model)``."""
        projection = self.module("output_projection", layer)
        return mapped(projection, z.flatten(-2).to(device_of(projection)))

    def head_outputs(self, layer: int, z: Tensor) -> Tensor:
        """Each head's ``z_h @ W_O[h]`` before any post norm: ``(..., n_heads, d_head)`` in, ``d_model`` out.

        Where the weights are not plain, the output projection is given one head's z at a time.
        """
        projection = self.module("output_projection", layer)
        z = z.to(device_of(projection))
        if self.has_plain_output(layer):
            return torch.einsum("...hd,hdm->...hm", z, self.output_matrix(layer))
        alone = z.unsqueeze(-3) * torch.eye(self.n_heads, dtype=z.dtype, device=z.device).unsqueeze(-1)
        return linear_part(projection, alone.flatten(-2))

    def patched_outputs(self, layer: int, z: Tensor, replacement: Tensor) -> Tensor:
        """``attention_output`` of z with one head's replaced at a time, ``(..., n_heads, d_model)``.

        Args:
            layer: The layer.
            z: ``(..., n_heads, d_head)``.
            replacement: What each head's z is replaced by, of the same shape.
        """
        if self.has_plain_output(layer):
            return self.attention_output(layer, z).unsqueeze(-2) + self.head_outputs(layer, replacement - z)
        # What is quantised is not quite linear: its own pass is what the model would do.
        is_own = torch.eye(self.n_heads, dtype=torch.bool, device=z.device).unsqueeze(-1)
        return self.attention_output(layer, torch.where(is_own, replacement.unsqueeze(-3), z.unsqueeze(-3)))

    def head_writes(self, layer: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """What each head, and the bias, adds to the residual stream.

        A post norm is applied with the scale of the whole attention output, so that the parts sum to
        ``attention_write`` exactly.

        Args:
            layer: The layer.
            z: ``(..., n_heads, d_head)``.

        Returns:
            The heads' writes ``(..., n_heads, d_model)`` and the bias' write ``(..., d_model)``.
        """
        heads = self.head_outputs(layer, z)
        if self.has_plain_output(layer):
            bias = self.output_bias(layer)
            bias_write = torch.zeros_like(heads[..., 0, :]) if bias is None else bias.expand_as(heads[..., 0, :])
        else:
            # Where activations are quantised too, it holds what their rounding makes of the sum.
            bias_write = self.attention_output(layer, z) - heads.sum(-2)
        if self.blueprint.attention_post_norm is not None:
            norm = self._block_part(layer, self.blueprint.attention_post_norm)
            gain = self._norm_gain(norm, heads.sum(-2) + bias_write)
            heads, bias_write = heads * gain.unsqueeze(-2), bias_write * gain
        return self._multiplied(heads), self._multiplied(bias_write)

    def added_by_attention(self, layer: int, attention_output: Tensor) -> Tensor:
        """What attention adds to the residual stream, given ``attention_output``, ``(..., d_model)`` both."""
        path = self.blueprint.attention_post_norm
        return self._multiplied(attention_output if path is None else self._block_part(layer, path)(attention_output))

    def mlp_write(self, layer: int, mlp_input: Tensor) -> Tensor:
        """What the MLP adds to the residual stream when it reads ``mlp_input`` ``(..., d_model)`` from it."""
        blueprint = self.blueprint
        read = mlp_input if blueprint.mlp_norm is None else self._block_part(layer, blueprint.mlp_norm)(mlp_input)
        # Experts ask for rows of tokens.
        values = read.reshape(1, -1, self.d_model)
        for step in blueprint.mlp_steps or (blueprint.mlp,):
            values = self._block_part(layer, step)(values)
        output = (values[0] if isinstance(values, tuple) else values).reshape(mlp_input.shape)
        path = blueprint.mlp_post_norm
        return self._multiplied(output if path is None else self._block_part(layer, path)(output))

    def _multiplied(self, write: Tensor) -> Tensor:
        return write if self.residual_multiplier == 1 else self.residual_multiplier * write

    def step(self, layer: int, residual: Tensor, attention_write: Tensor) -> Tensor:
        """The layer's output residual ``(..., d_model)`` from its input residual and what attention wrote."""
        residual = residual.to(attention_write.device)
        after_attention = residual + attention_write
        return after_attention + self.mlp_write(layer, residual if self.parallel else after_attention)

    def logits(self, residual: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Next-token logits of the final residual stream.

        Args:
            residual: ``(..., d_model)``, after the last block, before the final norm.
            token_ids: ``(..., n)``, leading dimensions broadcastable to those of ``residual``: only these
                columns of the unembedding are used. ``None`` means the whole vocabulary.

        Returns:
            ``(..., n)`` float32 or ``(..., d_vocab)``, soft-capped where the architecture does so.
        """
        normed = self.final_norm(residual).to(self.device)
        weight, bias = plain_weight(self._unembedding), self._unembedding_bias()
        if token_ids is None:
            logits = mapped(self._unembedding, normed)
        elif weight is None:
            logits = mapped(self._unembedding, normed).float().gather(-1, token_ids.expand(*normed.shape[:-1], -1))
        else:
            # In float32, also for a half-precision model: scores are small differences of large logits.
            logits = torch.einsum("...d,...nd->...n", normed.float(), weight.T[token_ids].float())
            logits = logits if bias is None else logits + bias[token_ids]
        logits = logits if self.logit_multiplier == 1 else self.logit_multiplier * logits
        return logits if self.logit_softcap is None else self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def log_probabilities(self, residual: Tensor, token_ids: Tensor, *, rows_at_once: int) -> Tensor:
        """Next-token log probabilities of some tokens in every residual stream.

        Args:
            residual: ``(n, n_streams, d_model)``, as for ``logits``.
            token_ids: ``(n, n_tokens)``.
            rows_at_once: How many streams are unembedded together; each takes ``d_vocab`` numbers.

        Returns:
            ``(n, n_streams, n_tokens)`` float32, nats.
        """
        targets = token_ids.unsqueeze(1).expand(-1, residual.shape[1], -1).flatten(0, 1)
        chunks = zip(residual.flatten(0, 1).split(rows_at_once), targets.split(rows_at_once), strict=True)
        parts = []
        for rows, ids in chunks:
            logits = self.logits(rows).float()
            parts.append(logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True))
        return torch.cat(parts).unflatten(0, residual.shape[:2])

    def logit_difference_direction(self, residual: Tensor, token_ids: Tensor) -> Tensor:
        """The direction whose dot product with a part of the residual stream is that part's logit difference.

        The final norm is held at the scale that ``residual`` gives it, which makes it linear; soft-capping is left out.

        Args:
            residual: The final residual stream, ``(n, d_model)``.
            token_ids: ``(n, 2)``; the difference is first minus second.

        Returns:
            ``(n, d_model)``.
        """
        columns = self._unembedding_matrix()[token_ids]
        direction = self._norm_gain(self.final_norm, residual) * (columns[:, 0] - columns[:, 1])
        if self.blueprint.norm == "layer":
            direction = direction - direction.mean(-1, keepdim=True)
        return self.logit_multiplier * direction

    def written_logits(self, write: Tensor, residual: Tensor) -> Tensor:
        """What a part of the final residual stream adds to the logits.

        The final norm is held at the scale that ``residual`` gives it, which makes it linear; biases and soft-capping
        are left out.

        Args:
            write: The part, ``(..., d_model)``.
            residual: The final residual stream, ``(..., d_model)``.

        Returns:
            ``(..., d_vocab)`` float32.
        """
        normed = self._norm_gain(self.final_norm, residual).float() * self._centred(write)
        rows = self._unembedding_matrix().split(_ROWS_AT_ONCE)
        return self.logit_multiplier * torch.cat([normed.to(self.device) @ some.float().T for some in rows], dim=-1)

    def direction_logits(self, direction: Tensor) -> Tensor:
        """What a direction in the final residual stream adds to the logits, per unit and up to a positive factor.

        The final norm is held linear: its weight is applied (after centring, for a layer norm), its scale is not,
        which depends on the input and is the factor. Soft-capping is left out. A constant added to all logits changes
        nothing, so the mean over the vocabulary is taken off.

        Args:
            direction: ``(..., d_model)``.

        Returns:
            ``(..., d_vocab)`` float32.
        """
        normed = self._centred(direction) * self._norm_weight(self.final_norm).to(direction.device).float()
        normed = normed.to(self.device)
        rows = self._unembedding_matrix().split(_ROWS_AT_ONCE)
        # A float32 copy of the unembedding of a large half-precision model would not fit beside it.
        logits = torch.cat([normed @ some.float().T for some in rows], dim=-1)
        return self.logit_multiplier * (logits - logits.mean(-1, keepdim=True))

    def logit_difference_offset(self, token_ids: Tensor) -> Tensor:
        """What final norm and unembedding biases add to the logit difference, whatever the residual: ``(n,)``."""
        columns = self._unembedding_matrix()[token_ids]
        norm_bias = own_parameter(self.final_norm, "bias")
        logit_bias = self._unembedding_bias()
        offset = torch.zeros_like(columns[:, 0, 0])
        if norm_bias is not None:
            offset = offset + (columns[:, 0] - columns[:, 1]) @ norm_bias.to(columns.device)
        if logit_bias is not None:
            offset = offset + logit_bias[token_ids[:, 0]] - logit_bias[token_ids[:, 1]]
        return self.logit_multiplier * offset

    def _norm_gain(self, norm: nn.Module, x: Tensor) -> Tensor:
        """What ``norm`` multiplies (the centred) ``x`` with, elementwise."""
        weight, norm = self._norm_weight(norm).to(x.device), inner(norm)
        epsilon: Any = next(
            value for name in ("eps", "variance_epsilon") if (value := getattr(norm, name, None)) is not None
        )
        return (weight * torch.rsqrt(self._centred(x).square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)

    def _norm_weight(self, norm: nn.Module) -> Tensor:
        """The part of the gain of ``norm`` that is the same for all inputs, ``(d_model,)``.

        Raises:
            UserError: If an adapter changes the norm.
        """
        weight = own_parameter(norm, "weight")
        if weight is None:
            raise UserError(
                f"An adapter changes a norm of this {self.architecture}, whose gain cannot be read then; merge the "
                "adapter with merge_and_unload()."
            )
        return 1 + weight.float() if self.blueprint.norm == "rms_plus_one" else weight

    def _centred(self, x: Tensor) -> Tensor:
        """What a norm scales: ``x`` in float32, less its mean where the norm is a layer norm."""
        values = x.float()
        return values - values.mean(-1, keepdim=True) if self.blueprint.norm == "layer" else values

    def _block_part(self, layer: int, path: str) -> nn.Module:
        return self.model.get_submodule(f"{self.blueprint.blocks}.{layer}.{path}")

    def _unembedding_bias(self) -> Tensor | None:
        return bias_of(self._unembedding, self.d_model, self.dtype)

    def _unembedding_matrix(self) -> Tensor:
        """A row for each token of the vocabulary, ``(d_vocab, d_model)``."""
        return matrix_of(self._unembedding, self.d_model, self.dtype).T
