"""Labs on tiny models, which are taken to know all that they are asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conflictscope.study.condition import Condition
from conflictscope.study.data import fact_prompts
from conflictscope.study.lab import Lab
from conflictscope.study.measure import Result, measure
from interp.fingerprints import fingerprint
from interp.records import Records


def tiny_lab(model: Any, folder: Path, *, subjects: int = 8, seed: int = 0) -> Lab:
    """A quick lab on prompts about capitals and languages."""
    records = Records(folder, model=fingerprint(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.known.known_facts", lambda *_, among, **__: among)
        prompts = fact_prompts(model, ["capital", "language"], records, subjects=subjects, seed=seed)
    return Lab(model, "tiny", prompts, records, seed=seed, quick=True, new_tokens=4)


def measured_from_files(lab: Lab, condition: Condition, folder: Path) -> Result:
    """What a lab that knows nothing measures of a condition that it reads from files."""
    condition.save(folder, lab.identity)
    fresh = replace(lab, records=Records(folder / "records", model=fingerprint(lab.model)))
    return measure(fresh, Condition.load(folder))
