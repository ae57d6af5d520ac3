import math
import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from interp.anatomy import transformers_model
from interp.errors import UserError
from interp.models import load_model
from interp.teacher_forcing import continued
from interventions import gate_training
from interventions.base import applied
from interventions.feedforward import FeedForwardScaling
from interventions.gate_training import (
    GUARDS,
    GateData,
    GateState,
    GateTraining,
    answer_losses,
    check_scales,
    divergences,
    learn_gates,
    scaled,
    within_budget,
)
from interventions.heads import HeadScaling, ScaledHead
from tests.tiny import tiny_conflicts

SETTINGS = GateTraining(max_gates=5, feed_forward=True, steps=12, conflicts=4, guards=4)
TEXTS = ["Rome is old and Paris is larger", "The capital", "Lima is in Peru and Cairo is in Egypt"]


def examples():
    """Every kind of prompt about the same countries."""
    conflicts = list(tiny_conflicts())
    kinds = [
        ("none", lambda e: e.prompt.split(". ")[-1]),
        ("aligned", lambda e: e.prompt),
        ("irrelevant", lambda e: e.prompt),
    ]
    return [
        *conflicts,
        *(
            replace(e, id=f"{e.id}/{kind}", kind=kind, prompt=prompt(e), context_answers=e.memory_answers)
            for kind, prompt in kinds
            for e in conflicts
        ),
    ]


@pytest.fixture(scope="module")
def data(tiny_bridge):
    return GateData(tiny_bridge, examples(), TEXTS)


def alone(model, prompt, answer):
    """Log-probabilities at the answer's tokens by transformers itself, and these tokens."""
    bare, full = model.tokenizer(prompt)["input_ids"], model.tokenizer(f"{prompt} {answer}")["input_ids"]
    with torch.inference_mode():
        logits = transformers_model(model)(input_ids=torch.tensor([full])).logits[0]
    return logits[len(bare) - 1 : -1].log_softmax(-1), torch.tensor(full[len(bare) :])


def some_scales(model):
    state = GateState(model, SETTINGS)
    scales = 1 + 0.5 * torch.randn(len(state.places), generator=torch.Generator().manual_seed(0))
    heads = [
        ScaledHead(layer, head, float(s))
        for (layer, head), s in zip(state.places, scales, strict=True)
        if head is not None
    ]
    layers = [(layer, float(s)) for (layer, head), s in zip(state.places, scales, strict=True) if head is None]
    return state.places, scales, [HeadScaling(tuple(heads)), FeedForwardScaling(tuple(layers))]


def test_the_loss_of_a_conflict_prompt_is_minus_log_p_of_its_answer(tiny_bridge):
    prompts = [(e.prompt, e.context_answers[0]) for e in tiny_conflicts()]
    places, scales, parts = some_scales(tiny_bridge)
    with torch.no_grad(), scaled(tiny_bridge, places, scales):
        found = answer_losses(tiny_bridge, [continued(tiny_bridge, *prompt) for prompt in prompts])
    with applied(tiny_bridge, *parts):
        for value, (log_p, answer) in zip(found, (alone(tiny_bridge, *prompt) for prompt in prompts), strict=True):
            torch.testing.assert_close(value, -log_p.gather(1, answer[:, None]).sum(), rtol=1e-4, atol=1e-4)


def test_the_loss_of_a_guard_is_its_divergence_from_the_unedited_model(tiny_bridge, data):
    places, scales, parts = some_scales(tiny_bridge)
    prompts = [(e.prompt, e.memory_answers[0]) for e in examples() if e.kind == "aligned"]
    clean = {tuple(model_tokens(tiny_bridge, *prompt)): alone(tiny_bridge, *prompt)[0] for prompt in prompts}
    with applied(tiny_bridge, *parts):
        edited = {tuple(model_tokens(tiny_bridge, *prompt)): alone(tiny_bridge, *prompt)[0] for prompt in prompts}
    with torch.no_grad(), scaled(tiny_bridge, places, scales):
        found = divergences(tiny_bridge, data.guards["aligned"])
    for (item, _), value in zip(data.guards["aligned"], found, strict=True):
        before, after = clean[item.tokens], edited[item.tokens]
        expected = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)


def model_tokens(model, prompt, answer):
    return model.tokenizer(f"{prompt} {answer}")["input_ids"]


def test_unedited_no_guard_diverges(tiny_bridge, data):
    state = GateState(tiny_bridge, SETTINGS)
    checked = check_scales(tiny_bridge, data, data.wanted("context"), state.places, state.scales())
    assert set(checked.divergence) == set(GUARDS)
    assert checked.worst < 1e-6


