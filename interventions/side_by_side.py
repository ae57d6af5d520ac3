"""Read each prompt twice, side by side in one batch, for edits that compare a pass with what it would have been.

The rows of every pass are doubled before the model sees them, and the logits of the two halves are made into one row
again. Both halves have keys and values of their own in the cache that the passes share, so that ``generate`` goes on
as without an edit; it costs two passes.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy, transformers_model
from interp.doubled import set_doubled
from interp.errors import UserError
from interp.pairs import Combined
from interventions.base import Patch, Placed
from interventions.replaced import Replaced
from interventions.tokens import argument_names

_BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
# What a pass gives by row besides logits, or makes of them.
_REFUSED = {
    "labels": "a loss",
    "output_hidden_states": "hidden states",
    "output_attentions": "attention weights",
}


_CLAIMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def claim_logits(network: nn.Module) -> None:
    """Note that an edit makes each row of a model's logits of two.

    Raises:
        UserError: If another does that already.
    """
    if network in _CLAIMED:
        raise UserError("Logits are made of two by one edit, not by several; apply one at a time.")
    _CLAIMED.add(network)


def release_logits(network: nn.Module) -> None:
    """Note that no edit does that any longer."""
    _CLAIMED.discard(network)


class SideBySide:
    """Doubles the rows of a model's passes while it is attached, and makes one row of logits of two.

    Args:
        combined: Makes logits ``(n, d_vocab)`` from those of the first and the second reading.
    """

    def __init__(self, combined: Combined) -> None:
        self._combined = combined
        self._thread = threading.local()

    def __deepcopy__(self, _: Any) -> SideBySide:
        # With the hooks of a model that is copied: patches share it with the one that doubles the rows.
        return self

    def attach(self, model: nn.Module) -> _Doubling:
        """Double the rows of the passes of ``model``, a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If another edit does that already.
        """
        return _Doubling(self, transformers_model(model))

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What passes by of the first and of the second reading, ``(n_rows, ...)`` each.

        Raises:
            UserError: If no pass is under way: then nothing was doubled.
        """
        if not hasattr(self._thread, "rows"):
            raise UserError(
                "An edit that reads each prompt twice was reached without a pass through the whole model; call the "
                "model, not a part of it or a part's forward method."
            )
        first, second = values.chunk(2)
        return first, second

    def double(self, names: list[str], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Double what a pass is given; ``names`` are those of the arguments given by position."""
        if len(args) > len(names):
            raise UserError(
                "An edit that reads each prompt twice cannot tell what the model is given by position; give its "
                "arguments by name."
            )
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, what in _REFUSED.items():
            if name in given and given[name] is not None and given[name] is not False:
                raise UserError(f"An edit that reads each prompt twice gives logits, not {what}; leave out {name}.")
        tokens = given.get("input_ids")
        rows = len(given["inputs_embeds"] if tokens is None else tokens)
        _check_cache(given.get("past_key_values", given.get("cache")), 2 * rows)
        self._thread.rows = rows
        return (), given | {name: _twice(given[name], rows) for name in _BY_ROW if name in given}

    def combine(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Make one row of logits of two."""
        rows = vars(self._thread).pop("rows", None)
        if rows is None or output is None:
            # The pass failed.
            return output
        for name in ("hidden_states", "attentions"):
            if getattr(output, name, None) is not None:
                raise UserError(
                    f"An edit that reads each prompt twice gives logits, not {name}; set output_{name} to False in the "
                    "model's config."
                )
        logits = output[0] if isinstance(output, tuple) else output.logits
        first, second = logits.flatten(0, 1).float().chunk(2)
        made = self._combined(first, second).to(logits.dtype).unflatten(0, (rows, -1))
        if isinstance(output, tuple):
            return (made, *output[1:])
        output.logits = made
        return output


class SecondHead(NamedTuple):
    """What a head writes in the second reading: ``own * z + other * z_first``.

    Attributes:
        own: Factor on what it writes there.
        other: Factor on what it writes in the first reading.
    """

    own: float
    other: float


def second_reading(model: nn.Module, heads: Mapping[tuple[int, int], SecondHead], combined: Combined) -> list[Patch]:
    """Patches that read each prompt twice, with other heads the second time.

    Args:
        model: The model, or a bridge around it.
        heads: What becomes of heads in the second reading, by ``(layer, head)``.
        combined: Makes logits from those of both readings.

    Raises:
        UserError: If the model does not have one of the heads.
    """
    anatomy = Anatomy(model)
    by_layer: dict[int, dict[int, SecondHead]] = defaultdict(dict)
    for (layer, head), change in heads.items():
        anatomy.checked_head(layer, head)
        by_layer[layer][head] = change
    readings = SideBySide(combined)
    return [
        Patch("output_projection", layer, _in_second(anatomy, some, readings), readings)
        for layer, some in sorted(by_layer.items())
    ]


def _in_second(anatomy: Anatomy, heads: Mapping[int, SecondHead], readings: SideBySide) -> Callable[[Tensor], Tensor]:
    """What becomes of the z of all heads of a layer in both readings, ``(2 * n_rows, n_tokens, n_heads * d_head)``."""
    own, other = torch.ones(anatomy.n_heads, anatomy.d_head), torch.zeros(anatomy.n_heads, anatomy.d_head)
    for head, change in heads.items():
        own[head], other[head] = change
    owns, others = Placed(own.flatten()), Placed(other.flatten())

    def change_second(z: Tensor) -> Tensor:
        first, second = readings.halves(z)
        return torch.cat([first, owns.like(z) * second + others.like(z) * first])

    return change_second


class _Doubling:
    """A ``SideBySide`` at work on a model, which meanwhile refuses to generate in ways that reorder or pack rows.

    Args:
        side_by_side: The one that doubles.
        network: The transformers model.
    """

    def __init__(self, side_by_side: SideBySide, network: Any) -> None:
        claim_logits(network)
        self._network = weakref.ref(network)
        self._parts = [
            # Before anything else looks at what a pass is given, and before it looks at what comes out.
            network.register_forward_pre_hook(
                partial(side_by_side.double, argument_names(network)), with_kwargs=True, prepend=True
            ),
            network.register_forward_hook(side_by_side.combine, prepend=True, always_call=True),
            Replaced(network, _REFUSING),
        ]
        set_doubled(network, doubled=True)

    def remove(self) -> None:
        """Double no more."""
        while self._parts:
            self._parts.pop().remove()
        if (network := self._network()) is not None:
            set_doubled(network, doubled=False)
            release_logits(network)


def _twice(values: Any, rows: int) -> Any:
    """Values of every row, once for each reading; what all rows share stays."""
    if isinstance(values, dict):
        return {name: _twice(part, rows) for name, part in values.items()}
    if isinstance(values, Tensor) and len(values) == rows:
        return torch.cat([values, values])
    return values


def _check_cache(cache: Any, rows: int) -> None:
    """Refuse to go on from what was read without the edit."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.numel() and len(keys) != rows:
            raise UserError(
                "An edit that reads each prompt twice cannot go on from keys and values that were kept without it; "
                "read the whole prompt while it is applied."
            )


def _generate(network: Any, generate: Any, *args: Any, **kwargs: Any) -> Any:
    # The second argument of generate; what it leaves open the model's own decides.
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    for name in ("num_beams", *_UNFOLLOWED):
        every = (kwargs.get(name), getattr(given, name, None), getattr(network.generation_config, name, None))
        value = next((one for one in every if one is not None), None)
        if name == "num_beams":
            if (value or 1) > 1:
                raise UserError(f"{_SENTENCE} by beams; set num_beams to 1.")
        elif value is not None:
            raise UserError(f"{_SENTENCE} by {_UNFOLLOWED[name]}; generate without {name}.")
    return generate(*args, **kwargs)


def _init_continuous_batching(*_: Any, **__: Any) -> Any:
    raise UserError(f"{_SENTENCE} by continuous batching, which packs several texts into one row; call generate.")


_SENTENCE = "An edit that reads each prompt twice does not generate"
_UNFOLLOWED = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "assistant_early_exit": "early exit decoding",
    "prefill_chunk_size": "reading a prompt in chunks",
}
_REFUSING = {"generate": _generate, "init_continuous_batching": _init_continuous_batching}
