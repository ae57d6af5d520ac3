"""Answers to one question in many words: each measure against counts by hand."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from interp import consistency as module
from interp.conflicts import ConflictSet
from interp.consistency import agreement, closed_book, consistency, estimates
from interp.errors import Caution, UserError
from interp.facts import PHRASINGS, load_facts, usable_facts
from interp.generation import Continuations
from interp.persuasion import Sampled, Sampling
from tests.tiny import tiny_conflicts

MODEL: Any = None
"""No model: what it answers is made up."""

ITALY = ["Rome", "Rome, of course", "Roma", "Milan", "It is Paris", "Paris", "I don't know"]
JAPAN = ["Tokyo", "It is Tokyo."] * 3 + ["tokyo"]


@pytest.fixture
def asked():
    return closed_book({"capital": [fact for fact in load_facts("capital") if fact.subject in {"Italy", "Japan"}]})


@pytest.fixture
def says(monkeypatch, asked):
    """Lets the model answer the questions about Italy and Japan in turn."""
    said = dict(zip([e.prompt for e in asked], [*ITALY, *JAPAN], strict=True))

    def answered(_model: Any, prompts: Any, **_: Any) -> Continuations:
        nothing: Any = None
        return Continuations([said[prompt] for prompt in prompts], nothing, nothing)

    monkeypatch.setattr(module, "continue_greedily", answered)
    return said


def test_facts_are_asked_in_every_wording_without_a_context():
    facts = usable_facts("capital")[:5]
    made = closed_book({"capital": facts})
    assert len(made) == 5 * len(PHRASINGS)
    assert len({e.prompt for e in made}) == len(made)
    assert {e.kind for e in made} == {"none"}
    assert all(e.prompt == e.bare_prompt and not e.contexts and e.subject in e.prompt for e in made)


@pytest.mark.parametrize(
    ("clusters", "share"),
    [([[0, 1, 2]], 1.0), ([[0], [1], [2]], 0.0), ([[0, 1], [2, 3]], 1 / 3), ([[0, 1, 2], [3, 4], [5], [6]], 4 / 21)],
)
def test_agreement_is_the_share_of_pairs_in_one_cluster(clusters, share):
    """By hand: 1 + 1 of 6 pairs; 3 + 1 of 21."""
    assert agreement(clusters) == pytest.approx(share)


@pytest.mark.usefixtures("says")
def test_a_subject_that_contradicts_itself_and_one_that_does_not(asked):
    italy, japan = consistency(MODEL, asked).iter_rows(named=True)
    # Rome three times (an alias and a sentence among them), Paris twice, Milan once, one abstention.
    assert italy["answers"] == ITALY
    assert (italy["meanings"], italy["consistency"], italy["agreement"]) == (4, 3 / 7, pytest.approx(4 / 21))
    assert (italy["right"], italy["most_said"]) == (False, "Rome")
    assert (japan["meanings"], japan["consistency"], japan["agreement"], japan["right"]) == (1, 1.0, 1.0, True)
    assert japan["prompts"] == [e.prompt for e in asked if e.subject == "Japan"]


@pytest.mark.usefixtures("says")
def test_a_classifier_may_say_what_belongs_together(asked):
    italy, _ = consistency(MODEL, asked, same=lambda one, other: one[0] == other[0]).iter_rows(named=True)
    # By first letters: R R R, M, I I, P.
    assert (italy["meanings"], italy["agreement"]) == (4, pytest.approx(4 / 21))


def test_true_answers_are_told_from_those_of_others_with_the_same_name():
    """Several currencies are called dinar; an answer with its country's name is the same for that country."""
    made = closed_book({"currency": [fact for fact in load_facts("currency") if fact.subject == "Algeria"]})
    known = module._questions(made)[0].known
    assert known[0] == ("dinar", "Algerian dinar")
    assert not any("dinar" in other for other in known[1:])
    assert any("euro" in other for other in known)


