"""Add the difference that a context makes.

ContextFocus (Anand et al. 2026, arXiv 2601.04131) takes the mean difference of the activations at the end of prompts
with their context and without it, and adds it at one layer while the answer is written. Here prompts are train's
conflict prompts; the paper's come with an instruction to trust the context as well. Towards memory it is taken away.
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
from interp.errors import UserError
from interventions.tokens import Tokens


@dataclass(frozen=True)
class ContextFocus(SteeringMethod):
    """Add the mean with the context less the mean without it."""

    name = "context_focus"
    starts_from = ()
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    tokens: Tokens = "answer"

    def vectors(self, lab: Lab, layers: Sequence[int], towards: Direction) -> Tensor:
        """Mean with the context less that without, on train, ``(n_layers, d_model)``.

        Raises:
            UserError: If no conflict prompt of train is known without its context.
        """
        sites = [lab.anatomy.site("block", layer) for layer in layers]
        known = [example for example in lab.prompts.train.select(kind="conflict") if example.bare_prompt]
        if not known:
            raise UserError("No conflict prompt of train is known without its context; give examples a bare_prompt.")

        def compute() -> Tensor:
            whole = record(lab.model, [e.prompt for e in known], sites, progress="Recording with the context")
            bare = record(lab.model, [e.bare_prompt for e in known], sites, progress="Recording without it")
            return torch.stack([whole[site].mean(0) - bare[site].mean(0) for site in sites])

        return signed(kept(lab, "context_differences", list(layers), compute), towards)
