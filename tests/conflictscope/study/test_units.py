"""Units are handed out in an order that fits what they need, whatever is lost; a comparison of units is a study."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conflictscope.cli import app
from conflictscope.study import comparison as comparison_module
from conflictscope.study import measure as measure_module
from conflictscope.study.comparison import Comparing, Comparison, StudyWorker, finished
from conflictscope.study.lab import Lab
from conflictscope.study.method import registered
from conflictscope.study.record import RECORD, StudyRecord
from conflictscope.study.units import MOST_LOSSES, Done, Journal, Schedule, Unit, serial, spent
from interp.errors import UserError
from interp.files import read_json
from tests.conflictscope.methods.labs import tiny_lab

METHODS = ("pruning", "instruction")


def chain(study: str, model: str = "m", tests: int = 3) -> list[Unit]:
    first = Unit(f"{study}/prompts", model, study, "prompts")
    choices = [Unit(f"{study}/choose/{n}", model, study, "choose", str(n), (first.id,)) for n in range(2)]
    return [first, *choices, Unit(f"{study}/tests", model, study, "tests", "", tuple(one.id for one in choices))]


def done(unit: Unit, tests: int = 3) -> Done:
    if unit.step != "tests":
        return Done(unit.id, 1.0)
    new = [Unit(f"{unit.study}/test/{n}", unit.model, unit.study, "test", str(n)) for n in range(tests)]
    record = Unit(f"{unit.study}/record", unit.model, unit.study, "record", "", tuple(one.id for one in new))
    return Done(unit.id, 1.0, new=(*new, record))


@pytest.mark.parametrize("seed", range(20))
def test_every_unit_is_done_once_and_after_what_it_needs_whatever_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    schedule = Schedule([unit for name in "abc" for unit in chain(name, rng.choice("mn"))])
    running: list[list[Unit]] = []
    order: list[str] = []
    while not schedule.is_finished:
        if (rng.random() < 0.5 or not running) and (taken := schedule.take(("m", "a"), rng.randint(1, 3))):
            assert len({unit.study for unit in taken}) == 1
            running.append(taken)
        elif running:
            units = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.2:
                schedule.lost(units)
                continue
            for unit in units:
                assert set(unit.needs) <= set(order)
                order.append(unit.id)
                schedule.finish(done(unit))
    assert Counter(order) == Counter(schedule.units.keys())
    assert len(order) == 3 * 8
    assert not schedule.take()


@pytest.mark.parametrize("seed", range(20))
def test_what_was_done_before_is_not_done_again(seed: int) -> None:
    """Whichever units those were, also where thousands of studies are finished."""
    rng, before = random.Random(seed), []
    known = Schedule([*chain("a"), *chain("b")])
    while len(before) < seed % 16 and (taken := known.take(most=1)):
        before.append(done(taken[0]))
        known.finish(before[-1])
    rng.shuffle(before)
    schedule = Schedule([*chain("a"), *chain("b")], before)
    order: list[str] = []
    while taken := schedule.take(most=3):
        order += [unit.id for unit in taken]
        for unit in taken:
            schedule.finish(done(unit))
    assert schedule.is_finished
    assert Counter(order) + Counter(one.id for one in before) == Counter(schedule.units.keys())


def test_thousands_of_finished_studies_are_no_burden() -> None:
    names = [str(number) for number in range(3000)]
    finished_before = [done(unit) for name in names for unit in chain(name)]
    finished_before += [Done(new.id, 1.0) for one in list(finished_before) for new in one.new]
    schedule = Schedule([*(unit for name in names for unit in chain(name)), *chain("new")], finished_before)
    assert schedule.n_ready == 1
    assert [unit.id for unit in schedule.take(most=9)] == ["new/prompts"]


def test_what_one_study_makes_for_all_is_made_by_others_where_it_fails() -> None:
    shared = Unit("a/texts", "m", "a", "share")
    schedule = Schedule([shared, Unit("b/choose", "m", "b", "choose", needs=("a/texts",))])
    schedule.finish(Done("a/texts", 1.0, failed="no such file"))
    assert [unit.id for unit in schedule.take()] == ["b/choose"]


def test_a_worker_keeps_its_study_then_its_model_and_new_models_go_where_fewest_are() -> None:
    schedule = Schedule([unit for name, model in (("a", "m"), ("b", "m"), ("c", "n")) for unit in chain(name, model)])
    assert [schedule.take(("m", "b"))[0].study for _ in range(2)] == ["b", "a"]
    assert schedule.take(("m", "b"))[0].study == "c"
    assert not schedule.take(("m", "b"))
    two = Schedule(Unit(f"{model}{n}", model, "s", "test") for model in "mn" for n in range(4 if model == "m" else 3))
    assert two.take(holders={"m": 3})[0].model == "n"
    assert two.take(holders={})[0].model == "m"


def test_what_takes_longest_goes_first() -> None:
    schedule = Schedule(Unit(str(cost), "m", "s", "test", cost=cost) for cost in (1.0, 5.0, 3.0, 5.5))
    assert [unit.id for unit in schedule.take(most=4)] == ["5.5", "5.0", "3.0", "1.0"]


def test_a_unit_that_fails_or_is_lost_too_often_takes_its_study_with_it_and_no_other() -> None:
    schedule = Schedule([*chain("a"), *chain("b")])
    schedule.finish(Done("a/prompts", 1.0, failed="no such file"))
    while taken := schedule.take():
        for unit in taken:
            assert unit.study == "b"
            schedule.finish(done(unit))
    assert schedule.is_finished
    assert schedule.failed == {"a": "no such file"}
    schedule = Schedule(chain("a"))
    for _ in range(MOST_LOSSES + 1):
        schedule.lost(schedule.take())
    assert schedule.is_finished
    assert "lost its worker" in schedule.failed["a"]


def test_a_journal_that_was_cut_amid_a_line_is_read_to_there_and_written_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "units.jsonl")
    first = Schedule(chain("a"))
    for _ in range(4):
        (unit,) = first.take()
        first.finish(done(unit))
        journal.append([done(unit)])
    with journal.path.open("a") as stream:
        stream.write('{"id": "a/test/0", "sec')
    again = Schedule(chain("a"), Journal(journal.path).read())
    assert sorted(unit.id for unit in again.take(most=9)) == [f"a/test/{n}" for n in range(3)]
    assert not again.n_ready
    Journal(journal.path).append([Done("a/test/0", 2.0), Done("a/test/1", 1.0, failed="out of memory")])
    once_more = Schedule(chain("a"), Journal(journal.path).read())
    assert sorted(unit.id for unit in once_more.take(most=9)) == ["a/test/1", "a/test/2"]
    assert spent(once_more)[0] == {"step": "test", "what": "", "units": 1, "hours": round(2 / 3600, 4)}


@pytest.fixture
def plan(tiny_directories: dict[str, Path]) -> dict[str, Any]:
    return {
        "models": [{"name": str(tiny_directories["llama"]), "attention": "eager"}, str(tiny_directories["gpt-neox"])],
        "data": [{"relations": ["capital"], "subjects": 8}],
        "methods": list(METHODS),
        "seeds": [0, 1],
        "quick": True,
    }


@pytest.fixture
def comparing(plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparing:
    monkeypatch.setattr("interp.known.known_facts", lambda *_, among, **__: among)
    return Comparing.of(Comparison.model_validate(plan), tmp_path / "out", "conflictscope compare plan.yaml")


def without_times(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return {**record, "conditions": [{**one, "cost": None} for one in record["conditions"]]}


def test_a_comparison_gives_the_records_of_its_studies_and_holds_one_model_at_a_time(
    comparing: Comparing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = comparison_module.ModelSetting.load
    monkeypatch.setattr(comparison_module.ModelSetting, "load", lambda self: loads.append(self.name) or load(self))
    schedule = Schedule(comparing.units())
    order = [schedule.units[one.id] for one in serial(lambda: StudyWorker(comparing))(schedule)]
    assert not schedule.failed
    assert len(loads) == 2
    assert len(finished(comparing, schedule)) == 4
    # A model's units come together, and a study's.
    assert len([unit for unit, before in zip(order[1:], order, strict=False) if unit.study != before.study]) == 3
    digest, setting = next(iter(comparing.settings.items()))
    lab = setting.lab(tmp_path / "fresh")
    study = replace(comparing.study(digest, lambda _: None), out=tmp_path / "alone")
    study.run(lab, comparing.plan.chosen_methods)
    assert without_times(tmp_path / "alone") == without_times(comparing.folder(setting))


def test_what_was_killed_goes_on_and_computes_nothing_twice(
    comparing: Comparing, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = comparing.plan.model_copy(update={"data": comparing.plan.data[:1], "models": comparing.plan.models[:1]})
    comparing = Comparing.of(plan.model_copy(update={"seeds": (0,)}), comparing.out, comparing.command)
    measured: Counter[str] = Counter()
    answers = measure_module.measure_usage

    def counted(model: Any, asked: Any, **options: Any) -> Any:
        measured["asked"] += 1
        if measured["asked"] in (2, 5):
            raise KeyboardInterrupt
        return answers(model, asked, **options)

    monkeypatch.setattr(measure_module, "measure_usage", counted)
    journal = Journal(comparing.out / "units.jsonl")

    def run() -> Schedule:
        schedule = Schedule(comparing.units(), journal.read(comparing.has_record))
        for one in serial(lambda: StudyWorker(comparing))(schedule):
            journal.append([one])
        return schedule

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run()
    schedule = run()
    tests = [unit for unit in schedule.units.values() if unit.step == "test"]
    assert measured["asked"] == len(tests) + 2
    known = Schedule(comparing.units(), journal.read(comparing.has_record))
    assert known.is_finished
    assert finished(comparing, known) == finished(comparing, schedule) != []
    # Another plan may write a record in its place, which is then not this one's.
    (folder,) = finished(comparing, schedule)
    record = StudyRecord.load(folder)
    replace(record, settings={**record.settings, "digest": "another"}).save(folder)
    assert [unit.step for unit in left(comparing, journal)] == ["record"]
    run()
    assert left(comparing, journal) == []
    assert measured["asked"] == len(tests) + 2


def left(comparing: Comparing, journal: Journal) -> list[Unit]:
    """What is left to do."""
    return Schedule(comparing.units(), journal.read(comparing.has_record)).take(most=99)


def test_a_study_that_cannot_be_made_is_said_and_others_are_made(
    plan: dict[str, Any], comparing: Comparing, tmp_path: Path
) -> None:
    (tmp_path / "no.jsonl").write_text("this is no JSON\n")
    data = [*plan["data"], {"name": "broken", "data": str(tmp_path / "no.jsonl")}]
    path, out = tmp_path / "plan.yaml", comparing.out
    path.write_text(json.dumps({**plan, "models": plan["models"][:1], "data": data, "seeds": [0]}))
    result = CliRunner().invoke(app, ["compare", str(path), "--out", str(out)])
    assert result.exit_code == 1
    assert "broken, seed 0 could not be made: " in result.stderr
    assert "no.jsonl" in result.stderr
    assert len(list(out.glob("studies/*/*/*/study.json"))) == 1
    assert (out / "leaderboard.md").stat().st_size
    units = {one["step"]: one["units"] for one in read_json(out / "hours.json")}
    assert units["record"] == 1


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"models": []}, "models"),
        ({"data": [{"name": "nothing"}]}, "needs either relations or data"),
        (
            {"data": [{"relations": ["capital"], "data_format": "nq-swap"}]},
            "data_format, unknown_too and most_words belong to data",
        ),
        ({"data": [{"relations": ["capital"]}, {"relations": ["capital"]}]}, "data has capital twice"),
        ({"data": [{"data": "nowhere.jsonl"}]}, "nowhere.jsonl, the data of nowhere, is not there"),
        ({"data": [{"relations": ["capitol"]}]}, "capitol"),
        ({"data": [{"data": "plan.yaml", "data_format": "nqswap"}]}, "nqswap"),
        ({"methods": ["prunning"]}, "There is no method 'prunning'"),
        ({"seeds": ["one"]}, "seeds"),
        ({"budgets": 1}, "budgets: Extra inputs are not permitted"),
        ({"budget": -1}, "greater than 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_a_sentence(
    plan: dict[str, Any], changed: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({**plan, **changed}))
    with pytest.raises(UserError, match=sentence):
        Comparison.load(path)


@pytest.mark.parametrize("text", ["models: [", "just words", ""])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="plan"):
        Comparison.load(path)


def test_options_that_a_plan_says_itself_are_refused(plan: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(plan))
    result = CliRunner().invoke(app, ["compare", str(path), "--method", "pruning"])
    assert isinstance(result.exception, UserError)
    assert "--method" in str(result.exception)
    result = CliRunner().invoke(app, ["compare", str(path), "--workers", "2", "--out", str(tmp_path)])
    assert "belong to --ray" in str(result.exception)


def test_methods_say_what_they_take_of_the_lab(
    tiny_plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what several start from would be made by each of them, on as many machines."""
    texts, splits = Lab.texts, set()
    monkeypatch.setattr(Lab, "texts", lambda lab, split: splits.add(split) or texts(lab, split))
    for name, kind in registered().items():
        lab, method = tiny_lab(tiny_plain("llama"), tmp_path), kind()
        splits.clear()
        with contextlib.suppress(UserError):
            (first, *_) = method.candidates(lab, "memory")
            method.controls(lab, first)
            method.details(lab, first)
        taken = {one for one in ("head_scores", "mean_outputs", "store") if one in vars(lab)}
        taken |= {"texts"} if "train" in splits else set()
        expected = set(method.starts_from).union(*(registered()[one].starts_from for one in method.follows))
        assert taken <= expected, name
