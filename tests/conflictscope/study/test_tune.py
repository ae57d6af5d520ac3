"""From data to one edit on a tiny model, whose data is made so that an edit is known to help."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from conflictscope.methods.instruction import Instructed
from conflictscope.report import read_runs, write_report
from conflictscope.study.choice import Dev
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from conflictscope.study.record import RECORD, StudyRecord
from conflictscope.study.tune import EDIT, Clock, Tuning, kinds_of
from conflictscope.study.verdict import Goal
from interp.anatomy import Anatomy
from interp.answers import Direction
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import measure_usage
from interp.generation import gathered_logits, next_logits
from interventions.base import Intervention
from interventions.config import InterventionFile
from interventions.decoding import CAD
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling
from interventions.steering import Steering
from tests.conflictscope.methods.labs import tiny_lab

IDLE = HeadScaling.of([(1, 1)], 0.999)


class Edits(Method):
    """Tries given edits, and one that does next to nothing as a control."""

    needs = "nothing"

    def __init__(self, *edits: Intervention, name: str = "edits") -> None:
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self.edits = edits

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        del lab
        return [Condition(self.name, towards, {"number": i}, (edit,)) for i, edit in enumerate(self.edits)]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        del lab
        return [Condition("random_heads", chosen.towards, {}, (IDLE,), control_of=chosen.method)]


class Untouched(Edits):
    """Fails where it is tried."""

    needs = "head_scores"

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        pytest.fail("nothing is to be tried")


@pytest.fixture(scope="module")
def saying_lima(tiny_llama: Any) -> Steering:
    """Makes the tiny model answer Lima, whatever it is asked."""
    (token,) = tiny_llama.tokenizer(" Lima", add_special_tokens=False).input_ids
    network: Any = Anatomy(tiny_llama).model
    rows = network.get_output_embeddings().weight.detach()
    return Steering(2, 1000 * (rows[token] - rows.mean(0)), 1.0, "all")


def tuned_lab(model: Any, folder: Path) -> Lab:
    """A lab whose contexts all say Lima, and in which memory says what the unedited model does."""
    lab = tiny_lab(model, folder / "records")

    def made(examples: ConflictSet) -> ConflictSet:
        logits = gathered_logits(next_logits(model, [e.prompt for e in examples]), len(examples))
        said = [model.tokenizer.decode([token]).strip() for token in logits.argmax(-1).tolist()]
        context = {"conflict": ("Lima",)}
        return ConflictSet(
            examples.name,
            tuple(
                replace(e, memory_answers=(word,), context_answers=context.get(e.kind, e.context_answers))
                for e, word in zip(examples, said, strict=True)
                if word.isalpha() and word != "Lima"
            ),
        )

    parts = {split: made(lab.prompts.part(split)) for split in ("train", "dev", "test")}
    lab = lab.on(replace(lab.prompts, **parts))
    lab.budgets = dict.fromkeys(lab.budgets, 1e6)
    return lab


@pytest.fixture
def lab(tiny_llama: Any, tmp_path: Path) -> Lab:
    return tuned_lab(tiny_llama, tmp_path)


def tuning(lab: Lab, **settings: Any) -> Tuning:
    return Tuning(**{"towards": "context", "out": lab.records.folder.parent, "command": "tune", **settings})


def test_the_edit_that_helps_is_verified_written_and_told(lab: Lab, saying_lima: Steering) -> None:
    out = lab.records.folder.parent
    found = tuning(lab, goal=Goal("context", 0.7)).run(lab, [Edits(IDLE, saying_lima)])
    assert found.file == out / EDIT
    (edit,) = InterventionFile.load(out / EDIT).build()
    assert isinstance(edit, Steering)
    assert torch.equal(edit.vector, saying_lima.vector)
    assert found.exports == {
        "vector-gguf": f"conflictscope export tiny {out / EDIT} {out / 'vector-gguf'} --vector gguf",
        "vector-peft": f"conflictscope export tiny {out / EDIT} {out / 'vector-peft'} --vector peft",
        "hooks": f"conflictscope serve {out / EDIT}",
    }
    record = StudyRecord.load(out)
    (row,) = record.chosen("context")
    (control,) = record.controls_of(row)
    assert row.test["context_rate"]["value"] == 1 > control.test["context_rate"]["value"]
    gain, costs, left = found.sentences
    assert "helps: on 15 subjects that it was not chosen on, 1.00 [0.80, 1.00] of the answers follow" in gain
    assert "random heads change that by 0.00" in gain
    assert gain.endswith("; the goal of 0.7 is met.")
    assert "of closed-book accuracy" in costs
    assert "0.00 [0.00, 0.20] of the prompts, which still follow memory" in left
    assert record.details["tune"]["sentences"] == list(found.sentences)
    write_report(out / "report.html", read_runs([out]))
    page = out / "report.html"
    assert all(sentence in html.unescape(page.read_text(encoding="utf-8")) for sentence in found.sentences)


def test_where_nothing_helps_that_comes_first_and_no_file_is_recommended(lab: Lab) -> None:
    out = lab.records.folder.parent
    (out / EDIT).write_text("of an earlier run")
    found = tuning(lab).run(lab, [Edits(IDLE)])
    assert found.sentences[0].startswith("Nothing within the budget helps by more than chance")
    assert (found.file, found.exports) == (None, {})
    assert not (out / EDIT).exists()
    assert [path.name for path in (out / "interventions").glob("*towards_context.json")] != []
    assert not (out / "interventions" / "towards_context.json").exists()
    assert StudyRecord.load(out).details["tune"]["recommended"] is False


def test_where_nothing_stays_within_the_budget_nothing_is_measured_on_test(lab: Lab, saying_lima: Steering) -> None:
    lab.budgets = dict.fromkeys(lab.budgets, 1e-12)
    found = tuning(lab).run(lab, [Edits(saying_lima)])
    assert len(found.sentences) == 1
    assert found.sentences[0].startswith("Nothing was found that stays within the budget")
    assert not (lab.records.folder.parent / RECORD).exists()


def test_where_the_goal_holds_already_nothing_is_written(lab: Lab) -> None:
    (sentence,) = tuning(lab, towards="memory", goal=Goal("memory", 0.1)).run(lab, [Untouched()]).sentences
    assert sentence.startswith("No edit is needed: unedited,")
    assert not (lab.records.folder.parent / RECORD).exists()


def test_where_all_answers_follow_the_source_already_nothing_is_tried(tiny_llama: Any, lab: Lab) -> None:
    test = lab.prompts.test
    frame = measure_usage(tiny_llama, test, max_new_tokens=lab.new_tokens).frame
    others = set(frame.filter((pl.col("kind") == "conflict") & (pl.col("usage") != "memory"))["id"])
    kept = ConflictSet(test.name, tuple(e for e in test if e.id not in others))
    assert kept.select(kind="conflict").examples
    lab = lab.on(replace(lab.prompts, test=kept))
    (sentence,) = tuning(lab, towards="memory").run(lab, [Untouched()]).sentences
    assert sentence.startswith("No edit is needed: unedited, 1.00 [")
    assert sentence.endswith("of the answers follow memory, so that there is nothing to gain.")


def test_what_was_killed_goes_on_and_measures_nothing_twice(
    tiny_llama: Any, lab: Lab, saying_lima: Steering, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, left = Edits(IDLE, saying_lima), 3
    measured: list[Any] = []
    whole = Dev.measure

    def until_killed(dev: Dev, condition: Condition) -> dict[str, Any]:
        if len(measured) == left:
            raise KeyboardInterrupt
        measured.append((dev.digest[0], condition.digest))
        return whole(dev, condition)

    monkeypatch.setattr(Dev, "measure", until_killed)
    with pytest.raises(KeyboardInterrupt):
        tuning(lab).run(lab, [method])
    left = 1000
    found = tuning(lab).run(tuned_lab(tiny_llama, lab.records.folder.parent), [method])
    assert found.file is not None
    assert len(measured) == len({str(one) for one in measured}) == 5


def test_when_time_is_up_nothing_is_begun(lab: Lab) -> None:
    told: list[str] = []
    found = tuning(lab, clock=Clock(0.0), told=told.append).run(lab, [Untouched()])
    assert found.record is None
    assert "Time was up." in told


def test_conditions_are_served_as_their_edits_say(tiny_llama: Any, saying_lima: Steering) -> None:
    heads, layers = HeadScaling.of([(1, 1)], 0.5), FeedForwardScaling(((1, 0.5),))
    at_end = replace(saying_lima, tokens="last_prompt")
    kinds = {
        Condition("heads", edits=(heads,)): ["lora", "bake", "hooks"],
        Condition("layers", edits=(layers,)): ["bake", "hooks"],
        Condition("direction", edits=(saying_lima,)): ["vector", "hooks"],
        Condition("at the end", edits=(at_end,)): ["hooks"],
        Condition("rule", decoding=CAD(1.0)): ["decoding"],
        Condition("words", prompting=Instructed("Listen.")): ["prompt"],
        Condition("rule and heads", edits=(heads,), decoding=CAD(1.0)): ["hooks"],
    }
    assert [kinds_of(tiny_llama, condition) for condition in kinds] == list(kinds.values())


def test_only_what_can_be_served_is_found(lab: Lab, saying_lima: Steering) -> None:
    methods = [Edits(saying_lima, name="direction"), Edits(IDLE, name="heads")]
    found = tuning(lab, allow=("lora",)).run(lab, methods)
    assert found.record is not None
    assert found.record.methods == ["heads"]
    assert found.record.not_run["direction"] == "None of its 1 candidates is of a kind that is allowed."


def test_what_edits_activations_is_not_even_prepared_where_words_alone_are_allowed(lab: Lab) -> None:
    told: list[str] = []
    tuning(lab, allow=("prompt",), told=told.append).run(lab, [Untouched()])
    assert "Not tried: edits. It edits activations, which is not allowed." in told


def test_dev_that_cannot_choose_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    lab = tiny_lab(tiny_llama, tmp_path / "records")
    with pytest.raises(UserError, match=r"so that dev cannot choose; show examples with --shots"):
        tuning(lab).run(lab, [Edits(IDLE)])


def test_a_goal_of_the_other_source_is_refused(lab: Lab) -> None:
    with pytest.raises(UserError, match="give --towards memory with it"):
        tuning(lab, goal=Goal("memory", 0.5)).run(lab, [])


@pytest.mark.parametrize(
    ("text", "goal"),
    [("context >= .9", ("context", 0.9)), ("memory>=1", ("memory", 1.0)), (" context >=0.25 ", ("context", 0.25))],
)
def test_a_goal_is_read(text: str, goal: tuple[str, float]) -> None:
    assert Goal.parse(text) == goal


@pytest.mark.parametrize(
    "text", ["context", "context > .9", "context >= 90", "context >= 0", "other >= .5", ">= .5", "context >= nan", ""]
)
def test_what_is_no_goal_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"A goal is a source and a rate up to 1, for example"):
        Goal.parse(text)


def test_a_goal_is_met_wholly_in_the_estimate_or_not() -> None:
    goal, rates = Goal("context", 0.5), ((0.7, 0.6), (0.7, 0.4), (0.4, 0.3))
    said = [goal.met_by({"value": value, "low": low}) for value, low in rates]
    assert [text.removeprefix("the goal of 0.5 is ") for text in said] == [
        "met",
        "met, though the interval begins below it",
        "not met",
    ]
