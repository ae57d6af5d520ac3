"""Contextual information-entropy constraint decoding: contrast less for tokens of usual information.

Yuan et al. 2024 (arXiv 2402.11893), as released. Tokens whose information lies in a band are taken to be no conflict:
their score is ``l_p + a (l_c - l_p)``, that of others ``l_c + a (l_c - l_p)``, with log probabilities l_c with the
context and l_p without; ``interventions.decoding.COIECD`` says what the band is. Published is a = 1. Of the way to
memory the paper says nothing: here a is negative then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from conflictscope.methods._two_streams import TwoStreamMethod
from interp.answers import Direction
from interventions.decoding import COIECD


@dataclass(frozen=True)
class EntropyConstraintDecoding(TwoStreamMethod):
    """Decode with and without the context, contrasted less inside a band of information.

    Attributes:
        alphas: Those that compete; towards memory with the opposite sign.
    """

    name: ClassVar[str] = "coiecd"
    alphas: tuple[float, ...] = (0.5, 1.0)

    def rules(self, towards: Direction) -> Iterator[tuple[dict[str, float], COIECD]]:
        """One for each alpha."""
        for alpha in self.alphas:
            signed = alpha if towards == "context" else -alpha
            yield {"alpha": signed}, COIECD(signed)
