"""Learn the scales of a trust dial: all together, few of them moved, and damage within a budget.

For one direction, find the scales of all heads (and, if wanted, of all feed-forward layers) under which conflict
prompts are answered from the wanted source, while guards keep their next-token distribution within a budget of KL
divergence and only so many scales differ from 1. Two learners do that:

``gauss_newton``   constrained second-order steps; scales go back to 1 by what that costs. The default.
``hard_concrete``  Adam, with noisy masks that close exactly (Louizos et al. 2018) and dual ascent on the budgets.

Either way, the scales of the last step are moved on their line from 1 to where the budget is used up on dev. The other
direction has scales of its own; the two make one dial.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from interp.answers import Direction
from interp.files import atomic_path
from interp.progress import tracked
from interp.teacher_forcing import Continued
from interventions.fitting.gauss_newton import GaussNewton
from interventions.fitting.hard_concrete import HardConcrete
from interventions.fitting.scale_data import Checked, HeadOrLayer, ScaleData, to_budget
from interventions.fitting.scale_training import LearnerName, ScaleTraining

SCALES_VERSION = 4
"""Version of the learners: raise it when the same data and settings would give other scales."""


class Learner(Protocol):
    """What learns the scales of one direction, step by step."""

    places: list[HeadOrLayer]
    step: int

    def descend(self, wanted: Sequence[Continued], data: ScaleData) -> None:
        """Make one step from prompts with the wanted answers, and the guards of the same data."""

    def scales(self) -> Tensor:
        """The scales as they are, ``(n_scales,)``."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step needs, but the number of steps."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on from ``tensors()`` after ``step`` steps; a ``KeyError`` or ``ValueError`` if they do not fit."""


_LEARNERS: dict[LearnerName, type[GaussNewton] | type[HardConcrete]] = {
    "gauss_newton": GaussNewton,
    "hard_concrete": HardConcrete,
}


@dataclass(frozen=True, eq=False)
class LearnedScales:
    """Scales that were learned for one direction, within the budget on dev.

    Attributes:
        places: What moves.
        scales: Their scales, as many.
        dev: What they do on dev.
    """

    places: tuple[HeadOrLayer, ...]
    scales: tuple[float, ...]
    dev: Checked


def learn_scales(
    model: nn.Module,
    train: ScaleData,
    dev: ScaleData,
    towards: Direction,
    settings: ScaleTraining,
    *,
    checkpoint: Path | None = None,
    progress: str | None = None,
) -> LearnedScales:
    """Learn the scales of one direction.

    Args:
        model: The model, or a bridge around it.
        train: What is learned from.
        dev: What the scales are checked on.
        towards: The source that is to win.
        settings: What decides the training.
        checkpoint: File that training is kept in, and goes on from if it is there, of the same settings and, which is
            for the caller to see to, the same model and data.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If the numbers leave the range of the model's dtype.
    """
    shuffled_by = settings.seed if settings.shuffled else None
    wanted, tried = (data.wanted(towards, shuffled_by=shuffled_by) for data in (train, dev))
    learner: Learner = _LEARNERS[settings.learner](model, settings)
    if checkpoint is not None:
        _resume(checkpoint, learner, settings)
    for _ in tracked(range(learner.step, settings.steps), progress):
        learner.descend(wanted, train)
        if checkpoint is not None:
            _save(checkpoint, learner, settings)
    scales, checked = to_budget(model, dev, tried, learner.places, learner.scales(), settings.budgets)
    moved = [i for i, scale in enumerate(scales.tolist()) if scale != 1]
    return LearnedScales(tuple(learner.places[i] for i in moved), tuple(float(scales[i]) for i in moved), checked)


def _save(path: Path, learner: Learner, settings: ScaleTraining) -> None:
    """Keep all that the next step needs, in one file."""
    tensors = {name: tensor.contiguous() for name, tensor in learner.tensors().items()}
    about = {"settings": asdict(settings), "step": learner.step}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"training": json.dumps(about)})


def _resume(path: Path, learner: Learner, settings: ScaleTraining) -> None:
    """Let the learner go on from what was kept, if it is there, whole and of the same settings."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        if about["settings"] == asdict(settings):
            learner.restore(tensors, about["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return
