"""Edit only where there is a conflict: a probe is read on the way up, and decides row by row about the layers above.

1. A forward pass over new prompts reads a linear probe at the last token of every prompt, at the probe's site.
2. Rows whose log odds exceed the threshold are open: in these the edits act, in this pass and in every later one that
   goes on with the same text. In all others they do nothing.

One pass both decides and answers, so an edit must lie above the layer that the probe reads. A row that is open gets
what the edits alone would give it; one that is not, what the unedited model would.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy, Part
from interp.errors import UserError
from interventions.base import Handle, Patch, Placed, attach_patches
from interventions.features import FeatureEdit
from interventions.feedforward import FeedForwardScaling
from interventions.gates import TrustDial
from interventions.heads import HeadScaling
from interventions.steering import Steering
from interventions.tokens import TokenTracker

Gateable = HeadScaling | FeedForwardScaling | TrustDial | Steering | FeatureEdit


@dataclass(frozen=True, eq=False)
class ConflictGate:
    """Applies edits to the rows of a batch for which a probe sees a conflict. Immutable.

    Attributes:
        part: What the probe reads: the part of a block whose output it is, of the output projection its input, z.
        layer: The block.
        weight: The probe, ``(width,)``.
        bias: Of the probe.
        threshold: Log odds, ``weight @ values + bias``, above which a row is open.
        edits: What is applied then, in order.

    Raises:
        UserError: If the probe is not finite, there is no edit, or one lies not above the probe's layer.
    """

    part: Part
    layer: int
    weight: Tensor
    bias: float
    threshold: float
    edits: tuple[Gateable, ...]

    def __post_init__(self) -> None:
        if self.weight.ndim != 1 or not self.weight.isfinite().all():
            raise UserError(
                f"A gate's probe is a row of finite numbers, not of shape {tuple(self.weight.shape)}; fit it again."
            )
        if not (math.isfinite(self.bias) and math.isfinite(self.threshold)):
            raise UserError("A gate's bias and threshold must be finite numbers; fit it again.")
        if not self.edits:
            raise UserError("A gate needs an edit that it lets through; give it one at least.")
        # A dial may be turned later, wherever it stands.
        layers = [
            layer
            for edit in self.edits
            for layer in ([g.layer for g in edit.gates] if isinstance(edit, TrustDial) else edit.edited_layers)
        ]
        lowest = min(layers, default=None)
        if lowest is not None and lowest <= self.layer:
            raise UserError(
                f"The gate reads layer {self.layer}, but layer {lowest} is edited, which has been passed by then; gate "
                "at a lower layer, or leave out edits of layers up to the gate's."
            )

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes where it is open."""
        return {layer for edit in self.edits for layer in edit.edited_layers}

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it reads and changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model lacks what is read or changed, or is of another width.
        """
        anatomy = Anatomy(model)
        anatomy.site(self.part, self.layer)
        width = anatomy.n_heads * anatomy.d_head if self.part == "output_projection" else anatomy.d_model
        if len(self.weight) != width:
            raise UserError(
                f"The gate's probe reads {len(self.weight)} numbers, but this model has {width} there; fit it on this "
                "model."
            )
        tracker = TokenTracker("last_prompt")
        reader = _Reader(self, tracker)
        edits = [patch for edit in self.edits for patch in edit.patches(model)]
        return [
            Patch(self.part, self.layer, reader.read, tracker),
            *(patch._replace(change=reader.where_open(patch.change)) for patch in edits),
        ]

    def attach(self, model: nn.Module) -> Handle:
        """Apply to a transformers model or a ``TransformerBridge`` until the handle is removed.

        Raises:
            UserError: As ``patches``.
        """
        return attach_patches(model, self.patches(model))


class _Reader:
    """The probe at work; what it decided is kept until the next prompts, for each thread by itself."""

    def __init__(self, gate: ConflictGate, tracker: TokenTracker) -> None:
        self._gate = gate
        self._tracker = tracker
        self._decided = threading.local()
        self._weight = Placed(gate.weight)

    def read(self, values: Tensor) -> Tensor:
        """Decide about the rows of ``(n_rows, n_tokens, width)``, if these are new prompts; the values stay."""
        mask = self._tracker.mask(values.device)
        if mask is not None:
            rows = torch.arange(len(values), device=values.device)
            last = values[rows, mask.int().argmax(-1)].float()
            is_open = last @ self._weight.like(last) + self._gate.bias > self._gate.threshold
            self._decided.rows = is_open
            # Looked at once here, so that later modules and steps need not ask the device.
            self._decided.any, self._decided.all = bool(is_open.any()), bool(is_open.all())
        return values

    def where_open(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same change, of open rows only."""

        def change_some(values: Tensor) -> Tensor:
            if not self._decided.any:
                return values
            edited = change(values)
            if self._decided.all or edited is values:
                return edited
            return torch.where(self._decided.rows.to(values.device)[:, None, None], edited, values)

        return change_some
