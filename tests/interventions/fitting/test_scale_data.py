import math
import random
from dataclasses import replace

import pytest
import torch

from interp import precision
from interp.anatomy import transformers_model
from interp.conflicts import evenly
from interp.errors import UserError
from interp.teacher_forcing import continued
from interventions.base import applied
from interventions.feedforward import FeedForwardScaling
from interventions.fitting import scale_data
from interventions.fitting.scale_data import (
    GUARDS,
    Checked,
    Guard,
    ScaleData,
    answer_losses,
    check_scales,
    divergences,
    log_probabilities,
    scale_places,
    scaled,
    to_budget,
)
from interventions.heads import HeadScaling, ScaledHead
from tests.tiny import few_bridges, tiny_conflicts

tiny_bridge = few_bridges
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
    return ScaleData(tiny_bridge, examples(), TEXTS)


def alone(model, prompt, answer):
    """Log-probabilities at the answer's tokens by transformers itself, and these tokens."""
    bare, full = model.tokenizer(prompt)["input_ids"], model.tokenizer(f"{prompt} {answer}")["input_ids"]
    with torch.inference_mode():
        logits = transformers_model(model)(input_ids=torch.tensor([full])).logits[0]
    return logits[len(bare) - 1 : -1].log_softmax(-1), torch.tensor(full[len(bare) :])


def some_scales(model):
    places = scale_places(model, feed_forward=True)
    scales = 1 + 0.5 * torch.randn(len(places), generator=torch.Generator().manual_seed(0))
    heads = [
        ScaledHead(layer, head, float(s)) for (layer, head), s in zip(places, scales, strict=True) if head is not None
    ]
    layers = [(layer, float(s)) for (layer, head), s in zip(places, scales, strict=True) if head is None]
    return places, scales, [HeadScaling(tuple(heads)), FeedForwardScaling(tuple(layers))]


def test_the_loss_of_a_conflict_prompt_is_minus_log_p_of_its_answer(tiny_bridge):
    prompts = [(e.prompt, e.context_answers[0]) for e in tiny_conflicts()]
    places, scales, parts = some_scales(tiny_bridge)
    with torch.no_grad(), scaled(tiny_bridge, places, scales):
        items = [continued(tiny_bridge, *prompt) for prompt in prompts]
        found = answer_losses(log_probabilities(tiny_bridge, items), items)
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
        items = [item for item, _ in data.guards["aligned"]]
        found = divergences(tiny_bridge, log_probabilities(tiny_bridge, items), data.guards["aligned"])
    for (item, _), value in zip(data.guards["aligned"], found, strict=True):
        before, after = clean[item.tokens], edited[item.tokens]
        expected = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)


def model_tokens(model, prompt, answer):
    return model.tokenizer(f"{prompt} {answer}")["input_ids"]


def test_unedited_no_guard_diverges(tiny_bridge, data):
    places = scale_places(tiny_bridge, feed_forward=True)
    checked = check_scales(tiny_bridge, data, data.wanted("context"), places, torch.ones(len(places)))
    assert set(checked.divergence) == set(GUARDS)
    assert max(checked.divergence.values()) < 1e-6


def test_checked_counts_the_guards_that_are_answered_right(tiny_bridge, data):
    places, scales, parts = some_scales(tiny_bridge)
    checked = check_scales(tiny_bridge, data, data.wanted("context"), places, scales)
    with applied(tiny_bridge, *parts):
        for kind in ("none", "aligned", "irrelevant"):
            prompts = [(e.prompt, e.memory_answers[0]) for e in examples() if e.kind == kind]
            found = [alone(tiny_bridge, *prompt) for prompt in prompts]
            right = [torch.equal(log_p.argmax(-1), answer) for log_p, answer in found]
            assert checked.right[kind] == pytest.approx(sum(right) / len(right))


