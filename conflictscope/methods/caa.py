"""Add the contrast of two answers to the same prompts (contrastive activation addition).

Rimsky et al. 2023 (arXiv 2312.06681) write either answer after a prompt and take the mean difference of the activations
at its tokens; it is added at every token from which an answer is predicted. No answer of the model's own is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conflictscope.methods._steering import SteeringMethod, kept, signed
from conflictscope.study.lab import Lab
from interp.activations import record
from interp.answers import Direction
from interventions.tokens import Tokens


@dataclass(frozen=True)
class CAA(SteeringMethod):
    """Add the mean difference between the tokens of the context's answer and those of memory's."""

    name = "caa"
    starts_from = ()
    tokens: Tokens = "answer"

    def vectors(self, lab: Lab, layers: Sequence[int], towards: Direction) -> Tensor:
        """Mean over the wanted answer's tokens less that over the other's, on train, ``(n_layers, d_model)``."""
        sites = [lab.anatomy.site("block", layer) for layer in layers]
        prompts = lab.prompts.train.select(kind="conflict")

        def compute() -> Tensor:
            context, memory = (
                record(lab.model, prompts, sites, position, progress=f"Recording {position}")
                for position in ("context_answer", "memory_answer")
            )
            return torch.stack([context[site].mean(0) - memory[site].mean(0) for site in sites])

        return signed(kept(lab, "answer_contrasts", list(layers), compute), towards)
