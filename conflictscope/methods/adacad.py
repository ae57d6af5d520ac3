"""Adaptive context-aware decoding: the further apart what the model says with the context and without, the more of CAD.

Wang et al. 2024 (arXiv 2409.07394). Each next token is the one with the highest ``(1 + a) z_c - a z_p``, where a is the
Jensen-Shannon divergence of both distributions in nats, from 0 to ln 2, or a threshold if the divergence is lower: 0
for questions, 0.3 for summaries. Of the way to memory the paper says nothing: here a is taken negative then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from conflictscope.methods._two_streams import TwoStreamMethod
from interp.answers import Direction
from interventions.decoding import AdaCAD


@dataclass(frozen=True)
class AdaptiveContextAwareDecoding(TwoStreamMethod):
    """Decode with and without the context, contrasted as far as they disagree.

    Attributes:
        thresholds: Lowest weights of the contrast that compete.
    """

    name: ClassVar[str] = "adacad"
    thresholds: tuple[float, ...] = (0.0, 0.3)

    def rules(self, towards: Direction) -> Iterator[tuple[dict[str, float], AdaCAD]]:
        """One for each threshold."""
        for threshold in self.thresholds:
            yield {"threshold": threshold}, AdaCAD(threshold, 1.0 if towards == "context" else -1.0)
