"""One engine behind all commands: what does the same gives the same rows, whichever command measured it."""

from __future__ import annotations

from collections import defaultdict

import polars as pl

from conflictscope.study.record import UNEDITED, StudyRecord, read_examples
from interventions.config import InterventionFile, effect_digest
from tests.conflictscope import small_studies
from tests.conflictscope.cli import test_cli

run, small = test_cli.run, small_studies.small

SHARED = "--relation capital --relation language --subjects 5 --seed 3"


def test_the_same_condition_has_the_same_rows_in_demo_compare_and_dial(small, run, tiny_directories, tmp_path):
    model, shared = tiny_directories["llama"], SHARED.split()
    commands = {
        "demo": ["demo", "--model", model, "--quick"],
        "compare": ["compare", "--model", model, "--method", "pruning", "--method", "value_scaling", "--quick"],
        "dial": ["dial", "fit", "--model", model, "--quick", "--max-scales", "3", "--budget", "0.5"],
    }
    rows: dict[str | None, dict[str, pl.DataFrame]] = defaultdict(dict)
    for study, command in commands.items():
        code, _, error = run(*command, *shared, "--out", study)
        assert code == 0, error
        assert (tmp_path / study / "report.html").exists()
        examples = read_examples(tmp_path / study)
        assert examples is not None
        for condition in StudyRecord.load(tmp_path / study).conditions:
            if condition.draws > 1:
                continue
            digest = None
            if condition.method != UNEDITED:
                assert condition.file is not None
                digest = effect_digest(InterventionFile.load(tmp_path / study / condition.file).build())
            rows[digest][study] = examples.filter(condition=condition.name).drop("condition")
    assert set(rows[None]) == {"demo", "compare", "dial"}
    shared_edits = [found for digest, found in rows.items() if digest and {"demo", "compare"} <= set(found)]
    assert len(shared_edits) >= 2
    for found in rows.values():
        first, *others = found.values()
        assert all(first.equals(other) for other in others)
