"""The command that does the whole job on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conflictscope.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_RELATION,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RelationOption,
    SeedOption,
)
from conflictscope.cli.studies import SUBJECTS, QuickOption, SubjectsOption, make_lab, show_page, study

METHODS = ("value_scaling", "mean_ablation", "pruning", "learned_scales")


def demo(
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    subjects: SubjectsOption = SUBJECTS,
    out: Annotated[Path, typer.Option(help="Folder for the results; finished steps in it are reused.")] = Path(
        "out/demo"
    ),
    seed: SeedOption = 0,
    quick: QuickOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Do the whole job on one model: measure, locate, intervene, verify; then look at OUT/report.html."""
    from conflictscope.study.method import method_named

    lab = make_lab(
        model,
        out,
        relation=relation,
        default=[DEFAULT_RELATION],
        subjects=subjects,
        seed=seed,
        quick=quick,
        device=device,
        dtype=dtype,
    )
    study(lab, [method_named(name) for name in METHODS], "demo", out, choices=("best",), controls="winners")
    show_page(out)
