"""Features that a context changes most."""

from dataclasses import replace

import pytest
import torch

from conflictscope.methods.feature_differences import ContextFeatures
from conflictscope.study.data import Prompts
from interp.activations import record
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interventions.features import FeatureEdit
from tests.conflictscope.methods.answered_lab import answered_lab
from tests.conflictscope.methods.test_spare import encoded, features_of, tiny_sae


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return answered_lab(tiny_llama, tmp_path_factory.mktemp("lab"), lambda: [tiny_sae(1)])


@pytest.mark.parametrize("towards", ["context", "memory"])
def test_features_that_hold_a_share_of_the_change_are_moved(lab, towards):
    (condition,) = ContextFeatures(shares=(0.4,), alphas=(1.0,)).candidates(lab, towards)
    (edit,) = condition.edits
    assert isinstance(edit, FeatureEdit)
    asked = lab.prompts.train.select(kind="conflict")
    sides = ([e.bare_prompt for e in asked], [e.prompt for e in asked])
    bare, whole = (
        encoded(tiny_sae(1), record(lab.model, side, ["blocks.1.hook_out"])["blocks.1.hook_out"]) for side in sides
    )
    change = (whole.double() - bare.double()).mean(0)
    held, order = change.abs().sort(descending=True)
    count = int((held.cumsum(0) <= 0.4 * held.sum()).sum()) + 1
    removed, added = features_of(edit.layers[0])
    assert {*removed, *added} == set(order[:count].tolist())
    rises = {feature for feature in {*removed, *added} if change[feature] > 0}
    assert 0 < len(rises) < count
    assert set(added if towards == "context" else removed) == rises
    means = torch.stack([whole.mean(0), bare.mean(0)][:: 1 if towards == "context" else -1])
    torch.testing.assert_close(
        edit.layers[0].targets, torch.cat([means[1][removed], means[0][added]]), atol=1e-5, rtol=1e-4
    )


def test_controls_are_as_many_other_features(lab):
    method = ContextFeatures(shares=(0.4,), alphas=(1.0,))
    (condition,) = method.candidates(lab, "context")
    for control in method.controls(lab, condition):
        assert (control.method, control.control_of) == ("random_features", "feature_differences")
        assert control.edits[0].n_moved == condition.edits[0].n_moved


def test_prompts_that_are_not_known_without_their_context_do_not_tell(tiny_llama, tmp_path):
    lab = answered_lab(tiny_llama, tmp_path, lambda: [tiny_sae(1)])
    parts = [lab.prompts.part(split) for split in ("train", "dev", "test")]
    bare = [ConflictSet(part.name, tuple(replace(e, bare_prompt="") for e in part)) for part in parts]
    with pytest.raises(UserError, match="known without their context"):
        ContextFeatures().candidates(lab.on(Prompts(*bare, name="none", relations=("capital",))), "context")
