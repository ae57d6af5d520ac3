"""Retrieval heads are left out of the contrast, and the control leaves out others."""

from __future__ import annotations

import pytest

from conflictscope.methods.decore import RetrievalHeadContrast
from conflictscope.study.condition import Condition
from interp.attribution.retrieval import retrieval_scores
from interp.conflicts import ConflictSet, evenly
from interventions.decore import DeCoRe
from tests.conflictscope.methods.labs import tiny_lab


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


def edit_of(condition: Condition) -> DeCoRe:
    (edit,) = condition.edits
    assert isinstance(edit, DeCoRe)
    return edit


def test_the_heads_with_the_highest_retrieval_scores_are_left_out(lab):
    train = evenly(lab.prompts.train.select(kind="conflict"), 24, lab.seed)
    mean = retrieval_scores(lab.model, ConflictSet("train", tuple(train)), name="tiny").mean()
    chosen = RetrievalHeadContrast(counts=(2,), strengths=(0.5, 2.0)).candidates(lab, "context")
    assert [c.settings["strength"] for c in chosen] == [0.5, 2.0]
    for candidate in chosen:
        edit = edit_of(candidate)
        assert edit.strength == candidate.settings["strength"]
        left_out = [mean[head].item() for head in edit.heads]
        others = [mean[head].item() for head in lab.anatomy.heads if head not in edit.heads]
        assert min(left_out) >= max(others)


def test_towards_memory_the_strength_is_negative(lab):
    for candidate in RetrievalHeadContrast().candidates(lab, "memory"):
        assert edit_of(candidate).strength < 0


def test_the_control_leaves_out_as_many_other_heads_at_the_same_strength(lab):
    method = RetrievalHeadContrast(counts=(2,))
    (chosen, *_) = method.candidates(lab, "context")
    for control in method.controls(lab, chosen):
        edit = edit_of(control)
        assert len(edit.heads) == 2
        assert not set(edit.heads) & set(edit_of(chosen).heads)
        assert edit.strength == edit_of(chosen).strength
