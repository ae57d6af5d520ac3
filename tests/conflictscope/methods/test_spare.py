"""SpARE, its random features and its ablations."""

import dataclasses

import pytest
import torch

from conflictscope.methods.spare import Spare, feature_statistics
from conflictscope.methods.spare_ablations import SpareAddOnly, SpareConstant, SpareRemoveOnly
from interp.activations import record
from interp.errors import UserError
from interp.sae import SparseAutoencoder
from interventions.features import FeatureEdit
from interventions.steering import Steering
from tests.conflictscope.methods.answered_lab import answered_lab

SMALL = Spare(shares=(0.3,), alphas=(2.0,), layers=(0, 1))
ABLATIONS = (SpareRemoveOnly, SpareAddOnly, SpareConstant)


def tiny_sae(layer, **changed):
    generator = torch.Generator().manual_seed(layer)
    weights = {
        "W_enc": torch.randn(32, 40, generator=generator),
        "b_enc": torch.randn(40, generator=generator),
        "W_dec": torch.randn(40, 32, generator=generator) / 32,
        "b_dec": torch.randn(32, generator=generator),
    }
    return SparseAutoencoder("standard", weights, layer, name=f"tiny {layer}", **changed)


SAES = [tiny_sae(layer) for layer in (2, 0, 1)]


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return answered_lab(tiny_llama, tmp_path_factory.mktemp("lab"), lambda: SAES)


@pytest.fixture(params=["context", "memory"])
def towards(request):
    return request.param


@pytest.fixture
def chosen(lab, towards):
    return lab.chosen(SMALL, towards).best.condition


def features_of(layer):
    return [[f for f, added in zip(layer.sae.kept, layer.added, strict=True) if added == half] for half in (0, 1)]


def train_streams(lab, layer):
    """States at the ends of train's answered prompts, recorded afresh, and what each was answered from."""
    rows = lab.answered.filter(split="train")
    prompts = {example.id: example.prompt for example in lab.prompts.train}
    site = f"blocks.{layer}.hook_out"
    return record(lab.model, [prompts[name] for name in rows["id"]], [site])[site], rows["usage"].to_list()


def encoded(sae, streams):
    return torch.relu((streams - sae.weights["b_dec"]) @ sae.weights["W_enc"] + sae.weights["b_enc"])


def test_all_runs_of_neighbouring_autoencoders_compete_with_every_share_and_alpha(lab, towards):
    candidates = Spare().candidates(lab, towards)
    seen = {(*c.settings["layers"], c.settings["share"], c.settings["alpha"]) for c in candidates}
    runs = [(0,), (0, 1), (0, 1, 2), (1,), (1, 2), (2,)]
    assert seen == {(*run, share, alpha) for run in runs for share in (0.1, 0.3, 0.5) for alpha in (1.0, 2.0, 4.0)}
    for condition in candidates:
        (edit,) = condition.edits
        assert isinstance(edit, FeatureEdit)
        assert [layer.sae.layer for layer in edit.layers] == condition.settings["layers"]
        assert edit.alpha == condition.settings["alpha"]
        assert edit.tokens == "last_prompt"


def test_features_larger_with_the_source_are_added_and_others_removed_with_their_means_as_targets(lab, towards):
    (condition, *_) = Spare(layers=(1,)).candidates(lab, towards)
    (edit,) = condition.edits
    assert isinstance(edit, FeatureEdit)
    (layer,) = edit.layers
    streams, usages = train_streams(lab, 1)
    z = encoded(tiny_sae(1), streams)
    wanted = z[[usage == towards for usage in usages]].mean(0)
    other = z[[usage != towards for usage in usages]].mean(0)
    removed, added = features_of(layer)
    assert (wanted[added] > other[added]).all()
    assert (other[removed] > wanted[removed]).all()
    torch.testing.assert_close(layer.targets, torch.cat([other[removed], wanted[added]]), atol=1e-5, rtol=1e-4)


def test_form_of_alpha_tokens_and_layers_are_those_that_were_asked_for(lab):
    method = Spare(shares=(0.2,), alphas=(3.0,), alpha_form="change", tokens="answer", layers=(2,))
    (condition,) = method.candidates(lab, "context")
    (edit,) = condition.edits
    assert isinstance(edit, FeatureEdit)
    assert (edit.alpha, edit.alpha_form, edit.tokens) == (3.0, "change", "answer")
    assert condition.settings["layers"] == [2]


