"""What edits do to weights: scales and shifts of heads, scales of feed-forward layers, directions after blocks.

``interventions.bake`` writes them into a model; whatever else ships an edit as weights starts from the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class HeadMap(NamedTuple):
    """What becomes of a head's output z, before the output projection: ``scale * z + shift``.

    Attributes:
        scale: The factor.
        shift: ``(d_head,)``, or one number for all.
    """

    scale: float
    shift: Tensor

    @classmethod
    def around(cls, scale: float, mean: tuple[float, ...] | None) -> HeadMap:
        """Scale around a mean of ``d_head`` numbers; ``None`` is zero."""
        return cls(scale, (1 - scale) * torch.tensor((0.0,) if mean is None else mean))

    def then(self, later: HeadMap) -> HeadMap:
        """This, and then ``later``."""
        return HeadMap(later.scale * self.scale, later.scale * self.shift + later.shift)


@dataclass(frozen=True, eq=False)
class Folding:
    """What an edit does to weights. An empty one does nothing.

    Attributes:
        heads: By ``(layer, head)``, what becomes of its output.
        layers: By layer, the factor on what its feed-forward layer writes.
        directions: By layer, what is added to the residual stream after it at every token, ``(d_model,)`` float32.
    """

    heads: Mapping[tuple[int, int], HeadMap] = field(default_factory=dict)
    layers: Mapping[int, float] = field(default_factory=dict)
    directions: Mapping[int, Tensor] = field(default_factory=dict)

    def then(self, later: Folding) -> Folding:
        """This, and then ``later``, which acts on what this made of the activations."""
        heads, layers, directions = dict(self.heads), dict(self.layers), dict(self.directions)
        for place, change in later.heads.items():
            heads[place] = heads[place].then(change) if place in heads else change
        for layer, scale in later.layers.items():
            layers[layer] = scale * layers.get(layer, 1.0)
        # Added after the block, so that no scale of the MLP, earlier or later in the order, meets it.
        for layer, direction in later.directions.items():
            directions[layer] = directions.get(layer, 0) + direction
        return Folding(heads, layers, directions)

    def without_idle(self) -> Folding:
        """The same less what it leaves as it is."""
        return Folding(
            {place: change for place, change in self.heads.items() if change.scale != 1 or change.shift.any()},
            {layer: scale for layer, scale in self.layers.items() if scale != 1},
            {layer: direction for layer, direction in self.directions.items() if direction.any()},
        )

    def __bool__(self) -> bool:
        return bool(self.heads or self.layers or self.directions)
