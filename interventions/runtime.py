"""Apply an intervention file to a plain transformers model: all that a serving program needs.

    from interventions.runtime import apply

    with apply(model, "towards_context.json"):
        model.generate(...)

Nothing but torch, transformers, safetensors and pydantic is needed. The edits are hooks on the model's own modules and
act in every forward pass until the handle is removed, in all threads, on any device and in any dtype.

- batches, padding on either side, KV caches, beams, sampling: as without an edit
- ``torch.compile``: apply and remove at any time; what was compiled is compiled anew
- ``device_map``: edits go where the activations are; where too many weights are offloaded to be read, the model cannot
  be recognised and is refused
- assisted decoding, chunked prompts and continuous batching: served by edits of all tokens; an edit of certain tokens,
  or behind a gate, refuses them in one sentence
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from interventions.base import Handle
from interventions.config import InterventionFile


def apply(
    model: nn.Module,
    file: str | Path | InterventionFile,
    *,
    tokenizer: Any = None,
    trust: float | None = None,
    strength: float = 1.0,
) -> Handle:
    """Apply an intervention to a model, until the handle is removed or its ``with`` block ends.

    Args:
        model: A transformers causal language model, compiled or not, or a ``TransformerBridge``.
        file: The path of an intervention file, or of the folder that it is alone in; or the file itself.
        tokenizer: The tokenizer that prompts are made with, to be checked as well.
        trust: Where the file's dial is to stand, from -1 (memory) to 1 (context); ``None`` leaves it as it is.
        strength: How far the edit goes: 0 changes nothing, 1 is what the file says. Not for a file with a dial.

    Raises:
        UserError: If the file cannot be read or is for another model or tokenizer; nothing is attached then.
    """
    loaded = file if isinstance(file, InterventionFile) else InterventionFile.load(file)
    chosen = loaded.at(trust=trust, strength=strength)
    network = getattr(model, "_orig_mod", model)
    if tokenizer is not None:
        chosen.model.check_tokenizer(tokenizer)
    return chosen.attach(network)
