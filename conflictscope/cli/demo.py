"""The command that does the whole job on one model."""

from __future__ import annotations

from pathlib import Path

from conflictscope.cli.options import OutOption
from conflictscope.cli.studies import BudgetedStudy, study


def demo(*, out: OutOption = Path("out/demo"), asked: BudgetedStudy) -> None:
    """Do the whole job on one model: measure, locate, intervene, verify; then look at OUT/report.html."""
    from conflictscope.methods.learned_scales import LearnedScales
    from conflictscope.methods.pruning import Pruning

    # Half of what is learned gains least: `compare` tries that too.
    methods = [Pruning(), LearnedScales(strengths=(1.0, 1.5, 2.0))]
    study(asked.lab(out), methods, "demo", out, choices=("best",), controls="winners", draws=1)
