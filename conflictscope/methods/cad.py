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

from torch import Tensor

from conflictscope.study.condition import Condition, Decoding
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction


@dataclass(frozen=True)
class ContextAware(Decoding):
    """Weigh both prompts' logits against each other.

    Attributes:
        alpha: a of the rule; 0 is greedy decoding, -1 that without the context.
    """

    needs_bare: ClassVar[bool] = True
    alpha: float

    def combined(self, with_context: Tensor, without: Tensor) -> Tensor:
        """``(1 + a) z_c - a z_p``, ``(n, d_vocab)``."""
        return (1 + self.alpha) * with_context - self.alpha * without

    def scaled(self, strength: float) -> ContextAware:
        """The same rule with ``strength`` times the alpha."""
        return ContextAware(self.alpha * strength)


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
        return [Condition(self.name, towards, {"alpha": a}, decoding=ContextAware(a)) for a in alphas]
