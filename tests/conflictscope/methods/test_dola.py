"""The layers that may be the earlier one are those of either half."""

from __future__ import annotations

from conflictscope.methods.dola import LayerContrast
from interventions.dola import DoLa
from tests.conflictscope.methods.labs import tiny_lab


def test_both_halves_compete_without_the_last_layer(tiny_llama, tmp_path):
    lab = tiny_lab(tiny_llama, tmp_path)
    found = {c.settings["half"]: c.edits for c in LayerContrast().candidates(lab, "context")}
    assert found == {"low": (DoLa((0,)),), "high": (DoLa((1,)),)}
    assert lab.anatomy.n_layers == 3
