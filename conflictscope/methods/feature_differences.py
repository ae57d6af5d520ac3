"""Move the features that a context changes most.

Persona features are found so (Wang et al. 2025, arXiv 2506.19823; see ``probes.feature_differences``): by the change of
their mean activation between two conditions. Here these are train's conflict prompts with their context and without it.
Features take the place of SpARE's: those that hold a share of the total change, moved as SpARE moves its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conflictscope.methods._steering import kept
from conflictscope.methods.spare import Spare
from conflictscope.study.lab import Lab
from interp.sae import SparseAutoencoder
from probes.feature_differences import differences
from probes.feature_selection import FeatureStatistics


@dataclass(frozen=True)
class ContextFeatures(Spare):
    """Move the features that differ most between prompts with and without their context."""

    name = "feature_differences"
    starts_from = ()

    def statistics(self, lab: Lab, sae: SparseAutoencoder) -> FeatureStatistics:
        """How far a context changes each feature, on train, in the place of its information.

        Raises:
            UserError: If no conflict prompt of train is known without its context.
        """
        asked = lab.prompts.train.select(kind="conflict")

        def compute() -> Tensor:
            (found,) = differences([sae], lab.model, asked, progress=f"Recording layer {sae.layer}")
            bare, whole = found.sides
            fires = (bare.fires + whole.fires) / 2
            return torch.stack([found.difference.abs(), whole.mean, bare.mean, fires])

        return FeatureStatistics(*kept(lab, "feature_differences", sae.digest, compute, torch.float64))
