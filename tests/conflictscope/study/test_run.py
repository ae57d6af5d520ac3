"""One engine: what does the same is the same everywhere, killed studies go on, and units run from files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from conflictscope.methods.instruction import Instruction
from conflictscope.methods.value_scaling import ValueScaling
from conflictscope.report import read_runs, write_report
from conflictscope.study import measure as measure_module
from conflictscope.study.condition import Condition, Prompting
from conflictscope.study.data import fact_prompts
from conflictscope.study.lab import Lab
from conflictscope.study.leaderboard import leaderboard
from conflictscope.study.measure import measure
from conflictscope.study.method import Method
from conflictscope.study.record import RECORD, UNEDITED, StudyRecord, read_examples
from conflictscope.study.run import Study
from interp.abilities import first_tokens
from interp.answers import Direction
from interp.conflicts import ConflictExample
from interp.errors import UserError
from interp.evaluation import measure_usage
from interp.fingerprints import fingerprint
from interp.generation import gathered_logits, next_logits
from interp.records import Records
from interventions.base import applied
from interventions.decoding import DecodingRule
from interventions.heads import HeadScaling
from interventions.steering import Steering
from tests.conflictscope.methods.labs import measured_from_files


@dataclass(frozen=True)
class Doubled(DecodingRule):
    """Scores that are those of the context twice less those without: a rule that files cannot hold."""

    def scores(self, with_context: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
        return 2 * with_context - without


@dataclass(frozen=True)
class Shouted(Prompting):
    """Puts a word before each prompt."""

    word: str = "Listen."

    def prompt(self, example: ConflictExample) -> str:
        return f"{self.word} {example.prompt}"


class TwoHeads(Method):
    """Removes one of two heads, and one at random as a control."""

    name = "two_heads"

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        return [Condition(self.name, towards, {"head": head}, (HeadScaling.of([(1, head)], 0.0),)) for head in (0, 1)]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        heads = lab.rng("two heads").sample([2, 3], 2)
        return [
            Condition("random_heads", chosen.towards, {}, (HeadScaling.of([(1, head)], 0.0),), control_of=chosen.method)
            for head in heads
        ]


class Impossible(Method):
    """Cannot run."""

    name = "impossible"

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        raise UserError("This model has no such thing; take another.")


def make_lab(directory: Path, out: Path, model: Any) -> Lab:
    """A quick lab whose model is known by its directory, so that other processes can load it."""
    records = Records(out / "records", model=fingerprint(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.known.known_facts", lambda *_, among, **__: among)
        prompts = fact_prompts(model, ["capital"], records, subjects=8, seed=0)
    return Lab(model, str(directory), prompts, records, quick=True)


@pytest.fixture(scope="module")
def lab(tiny_llama: Any, tiny_directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tiny_directories["llama"], tmp_path_factory.mktemp("study"), tiny_llama)


@pytest.fixture(scope="module")
def record(lab: Lab) -> StudyRecord:
    out = lab.records.folder.parent
    return Study("compare", "conflictscope compare", out).run(lab, [TwoHeads(), Impossible()])


def without_times(path: Path) -> dict[str, Any]:
    written = json.loads(path.read_text(encoding="utf-8"))
    for condition in written["conditions"]:
        del condition["cost"]
    return written


def test_the_record_holds_unedited_chosen_and_controls_and_says_what_was_not_run(record: StudyRecord) -> None:
    assert record.unedited.method == UNEDITED
    for towards in ("context", "memory"):
        assert [c.method for c in record.chosen(towards)] == ["two_heads"]
        best = record.winner(towards)
        assert best is not None
        (control,) = record.controls_of(best)
        assert (control.draws, control.moved) == (1, best.moved)
    assert record.not_run == {"impossible": "This model has no such thing; take another."}
    assert record.command == "conflictscope compare"


def test_a_record_grows_and_ends_as_one_that_was_written_once(lab: Lab, record: StudyRecord, tmp_path: Path) -> None:
    """After each method but the last it says what is to come, without controls; every stage has its sentence."""
    told, shown = [], []
    methods = [TwoHeads(), ValueScaling(), Impossible()]
    growing = Study("compare", record.command, tmp_path / "a", told=told.append, shown=shown.append)
    ended = growing.run(lab, methods)
    Study("compare", record.command, tmp_path / "b").run(lab, methods)
    assert without_times(tmp_path / "a" / RECORD) == without_times(tmp_path / "b" / RECORD)
    files = [{path.name for path in (tmp_path / folder / "interventions").iterdir()} for folder in ("a", "b")]
    assert files[0] == files[1]
    assert [part.to_come for part in shown] == [("value_scaling", "impossible"), ("impossible",)]
    assert [part.methods for part in shown] == [["two_heads"], ["two_heads", "value_scaling"]]
    assert not any(c.is_control for part in shown for c in part.conditions)
    assert not ended.to_come
    assert any(c.is_control for c in ended.conditions)
    for name in (c.name for c in record.conditions):
        assert told.count(next(line for line in told if line.startswith(f"{name}, on unseen subjects: "))) == 1
    assert any(line.startswith("Path patching, positive towards the context: ") for line in told)
    assert any(line.startswith("two heads, towards memory: dev chose, of 4 tried, 1 ") for line in told)


def test_a_winner_that_no_file_can_hold_leaves_no_file_of_an_earlier_one(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "interventions"
    Study("compare", "", tmp_path, directions=("memory",)).run(lab, [TwoHeads()])
    assert (folder / "towards_memory.json").exists()
    Study("compare", "", tmp_path, directions=("memory",)).run(lab, [Instruction()])
    assert not (folder / "towards_memory.json").exists()


def test_a_finished_record_is_replaced_by_a_finished_one_alone(lab: Lab, tmp_path: Path) -> None:
    shown = []
    study = Study("compare", "", tmp_path, directions=("memory",), shown=shown.append)
    study.run(lab, [TwoHeads(), Impossible()])
    assert [part.to_come for part in shown] == [("impossible",)]
    study.run(lab, [TwoHeads(), Impossible()])
    assert len(shown) == 1
    shown[0].save(tmp_path)
    study.run(lab, [TwoHeads(), Impossible()])
    assert len(shown) == 2


def test_rates_on_test_are_those_of_answers_asked_with_hooks(lab: Lab, record: StudyRecord) -> None:
    best = record.winner("context")
    assert best is not None
    edit = HeadScaling.of([(1, best.settings["head"])], 0.0)
    with applied(lab.model, edit):
        answers = measure_usage(lab.model, lab.asked.select(kind="conflict"))
    assert best.test["context_rate"]["value"] == (answers.frame["usage"] == "context").mean()


def test_a_change_is_what_prompts_gain_on_average(lab: Lab, record: StudyRecord) -> None:
    examples = read_examples(lab.records.folder.parent)
    assert examples is not None
    for towards in ("context", "memory"):
        best = record.winner(towards)
        assert best is not None
        rates = [
            np.mean((examples.filter(kind="conflict", condition=name)["usage"] == towards).to_numpy())
            for name in (UNEDITED, best.name)
        ]
        assert best.test["change"][f"{towards}_rate"]["value"] == pytest.approx(rates[1] - rates[0])


def test_an_intervention_file_of_the_record_gives_the_rows_of_the_record(lab: Lab, record: StudyRecord) -> None:
    from interventions.config import InterventionFile

    out = lab.records.folder.parent
    best = record.winner("memory")
    assert best is not None
    assert best.file is not None
    with applied(lab.model, InterventionFile.load(out / best.file)):
        answers = measure_usage(lab.model, lab.asked)
    examples = read_examples(out)
    assert examples is not None
    assert examples.filter(condition=best.name)["answer"].to_list() == answers.frame["answer"].to_list()


def test_a_study_that_is_killed_again_and_again_ends_with_the_same_record(
    lab: Lab, record: StudyRecord, tiny_directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    kept, left = Records._kept, [0]

    def killing(self: Records, path: Path, read: Any, write: Any, compute: Any) -> Any:
        def dying() -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return compute()

        return kept(self, path, read, write, dying)

    monkeypatch.setattr(Records, "_kept", killing)
    killed = 0
    while True:
        left[0] = 2
        try:
            again = make_lab(tiny_directories["llama"], tmp_path, lab.model)
            Study("compare", "conflictscope compare", tmp_path).run(again, [TwoHeads(), Impossible()])
            break
        except Killed:
            killed += 1
            assert not (tmp_path / RECORD).exists()
    assert killed >= 5
    assert without_times(tmp_path / RECORD) == without_times(lab.records.folder.parent / RECORD)


def test_a_control_that_cannot_be_drawn_is_said_and_the_rest_is_measured(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: Any) -> Any:
        raise UserError("There are no other heads.")

    monkeypatch.setattr(TwoHeads, "controls", refusing)
    found = Study("compare", "", tmp_path, directions=("memory",)).run(lab, [TwoHeads()])
    refused = {c.name for c in found.conditions if c.method == "two_heads"}
    assert found.not_run == {f"random control of {name}": "There are no other heads." for name in refused}
    assert [c.method for c in found.chosen("memory")] == ["two_heads"]


def test_methods_of_one_name_with_other_options_are_chosen_apart(lab: Lab) -> None:
    class Head(Method):
        name = "head"

        def __init__(self, head: int) -> None:
            self.head = head

        def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
            return [Condition(self.name, towards, {}, (HeadScaling.of([(0, self.head)], 0.0),))]

    chosen = [lab.chosen(Head(head), "context").best.condition for head in (0, 1, 0)]
    assert [condition.heads for condition in chosen] == [((0, 0, 0.0),), ((0, 1, 0.0),), ((0, 0, 0.0),)]
    assert chosen[0] is chosen[2]


@pytest.mark.parametrize("kind", ["edit", "steering", "prompting", "decoding", "unedited"])
def test_a_unit_gives_the_same_answers_from_its_files_alone(lab: Lab, kind: str, tmp_path: Path) -> None:
    vector = torch.linspace(-1, 1, lab.anatomy.d_model)
    condition = {
        "edit": Condition("edit", "context", {}, (HeadScaling.of([(0, 1)], -1.0),)),
        "steering": Condition("steering", "memory", {}, (Steering(1, vector, 2.0),)),
        "prompting": Condition("prompting", prompting=Shouted("Hear, hear!")),
        "decoding": Condition("decoding", decoding=Doubled()),
        "unedited": Condition("unedited"),
    }[kind]
    here = measure(lab, condition)
    there = measured_from_files(lab, condition, tmp_path)
    assert there.report.frame.equals(here.report.frame)
    assert (here.divergences is None) == (there.divergences is None) == (kind in ("prompting", "decoding"))


def test_what_does_not_apply_is_none_and_not_zero(lab: Lab) -> None:
    unedited = measure(lab, Condition("unedited"))
    found = measure_module.measures_of(measure(lab, Condition("doubled", decoding=Doubled())), unedited.report)
    assert found["neutral_kl"] is None
    assert found["closed_book_accuracy"] is None
    assert "closed_book_accuracy" not in found["change"]
    assert found["aligned_accuracy"] is not None


def test_prompts_without_a_context_are_answered_as_ever_by_a_rule_of_two_streams(lab: Lab) -> None:
    bare = lab.asked.select(kind="none")
    assert measure_usage(lab.model, bare, combined=Doubled().scores).frame.equals(measure_usage(lab.model, bare).frame)


class OneHead(TwoHeads):
    """The same for one head, which controls of the same kind stand for."""

    name = "one_head"

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        return [Condition(self.name, towards, {}, (HeadScaling.of([(2, 1)], -4.0),))]


class Pushed(Method):
    """Adds a direction, and a random one as a control."""

    name = "pushed"

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        return [Condition(self.name, towards, {}, (Steering(1, torch.ones(lab.anatomy.d_model), 9.0),))]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        edit = Steering(1, torch.linspace(-1, 1, lab.anatomy.d_model), 9.0)
        return [Condition("random_direction", chosen.towards, {}, (edit,), control_of=chosen.method)]


class Alone(TwoHeads):
    """Has a control that cannot be drawn."""

    name = "alone"

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        raise UserError("There is no other head.")


def test_controls_are_measured_of_each_edit_of_each_kind_or_of_the_best_alone(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each choice: what is best within the budget has a control too."""
    monkeypatch.setattr(measure_module, "_cost", lambda *_: {"speed": 1.0, "low": 1.0, "high": 1.0})
    methods = [TwoHeads(), OneHead(), Pushed(), Alone()]
    found: dict[str, StudyRecord] = {}
    modes: tuple[Literal["each", "kinds", "winners"], ...] = ("each", "kinds", "winners")
    for mode in modes:
        out = tmp_path / mode
        found[mode] = Study("compare", "", out, directions=("memory",), controls=mode).run(lab, methods)
    controlled = {mode: {c.control_of for c in record.conditions if c.is_control} for mode, record in found.items()}
    edits = {c.name: c for c in found["each"].conditions if not c.is_control and c.method != UNEDITED}
    assert controlled["each"] == {name for name, edit in edits.items() if edit.method != "alone"}
    kinds = [("two_heads", "one_head"), ("pushed",)]
    for choice in ("best", "within_budget"):
        for kind in kinds:
            own = {name for name, edit in edits.items() if edit.method in kind and choice in edit.choices}
            assert len(own & controlled["kinds"]) >= bool(own), "a kind without a control"
    assert controlled["kinds"] < controlled["each"]
    assert controlled["winners"] <= controlled["each"]
    winner = found["winners"].winner("memory")
    assert winner is not None
    assert winner.method == "alone" or winner.name in controlled["winners"]
    assert len(controlled["winners"]) <= 2
    alone = {name for name, edit in edits.items() if edit.method == "alone"}
    undrawn = {name: why for name, why in found["each"].not_run.items() if name.startswith("random control of ")}
    assert undrawn == {f"random control of {name}": "There is no other head." for name in alone}
    assert alone


