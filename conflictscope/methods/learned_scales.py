"""Learn the scales of all heads together, within the budgets of damage: what a trust dial moves.

``interventions.fitting.scale_learning`` states how they are learned from train and checked on dev. Moved on their line
from 1, less far or further, they compete at several strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from conflictscope.methods._heads import HeadMethod
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from interp.answers import Direction
from interp.corpus import TEXTS_VERSION
from interp.errors import UserError
from interp.teacher_forcing import FORCING_VERSION
from interventions.dial import DialScale, TrustDial
from interventions.fitting.scale_data import SCALE_DATA_VERSION, HeadOrLayer, ScaleData
from interventions.fitting.scale_learning import SCALES_VERSION, learn_scales
from interventions.fitting.scale_training import ScaleTraining

ENDS: Mapping[Direction, float] = {"memory": -1.0, "context": 1.0}
"""Where a dial stands at its ends."""

TRAINING = ScaleTraining()
_QUICK: dict[str, Any] = {"steps": 3, "conflicts": 2, "guards": 1}


@dataclass(frozen=True)
class LearnedScales(HeadMethod):
    """Learn the scales of heads, and of feed-forward layers if wanted.

    Attributes:
        training: What decides the learning; budgets and seed are the lab's.
        strengths: How far the scales are moved, of what was learned.
    """

    name = "learned_scales"
    needs = "learning"
    starts_from = ("texts",)
    training: ScaleTraining = TRAINING
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """What was learned, at each strength.

        Raises:
            UserError: If the data lacks a kind of prompts, nothing could be moved within the budgets, or numbers leave
                the range of the model's dtype.
        """
        scales, _ = learned(lab, towards, self.training)
        end = dial_of({towards: scales}).at(ENDS[towards]).settled()
        return [
            Condition(self.name, towards, {"strength": strength}, tuple(edit.scaled(strength) for edit in end))
            for strength in self.strengths
        ]

    def details(self, lab: Lab, chosen: Condition) -> Mapping[str, Any]:
        """What decided the learning, and what the learner saw on dev."""
        assert chosen.towards is not None
        return {
            "training": asdict(in_lab(lab, self.training)),
            "dev": learned(lab, chosen.towards, self.training)[1],
        }


def learned(lab: Lab, towards: Direction, training: ScaleTraining) -> tuple[dict[HeadOrLayer, float], dict[str, Any]]:
    """The scales of one direction by ``(layer, head)``, and what they do on dev; a training that was stopped goes on.

    Head ``None`` is the feed-forward layer.

    Args:
        lab: The lab; its budgets and its seed are the training's.
        towards: The direction.
        training: What else decides the learning.

    Raises:
        UserError: As ``LearnedScales.candidates``.
    """
    settings = in_lab(lab, training)
    return learned_from(lab, towards, settings, [], lambda: lab.scale_data)


def learned_from(
    lab: Lab,
    towards: Direction,
    settings: ScaleTraining,
    besides: Sequence[Any],
    data: Callable[[], Mapping[Literal["train", "dev"], ScaleData]],
) -> tuple[dict[HeadOrLayer, float], dict[str, Any]]:
    """The same from some data, which is made only if it is not known what was learned from it.

    Args:
        lab: The lab.
        towards: The direction.
        settings: What decides the learning.
        besides: What the data depends on besides the lab's prompts.
        data: Makes it.

    Raises:
        UserError: As ``LearnedScales.candidates``.
    """
    depends_on = [lab.scale_basis, *besides, asdict(settings)]
    version = (SCALES_VERSION, SCALE_DATA_VERSION, FORCING_VERSION, TEXTS_VERSION)
    checkpoint = lab.records.place(f"training-{towards}", depends_on, ".safetensors", version=version)

    def compute() -> dict[str, Any]:
        made = data()
        label = f"Learning towards {towards}"
        found = learn_scales(
            lab.model, made["train"], made["dev"], towards, settings, checkpoint=checkpoint, progress=label
        )
        moved = zip(found.places, found.scales, strict=True)
        return {"scales": [[*place, scale] for place, scale in moved], "dev": asdict(found.dev)}

    found = lab.records.json(f"scales-{towards}", depends_on, compute, version=version)
    checkpoint.unlink(missing_ok=True)
    if not found["scales"]:
        raise UserError(
            f"No scale could be moved towards {towards} within the budgets of {settings.budget:g} and "
            f"{settings.context_budget:g} nats; give a larger --budget or --context-budget."
        )
    return {(layer, head): scale for layer, head, scale in found["scales"]}, found["dev"]


def dial_of(ends: Mapping[Direction, Mapping[HeadOrLayer, float]]) -> TrustDial:
    """The dial, at 0, with these scales at its ends; in the order of the model."""
    places = {place for scales in ends.values() for place in scales}
    order = sorted(places, key=lambda place: (place[0], -1 if place[1] is None else place[1]))
    return TrustDial(
        tuple(
            DialScale(*place, **{towards: scales[place] for towards, scales in ends.items() if place in scales})
            for place in order
        )
    )


def in_lab(lab: Lab, training: ScaleTraining) -> ScaleTraining:
    """The training with the lab's budgets and seed, and few steps where the lab is quick."""
    budget = min(lab.budgets["none"], lab.budgets["neutral"])
    context_budget = min(lab.budgets["aligned"], lab.budgets["irrelevant"])
    settings = replace(training, budget=budget, context_budget=context_budget, seed=lab.seed)
    return replace(settings, **_QUICK) if lab.quick else settings
