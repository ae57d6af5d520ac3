"""Apply an intervention file to a plain transformers model: all that a serving program needs.

    from interventions.runtime import apply

    with apply(model, "towards_context.json"):
        model.generate(...)

Nothing but torch, transformers, safetensors and pydantic is needed. The edits are hooks on the model's own modules and
act in every forward pass until the handle is removed, in all threads, on any device and in any dtype. Interventions of
different names add up, in the order in which they were applied; one that is on the model already is replaced, with a
``Caution``. ``remove(model)`` takes off all of them, also those whose handles were lost.

- batches, padding on either side, KV caches, beams, sampling: as without an edit
- ``torch.compile``: apply and remove at any time; what was compiled is compiled anew
- ``device_map``: edits go where the activations are; where too many weights are offloaded to be read, the model cannot
  be recognised and is refused
- called with arguments by name or by position, or by its ``forward`` method: edited alike
- assisted decoding, chunked prompts and continuous batching: served by edits of all tokens; an edit of certain tokens,
  or behind a gate, refuses them in one sentence
- edits that read each prompt twice (JuICE, DeCoRe) or compare layers (DoLa) act on passes through the whole model: its
  ``forward`` method, and of the former beams too, are refused in one sentence
"""

from __future__ import annotations

import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from interp.anatomy import transformers_model
from interp.errors import Caution, UserError
from interventions.base import SAVING, Handle
from interventions.config import InterventionFile
from interventions.replaced import Replaced

# What is on a model through ``apply``, by name, in order.
_applied: weakref.WeakKeyDictionary[nn.Module, dict[str, Handle]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def apply(
    model: nn.Module,
    file: str | Path | InterventionFile,
    *,
    tokenizer: Any = None,
    trust: float | None = None,
    strength: float = 1.0,
) -> Handle:
    """Apply an intervention to a model, until the handle is removed or its ``with`` block ends.

    An intervention of the same name that was applied before, at whatever setting, is taken off, with a ``Caution``.

    Args:
        model: A transformers causal language model, compiled or not, or a ``TransformerBridge``.
        file: The path of an intervention file, or of the folder that it is alone in; or the file itself.
        tokenizer: The tokenizer that prompts are made with, to be checked as well.
        trust: Where the file's dial is to stand, from -1 (memory) to 1 (context); ``None`` leaves it as it is.
        strength: How far the edit goes: 0 changes nothing, 1 is what the file says. Not for a file with a dial.

    Raises:
        UserError: If the file cannot be read or is for another model or tokenizer; nothing is changed then.
    """
    loaded = file if isinstance(file, InterventionFile) else InterventionFile.load(file)
    chosen = loaded.at(trust=trust, strength=strength)
    network = _network(model)
    if tokenizer is not None:
        chosen.model.check_tokenizer(tokenizer)
    with _lock:
        handle = chosen.attach(network)
        there = _applied.setdefault(network, {})
        earlier = there.pop(chosen.name, None)
        there[chosen.name] = handle
        # Without hooks it was removed already.
        is_replaced = earlier is not None and bool(earlier.hooks)
        if earlier is not None:
            earlier.remove()
    if is_replaced:
        warnings.warn(
            Caution(
                f"{chosen.name} was on the model already and is replaced; to have it on twice, give the second another "
                "name, and to take it off, use the handle, a with block, or interventions.runtime.remove(model)."
            ),
            stacklevel=2,
        )
    return handle


def remove(model: nn.Module) -> None:
    """Take everything that ``apply`` put on a model off again.

    Args:
        model: As given to ``apply``.

    Raises:
        UserError: If the model is a copy that was made while something was applied.
    """
    network = _network(model)
    with _lock:
        for handle in _applied.pop(network, {}).values():
            handle.remove()


def _network(model: nn.Module) -> nn.Module:
    network = transformers_model(getattr(model, "_orig_mod", model))
    if Replaced.by_copying(network, SAVING):
        raise UserError(
            "The model is a copy of one that was edited at the time, and its edit cannot be taken off; copy the model "
            "before an intervention is applied, or load it again."
        )
    return network
