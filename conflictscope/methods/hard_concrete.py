"""Learn scales with noisy gates that close exactly: hard concrete masks (Louizos et al. 2018, arXiv 1712.01312).

Everything else is as with ``learned_scales``: data, budgets, strengths.
"""

from __future__ import annotations

from dataclasses import dataclass

from conflictscope.methods.learned_scales import LearnedScales
from interventions.fitting.scale_learning import ScaleTraining

TRAINING = ScaleTraining(learner="hard_concrete", steps=60, conflicts=12, guards=6)


@dataclass(frozen=True)
class HardConcrete(LearnedScales):
    """Learn scales by gradient descent through noisy gates."""

    name = "hard_concrete"
    training: ScaleTraining = TRAINING
