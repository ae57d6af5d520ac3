"""What a comparison takes is told before any weight is loaded, from what its units took elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conflictscope.cli import app
from conflictscope.study import costs as costs_module
from conflictscope.study.comparison import Comparing, Comparison
from conflictscope.study.costs import expected, flops_a_second, load_of, measured, ratios
from conflictscope.study.method import registered
from conflictscope.study.units import Done, Unit
from interp.answers import COMPLETION_TOKENS
from interp.models import load_config
from interp.plan import Shapes
from interp.records import Records


@pytest.fixture
def plan(tiny_directories: dict[str, Path]) -> dict[str, Any]:
    data = [{"relations": ["capital"], "subjects": 8}, {"relations": ["language"], "subjects": 4}]
    return {"models": [str(tiny_directories["llama"])], "data": data, "methods": ["pruning", "caa"], "seeds": [0, 1]}


def test_units_are_told_by_the_median_test_of_their_study() -> None:
    units, done = {}, {}

    def did(study: str, step: Any, what: str, seconds: float) -> None:
        unit = Unit(f"{study}/{step}/{what}", "m", study, step, what)
        units[unit.id], done[unit.id] = unit, Done(unit.id, seconds)

    for study, scale in (("a", 1.0), ("b", 3.0)):
        did(study, "prompts", "", 4 * scale)
        did(study, "share", "head_scores", 6 * scale)
        did(study, "choose", "pruning", 10 * scale)
        did(study, "choose", "caa", (2 if study == "a" else 4) * scale)
        for number, seconds in enumerate((1.0, 2.0, 9.0)):
            did(study, "test", str(number), seconds * scale)
    found = ratios(done, units)
    assert found["prompts"] == 2
    assert found["share"] == {"head_scores": 3}
    assert found["choose"] == {"pruning": 5, "caa": 1.5}
    assert found["tests"] == 1.5
    assert found["test_seconds"] == 4


def test_a_study_takes_what_its_passes_do(plan: dict[str, Any], tmp_path: Path) -> None:
    (setting, *_) = Comparison.model_validate(plan).studies
    load, known = load_of(setting, plan["methods"]), measured()
    prompts = setting.prompts(None, Records(tmp_path))
    assert load.tested == len(prompts.test)
    shapes = Shapes.of(load_config(setting.model.name))
    assert load.flops == load.tested * shapes.answer_flops(round(load.tokens), COMPLETION_TOKENS)
    shared = known["share"]["dev texts"] + known["share"]["head_scores"]
    steps = known["prompts"] + shared + known["choose"]["pruning"] + known["choose"]["caa"]
    assert load.all_flops == pytest.approx(load.flops * (steps + load.tests))


def test_the_last_row_is_all_of_them(plan: dict[str, Any], tmp_path: Path) -> None:
    frame = expected(Comparing.of(Comparison.model_validate(plan), tmp_path, ""))
    *studies, together = frame.iter_rows(named=True)
    assert [(row["data"], row["seed"]) for row in studies] == [(d, s) for d in ("capital", "language") for s in "01"]
    for column in ("prompts", "units", "PFLOP", "hours"):
        assert together[column] == pytest.approx(sum(row[column] for row in studies))


def test_a_dry_run_loads_no_weights(plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conflictscope.study.setting.load_model", None)
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    command = ["compare", str(tmp_path / "plan.yaml"), "--dry-run", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "language" in result.output
    assert not (tmp_path / "out").exists()


def test_what_was_not_measured_takes_as_long_as_what_needs_the_same(
    plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(measured()["choose"]) <= set(registered())
    (setting, *_) = Comparison.model_validate(plan).studies
    choose = {"actadd": 2.0, "probe_direction": 4.0, "task_vector": 9.0, "learned_scales": 50.0}
    monkeypatch.setattr(
        costs_module, "measured", lambda: {"prompts": 1.0, "share": {"store": 3.0}, "choose": choose, "tests": 2.0}
    )
    steps = load_of(setting, ["caa", "hard_concrete", "greedy_pruning", "learned_scales"]).steps
    found = [cost for (step, _), cost in steps.items() if step == "choose"]
    assert found == [4.0, 50.0, 50.0, 50.0]


def test_a_machine_is_asked_how_fast_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 0.1, 0.2, 0.5))
    monkeypatch.setattr(costs_module.time, "perf_counter", lambda: next(now))
    assert flops_a_second() == pytest.approx(2 * 2 * 1024**3 / 0.5)