def test_the_gradient_of_the_scales_is_that_of_finite_differences(tiny_bridge):
    items = [continued(tiny_bridge, e.prompt, e.context_answers[0]) for e in tiny_conflicts()]
    places, scales, _ = some_scales(tiny_bridge)
    scales.requires_grad_()
    with scaled(tiny_bridge, places, scales):
        answer_losses(tiny_bridge, items).mean().backward()
    assert scales.grad is not None
    step = 1e-2
    for index in (0, 5, len(places) - 1):
        ends = []
        for sign in (1, -1):
            moved = scales.detach().clone()
            moved[index] += sign * step
            with torch.no_grad(), scaled(tiny_bridge, places, moved):
                ends.append(answer_losses(tiny_bridge, items).mean())
        torch.testing.assert_close(scales.grad[index], (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("location", [-2.0, 0.0, 1.5])
def test_gates_open_as_often_as_louizos_et_al_say(tiny_llama, location):
    """Equation 12: P(gate is not 0) = sigmoid(log alpha - beta log(-gamma / zeta))."""
    state = GateState(tiny_llama, SETTINGS)
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
def test_learned_gates_are_few_within_the_budget_and_do_more_than_nothing(tiny_llama, towards):
    data = GateData(tiny_llama, examples(), TEXTS)
    settings = replace(SETTINGS, budget=0.5, steps=60, learning_rate=0.2)
    learned = learn_gates(tiny_llama, data, data, towards, settings)
    assert len(learned.places) <= settings.max_gates
    assert learned.dev.worst <= settings.budget
    wanted = data.wanted(towards)
    with torch.no_grad():
        before = answer_losses(tiny_llama, wanted).mean()
        with scaled(tiny_llama, learned.places, torch.tensor(learned.scales)):
            assert answer_losses(tiny_llama, wanted).mean() < before - 0.05


def test_a_training_that_was_killed_ends_with_the_same_numbers(tiny_llama, tmp_path, monkeypatch):
    data = GateData(tiny_llama, examples(), TEXTS)
    expected = learn_gates(tiny_llama, data, data, "context", SETTINGS)
    descend, calls = gate_training._Training.descend, []

    def dies(*arguments):
        if len(calls) == 11:
            raise KeyboardInterrupt
        calls.append(1)
        return descend(*arguments)

    checkpoint = tmp_path / "gates.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(gate_training._Training, "descend", dies)
        with pytest.raises(KeyboardInterrupt):
            learn_gates(tiny_llama, data, data, "context", SETTINGS, checkpoint=checkpoint)
    assert checkpoint.exists()
    found = learn_gates(tiny_llama, data, data, "context", SETTINGS, checkpoint=checkpoint)
    assert (found.places, found.scales, found.dev) == (expected.places, expected.scales, expected.dev)


def test_another_training_s_or_a_damaged_checkpoint_is_not_used(tiny_llama, tmp_path):
    data = GateData(tiny_llama, examples(), TEXTS)
    checkpoint = tmp_path / "gates.safetensors"
    gate_training._Training(tiny_llama, replace(SETTINGS, seed=1)).save(checkpoint)
    other = gate_training._Training(tiny_llama, SETTINGS)
    other.resume(checkpoint)
    assert other.step == 0
    checkpoint.write_bytes(b"nonsense")
    expected = learn_gates(tiny_llama, data, data, "memory", SETTINGS)
    assert learn_gates(tiny_llama, data, data, "memory", SETTINGS, checkpoint=checkpoint).scales == expected.scales


def test_a_missing_kind_of_prompts_or_text_is_refused(tiny_llama):
    with pytest.raises(UserError, match="none of 'aligned'"):
        GateData(tiny_llama, [e for e in examples() if e.kind != "aligned"], TEXTS)
    with pytest.raises(UserError, match="two tokens"):
        GateData(tiny_llama, examples(), [])
    with pytest.raises(UserError, match="two tokens"):
        GateData(tiny_llama, examples(), ["", "R"])
    wrong: dict[str, Any] = {"budget": 0.0, "learning_rate": math.nan, "max_gates": 0, "steps": 2, "guards": 0}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=name.replace("_", ".")):
            GateTraining(**{name: value})


@pytest.mark.parametrize(("first", "expected"), [(0.4, 0.4), (2.0, 0.97), (1e9, 0.97)])
def test_scales_go_back_as_far_as_the_budget_demands(tiny_llama, monkeypatch, first, expected):
    """With a divergence that is exactly the square of the way, one step back is enough."""
    data = GateData(tiny_llama, examples(), TEXTS)
    places, tried = [(0, 0)], []

    def applied_scales(_, __, scales):
        tried.append(scales)
        return nullcontext()

    monkeypatch.setattr(gate_training, "scaled", applied_scales)
    way = lambda: float((tried[-1] - 1).abs())  # noqa: E731
    monkeypatch.setattr(gate_training, "_divergence", lambda *_: {"none": way() ** 2, "neutral": 0.0})
    wanted = data.wanted("context")
    found, checked = within_budget(tiny_llama, data, wanted, places, torch.tensor([1 + first]), 1.0)
    assert float(found) - 1 == pytest.approx(expected, rel=1e-3)
    assert checked.worst <= 1.0


@pytest.mark.parametrize("broken", [5.0, math.nan])
def test_where_no_way_back_keeps_the_budget_nothing_moves(tiny_llama, monkeypatch, broken):
    data = GateData(tiny_llama, examples(), TEXTS)
    monkeypatch.setattr(gate_training, "_divergence", lambda *_: {"none": 0.0, "neutral": broken})
    found, _ = within_budget(tiny_llama, data, data.wanted("memory"), [(0, 0)], torch.tensor([3.0]), 1.0)
    assert found.tolist() == [1.0]


def test_gradients_that_are_no_numbers_are_one_sentence(tiny_llama, monkeypatch):
    data = GateData(tiny_llama, examples(), TEXTS)
    real = gate_training.divergences
    monkeypatch.setattr(gate_training, "divergences", lambda *arguments: real(*arguments) * math.nan)
    with pytest.raises(UserError, match="float32 or bfloat16"):
        learn_gates(tiny_llama, data, data, "context", SETTINGS)


def test_prompts_are_drawn_evenly_from_relations_and_phrasings():
    some = [replace(e, id=f"{e.id}/{t}", template=t) for e in tiny_conflicts() for t in ("a", "b")]
    random.Random(0).shuffle(some)
    kept = gate_training._evenly(some, 6, 0)
    assert [e.template for e in kept].count("a") == 3
    assert len({e.id for e in kept}) == 6


def test_a_model_on_a_bridge_is_as_before_after_training(tiny_directories):
    model = load_model(str(tiny_directories["llama"]), device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = GateData(model, examples(), TEXTS)
    learn_gates(model, data, data, "context", SETTINGS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
