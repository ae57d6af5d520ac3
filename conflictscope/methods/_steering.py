"""Steer by one vector a layer: every layer competes with every strength; what methods that add or replace share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from conflictscope.methods._heads import DRAWS
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interp.evaluation import ANSWERS_VERSION
from interventions.steering import Steering, SteeringMode
from interventions.tokens import Tokens

STRENGTHS = (1.0, 2.0, 4.0, 8.0)
"""The strengths that compete where a vector is added."""

_VECTORS_VERSION = 1


@dataclass(frozen=True)
class SteeringMethod(Method):
    """Add a vector to the residual stream after one block, or put it there.

    Attributes:
        layers: The layers that compete; ``None`` takes every second one, but for the first and last few.
        strengths: The strengths that compete.
        tokens: The tokens that are steered.
    """

    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] = STRENGTHS
    tokens: Tokens = "last_prompt"

    mode: ClassVar[SteeringMode] = "add"
    needs = "states"

    @abstractmethod
    def vectors(self, lab: Lab, layers: Sequence[int], towards: Direction) -> Tensor:
        """A vector for each layer, ``(n_layers, d_model)``.

        Raises:
            UserError: If the answers or prompts do not give them.
        """

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Every layer with every strength."""
        n_layers = lab.anatomy.n_layers
        inner = range(n_layers // 6, n_layers - n_layers // 10, 2)
        layers = [lab.anatomy.checked_layer(layer) for layer in (inner if self.layers is None else self.layers)]
        return [
            Condition(
                self.name,
                towards,
                {"layer": layer, "strength": strength, "tokens": self.tokens},
                (Steering(layer, vector, strength, self.tokens, self.mode),),
            )
            for layer, vector in zip(layers, self.vectors(lab, layers, towards), strict=True)
            for strength in self.strengths
        ]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """Vectors of the same length that point anywhere, in the same place."""
        (edit,) = chosen.edits
        assert isinstance(edit, Steering)
        controls = []
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(lab.rng(chosen.name, draw).getrandbits(32))
            direction = torch.randn(len(edit.vector), generator=generator)
            moved = replace(edit, vector=direction * edit.vector.norm() / direction.norm())
            controls.append(
                Condition("random_direction", chosen.towards, {"draw": draw}, (moved,), control_of=chosen.method)
            )
        return controls


def source_means(lab: Lab, layers: Sequence[int]) -> Tensor:
    """Mean residual streams at the ends of train's prompts that were answered from the context, and from memory.

    Returns:
        ``(2, n_layers, d_model)``: context, memory.

    Raises:
        UserError: If all answers follow one source.
    """

    def compute() -> Tensor:
        states = (lab.train_states(layer) for layer in layers)
        return torch.stack([torch.stack([s[c].mean(0), s[~c].mean(0)]) for s, c in states], dim=1)

    return kept(lab, "source_means", list(layers), compute)


def signed(towards_context: Tensor, towards: Direction) -> Tensor:
    """Vectors towards a source: towards memory is the opposite of towards the context."""
    return towards_context if towards == "context" else -towards_context


def kept(
    lab: Lab, step: str, depends_on: Any, compute: Callable[[], Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """What is learned from train's and dev's prompts, computed once.

    Kept, since what it decides is kept under its digits, which may differ from run to run.
    """
    data = [lab.prompts.train.digest, lab.prompts.dev.digest, depends_on]
    version = (_VECTORS_VERSION, ANSWERS_VERSION)
    found = lab.records.json(step, data, lambda: compute().cpu().tolist(), version=version)
    return torch.tensor(found, dtype=dtype)
