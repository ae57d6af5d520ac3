import numpy as np
import pytest

from conflictscope.methods.pruning import Pruning
from tests.conflictscope.methods.labs import tiny_lab


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize(("towards", "sign"), [("context", 1), ("memory", -1)])
def test_the_first_heads_of_both_rankings_are_pruned(lab, towards, sign):
    """Rankings from the scores themselves: positive pushes towards the context."""
    expected = set()
    for metric in ("logit_diff", f"{towards}_probability"):
        mean = lab.head_scores[metric].values.mean(0).numpy() * sign
        order = [divmod(int(i), mean.shape[1]) for i in np.argsort(mean, axis=None, kind="stable")]
        expected |= {frozenset(order[:count]) for count in (1, 2, 4, 8)}
    found = Pruning().candidates(lab, towards)
    assert all(scale == 0 for condition in found for *_, scale in condition.heads)
    pruned = [frozenset(condition.edits[0].head_scales) for condition in found]
    assert len(pruned) == len(set(pruned))
    assert set(pruned) == expected


def test_the_settings_say_how_many_heads_by_which_ranking(lab):
    for condition in Pruning().candidates(lab, "context"):
        assert condition.settings["heads"] == condition.moved
        assert condition.settings["ranking"] in ("opponents", "obstacles")


def test_the_control_prunes_as_many_heads(lab):
    chosen = Pruning().candidates(lab, "context")[2]
    for control in Pruning().controls(lab, chosen):
        assert control.moved == chosen.moved
        assert set(control.edits[0].head_scales.values()) == {0.0}
