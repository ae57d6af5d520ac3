"""Put a transformer_lens bridge around a model: its hooks, caches and named sites, on the same weights.

Nothing in the toolkit needs one. It is for work with transformer_lens itself, whose import takes ten seconds; all
functions that take a model take a bridge as well, and give the same numbers.

A bridge counts as made only when the model inside computes what it computed before: that is checked every time.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.errors import UserError
from interp.inputs import tokenizer_of
from interp.models import DEFAULT_MODEL, load_model
from interp.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

# How far apart, relative to their size, logits computed in another order may lie: rounding, added up over the layers.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def load_bridge(
    name: str = DEFAULT_MODEL, *, device: str = "auto", dtype: torch.dtype | str = torch.float32
) -> TransformerBridge:
    """Load a model as ``interp.models.load_model`` does, and put a bridge around it.

    Args:
        name: A registered name, a local directory with weights and tokenizer, or a hub id.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
        dtype: ``torch.float32``, ``float16`` or ``bfloat16``, or its name.

    Raises:
        UserError: As ``load_model`` and ``bridge_around``.
    """
    return bridge_around(load_model(name, device=device, dtype=dtype))


def bridge_around(model: PreTrainedModel) -> TransformerBridge:
    """Put a bridge around a loaded model, without a second copy of its weights.

    The model goes on working, now through the bridge's hook points, and cannot be taken out again. Prompts are
    tokenised as its own tokenizer does it; transformer_lens would put a begin-of-sequence token first in every model.

    Args:
        model: A transformers model with its tokenizer, from ``interp.models.load_model``.

    Returns:
        The bridge in evaluation mode, without compatibility mode.

    Raises:
        UserError: If transformer_lens is not installed, cannot wrap the model, or computes something else than it does.
    """
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module, detect_tokenizer_bos_eos
    except ImportError as error:
        raise UserError(
            "A bridge needs transformer_lens; install it with: pip install 'conflictscope[study]'"
        ) from error
    name, tokenizer = model.name_or_path, tokenizer_of(model)
    # Attention weights, which a bridge has a site for, come from no other implementation.
    model.set_attn_implementation("eager")
    own = _probe_logits(model)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("transformer_lens").setLevel(logging.ERROR)
        try:
            bridge = build_bridge_from_module(
                model, type(model).__name__, hf_config=model.config, model_name=name or "external"
            )
            bridge.eval()
            bridged = _probe_logits(model)
        # Whatever it stumbles over: options that it does not know end in assertions, missing attributes, wrong shapes.
        except Exception as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise UserError(
                f"transformer_lens cannot wrap the model {name!r} ({reason or type(error).__name__}): it does not know "
                f"an option of its architecture{_unusual(model.config)}; load the model again, and work without one."
            ) from error
    distance = ((bridged - own).norm() / own.norm()).item()
    limit = _ROUNDING.get(model.dtype, _ROUNDING[torch.bfloat16])
    # Not a number where the model itself overflows in this dtype, which is no fault of the bridge.
    if distance > limit or bridged.isfinite().ne(own.isfinite()).any():
        raise UserError(
            f"transformer_lens computes something else than the model {name!r} itself (its logits are {distance:.1%} "
            f"off): it does not know an option of the architecture{_unusual(model.config)}; load the model again, and "
            "work without a bridge."
        )
    # The bridge's own setter would add a BOS token.
    bridge._tokenizer = tokenizer
    prepends, appends = detect_tokenizer_bos_eos(tokenizer)
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = prepends, appends
    bridge.cfg.default_prepend_bos = prepends
    return bridge


def _probe_logits(network: Any) -> Tensor:
    """Logits of seven tokens in two rows, one of which begins with padding: ``(7, d_vocab)`` float32."""
    vocabulary = network.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=network.device) * 7919 % vocabulary).view(2, 4)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = network(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[mask.bool()].float()


def _unusual(config: Any) -> str:
    """The options of a configuration that are not the defaults of its class, in words."""
    usual, aside = type(config)().to_dict(), {"dtype", "transformers_version", "_name_or_path"}
    found = ((key, value) for key, value in config.to_dict().items() if key not in aside and value != usual.get(key))
    options = [f"{key}={value}" for key, value in found if isinstance(value, bool | float | str)]
    return f", perhaps one of {', '.join(options)}" if options else ""