def test_the_gradient_of_the_scales_is_that_of_finite_differences(tiny_bridge):
    items = [continued(tiny_bridge, e.prompt, e.context_answers[0]) for e in tiny_conflicts()]
    places, scales, _ = some_scales(tiny_bridge)
    scales.requires_grad_()
    with scaled(tiny_bridge, places, scales):
        answer_losses(log_probabilities(tiny_bridge, items), items).mean().backward()
    assert scales.grad is not None
    step = 1e-2
    for index in (0, 5, len(places) - 1):
        ends = []
        for sign in (1, -1):
            moved = scales.detach().clone()
            moved[index] += sign * step
            with torch.no_grad(), scaled(tiny_bridge, places, moved):
                ends.append(answer_losses(log_probabilities(tiny_bridge, items), items).mean())
        torch.testing.assert_close(scales.grad[index], (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=1e-4)


def test_a_missing_kind_of_prompts_or_text_is_refused(tiny_llama):
    with pytest.raises(UserError, match="none of 'aligned'"):
        ScaleData(tiny_llama, [e for e in examples() if e.kind != "aligned"], TEXTS)
    with pytest.raises(UserError, match="two tokens"):
        ScaleData(tiny_llama, examples(), [])
    with pytest.raises(UserError, match="two tokens"):
        ScaleData(tiny_llama, examples(), ["", "R"])


@pytest.mark.parametrize(("first", "expected"), [(0.4, 0.6), (0.9, 0.97), (0.97, 0.97), (2.0, 0.97), (1e9, 0.97)])
def test_scales_go_back_as_far_as_the_budget_demands(tiny_llama, monkeypatch, first, expected):
    """With a divergence that is exactly the square of the way, one step back is enough."""
    data = ScaleData(tiny_llama, examples(), TEXTS)

    def check(*arguments, **_):
        way = float((arguments[-1] - 1).abs())
        return Checked(1.0, {**dict.fromkeys(GUARDS, 0.0), "none": way**2, "aligned": 2 * way**2}, {})

    monkeypatch.setattr(scale_data, "check_scales", check)
    budgets: dict[Guard, float] = {"none": 1.0, "aligned": 2.0, "irrelevant": 1.0, "neutral": 1.0}
    found, checked = to_budget(tiny_llama, data, [], [(0, 0)], torch.tensor([1 + first]), budgets)
    assert float(found) - 1 == pytest.approx(expected, rel=1e-3)
    assert checked.spent(budgets) <= 1


def test_where_a_budget_is_broken_no_conflict_prompt_is_asked(tiny_bridge, data, monkeypatch):
    places, scales, _ = some_scales(tiny_bridge)
    monkeypatch.setattr(scale_data, "greedily_continued", lambda *_: pytest.fail("asked"))
    tight = dict.fromkeys(GUARDS, 1e-9)
    checked = check_scales(tiny_bridge, data, data.wanted("context"), places, scales, within=tight)
    assert checked.rate == 0
    assert checked.spent(tight) > 1


@pytest.mark.parametrize("broken", [5.0, math.nan])
def test_where_no_way_back_keeps_the_budget_nothing_moves(tiny_llama, monkeypatch, broken):
    data = ScaleData(tiny_llama, examples(), TEXTS)
    checked = Checked(1.0, {**dict.fromkeys(GUARDS, 0.0), "neutral": broken}, {})
    monkeypatch.setattr(scale_data, "check_scales", lambda *_, **__: checked)
    found, _ = to_budget(tiny_llama, data, [], [(0, 0)], torch.tensor([3.0]), dict.fromkeys(GUARDS, 1.0))
    assert found.tolist() == [1.0]


def test_prompts_are_drawn_evenly_from_relations_and_phrasings():
    some = [replace(e, id=f"{e.id}/{t}", template=t) for e in tiny_conflicts() for t in ("a", "b")]
    random.Random(0).shuffle(some)
    kept = evenly(some, 6, 0)
    assert [e.template for e in kept].count("a") == 3
    assert len({e.id for e in kept}) == 6


def test_other_prompts_answers_are_none_of_a_prompt_s_own(tiny_llama):
    some = [
        replace(
            e, id=f"{e.id}/{t}", template=t, prompt=f"{t} {e.prompt}", context_answers=(f"{e.context_answers[0]} {t}",)
        )
        for e in examples()
        for t in ("a", "b")
    ]
    data = ScaleData(tiny_llama, some, TEXTS)
    plain, others = data.wanted("context"), data.wanted("context", shuffled_by=0)
    of_prompt = {item.tokens[: -item.predicted]: e for item, e in zip(plain, data.conflicts, strict=True)}
    assert others
    for item in others:
        example = of_prompt[item.tokens[: -item.predicted]]
        own = (example.context_answers[0], example.memory_answers[0])
        related = {e.context_answers[0] for e in data.conflicts if e.relation == example.relation}
        possible = {continued(tiny_llama, example.prompt, answer).answer for answer in related - set(own)}
        assert item.answer in possible


def slopes(model, items, *, roughly):
    """The gradient of the items' mean log p by the scales of all heads."""
    places = scale_data.scale_places(model, feed_forward=False)
    scales = torch.ones(len(places), requires_grad=True)
    with scale_data.scaled(model, places, scales):
        log_p = scale_data.log_probabilities(model, items, roughly=roughly)
    return torch.autograd.grad(-scale_data.answer_losses(log_p, items).mean(), scales)[0]


def test_rough_gradients_point_where_exact_ones_do_and_are_exact_where_the_cpu_has_no_bfloat16(tiny_plain, monkeypatch):
    model = tiny_plain("llama")
    items = [continued(model, e.prompt, e.memory_answers[0]) for e in tiny_conflicts()]
    exact = slopes(model, items, roughly=False)
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: True)
    rough = slopes(model, items, roughly=True)
    assert not torch.equal(rough, exact)
    assert torch.cosine_similarity(rough, exact, dim=0) > 0.999
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: False)
    assert torch.equal(slopes(model, items, roughly=True), exact)
