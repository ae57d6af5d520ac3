from dataclasses import replace

import pytest

from conflictscope.methods import learned_scales as job
from conflictscope.methods.hard_concrete import HardConcrete
from conflictscope.methods.learned_scales import LearnedScales, dial_of, learned
from conflictscope.methods.other_answers import OtherAnswers
from interp.errors import UserError
from interventions.dial import DialScale
from interventions.feedforward import FeedForwardScaling
from interventions.fitting.scale_learning import learn_scales
from interventions.fitting.scale_training import ScaleTraining
from tests.conflictscope.methods.labs import tiny_lab

FEW = ScaleTraining(max_scales=3)


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    lab = tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))
    lab.budgets = dict.fromkeys(lab.budgets, 0.5)
    return lab


def direct(lab, towards, **settings):
    """What the learner itself gives with a quick lab's steps."""
    training = ScaleTraining(budget=0.5, context_budget=0.5, steps=3, conflicts=2, guards=1, **settings)
    found = learn_scales(lab.model, lab.scale_data["train"], lab.scale_data["dev"], towards, training)
    return dict(zip(found.places, found.scales, strict=True))


@pytest.mark.parametrize("towards", ["context", "memory"])
def test_what_was_learned_competes_at_each_strength(lab, towards):
    scales = direct(lab, towards, max_scales=3)
    assert 0 < len(scales) <= 3
    method = LearnedScales(FEW, strengths=(0.5, 1.0, 2.0))
    for condition, strength in zip(method.candidates(lab, towards), method.strengths, strict=True):
        (edit,) = condition.edits
        expected = {place: 1 + strength * (scale - 1) for place, scale in scales.items()}
        assert edit.head_scales == pytest.approx(expected)
        assert condition.settings == {"strength": strength}


def test_the_budgets_and_the_seed_are_the_lab_s(lab):
    (condition,) = LearnedScales(FEW, strengths=(1.0,)).candidates(lab, "context")
    details = LearnedScales(FEW).details(lab, condition)
    assert (details["training"]["budget"], details["training"]["seed"]) == (0.5, lab.seed)
    assert max(details["dev"]["divergence"].values()) <= 0.5


def test_what_was_learned_is_kept_and_the_training_is_not(lab, monkeypatch):
    scales, _ = learned(lab, "context", FEW)
    monkeypatch.setattr(job, "learn_scales", lambda *_, **__: pytest.fail("learned again"))
    assert learned(lab.on(lab.prompts), "context", FEW)[0] == scales
    assert not list(lab.records.folder.glob("training-*"))


def test_a_training_that_was_stopped_is_kept(lab, monkeypatch):
    given = []

    def stopped(*_, checkpoint, **__):
        given.append(checkpoint)
        checkpoint.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "learn_scales", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            learned(lab, "context", replace(FEW, max_scales=2))
    assert given[0] == given[1]
    assert given[0].exists()
    given[0].unlink()


def test_feed_forward_layers_move_where_they_are_wanted_and_in_the_control(lab):
    method = LearnedScales(ScaleTraining(max_scales=15, feed_forward=True), strengths=(1.0,))
    (chosen,) = method.candidates(lab, "context")
    heads, layers = chosen.edits
    assert isinstance(layers, FeedForwardScaling)
    assert chosen.moved == len(heads.edited_heads) + len(layers.scales)
    for control in method.controls(lab, chosen):
        assert [edit.n_moved for edit in control.edits] == [edit.n_moved for edit in chosen.edits]


def test_budgets_that_nothing_can_keep_are_one_sentence(lab):
    tight = lab.on(lab.prompts)
    tight.budgets = dict.fromkeys(lab.budgets, 1e-12)
    with pytest.raises(UserError, match=r"No scale could be moved towards context within .* give a larger --budget"):
        LearnedScales().candidates(tight, "context")


def test_a_dial_has_each_place_once_in_the_order_of_the_model():
    dial = dial_of({"context": {(1, 2): 0.5, (0, 3): 2.0, (1, None): 0.1}, "memory": {(1, 2): 3.0}})
    assert dial.scales == (
        DialScale(0, 3, 1.0, 2.0),
        DialScale(1, None, 1.0, 0.1),
        DialScale(1, 2, 3.0, 0.5),
    )
    assert dial.trust == 0


def test_hard_concrete_is_learned_by_the_noisy_learner(lab):
    scales = direct(lab, "context", learner="hard_concrete")
    (condition,) = HardConcrete(strengths=(1.0,)).candidates(lab, "context")
    assert condition.method == "hard_concrete"
    assert condition.edits[0].head_scales == pytest.approx(scales)


def test_other_answers_are_learned_from_shuffled_answers_and_do_not_compete(lab):
    scales = direct(lab, "context", shuffled=True)
    (condition,) = OtherAnswers(strengths=(1.0,)).candidates(lab, "context")
    assert condition.method == "other_answers"
    assert condition.edits[0].head_scales == pytest.approx(scales)
    assert scales != direct(lab, "context")
    assert OtherAnswers.derived
    assert not HardConcrete.derived
