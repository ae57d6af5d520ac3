"""Context-aware decoding: weigh what the model says with the context against what it says without.

Shi et al. 2023 (arXiv 2305.14739). With the logits z_c of the prompt and z_p of the same prompt without its context,
each next token is the one with the highest

    (1 + a) z_c - a z_p

where a > 0 takes away what the model would have said anyway. Of the way to memory the paper says nothing: here a is
negative then, down to a = -1, which answers as if there were no context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from conflictscope.methods._two_streams import random_contexts
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interventions.decoding import CAD


@dataclass(frozen=True)
class ContextAwareDecoding(Method):
    """Decode with and without the context side by side.

    Attributes:
        alphas: Those that compete; towards memory with the opposite sign.
    """

    name: ClassVar[str] = "cad"
    alphas: tuple[float, ...] = (0.5, 1.0)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """A condition for each alpha."""
        del lab
        alphas = [alpha if towards == "context" else -alpha for alpha in self.alphas]
        return [Condition(self.name, towards, {"alpha": a}, decoding=CAD(a)) for a in alphas]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """The same alpha, against another prompt's context instead of none."""
        return random_contexts(lab, chosen)