def test_random_features_are_as_many_in_the_same_layers_and_none_of_the_selected(lab, chosen):
    controls = SMALL.controls(lab, chosen)
    (ours,) = chosen.edits
    assert len({c.digest for c in (chosen, *controls)}) == 3
    for control in controls:
        (theirs,) = control.edits
        assert isinstance(theirs, FeatureEdit)
        assert (control.method, control.control_of) == ("random_features", "spare")
        assert (theirs.alpha, theirs.alpha_form, theirs.tokens) == (ours.alpha, ours.alpha_form, ours.tokens)
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert a.sae.layer == b.sae.layer
            assert [*map(len, features_of(a))] == [*map(len, features_of(b))]
            assert not {f for half in features_of(a) for f in half} & {f for half in features_of(b) for f in half}
    assert [c.digest for c in SMALL.controls(lab, chosen)] == [c.digest for c in controls]


def test_halves_of_the_edit_are_disjoint_and_together_the_whole(lab, towards, chosen):
    (whole,) = chosen.edits
    conditions = [method(of=SMALL).candidates(lab, towards)[0] for method in (SpareRemoveOnly, SpareAddOnly)]
    halves = [edit for condition in conditions for edit in condition.edits if isinstance(edit, FeatureEdit)]
    streams, _ = train_streams(lab, 0)
    for layer, removing, adding in zip(whole.layers, *(half.layers for half in halves), strict=True):
        assert (features_of(removing)[0], features_of(adding)[1]) == tuple(features_of(layer))
        assert features_of(removing)[1] == features_of(adding)[0] == []
        parts = [part.change(streams, whole.alpha, whole.alpha_form) for part in (removing, adding)]
        torch.testing.assert_close(sum(parts), layer.change(streams, whole.alpha, whole.alpha_form))


def test_the_constant_adds_the_mean_change_of_unedited_streams(lab, towards, chosen):
    (edit,) = chosen.edits
    (condition,) = SpareConstant(of=SMALL).candidates(lab, towards)
    assert len(condition.edits) == len(edit.layers)
    for layer, steering in zip(edit.layers, condition.edits, strict=True):
        sae = tiny_sae(layer.sae.layer)
        streams, _ = train_streams(lab, sae.layer)
        z = encoded(sae, streams)[:, list(layer.sae.kept)]
        target = 2.0 * layer.targets
        moved = torch.where(layer.added, (target - z).clamp(min=0), -torch.minimum(z, target))
        expected = (moved @ sae.weights["W_dec"][list(layer.sae.kept)]).mean(0)
        assert isinstance(steering, Steering)
        assert (steering.layer, steering.strength, steering.tokens) == (sae.layer, 1.0, "last_prompt")
        torch.testing.assert_close(steering.vector, expected, atol=1e-5, rtol=1e-4)


def test_ablations_are_not_compared_with_others_and_name_what_they_are_of(lab, towards, chosen):
    for method in ABLATIONS:
        (condition,) = method(of=SMALL).candidates(lab, towards)
        assert method.derived
        assert (condition.method, condition.towards) == (method.name, towards)
        assert condition.settings == chosen.settings


def test_a_selection_of_one_source_alone_still_has_ablations(tiny_llama, tmp_path):
    """So small a share that a single feature is edited: one of the halves is empty, and does nothing."""
    one = Spare(shares=(1e-6,), alphas=(2.0,), layers=(0,))
    lab = answered_lab(tiny_llama, tmp_path, lambda: SAES)
    chosen = lab.chosen(one, "context").best.condition
    assert chosen.moved == 1
    assert {lab.chosen(method(of=one), "context").best.condition.moved for method in ABLATIONS[:2]} == {0, 1}


def test_statistics_are_kept_for_each_autoencoder_by_what_it_computes(lab, monkeypatch):
    before = feature_statistics(lab, tiny_sae(1))
    with monkeypatch.context() as patch:
        patch.setattr(lab, "train_states", None)
        again = feature_statistics(lab, tiny_sae(1))
    assert torch.equal(again.information, before.information)
    weights = tiny_sae(1).weights
    changed = dataclasses.replace(tiny_sae(1), weights={**weights, "W_enc": -weights["W_enc"]})
    assert not torch.equal(feature_statistics(lab, changed).context_mean, before.context_mean)


def test_autoencoders_that_do_not_fit_are_refused(tiny_llama, tmp_path):
    def refused(saes, message, method=SMALL):
        lab = answered_lab(tiny_llama, tmp_path, None if saes is None else lambda: saes)
        with pytest.raises(UserError, match=message):
            method.candidates(lab, "context")

    refused(None, "There are no SAEs of tiny")
    refused(SAES, "There is no SAE of layer 7; there are SAEs of layers 2, 0, 1", Spare(layers=(7,)))
    refused([*SAES, SAES[1]], "several SAEs of layer 0")
    refused([tiny_sae(5)], "give an SAE of this model", Spare())
    # With another seed some subject that is held out here was trained on.
    card = {"data": {"conflict_prompts": 9, "split_seed": 2}}
    refused([tiny_sae(0, card=card)], r"trained on prompts about \d+ of the subjects that are held out", Spare())
    refused(SAES, "share of information must lie between 0 and 1", Spare(shares=(1.5,)))
