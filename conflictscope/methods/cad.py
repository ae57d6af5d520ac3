"""Context-aware decoding: weigh what the model says with the context against what it says without.

Shi et al. 2023 (arXiv 2305.14739). With the logits z_c of the prompt and z_p of the same prompt without its context,
each next token is the one with the highest

    (1 + a) z_c - a z_p

where a > 0 takes away what the model would have said anyway. Of the way to memory the paper says nothing: here a is
negative then, down to a = -1, which answers as if there were no context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from conflictscope.methods._two_streams import TwoStreamMethod
from interp.answers import Direction
from interventions.decoding import CAD


@dataclass(frozen=True)
class ContextAwareDecoding(TwoStreamMethod):
    """Decode with and without the context side by side.

    Attributes:
        alphas: Those that compete; towards memory with the opposite sign.
    """

    name: ClassVar[str] = "cad"
    alphas: tuple[float, ...] = (0.5, 1.0)

    def rules(self, towards: Direction) -> Iterator[tuple[dict[str, float], CAD]]:
        """One for each alpha."""
        for alpha in self.alphas:
            signed = alpha if towards == "context" else -alpha
            yield {"alpha": signed}, CAD(signed)
