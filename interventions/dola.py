"""Contrast what the last layer says with what an earlier one would say: DoLa (Chuang et al. 2023, arXiv 2309.03883).

With q_j the next token's distribution read off the residual stream after layer j, and q that of the model:

    M = the candidate layer whose q_M is farthest from q, by the Jensen-Shannon divergence, at each token
    scores = log q - log q_M, for tokens with at least a tenth of the best one's probability; the others get none

It is meant for facts, not for conflicts: a control for methods that weigh context against memory.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from interp.anatomy import Anatomy, Blueprint, transformers_model
from interp.errors import UserError
from interventions.base import Entry, Intervention, Patch, Place
from interventions.decoding import jensen_shannon
from interventions.identity import Layer, ModelIdentity
from interventions.side_by_side import claim_logits, release_logits

_SHARE = 0.1
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class DoLa(Intervention):
    """Chooses next tokens by the contrast with an earlier layer. Immutable.

    Residual streams stay as they are.

    Attributes:
        layers: Layers that may be the earlier one.

    Raises:
        UserError: If there is none, or one is listed twice.
    """

    layers: tuple[int, ...]

    by_row = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("DoLa contrasts with an earlier layer; give one at least.")
        if twice := [layer for layer, count in Counter(self.layers).items() if count > 1]:
            raise UserError(f"Layer {twice[0]} is listed twice; give each layer once.")

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
            UserError: If the model does not have one of the layers, or it is the last one.
        """
        anatomy = Anatomy(model)
        contrast = _Contrast()
        last = anatomy.n_layers - 1
        if last in self.layers:
            raise UserError(f"DoLa contrasts layer {last}, the last one, with earlier ones; leave it out.")
        return [
            Patch("block", anatomy.checked_layer(layer), partial(contrast.keep, layer), contrast)
            for layer in sorted(self.layers)
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
        """See that the layers come before the last one."""
        if last := [layer for layer in self.layers if layer == model.n_layers - 1]:
            raise UserError(f"layer {last[0]} is the last one, which is contrasted with earlier ones")


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

    def __init__(self) -> None:
        self._thread = threading.local()

    def __deepcopy__(self, _: Any) -> _Contrast:
        # With the hooks of a model that is copied: patches share it with the one that sees the passes.
        return self

    def attach(self, model: nn.Module) -> _Contrasting:
        """Contrast the logits of the passes of ``model``.

        Raises:
            UserError: If another edit makes logits of two already.
        """
        return _Contrasting(self, transformers_model(model))

    def keep(self, layer: int, residual: Tensor) -> Tensor:
        """Keep what comes out of a layer."""
        if not hasattr(self._thread, "kept"):
            raise UserError(
                "A contrast with an earlier layer was reached without a pass through the whole model; call the model, "
                "not a part of it or a part's forward method."
            )
        self._thread.kept[layer] = residual
        return residual

    def begin(self, _: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        """Note which tokens' logits a pass is to give."""
        self._thread.kept = {}
        wanted = kwargs.get("logits_to_keep", 0)
        self._thread.wanted = slice(-wanted or None, None) if isinstance(wanted, int) else wanted

    def combine(self, network: nn.Module, _: Any, output: Any) -> Any:
        """Contrast the logits with those of the layers that were kept."""
        state = vars(self._thread)
        kept: dict[int, Tensor] | None = state.pop("kept", None)
        wanted = state.pop("wanted", None)
        if not kept or output is None:
            # The pass failed.
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        # The model that the hook is on: a copy has weights of its own.
        anatomy = Anatomy(network)
        early = torch.stack([residual[:, wanted].flatten(0, 1).to(logits.device) for residual in kept.values()])
        parts = zip(logits.flatten(0, 1).float().split(_ROWS_AT_ONCE), early.split(_ROWS_AT_ONCE, 1), strict=True)
        scores = torch.cat([contrasted(final, anatomy.logits(residual).float()) for final, residual in parts])
        made = scores.to(logits.dtype).unflatten(0, logits.shape[:2])
        if isinstance(output, tuple):
            return (made, *output[1:])
        output.logits = made
        return output


class _Contrasting:
    """A contrast at work on a model.

    Args:
        contrast: The contrast.
        network: The transformers model.
    """

    def __init__(self, contrast: _Contrast, network: nn.Module) -> None:
        claim_logits(network)
        self._network = weakref.ref(network)
        self._parts = [
            network.register_forward_pre_hook(contrast.begin, with_kwargs=True),
            network.register_forward_hook(contrast.combine, always_call=True),
        ]

    def remove(self) -> None:
        """Contrast no more."""
        while self._parts:
            self._parts.pop().remove()
        if (network := self._network()) is not None:
            release_logits(network)
