import copy
from typing import Any

import numpy as np
import pytest
import torch

from interp.activations import record
from interp.anatomy import Anatomy
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.sae import SparseAutoencoder
from interventions.base import applied
from interventions.features import EditedFeatures, FeatureEdit
from probes.feature_differences import FeatureDifferences, differences
from tests.tiny import tiny_conflicts


def identity(width, layer=1):
    """An autoencoder whose features are the positive and the negative parts of each number."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    weights = {"W_enc": both.T.contiguous(), "b_enc": torch.zeros(2 * width)}
    return SparseAutoencoder("standard", weights | {"W_dec": both, "b_dec": torch.zeros(width)}, layer, name="identity")


def edited(found, count):
    return EditedFeatures.of(found.sae, *found.moves(count))


@pytest.fixture
def three():
    """Three prompts about two subjects; features 0 to 2 fire where numbers are positive, 3 to 5 where negative."""
    one = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 2.0], [1.0, 0.0, 5.0]])
    other = torch.tensor([[4.0, 0.0, 1.0], [4.0, 0.0, 1.0], [4.0, -3.0, 4.0]])
    return FeatureDifferences(identity(3), (one, other), ("a", "a", "b"))


def test_features_are_ordered_by_how_far_their_means_differ(three):
    torch.testing.assert_close(three.difference, torch.tensor([3.0, 0.0, -1.0, 0.0, 1.0, 0.0]).double())
    assert three.first(2) == [0, 2]
    assert three.first(9) == [0, 2, 4]
    table = three.table(9)
    assert table["feature"].to_list() == [0, 2, 4]
    assert table["one"].to_list() == [1.0, 3.0, 0.0]
    assert table["other"].to_list() == [4.0, 2.0, 1.0]
    assert table["difference"].to_list() == [3.0, -1.0, 1.0]
    assert table["fires_one"].to_list() == [1.0, 1.0, 0.0]
    assert table["fires_other"].to_list() == pytest.approx([1.0, 1.0, 1 / 3])
    # The first two move alike for every subject; feature 4 is 0 for one subject and 3 for the other.
    np.testing.assert_allclose(table.select("low", "high").to_numpy()[:2], [[3.0, 3.0], [-1.0, -1.0]])
    assert table["low"][2] == 0.0
    assert table["high"][2] == 3.0


def test_the_edit_moves_features_to_what_they_are_on_the_other_side(three):
    edit = edited(three, 9)
    assert edit.sae.kept == (2, 0, 4)
    assert edit.added.tolist() == [False, True, True]
    # Feature 2 goes from 3 to 2, features 0 and 4 to 4 and 1.
    assert edit.targets.tolist() == [1.0, 4.0, 1.0]


def test_without_a_difference_there_is_no_edit():
    same = torch.ones(2, 3)
    alike = FeatureDifferences(identity(3), (same, same), ("a", "b"))
    assert alike.table(4).is_empty()
    with pytest.raises(UserError, match="No feature of the SAE identity differs"):
        alike.moves(4)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (2, 1)])
def test_sides_need_the_same_prompts(one, other):
    with pytest.raises(UserError, match="the same prompts"):
        FeatureDifferences(identity(3), (torch.ones(one, 3), torch.ones(other, 3)), ("a",) * one)


def test_contexts_make_the_difference_between_prompts_with_and_without_them(tiny_plain):
    model, asked = tiny_plain("llama"), tiny_conflicts()
    sae = identity(Anatomy(model).d_model)
    (found,) = differences([sae], model, asked)
    bare, whole = (record(model, prompts, [sae.site])[sae.site] for prompts in zip(*_prompts(asked), strict=True))
    for side, states in zip(found.sides, (bare, whole), strict=True):
        features = torch.cat([states.relu(), (-states).relu()], 1).double()
        torch.testing.assert_close(side.mean, features.mean(0))
        torch.testing.assert_close(side.fires, (features > 0).double().mean(0))
    assert found.subjects == tuple(example.subject for example in asked)


def _prompts(asked):
    return [(example.bare_prompt, example.prompt) for example in asked]


def test_two_models_read_the_same_prompts_and_the_edit_leads_from_one_to_the_other(tiny_plain):
    model = tiny_plain("llama")
    other = copy.deepcopy(model)
    mlp: Any = Anatomy(other).module("mlp", 1)
    with torch.no_grad():
        mlp.down_proj.weight.mul_(3)
    asked = ConflictSet("one", tiny_conflicts().examples[:1])
    sae = identity(Anatomy(model).d_model)
    (found,) = differences([sae], model, asked, other=other)
    (prompt,) = (example.prompt for example in asked)
    theirs = record(other, [prompt], [sae.site])[sae.site]
    torch.testing.assert_close(found.sides[1].mean.float(), torch.cat([theirs.relu(), (-theirs).relu()], 1)[0])
    # Of one prompt the mean is all there is: all features of a lossless autoencoder give the other model's stream.
    with applied(model, FeatureEdit((edited(found, sae.d_sae),), tokens="last_prompt")):
        moved = record(model, [prompt], [sae.site])[sae.site]
    torch.testing.assert_close(moved, theirs, rtol=1e-4, atol=1e-4)


def test_means_move_as_far_as_activations_allow(three):
    """Feature 2 falls by 1 for every prompt; feature 0, below its new mean of 4 everywhere, is raised to it."""
    edit = edited(three, 2)
    moved = three.states[0] + edit.change(three.states[0], 1.0, "targets")
    torch.testing.assert_close(moved, torch.tensor([[4.0, 0.0, 1.0], [4.0, 0.0, 1.0], [4.0, 0.0, 4.0]]))


def test_what_is_no_fine_tune_is_refused(tiny_plain):
    model, asked = tiny_plain("llama"), tiny_conflicts()
    sae = identity(Anatomy(model).d_model)
    with pytest.raises(UserError, match="another architecture, MistralForCausalLM and not LlamaForCausalLM"):
        differences([sae], model, asked, other=tiny_plain("mistral"))
    for other, known in ((None, "without their context"), (model, "give conflict prompts\\.")):
        with pytest.raises(UserError, match=known):
            differences([sae], model, ConflictSet("none", ()), other=other)
