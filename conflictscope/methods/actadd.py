"""Add the difference of mean activations (activation addition).

Turner et al. 2023 (arXiv 2308.10248) add the difference of the activations of two prompts. Here it is that of the
means over train's conflict prompts, answered from the context less answered from memory, at the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from conflictscope.methods._steering import SteeringMethod, signed, source_means
from conflictscope.study.lab import Lab
from interp.answers import Direction


class ActAdd(SteeringMethod):
    """Add the difference of the means by what was answered."""

    name = "actadd"
    starts_from = ("store",)

    def vectors(self, lab: Lab, layers: Sequence[int], towards: Direction) -> Tensor:
        """Mean with the wanted source less mean with the other, ``(n_layers, d_model)``."""
        context, memory = source_means(lab, layers)
        return signed(context - memory, towards)
