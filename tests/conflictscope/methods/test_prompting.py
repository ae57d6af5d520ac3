"""Methods that ask in other words: what they ask is put together by hand here, and answers are those of asking it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conflictscope.methods.demonstrations import Demonstrated, Demonstrations, answered
from conflictscope.methods.instruction import UNRELATED, WORDINGS, Instruction
from conflictscope.methods.opinion import FRAMES, Framed, Opinion
from conflictscope.study.condition import Condition
from conflictscope.study.measure import measure
from conflictscope.study.run import Study
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import measure_usage
from tests.conflictscope.methods.labs import measured_from_files, tiny_lab

METHODS = (Instruction(), Opinion(), Demonstrations((1, 2)))


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


def asked(lab, condition: Condition) -> list[str]:
    return [example.prompt for example in condition.asked(lab.asked)]


@pytest.mark.parametrize("towards", ["context", "memory"])
def test_an_instruction_stands_before_every_prompt(lab, towards):
    candidates = Instruction().candidates(lab, towards)
    for condition, line in zip(candidates, WORDINGS[towards], strict=True):
        assert asked(lab, condition) == [line + "\n" + example.prompt for example in lab.asked]
    controls = Instruction().controls(lab, candidates[0])
    assert [asked(lab, c)[0].split("\n")[0] for c in controls] == [line for line in UNRELATED]


@pytest.mark.parametrize("towards", ["context", "memory"])
def test_a_frame_stands_around_the_context_alone(lab, towards):
    for condition, (before, after) in zip(Opinion().candidates(lab, towards), FRAMES[towards], strict=True):
        for example, prompt in zip(lab.asked, asked(lab, condition), strict=True):
            framed = before + example.contexts[0] + after + example.bare_prompt if example.contexts else example.prompt
            assert prompt == framed


def test_a_frame_needs_the_prompt_without_its_context(lab):
    (conflict, *_) = lab.asked.select(kind="conflict")
    with pytest.raises(UserError, match=rf"how {conflict.id} asks without its context; give it a bare_prompt"):
        Framed("a", "b").prompt(replace(conflict, bare_prompt=""))


@pytest.mark.parametrize("towards", ["context", "memory"])
def test_demonstrations_are_train_s_conflicts_answered_from_the_wanted_source(lab, towards):
    answers = {
        f"{e.prompt} {(e.context_answers if towards == 'context' else e.memory_answers)[0]}."
        for e in lab.prompts.train.select(kind="conflict")
    }
    for condition, count in zip(Demonstrations((1, 2)).candidates(lab, towards), (1, 2), strict=True):
        assert isinstance(condition.prompting, Demonstrated)
        shown = condition.prompting.shown
        assert len(set(shown)) == count
        assert set(shown) <= answers
        assert asked(lab, condition) == ["\n\n".join([*shown, e.prompt]) for e in lab.asked]


def test_the_control_of_demonstrations_shows_contexts_that_agree(lab):
    (chosen,) = Demonstrations((2,)).candidates(lab, "context")
    agreeing = {f"{e.prompt} {e.memory_answers[0]}." for e in lab.prompts.train.select(kind="aligned")}
    drawn = []
    for control in Demonstrations().controls(lab, chosen):
        assert isinstance(control.prompting, Demonstrated)
        drawn.append(control.prompting.shown)
    assert all(len(shown) == 2 and set(shown) <= agreeing for shown in drawn)
    assert drawn[0] != drawn[1]


def test_no_more_is_shown_than_there_is_and_of_every_relation(lab):
    conflicts = lab.prompts.train.select(kind="conflict")
    (condition,) = Demonstrations((1000,)).candidates(lab, "context")
    assert condition.settings == {"shown": len(conflicts)}
    assert condition.does == f"after {len(conflicts)} answered prompts"
    shown = {one for seed in range(8) for one in answered(lab, "conflict", 1, "context", seed).shown}
    of = {e.relation for e in conflicts if f"{e.prompt} {e.context_answers[0]}." in shown}
    assert of == {"capital", "language"}


def test_a_direction_without_wordings_has_no_candidates(lab):
    assert Instruction({"context": ["Believe it."]}).candidates(lab, "memory") == []
    assert Opinion({"context": [("It says: ", " So: ")]}).candidates(lab, "memory") == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_rates_are_those_of_asking_so_here_and_from_files_alone(lab, tmp_path, method):
    lab = tiny_lab(lab.model, tmp_path / "here")
    condition = method.candidates(lab, "context")[-1]
    rewritten = tuple(replace(e, prompt=prompt) for e, prompt in zip(lab.asked, asked(lab, condition), strict=True))
    expected = measure_usage(lab.model, ConflictSet("by hand", rewritten), max_new_tokens=lab.new_tokens).frame
    here = measure(lab, condition).report.frame
    assert here["answer"].to_list() == expected["answer"].to_list()
    assert measured_from_files(lab, condition, tmp_path / "there").report.frame.equals(here)


def test_a_study_measures_them_next_to_their_controls_and_says_that_text_does_not_apply(lab, tmp_path):
    record = Study("compare", "", tmp_path, directions=("context",), choices=("best",)).run(lab, METHODS)
    assert not record.not_run
    assert record.methods == ["instruction", "opinion", "demonstrations"]
    for condition in record.conditions[1:]:
        assert condition.file is None
        assert condition.test["neutral_kl"] is None
        assert condition.test["closed_book_accuracy"] is not None
    controls = {c.method for c in record.conditions if c.is_control}
    assert controls == {"unrelated_instruction", "plain_quotes", "agreeing_demonstrations"}
