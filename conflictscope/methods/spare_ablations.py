"""Take apart what SpARE does, with the layers, features and alpha that were chosen for it.

spare_remove_only, spare_add_only   one half of the edit
spare_constant                      what the edit of each layer does to unedited streams on average, whatever the
                                    input: the same push without features
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from conflictscope.methods._steering import kept
from conflictscope.methods.spare import Spare
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interventions.base import Intervention
from interventions.config import effect_digest
from interventions.features import EditedFeatures, FeatureEdit
from interventions.steering import Steering


@dataclass(frozen=True)
class SpareAblation(Method):
    """Do a part of what dev chose for SpARE.

    Attributes:
        of: SpARE, with its options.
    """

    of: Spare = field(default_factory=Spare)

    derived = True
    needs = "autoencoders"
    starts_from = ("store",)
    follows = ("spare",)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """The one part of SpARE's best."""
        best = lab.chosen(self.of, towards).best.condition
        (edit,) = best.edits
        assert isinstance(edit, FeatureEdit)
        return [Condition(self.name, towards, best.settings, tuple(self.parts(lab, edit)))]

    @abstractmethod
    def parts(self, lab: Lab, edit: FeatureEdit) -> Iterator[Intervention]:
        """What is left of the edit, or stands for it."""


class SpareRemoveOnly(SpareAblation):
    """Remove the other source's features, add none."""

    name = "spare_remove_only"

    def parts(self, lab: Lab, edit: FeatureEdit) -> Iterator[Intervention]:
        """The edit without the features that it adds."""
        del lab
        yield replace(edit, layers=tuple(_only(layer, ~layer.added) for layer in edit.layers))


class SpareAddOnly(SpareAblation):
    """Add the wanted source's features, remove none."""

    name = "spare_add_only"

    def parts(self, lab: Lab, edit: FeatureEdit) -> Iterator[Intervention]:
        """The edit without the features that it removes."""
        del lab
        yield replace(edit, layers=tuple(_only(layer, layer.added) for layer in edit.layers))


class SpareConstant(SpareAblation):
    """Add what SpARE adds on average."""

    name = "spare_constant"

    def parts(self, lab: Lab, edit: FeatureEdit) -> Iterator[Intervention]:
        """For each layer the mean change of train's unedited streams, as a direction."""

        def compute() -> Tensor:
            streams = ((layer, lab.train_states(layer.sae.layer)[0]) for layer in edit.layers)
            return torch.stack([layer.change(s, edit.alpha, edit.alpha_form).mean(0) for layer, s in streams])

        for layer, change in zip(edit.layers, kept(lab, "mean_changes", effect_digest([edit]), compute), strict=True):
            yield Steering(layer.sae.layer, change, 1.0, edit.tokens)


def _only(layer: EditedFeatures, wanted: Tensor) -> EditedFeatures:
    index = wanted.nonzero().flatten().tolist()
    return EditedFeatures(layer.sae.restricted(index), layer.targets[index], layer.added[index])
