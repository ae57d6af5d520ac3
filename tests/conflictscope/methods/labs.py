"""Labs on tiny models, which are taken to know all that they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conflictscope.study.data import fact_prompts
from conflictscope.study.lab import Lab
from interp.fingerprints import fingerprint
from interp.records import Records


def tiny_lab(model: Any, folder: Path, *, subjects: int = 8, seed: int = 0) -> Lab:
    """A quick lab on prompts about capitals and languages."""
    records = Records(folder, model=fingerprint(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.known.known_facts", lambda *_, among, **__: among)
        prompts = fact_prompts(model, ["capital", "language"], records, subjects=subjects, seed=seed)
    return Lab(model, "tiny", prompts, records, seed=seed, quick=True)
