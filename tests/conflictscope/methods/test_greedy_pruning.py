from itertools import pairwise

import pytest
import torch

from conflictscope.methods import greedy_pruning as job
from conflictscope.methods.greedy_pruning import GreedyPruning
from interventions.base import applied
from interventions.fitting.scale_data import answer_losses, log_probabilities
from interventions.heads import HeadScaling
from tests.conflictscope.methods.labs import tiny_lab


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def candidates(lab):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_SHORTLIST", 12)
        return GreedyPruning().candidates(lab, "context")


def without(lab, heads) -> float:
    """The mean log p of the wanted answers with these heads pruned."""
    items = lab.scale_data["train"].wanted("context")
    with torch.no_grad(), applied(lab.model, HeadScaling.of(heads, 0.0)):
        return -answer_losses(log_probabilities(lab.model, items), items).mean().item()


def test_the_first_head_is_the_best_of_all(lab, candidates):
    ((first,), *_) = (condition.edits[0].edited_heads for condition in candidates)
    assert without(lab, [first]) == pytest.approx(max(without(lab, [place]) for place in lab.anatomy.heads), abs=1e-5)


def test_more_heads_hold_the_fewer_and_make_the_answers_likelier(lab, candidates):
    pruned = [condition.edits[0].edited_heads for condition in candidates]
    for fewer, more in pairwise(pruned):
        assert set(fewer) < set(more)
        assert without(lab, more) > without(lab, fewer)
    assert [condition.settings["heads"] for condition in candidates] == [len(heads) for heads in pruned]
    assert all(scale == 0 for condition in candidates for *_, scale in condition.heads)


def test_what_was_found_is_kept(lab, candidates, monkeypatch):
    monkeypatch.setattr(job, "_SHORTLIST", 12)
    monkeypatch.setattr(job, "greedy_heads", lambda *_, **__: pytest.fail("computed again"))
    again = GreedyPruning().candidates(lab.on(lab.prompts), "context")
    assert [condition.digest for condition in again] == [condition.digest for condition in candidates]


def test_where_no_removal_helps_there_is_nothing_to_try(lab, monkeypatch):
    monkeypatch.setattr(job, "greedy_heads", lambda *_, **__: [])
    assert GreedyPruning().candidates(lab, "memory") == []
