from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from interp.attribution.path_patching import path_patching
from interp.attribution.retrieval import retrieval_scores
from interp.attribution.scores import HeadScores
from interp.attribution.ways import WAYS, agreement, scored
from interp.errors import UserError
from tests.tiny import tiny_conflicts


def made_up(seed, *, signed=True, subjects=("a", "b", "c", "d")):
    values = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed))
    values = values if signed else values.abs()
    ids = tuple(f"e{i}" for i in range(4))
    return HeadScores(values, ids, subjects, f"way {seed}", "logit_diff", "tiny", "d", {"signed": signed})


def rho(one, other):
    """Spearman's correlation by scipy."""
    found: Any = spearmanr(one.flatten(), other.flatten())
    return found.statistic


def test_ways_are_those_of_the_library(tiny_llama):
    conflicts = tiny_conflicts()
    exact = path_patching(tiny_llama, conflicts, name="tiny", seed=3)["logit_diff"]
    torch.testing.assert_close(scored("path-patching", tiny_llama, conflicts, name="tiny", seed=3).values, exact.values)
    looked = retrieval_scores(tiny_llama, conflicts, name="tiny")
    torch.testing.assert_close(scored("retrieval", tiny_llama, conflicts, name="tiny").values, looked.values)


def test_every_way_gives_scores_of_all_heads(tiny_llama):
    conflicts = tiny_conflicts()
    for way in set(WAYS) - {"attention-drift"}:
        assert scored(way, tiny_llama, conflicts, name="tiny").mean().shape == (3, 4)
    with pytest.raises(UserError, match="comes with one whose context agrees"):
        scored("attention-drift", tiny_llama, conflicts, name="tiny")


def test_an_unknown_way_lists_those_there_are(tiny_llama):
    with pytest.raises(UserError, match="choose among path-patching, direct-logits"):
        scored("guessing", tiny_llama, tiny_conflicts(), name="tiny")


def test_agreement_is_spearmans_correlation():
    one, other = made_up(1), made_up(2)
    found = agreement({"one": one, "other": other})
    expected = rho(one.mean(), other.mean())
    assert found["one"]["other"] == found["other"]["one"] == pytest.approx(expected)


def test_where_one_has_no_sign_the_other_counts_by_its_size():
    one, size = made_up(1), made_up(2, signed=False)
    expected = rho(one.mean().abs(), size.mean())
    assert agreement({"one": one, "size": size})["one"]["size"] == pytest.approx(expected)


def test_agreement_of_a_way_with_itself_is_that_of_two_halves_of_its_subjects():
    one = made_up(1, subjects=("a", "b", "c", "a"))
    first, second = one.values[[0, 2, 3]].mean(0), one.values[[1]].mean(0)
    expected = rho(first, second)
    assert agreement({"one": one})["one"]["one"] == pytest.approx(expected)
    assert agreement({"one": replace(one, subjects=("a",) * 4)}) == {"one": {}}


def test_two_ways_are_compared_on_the_examples_that_both_could_score():
    one, other = made_up(1), replace(made_up(2), example_ids=("e2", "e9", "e0", "e8"))
    expected = rho(one.values[[0, 2]].mean(0), other.values[[0, 2]].mean(0))
    assert agreement({"one": one, "other": other})["other"]["one"] == pytest.approx(expected)
    apart = replace(other, example_ids=("f0", "f1", "f2", "f3"))
    assert set(agreement({"one": one, "apart": apart})["one"]) == {"one"}


def test_a_way_that_scores_all_heads_alike_agrees_with_none():
    flat = replace(made_up(2), values=torch.zeros(4, 3, 5))
    assert agreement({"one": made_up(1), "flat": flat})["flat"] == {}
