"""CK-PLUG: mix memory and what the context adds, where the context makes the model less sure.

Bi et al. 2025 (arXiv 2503.15888). Where the next token's entropy rises with the context, it is the one with the highest

    a l_p + (1 - a) (l_c - l_p)

of the tokens that stand out, with log probabilities l_c with the context and l_p without; elsewhere it is the model's.
a = 1 is memory alone, a = 0 what the context adds, and a can be found for each token. The paper and the released code
differ in where that acts and in how a is found: both compete, by the names of ``interventions.decoding.CKPlug``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from conflictscope.methods._two_streams import TwoStreamMethod
from interp.answers import Direction
from interventions.decoding import CKPlug, CKPlugGate


@dataclass(frozen=True)
class KnowledgePlug(TwoStreamMethod):
    """Decode with and without the context, mixed where they conflict.

    Attributes:
        alphas: Shares of memory that compete towards the context; towards memory it is what they leave of 1.
        gates: Forms that compete. In each the share that is found for each token competes too.
    """

    name: ClassVar[str] = "ck_plug"
    alphas: tuple[float, ...] = (0.0, 0.25)
    gates: tuple[CKPlugGate, ...] = ("paper", "released")

    def rules(self, towards: Direction) -> Iterator[tuple[dict[str, Any], CKPlug]]:
        """One for each form and share."""
        alphas = [*(a if towards == "context" else 1 - a for a in self.alphas), None]
        for gate, alpha in itertools.product(self.gates, alphas):
            yield {"alpha": alpha, "form": gate}, CKPlug(alpha, gate)
