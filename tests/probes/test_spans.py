"""Scores of tokens against marked spans, by hand and on a real model."""

from __future__ import annotations

import pytest

from interp.errors import UserError
from interp.reliance import forced_reliance
from interp.spans import MarkedAnswer, MarkedSpan
from probes.spans import score_spans

OFFSETS = [(0, 2), (3, 6), (7, 11), (11, 12)]
OTTO = [MarkedSpan(7, 11, "Otto", "Evident Conflict")]


@pytest.mark.parametrize(
    ("scores", "auroc"),
    [([0.0, 1.0, 2.0, 1.5], 1.0), ([0.0, 2.0, 2.0, 3.0], 0.5), ([3.0, 2.0, 1.0, 0.0], 1 / 3)],
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(scores: list[float], auroc: float):
    # One marked token of four makes three pairs; a tie counts half.
    assert score_spans([OFFSETS], [scores], [OTTO]).value == pytest.approx(auroc)


def test_tokens_of_all_answers_are_compared_with_each_other():
    found = score_spans([OFFSETS, [(0, 3)]], [[0.0, 1.0, 2.0, 3.0], [2.5]], [OTTO, []])
    # 2 beats 0 and 1, but neither 3 nor 2.5.
    assert found.value == pytest.approx(2 / 4)
    assert found.n == 5


@pytest.mark.parametrize(
    ("offsets", "scores", "spans", "message"),
    [
        ([OFFSETS], [[1.0]], [OTTO], "Answer 0 has 4 tokens, but 1 scores"),
        ([OFFSETS], [[1.0] * 4], [[]], "Of 4 tokens 0 are marked"),
        ([OFFSETS], [[1.0] * 4], [[MarkedSpan(0, 12, "", "")]], "Of 4 tokens 4 are marked"),
        ([OFFSETS], [[1.0, 2.0, 3.0, float("nan")]], [OTTO], "1 of 4 scores are NaN"),
        ([OFFSETS], [], [OTTO], "offsets of 1 answers, scores of 0"),
    ],
)
def test_what_cannot_be_scored_is_told(offsets, scores, spans, message):
    with pytest.raises(UserError, match=message):
        score_spans(offsets, scores, spans)


def marked(question: str, document: str, answer: str, wrong: str) -> MarkedAnswer:
    start = answer.index(wrong)
    spans = (MarkedSpan(start, start + len(wrong), wrong, "Evident Conflict"),)
    return MarkedAnswer("1", question, "QA", question, (document,), answer, spans, "nobody", "test", "good")


def test_gains_of_a_real_model_find_made_up_words_better_than_chance(smollm2):
    answers = [
        marked(
            "Who painted the ceiling of Marlow Town Hall?",
            "The ceiling of Marlow Town Hall was painted by Ida Fenn in two summers.",
            "Ida Fenn painted the ceiling of Marlow Town Hall together with nine horses.",
            "together with nine horses",
        ),
        marked(
            "Where does the river Sill rise?",
            "The river Sill rises near Upper Tarn, below Ruan Peak, and flows north.",
            "The river Sill rises near Upper Tarn, below Ruan Peak, in Portugal.",
            "Portugal",
        ),
    ]
    frame = forced_reliance(
        smollm2, [a.prompt for a in answers], [a.bare_prompt for a in answers], [a.answer for a in answers]
    )
    parts = [frame.filter(answer=number) for number in range(len(answers))]
    gains = [part["gain"].to_list() for part in parts]
    offsets = [part["start", "end"].rows() for part in parts]
    scores = [[-gain for gain in one] for one in gains]
    found = score_spans(offsets, scores, [a.spans for a in answers], clusters=[a.source for a in answers])
    assert found.value > 0.5
