import numpy as np
import pytest

from conflictscope.methods.pruning_by import pruning_by, way_scores
from interp.attribution import ways
from tests.conflictscope.methods.labs import tiny_lab


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("way", ["direct-logits", "attention-drift"])
@pytest.mark.parametrize(("towards", "sign"), [("context", 1), ("memory", -1)])
def test_the_first_heads_of_a_way_are_pruned(lab, way, towards, sign):
    """Those that push hardest to the other source; without a sign those that score highest, whatever is wanted."""
    mean = way_scores(lab, way).values.mean(0).numpy() * (sign if way == "direct-logits" else -1)
    order = [divmod(int(i), mean.shape[1]) for i in np.argsort(mean, axis=None, kind="stable")]
    found = pruning_by(way).candidates(lab, towards)
    assert [set(condition.edits[0].head_scales) for condition in found] == [set(order[:n]) for n in (1, 2, 4, 8)]
    assert {condition.method for condition in found} == {f"pruning_by_{way.replace('-', '_')}"}
    assert all(scale == 0 for condition in found for *_, scale in condition.heads)


def test_scores_are_computed_once_on_the_same_prompts(lab, monkeypatch):
    first = way_scores(lab, "direct-logits")
    monkeypatch.setattr("conflictscope.methods.pruning_by.scored", None)
    assert way_scores(lab, "direct-logits").data == first.data
    assert {e.split(":")[0] for e in first.example_ids} <= {e.id.split(":")[0] for e in lab.prompts.train}


def test_methods_of_two_ways_are_different_ones():
    assert pruning_by("retrieval") == pruning_by("retrieval")
    assert pruning_by("retrieval").name != pruning_by("edges").name
    assert len({pruning_by(way).name for way in ways.WAYS}) == len(ways.WAYS)
