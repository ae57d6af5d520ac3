"""Heads are chosen by what the wanted answer gains on every kind of prompts, and the control takes others."""

from __future__ import annotations

import pytest
import torch

from conflictscope.methods.juice import JudgeHeads, gains
from conflictscope.study.condition import Condition
from interp.attribution.head_gains import head_gains
from interp.conflicts import evenly
from interp.errors import UserError
from interp.inputs import first_token_id
from interventions.juice import JuICE
from tests.conflictscope.methods.labs import tiny_lab


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


def edit_of(condition: Condition) -> JuICE:
    (edit,) = condition.edits
    assert isinstance(edit, JuICE)
    return edit


@pytest.mark.parametrize(("towards", "kinds"), [("context", ("conflict", "aligned")), ("memory", ("none",))])
def test_gains_are_those_of_the_wanted_answer(lab, towards, kinds):
    for kind in kinds:
        asked = evenly(lab.prompts.train.select(kind=kind), 2, lab.seed)
        answers = [(e.context_answers if towards == "context" else e.memory_answers)[0] for e in asked]
        tokens = [first_token_id(lab.model, e.prompt, answer) for e, answer in zip(asked, answers, strict=True)]
        expected = head_gains(lab.model, [e.prompt for e in asked], tokens, [2.0]).mean(0)
        torch.testing.assert_close(gains(lab, towards, kind, [2.0]), expected, atol=1e-6, rtol=1e-3)


def test_heads_that_help_get_more_and_heads_that_hinder_less(lab):
    found = {
        (c.settings["up"], c.settings["down"]): edit_of(c)
        for c in JudgeHeads(counts=(2,), factors=((3.0, 0.0), (0.0, -1.0), (3.0, -1.0))).candidates(lab, "memory")
    }
    kinds = ("conflict", "irrelevant", "none")
    for factor, chosen_by in ((3.0, (1.0, 5.0)), (-1.0, (-1.0, -2.0))):
        by_kind = torch.stack([gains(lab, "memory", kind, chosen_by) for kind in kinds])
        edit = found[(factor, 0.0) if factor > 0 else (0.0, factor)]
        assert {h.factor for h in edit.heads} == {factor}
        mean = by_kind.mean(0)
        helpful = [mean[head].item() for head in lab.anatomy.heads if (by_kind[:, head[0], head[1]] > 0).all()]
        assert sorted(mean[h.layer, h.head].item() for h in edit.heads) == sorted(helpful)[-2:]
    both = found[3.0, -1.0]
    assert {h.factor for h in both.heads} == {3.0, -1.0}
    assert len({h[:2] for h in both.heads}) == len(both.heads)


def test_the_control_adds_to_as_many_other_heads(lab):
    method = JudgeHeads(counts=(2,), factors=((3.0, 0.0),))
    (chosen,) = method.candidates(lab, "context")
    edit = edit_of(chosen)
    for control in method.controls(lab, chosen):
        drawn = edit_of(control)
        assert sorted(h.factor for h in drawn.heads) == sorted(h.factor for h in edit.heads)
        assert not {h[:2] for h in drawn.heads} & {h[:2] for h in edit.heads}


def test_where_no_head_helps_it_cannot_run(lab, monkeypatch):
    monkeypatch.setattr("conflictscope.methods.juice.gains", lambda *_: torch.full((3, 4), -0.1))
    with pytest.raises(UserError, match="No head helps the wanted answer"):
        JudgeHeads().candidates(lab, "context")
