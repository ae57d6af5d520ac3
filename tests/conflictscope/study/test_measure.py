from types import SimpleNamespace
from typing import Any

import polars as pl
import torch

from conflictscope.study import measure as study
from conflictscope.study.condition import Condition
from interp.evaluation import UsageReport
from interp.generation import MAX_NEW_TOKENS
from interp.records import Records
from interventions.dial import DialScale, TrustDial
from interventions.heads import HeadScaling
from interventions.steering import Steering
from tests.tiny import tiny_conflicts


def test_the_same_edit_is_measured_once_whatever_it_is_called(tiny_llama, tmp_path, monkeypatch):
    asked, measured = tiny_conflicts(), []

    def measure(_, conflicts, *, combined, read, max_new_tokens, progress):
        assert max_new_tokens == MAX_NEW_TOKENS
        assert combined is None
        assert read is not None
        measured.append(progress)
        rows = {"id": [e.id for e in conflicts], "subject": [e.subject for e in conflicts]}
        return UsageReport(pl.DataFrame(rows))

    monkeypatch.setattr(study, "measure_usage", measure)
    monkeypatch.setattr(study, "_cost", lambda *_: {})
    reading = study.Reading(tiny_llama, asked)
    where = {"records": Records(tmp_path), "seed": 0, "reading": reading, "abilities": False}
    bench: Any = SimpleNamespace(model=tiny_llama, asked=asked, **where)
    steered = Steering(1, torch.ones(32), 2.0)
    names = {
        "pruning": [HeadScaling.of([(1, 0)], 0.0)],
        "the same as a dial": [TrustDial((DialScale(1, 0, 0.0, 2.0), DialScale(2, 1, 1.0, 0.5)), -1.0)],
        "steering": [steered],
        "the same by another name": [Steering(1, torch.ones(32), 2.0)],
        "unedited": [],
        "a dial at rest": [TrustDial((DialScale(1, 0, 0.0, 2.0),), 0.0)],
        "another vector, the same settings": [Steering(1, -torch.ones(32), 2.0)],
        "another scale": [HeadScaling.of([(1, 0)], 0.5)],
    }
    for name, edits in names.items():
        study.measure(bench, Condition(name, edits=tuple(edits)))
    once = ["pruning", "steering", "unedited", "another vector, the same settings", "another scale"]
    assert measured == [f"On test: {name}" for name in once]
