"""Contrast what the last layer says with what an earlier one would say: DoLa (Chuang et al. 2023, arXiv 2309.03883).

With q_j the next token's distribution read off the residual stream after layer j, and q that of the model:

    M = the candidate layer whose q_M is farthest from q, by the Jensen-Shannon divergence, at each token
    scores = log q - log q_M, for tokens with at least a tenth of the best one's probability; the others get none

It is meant for facts, not for conflicts: a control for methods that weigh context against memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from interp.anatomy import Anatomy, Blueprint
from interp.errors import UserError
from interventions.base import Entry, Handle, Intervention, Patch, Place
from interventions.decoding import jensen_shannon
from interventions.identity import Layer, ModelIdentity

_SHARE = 0.1
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class DoLa(Intervention):
    """Chooses next tokens by the contrast with an earlier layer. Immutable.

    Residual streams stay as they are, and ``generate`` works as without it.

    Attributes:
        layers: Layers that may be the earlier one.

    Raises:
        UserError: If there is none.
    """

    layers: tuple[int, ...]

    by_row = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("DoLa contrasts with an earlier layer; give one at least.")

    @property
    def edited_layers(self) -> set[int]:
        """None: what a layer writes stays."""
        return set()

    @property
    def n_moved(self) -> int:
        """How many layers may be the earlier one."""
        return len(self.layers)

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it reads in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model does not have one of the layers.
        """
        anatomy = Anatomy(model)
        contrast = _Contrast(anatomy)
        return [
            Patch("block", anatomy.checked_layer(layer), partial(contrast.keep, layer), contrast)
            for layer in sorted(set(self.layers))
        ]

    def described(self) -> Iterator[str]:
        """Its layers."""
        yield f"next token by contrast with one of the layers {', '.join(map(str, self.layers))}"

    def entry(self, name: str, tensors: dict[str, Tensor]) -> DoLaEntry:
        """Its part of the intervention file; it has no tensors."""
        return DoLaEntry(layers=list(self.layers))


class DoLaEntry(Entry):
    """A ``DoLa``."""

    kind: Literal["dola"] = "dola"
    layers: Annotated[list[Layer], Field(min_length=1)]

    def build(self, tensors: Mapping[str, Tensor]) -> DoLa:
        """The intervention that this entry describes."""
        return DoLa(tuple(self.layers))

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it reads."""
        return [Place("block", layer) for layer in self.layers]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """Every layer of every model fits it."""


def contrasted(final: Tensor, early: Tensor) -> Tensor:
    """Scores of the next token from logits of the last layer and of the earlier ones.

    Args:
        final: ``(n, d_vocab)``.
        early: ``(n_layers, n, d_vocab)``.

    Returns:
        ``(n, d_vocab)``; minus infinity for tokens that may not be chosen.
    """
    apart = torch.stack([jensen_shannon(final, one) for one in early])
    premature = early[apart.argmax(0), torch.arange(len(final), device=final.device)]
    log_probs = final.log_softmax(-1)
    scores = log_probs - premature.log_softmax(-1)
    return scores.masked_fill(log_probs < log_probs.amax(-1, keepdim=True) + math.log(_SHARE), -torch.inf)


class _Contrast:
    """Keeps residual streams of a pass that is under way, and contrasts its logits with theirs."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._thread = threading.local()

    def __deepcopy__(self, _: Any) -> _Contrast:
        return self

    def attach(self, model: nn.Module) -> Handle:
        """Contrast the logits of the passes of ``model``."""
        del model
        network = self._anatomy.model
        # Before anything that makes one row of two.
        after = network.register_forward_hook(self._combine, prepend=True, always_call=True)
        return Handle([network.register_forward_pre_hook(self._begin), after])

    def keep(self, layer: int, residual: Tensor) -> Tensor:
        """Keep what comes out of a layer."""
        if not hasattr(self._thread, "kept"):
            raise UserError(
                "A contrast with an earlier layer was reached without a pass through the whole model; call the model, "
                "not a part of it or a part's forward method."
            )
        self._thread.kept[layer] = residual
        return residual

    def _begin(self, *_: Any) -> None:
        self._thread.kept = {}

    def _combine(self, _: nn.Module, __: Any, output: Any) -> Any:
        kept: dict[int, Tensor] | None = vars(self._thread).pop("kept", None)
        if not kept or output is None:
            # The pass failed.
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        rows, tokens, _ = logits.shape
        early = torch.stack([residual[:, -tokens:].flatten(0, 1) for residual in kept.values()])
        if early.shape[1] != rows * tokens:
            raise UserError("A contrast with an earlier layer is attached after edits that read each prompt twice.")
        parts = zip(logits.flatten(0, 1).float().split(_ROWS_AT_ONCE), early.split(_ROWS_AT_ONCE, 1), strict=True)
        read: Callable[[Tensor], Tensor] = self._anatomy.logits
        scores = torch.cat([contrasted(final, read(residual).float()) for final, residual in parts])
        made = scores.to(logits.dtype).unflatten(0, (rows, tokens))
        if isinstance(output, tuple):
            return (made, *output[1:])
        output.logits = made
        return output
