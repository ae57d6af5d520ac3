import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from interp.errors import UserError
from interp.models import load_model
from interventions.fitting import scale_learning
from interventions.fitting.hard_concrete import MaskedScales
from interventions.fitting.scale_data import ScaleData, answer_losses, log_probabilities, scaled
from interventions.fitting.scale_learning import learn_scales
from interventions.fitting.scale_training import ScaleTraining
from tests.interventions.fitting.test_scale_data import TEXTS, examples

NEWTON = ScaleTraining(max_scales=5, feed_forward=True, steps=6, conflicts=6, guards=6)
NOISY = replace(NEWTON, learner="hard_concrete", steps=60, conflicts=4, guards=4)
NAMES = ["gauss_newton", "hard_concrete"]
LEARNERS = pytest.mark.parametrize("settings", [NEWTON, NOISY], ids=NAMES)
# Where it does not matter what is learned.
HASTY = pytest.mark.parametrize("settings", [replace(settings, steps=4) for settings in (NEWTON, NOISY)], ids=NAMES)


@pytest.mark.parametrize("location", [-2.0, 0.0, 1.5])
def test_masks_open_as_often_as_louizos_et_al_say(tiny_llama, location):
    """Equation 12: P(mask is not 0) = sigmoid(log alpha - beta log(-gamma / zeta))."""
    state = MaskedScales(tiny_llama, NOISY)
    with torch.no_grad():
        state.location.fill_(location)
        state.offset.fill_(1.0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([state.sampled(generator).detach() for _ in range(4000)])
    closed_form = 1 / (1 + math.exp(-(location - 2 / 3 * math.log(0.1 / 1.1))))
    assert (drawn != 1).float().mean().item() == pytest.approx(closed_form, abs=0.01)
    assert state.expected_open().item() == pytest.approx(closed_form * len(state.places), rel=1e-5)
    assert drawn.min() >= 1
    assert drawn.max() <= 2


@pytest.mark.parametrize("towards", ["context", "memory"])
@LEARNERS
def test_learned_scales_are_few_within_the_budget_and_do_more_than_nothing(tiny_llama, towards, settings):
    data = ScaleData(tiny_llama, examples(), TEXTS)
    settings = replace(settings, budget=0.5, context_budget=0.7)
    learned = learn_scales(tiny_llama, data, data, towards, settings)
    assert len(learned.places) <= settings.max_scales
    assert learned.dev.spent(settings.budgets) <= 1
    wanted = data.wanted(towards)
    with torch.no_grad():
        before = answer_losses(log_probabilities(tiny_llama, wanted), wanted).mean()
        with scaled(tiny_llama, learned.places, torch.tensor(learned.scales)):
            assert answer_losses(log_probabilities(tiny_llama, wanted), wanted).mean() < before - 0.05


@HASTY
def test_a_training_that_was_killed_ends_with_the_same_numbers(tiny_llama, tmp_path, monkeypatch, settings):
    data = ScaleData(tiny_llama, examples(), TEXTS)
    settings = replace(settings, budget=0.5)
    expected = learn_scales(tiny_llama, data, data, "context", settings)
    learner = scale_learning._LEARNERS[settings.learner]
    descend, calls = learner.descend, []

    def dies(*arguments):
        if len(calls) == settings.steps - 1:
            raise KeyboardInterrupt
        calls.append(1)
        return descend(*arguments)

    checkpoint = tmp_path / "scales.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(learner, "descend", dies)
        with pytest.raises(KeyboardInterrupt):
            learn_scales(tiny_llama, data, data, "context", settings, checkpoint=checkpoint)
    assert checkpoint.exists()
    found = learn_scales(tiny_llama, data, data, "context", settings, checkpoint=checkpoint)
    assert (found.places, found.scales, found.dev) == (expected.places, expected.scales, expected.dev)


@HASTY
def test_another_training_s_or_a_damaged_checkpoint_is_not_used(tiny_llama, tmp_path, settings):
    data = ScaleData(tiny_llama, examples(), TEXTS)
    checkpoint = tmp_path / "scales.safetensors"
    learn_scales(tiny_llama, data, data, "memory", replace(settings, seed=1), checkpoint=checkpoint)
    expected = learn_scales(tiny_llama, data, data, "memory", settings)
    assert learn_scales(tiny_llama, data, data, "memory", settings, checkpoint=checkpoint).scales == expected.scales
    checkpoint.write_bytes(b"nonsense")
    assert learn_scales(tiny_llama, data, data, "memory", settings, checkpoint=checkpoint).scales == expected.scales


def test_senseless_settings_are_refused():
    wrong: dict[str, Any] = {"budget": 0.0, "context_budget": math.inf}
    wrong |= {"max_scales": 0, "steps": 2, "guards": 0, "learner": "sgd"}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=name.replace("_", ".")):
            ScaleTraining(**{name: value})


@LEARNERS
def test_a_checkpoint_that_lacks_something_is_not_half_used(tiny_llama, tmp_path, settings):
    data = ScaleData(tiny_llama, examples(), TEXTS)
    learner = scale_learning._LEARNERS[settings.learner](tiny_llama, settings)
    learner.descend(data.wanted("memory"), data)
    for lacking in learner.tensors():
        tensors = {name: tensor for name, tensor in learner.tensors().items() if name != lacking}
        fresh = scale_learning._LEARNERS[settings.learner](tiny_llama, settings)
        before = fresh.scales()
        if lacking.startswith("adam."):
            continue
        with pytest.raises(KeyError):
            fresh.restore(tensors, 1)
        assert torch.equal(fresh.scales(), before)
        assert fresh.step == 0


@LEARNERS
def test_gradients_that_are_no_numbers_are_one_sentence(tiny_llama, monkeypatch, settings):
    data = ScaleData(tiny_llama, examples(), TEXTS)
    module = f"interventions.fitting.{settings.learner}"
    monkeypatch.setattr(f"{module}.answer_losses", lambda *arguments: answer_losses(*arguments) * math.nan)
    with pytest.raises(UserError, match="in float32, or in bfloat16 with eager attention"):
        learn_scales(tiny_llama, data, data, "context", settings)


def test_a_model_on_a_bridge_is_as_before_after_training(tiny_directories):
    model = load_model(str(tiny_directories["llama"]), device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = ScaleData(model, examples(), TEXTS)
    learn_scales(model, data, data, "context", NEWTON)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
