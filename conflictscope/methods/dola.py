"""Contrast the last layer with an earlier one: a control, which knows of no context.

DoLa (Chuang et al. 2023, arXiv 2309.03883; see ``interventions.dola``) makes models say what their upper layers add.
The lower or the upper half of the layers, every second one, may be the earlier layer; which half is chosen on dev.
Either source may gain by it, and nothing in it tells one from the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interventions.dola import DoLa


class LayerContrast(Method):
    """Decode by the contrast with an earlier layer."""

    name = "dola"
    needs = "nothing"
    starts_from = ()

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """The lower half of the layers and the upper one."""
        n_layers = lab.anatomy.n_layers
        halves = {"low": range(0, n_layers // 2, 2), "high": range(n_layers // 2, n_layers - 1, 2)}
        return [
            Condition(self.name, towards, {"half": half}, (DoLa(tuple(layers)),))
            for half, layers in halves.items()
            if layers
        ]
