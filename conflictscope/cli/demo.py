"""The command that does the whole job on one model."""

from __future__ import annotations

from pathlib import Path

from conflictscope.cli.options import OutOption
from conflictscope.cli.studies import BudgetedStudy, study

METHODS = ("value_scaling", "pruning", "learned_scales")


def demo(*, out: OutOption = Path("out/demo"), asked: BudgetedStudy) -> None:
    """Do the whole job on one model: measure, locate, intervene, verify; then look at OUT/report.html."""
    from conflictscope.study.method import method_named

    methods = [method_named(name) for name in METHODS]
    study(asked.lab(out), methods, "demo", out, choices=("best",), controls="winners")