@pytest.mark.parametrize(("draws", "measured"), [(None, 2), (1, 1)])
def test_no_more_draws_of_a_control_are_measured_than_wanted(
    draws: int | None, measured: int, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A quick study draws once in any case.
    monkeypatch.setattr(lab, "quick", False)
    record = Study("compare", "", tmp_path, directions=("memory",), draws=draws).run(lab, [OneHead()])
    assert {control.draws for control in record.conditions if control.is_control} == {measured}


def test_a_study_without_a_method_that_can_run_says_why(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such thing"):
        Study("compare", "", tmp_path).run(lab, [Impossible()])


def test_value_scaling_scales_the_strongest_heads_of_the_scores(lab: Lab) -> None:
    for towards in ("context", "memory"):
        means = lab.head_scores["logit_diff"].values.mean(0)
        sign = 1 if towards == "context" else -1
        supporter = divmod(int((sign * means).argmax()), means.shape[1])
        opponent = divmod(int((sign * means).argmin()), means.shape[1])
        conditions = ValueScaling().candidates(lab, towards)
        assert [c.heads for c in conditions] == [
            ((*opponent, 0.0),),
            ((*opponent, -1.0),),
            ((*supporter, 2.0),),
            ((*supporter, 4.0),),
        ]


def test_abilities_are_asked_where_that_is_wanted_with_what_is_lost_of_them(lab: Lab, tmp_path: Path) -> None:
    """Against plain passes over each text."""
    # A lab of its own, with places of its own for what is kept.
    able = replace(lab, abilities=True, records=Records(tmp_path, model="other"))
    edit = Condition("pruned", "context", edits=(HeadScaling.of([(1, 0), (2, 1)], -9.0),))
    before, after, unsaid = (
        measure(able, one) for one in (Condition(UNEDITED), edit, Condition("doubled", decoding=Doubled()))
    )
    assert before.able is not None
    assert after.able is not None
    tokens = first_tokens(lab.model, measure_module.ABILITIES)
    prompts = [item.prompt for item in measure_module.ABILITIES]
    for able_now, edits in ((before.able, ()), (after.able, edit.edits)):
        with applied(lab.model, *edits):
            logits = gathered_logits(next_logits(lab.model, prompts), len(prompts)).gather(1, tokens)
        assert able_now.tolist() == (logits[:, 0] > logits[:, 1]).float().tolist()
    found = measure_module.measures_of(after, before.report, before.able)
    assert found["abilities_accuracy"]["value"] == pytest.approx(after.able.mean())
    assert found["change"]["abilities_accuracy"]["value"] == pytest.approx((after.able - before.able).mean())
    assert np.mean([*found["by_ability"].values()]) == pytest.approx(after.able.mean())
    assert (after.able != before.able).any()
    assert unsaid.able is None
    assert measure_module.measures_of(unsaid, before.report, before.able)["abilities_accuracy"] is None
    assert measure(lab, Condition(UNEDITED)).able is None
    drawn = measure_module.pooled([before, after])
    assert drawn.able == pytest.approx((before.able + after.able) / 2)
    assert "abilities_accuracy" not in measure_module.measures_of(measure(lab, Condition(UNEDITED)))


def test_a_study_with_abilities_shows_them(lab: Lab, tmp_path: Path) -> None:
    able = replace(lab, abilities=True, records=Records(tmp_path / "records", model="other"))
    record = Study("compare", "conflictscope compare", tmp_path).run(able, [TwoHeads()])
    assert all("abilities loss" in table.columns for table in leaderboard(record))
    write_report(tmp_path / "report.html", read_runs([tmp_path]))
    assert "Other abilities" in (tmp_path / "report.html").read_text(encoding="utf-8")
