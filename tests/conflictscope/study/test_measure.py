from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch

from conflictscope.study import measure as study
from conflictscope.study.condition import Condition
from interp.evaluation import UsageReport
from interp.generation import MAX_NEW_TOKENS
from interp.records import Records
from interventions.decoding import CAD
from interventions.dial import DialScale, TrustDial
from interventions.heads import HeadScaling
from interventions.steering import Steering
from tests.tiny import tiny_conflicts


def test_the_same_edit_is_measured_once_whatever_it_is_called(tiny_llama, tmp_path, monkeypatch):
    asked, measured = tiny_conflicts(), []

    def measure(_, conflicts, *, combined, read, max_new_tokens, progress):
        assert max_new_tokens == MAX_NEW_TOKENS
        assert (combined is None) == ("rule" not in progress)
        # All of them go on from what was read once.
        assert read[0] is (reading.prompts if combined is None else reading.pairs)
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
    for name, rule in {"a rule": CAD(1.0), "the same rule": CAD(1.0), "another rule": CAD(2.0)}.items():
        study.measure(bench, Condition(name, decoding=rule))
    once = [
        "pruning",
        "steering",
        "unedited",
        "another vector, the same settings",
        "another scale",
        "a rule",
        "another rule",
    ]
    assert measured == [f"On test: {name}" for name in once]


@pytest.mark.parametrize(
    ("edited_takes", "rounds", "expected"),
    [([2.0, 2.18], 2, (1 / 2 + 1 / 2.18) / 2), ([2.0, 4.0, 2.5], 3, 1 / 2.5), ([4.0, 2.0, 1.0], 3, 1 / 2)],
)
def test_speed_is_of_the_same_prompts_in_turns_until_two_rounds_agree(
    tiny_llama, monkeypatch, edited_takes, rounds, expected
):
    clock, calls = [0.0], []
    takes = iter(edited_takes)

    def generated(model, prompts, *, max_new_tokens, **_):
        edited = bool(model.model.layers[1]._forward_hooks)
        calls.append((edited, max_new_tokens, tuple(prompts)))
        # The first tokens, which warm up, count for nothing however long they take.
        clock[0] += 50.0 if max_new_tokens == 1 else next(takes) if edited else 1.0

    monkeypatch.setattr(study, "continue_greedily", generated)
    monkeypatch.setattr(study.time, "perf_counter", lambda: clock[0])
    bench: Any = SimpleNamespace(model=tiny_llama, asked=tiny_conflicts(), seed=0)
    cost = study._cost(bench, Condition("steering", edits=(Steering(1, torch.ones(32), 2.0),)))
    speeds = [1 / one for one in edited_takes]
    assert cost == pytest.approx({"speed": expected, "low": min(speeds), "high": max(speeds)})
    assert [tokens for _, tokens, _ in calls] == [1, 1] + [study._TOKENS] * 2 * rounds
    turns = [edited for edited, *_ in calls[2:]]
    assert turns == ([True, False, False, True, True, False])[: 2 * rounds]
    assert len({frozenset(prompts) for *_, prompts in calls}) == 1