@pytest.mark.usefixtures("says")
def test_means_have_intervals_by_subject(asked):
    frame = consistency(MODEL, asked)
    found = {row["measure"]: row for row in estimates(frame).iter_rows(named=True)}
    assert [found[name]["value"] for name in ("unanimous", "right", "meanings")] == [0.5, 0.5, 2.5]
    assert found["consistency"]["value"] == pytest.approx((3 / 7 + 1) / 2)
    assert found["agreement"]["value"] == pytest.approx((4 / 21 + 1) / 2)
    # Two subjects, resampled: both ends are those of one subject alone.
    assert (found["agreement"]["low"], found["agreement"]["high"]) == (pytest.approx(4 / 21), 1.0)
    assert all(row["n"] == 2 for row in found.values())
    by_right = {
        (row["right"], row["measure"]): row["value"] for row in estimates(frame, ["right"]).iter_rows(named=True)
    }
    assert (by_right[True, "unanimous"], by_right[False, "unanimous"]) == (1.0, 0.0)
    with pytest.raises(UserError, match="cannot be broken down by 'colour'; choose among relation, split, right"):
        estimates(frame, ["colour"])


@pytest.mark.usefixtures("says")
def test_semantic_entropy_is_the_mean_over_wordings(asked, monkeypatch):
    """Every other wording samples one meaning of all the mass, the others two of a half: (0 + log 2) / 2 of six."""
    half = torch.tensor([math.log(0.5)] * 2)
    nothing = torch.zeros(2)
    one = asked.select(templates=list(PHRASINGS)[:6])

    def sampled(self, model, prompt):
        is_sure = [e.prompt for e in one].index(prompt) % 2 == 0
        return Sampled(["Rome", "Roma" if is_sure else "Milan"], nothing, half, nothing)

    monkeypatch.setattr(Sampling, "sampled", sampled)
    italy, _ = consistency(MODEL, one, Sampling(2)).iter_rows(named=True)
    assert italy["semantic_entropy"] == pytest.approx(math.log(2) / 2)
    assert italy["samples"] == [["Rome", "Roma"], ["Rome", "Milan"]] * 3


def test_a_models_answers_are_those_it_gives_to_each_prompt(tiny_plain):
    model = tiny_plain("llama")
    made = closed_book({"capital": usable_facts("capital")[:2]})
    frame = consistency(model, made, Sampling(2, new_tokens=2), max_new_tokens=3)
    alone = module.continue_greedily(model, [e.prompt for e in made], max_new_tokens=3).answers
    assert [answer for answers in frame["answers"] for answer in answers] == alone
    assert (frame["semantic_entropy"] > 0).all()
    assert [len(samples) for samples in frame["samples"]] == [7, 7]


def test_what_has_one_wording_is_left_out_and_told(tiny_plain):
    model, some = tiny_plain("llama"), tiny_conflicts()
    with pytest.raises(UserError, match="asks nothing in two wordings"):
        consistency(model, some)
    again = dataclasses.replace(some.examples[1], bare_prompt="Name the capital of Italy:", memory_answers=("Rome",))
    mixed = ConflictSet("mixed", (some.examples[0], again, *some.examples[2:]))
    with pytest.warns(Caution, match="7 of 8 questions of mixed have one wording, and are left out"):
        frame = consistency(model, mixed)
    assert frame["subject"].to_list() == ["Italy"]
    assert frame["prompts"].to_list() == [["The capital of Italy is", "Name the capital of Italy:"]]


def test_nobody_is_right_where_the_truth_is_not_known(tiny_plain):
    some = tiny_conflicts()
    unknown = [
        dataclasses.replace(e, memory_answers=(), bare_prompt=f"{e.template} {e.bare_prompt}")
        for e in some.examples[:4]
    ]
    frame = consistency(tiny_plain("llama"), ConflictSet("unknown", tuple(unknown)))
    assert frame["right"].to_list() == [None, None]
    assert "right" not in estimates(frame)["measure"].to_list()
