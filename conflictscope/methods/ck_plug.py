"""CK-PLUG: mix memory and what the context adds, where the context makes the model less sure.

Bi et al. 2025 (arXiv 2503.15888). Where the next token's entropy rises with the context, it is the one with the highest

    a l_p + (1 - a) (l_c - l_p)

of the tokens that stand out, with log probabilities l_c with the context and l_p without; elsewhere it is the model's.
a = 1 is memory alone, a = 0 what the context adds, and a can be found for each token. The paper and the released code
differ in where that acts and in how a is found: both compete, by the names of ``interventions.decoding.CKPlug``.
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
from interventions.decoding import CKPlug, CKPlugGate


@dataclass(frozen=True)
class KnowledgePlug(Method):
    """Decode with and without the context, mixed where they conflict.

    Attributes:
        alphas: Shares of memory that compete towards the context; towards memory it is what they leave of 1.
        gates: Forms that compete. In each the share that is found for each token competes too.
    """

    name: ClassVar[str] = "ck_plug"
    alphas: tuple[float, ...] = (0.0, 0.25)
    gates: tuple[CKPlugGate, ...] = ("paper", "released")

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """A condition for each form and share."""
        del lab
        alphas = [*(a if towards == "context" else 1 - a for a in self.alphas), None]
        rules = [CKPlug(alpha, gate) for gate in self.gates for alpha in alphas]
        return [Condition(self.name, towards, {"alpha": r.alpha, "form": r.gate}, decoding=r) for r in rules]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """The same form and share, with another prompt's context instead of none."""
        return random_contexts(lab, chosen)
