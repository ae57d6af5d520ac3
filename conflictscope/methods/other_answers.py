"""Learn scales from other prompts' answers: the learner's own control.

What ``learned_scales`` gains should come from what the wanted answers say; a learner that is taught answers of other
prompts about the same relation should gain nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from conflictscope.methods.learned_scales import LearnedScales
from interventions.fitting.scale_learning import ScaleTraining

TRAINING = ScaleTraining(shuffled=True)


@dataclass(frozen=True)
class OtherAnswers(LearnedScales):
    """Learn scales under which prompts would be answered like others."""

    name = "other_answers"
    derived = True
    training: ScaleTraining = TRAINING
