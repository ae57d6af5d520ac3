"""Contextual information-entropy constraint decoding: contrast less for tokens of usual information.

Yuan et al. 2024 (arXiv 2402.11893), as released. Tokens whose information lies in a band are taken to be no conflict:
their score is ``l_p + a (l_c - l_p)``, that of others ``l_c + a (l_c - l_p)``, with log probabilities l_c with the
context and l_p without; ``interventions.decoding.COIECD`` says what the band is. Published is a = 1. Of the way to
memory the paper says nothing: here a is negative then.
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
from interventions.decoding import COIECD


@dataclass(frozen=True)
class EntropyConstraintDecoding(Method):
    """Decode with and without the context, contrasted less inside a band of information.

    Attributes:
        alphas: Those that compete; towards memory with the opposite sign.
    """

    name: ClassVar[str] = "coiecd"
    alphas: tuple[float, ...] = (0.5, 1.0)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """A condition for each alpha."""
        del lab
        alphas = [alpha if towards == "context" else -alpha for alpha in self.alphas]
        return [Condition(self.name, towards, {"alpha": a}, decoding=COIECD(a)) for a in alphas]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """The same alpha, against another prompt's context instead of none."""
        return random_contexts(lab, chosen)
