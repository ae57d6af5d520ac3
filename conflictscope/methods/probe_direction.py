"""Add the direction along which a linear probe tells the source of an answer.

Li et al. 2023 (arXiv 2306.03341, inference-time intervention) steer heads along the directions of linear probes. Here
the logistic source probe reads the residual stream at the prompt's last token, and its direction is as long as the
difference of the means, so that strengths compare with those of ``actadd``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conflictscope.methods._steering import SteeringMethod, kept, signed, source_means
from conflictscope.study.lab import Lab
from interp.answers import Direction
from probes.detector import SOURCE_CLASSES
from probes.linear import ProbeSet


class ProbeDirection(SteeringMethod):
    """Add the source probe's direction."""

    name = "probe_direction"
    starts_from = ("store",)

    def vectors(self, lab: Lab, layers: Sequence[int], towards: Direction) -> Tensor:
        """The probe's direction towards the source, as long as the difference of the means, ``(n_layers, d_model)``."""
        context, memory = source_means(lab, layers)
        sites = [lab.anatomy.site("block", layer) for layer in layers]

        def compute() -> Tensor:
            answered = lab.answered
            rows = lab.store.rows(answered["row"].to_list())
            probes = ProbeSet.fit(
                {site: rows[site] for site in sites},
                answered["usage"].to_list(),
                validation=(answered["split"] == "dev").to_list(),
                classes=SOURCE_CLASSES,
                progress="Source probes",
            )
            return torch.stack([probes[site].direction for site in sites])

        directions = kept(lab, "source_directions", list(layers), compute)
        return signed(directions * (context - memory).norm(dim=-1, keepdim=True), towards)
