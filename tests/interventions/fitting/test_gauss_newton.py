from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import NonlinearConstraint, minimize
from torch import Tensor

from interp import teacher_forcing
from interp.teacher_forcing import continued
from interventions.fitting.gauss_newton import (
    Average,
    GaussNewton,
    Model,
    _guard_losses,
    _turn,
    closing_costs,
    constrained_step,
    followed,
    gauss_newton,
    gradients_by_row,
    pooled,
)
from interventions.fitting.hard_concrete import HardConcrete
from interventions.fitting.scale_data import Guarded, ScaleData, answer_losses, log_probabilities, scale_places, scaled
from interventions.fitting.scale_training import ScaleTraining
from tests.interventions.fitting.test_scale_data import TEXTS, examples
from tests.tiny import few_bridges, tiny_conflicts

tiny_bridge = few_bridges


def random_curvature(size, seed):
    half = torch.randn(size, size, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    return half @ half.T / size


def some_scales(places):
    return 1 + 0.3 * torch.randn(len(places), generator=torch.Generator().manual_seed(0))


def test_each_row_s_gradient_is_that_of_its_prompt_alone(tiny_bridge):
    items = [continued(tiny_bridge, e.prompt, e.context_answers[0]) for e in tiny_conflicts()]
    places = scale_places(tiny_bridge, feed_forward=True)
    scales = some_scales(places)
    values, gradients = gradients_by_row(
        tiny_bridge, places, scales, items, lambda log_p, batch: [answer_losses(log_p, [items[i] for i in batch])]
    )
    for index, item in enumerate(items):
        own = scales.clone().requires_grad_()
        with scaled(tiny_bridge, places, own):
            loss = answer_losses(log_probabilities(tiny_bridge, [item]), [item])[0]
        torch.testing.assert_close(values[0, index], loss.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradients[0, index], torch.autograd.grad(loss, own)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_text", [False, True])
def test_drawn_scores_average_to_the_curvature_of_the_divergence(tiny_llama, monkeypatch, is_text):
    """The Hessian of KL(p(s) || p(s + d)) at d = 0, by autograd, is the Fisher information."""
    monkeypatch.setattr(teacher_forcing, "TOKENS_AT_ONCE", 20_000)
    item = continued(tiny_llama, next(iter(tiny_conflicts())).prompt, "Rome is old and")
    places = [(0, 0), (1, 2)]
    scales = torch.tensor([0.8, 1.3])

    def log_p(at):
        with scaled(tiny_llama, places, at):
            return log_probabilities(tiny_llama, [item])

    fixed = log_p(scales).detach()
    exact: Any = torch.autograd.functional.hessian(
        lambda at: (fixed.exp() * (fixed - log_p(at))).sum(-1).mean(), scales
    )
    generator = torch.Generator().manual_seed(0)
    many = [Guarded(item, torch.zeros(item.predicted, 32))] * 2000
    losses = partial(_guard_losses, tiny_llama, many, torch.full((len(many),), is_text), generator)
    _, gradients = gradients_by_row(tiny_llama, places, scales, [item for item, _ in many], losses)
    scores = gradients[1 if is_text else 2 :].flatten(0, 1)
    torch.testing.assert_close(
        scores.T @ scores / len(many), exact, rtol=0.1, atol=0.05 * exact.diagonal().max().item()
    )


@pytest.mark.parametrize("tight", [0.05, 0.5])
def test_a_step_is_the_one_that_scipy_finds(tight):
    """A quadratic objective under quadratic constraints, some scales closed, against SLSQP."""
    size = 8
    gradient = torch.randn(size, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    curvature = random_curvature(size, 0)
    slope = 0.1 * torch.randn(size, dtype=torch.double, generator=torch.Generator().manual_seed(4))
    constraints = [
        Model(0.02, slope, random_curvature(size, 1)),
        Model(0.0, torch.zeros(size, dtype=torch.double), random_curvature(size, 2)),
    ]
    present = some_scales(range(size))
    opened = torch.ones(size, dtype=torch.bool)
    opened[[1, 5]] = False
    found = constrained_step(Model(0.0, gradient, curvature), constraints, [tight, 0.1], present, opened)
    assert found.scales[~opened].tolist() == [1.0, 1.0]

    def model(value, slope, bend):
        value, slope, bend = float(value), slope.numpy(), bend.numpy()
        return lambda way: value + slope @ way + way @ bend @ way / 2

    ridge = 0.005 * torch.eye(size, dtype=torch.double)
    goal = model(0, gradient + ridge @ (present - 1).double(), curvature + ridge)
    forced = (1 - present).double().numpy()
    closed = np.flatnonzero(~opened.numpy())
    free = np.flatnonzero(opened.numpy())
    limits = [
        NonlinearConstraint(model(*constraint), -np.inf, budget)
        for constraint, budget in zip(constraints, [tight, 0.1], strict=True)
    ]
    limits += [
        NonlinearConstraint(lambda way: way[closed] - forced[closed], 0, 0),
        NonlinearConstraint(lambda way: way[free] @ way[free], -np.inf, 1.0),
    ]
    start = np.where(opened.numpy(), 0, forced)
    best = minimize(goal, start, method="SLSQP", constraints=limits, options={"maxiter": 500, "ftol": 1e-12})
    assert best.success
    np.testing.assert_allclose((found.scales - present).numpy(), best.x, atol=0.01)


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_the_cost_of_closing_a_scale_is_what_solving_again_without_it_finds(seed):
    """The limits are out of reach, so that the objective alone decides."""
    size = 6
    gradient = 0.1 * torch.randn(size, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    objective = Model(0.0, gradient, random_curvature(size, seed + 10) + torch.eye(size, dtype=torch.double))
    present = 1 + 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    every = torch.ones(size, dtype=torch.bool)

    def least(opened):
        found = constrained_step(objective, [], [], present, opened)
        way = (found.scales - present).double()
        away = (found.scales - 1).double()
        return found, objective.at(way).value + 0.005 * float(away @ away) / 2

    found, best = least(every)
    costs = [least(every & (torch.arange(size) != closed))[1] - best for closed in range(size)]
    np.testing.assert_allclose(closing_costs(found, every).numpy(), costs, rtol=2e-2, atol=1e-5)


def test_an_average_that_moved_is_the_same_function():
    slope, bend = torch.tensor([1.0, -2.0, 0.5]), random_curvature(3, 7).float()
    average = Average(3)
    average.add(torch.tensor(0.7), slope, bend)
    first, then = torch.tensor([0.3, 0.1, -0.2]).double(), torch.tensor([-0.5, 0.2, 0.4]).double()
    model = average.model()
    average.move(model, first)
    moved = average.model()
    assert moved.at(then).value == pytest.approx(model.at(first + then).value, rel=1e-4)
    torch.testing.assert_close(moved.at(then).gradient, model.at(first + then).gradient, rtol=1e-4, atol=1e-5)


def test_later_prompts_weigh_more_in_an_average():
    average = Average(1)
    for value in (1.0, 2.0, 4.0):
        average.add(torch.tensor(value), torch.tensor([value]), torch.tensor([[value]]))
    expected = (0.81 * 1 + 0.9 * 2 + 4) / (0.81 + 0.9 + 1)
    assert (float(average.value), float(average.gradient)) == pytest.approx((expected, expected))


def test_the_curvature_of_a_binary_answer_is_that_of_its_logistic_loss():
    """With two answers whose log-odds are linear in the scales it is the Hessian, by autograd."""
    directions = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.2, -0.1, 0.3])

    def losses(at):
        return torch.nn.functional.softplus(-directions @ at)

    gradients = torch.autograd.functional.jacobian(losses, scales)
    exact = torch.autograd.functional.hessian(lambda at: losses(at).mean(), scales)
    value, gradient, curvature = gauss_newton(losses(scales), gradients)
    torch.testing.assert_close(value, losses(scales).mean())
    torch.testing.assert_close(gradient, gradients.mean(0))
    torch.testing.assert_close(curvature, exact)


def test_guards_lend_each_other_curvature_but_keep_their_size():
    models = [Model(0.0, torch.zeros(4).double(), size * random_curvature(4, size)) for size in (1, 10)]
    for before, after in zip(models, pooled(models), strict=True):
        assert float(after.curvature.trace()) == pytest.approx(float(before.curvature.trace()))
    same = pooled([models[0], models[0]])
    torch.testing.assert_close(same[0].curvature, models[0].curvature)


def test_a_model_s_budget_follows_what_fresh_prompts_diverge():
    assert followed(0.02, 0.02, 0.08) == pytest.approx(0.01)  # four times too much: half
    assert followed(0.01, 0.02, 0.005) == pytest.approx(0.02)  # a quarter: double
    assert followed(0.02, 0.02, 0.001) == 0.02  # never above the user's
    assert followed(0.0026, 0.02, 1.0) == pytest.approx(0.02 / 8)  # nor below an eighth of it
    assert followed(0.02, 0.02, 0.0) == 0.02


def test_scales_close_down_to_the_wanted_number(tiny_llama):
    data = ScaleData(tiny_llama, examples(), TEXTS)
    settings = ScaleTraining(max_scales=3, steps=6, conflicts=6, guards=6, budget=0.5)
    learner = GaussNewton(tiny_llama, settings)
    moved = []
    for _ in range(settings.steps):
        learner.descend(data.wanted("context"), data)
        moved.append(int((learner.scales() != 1).sum()))
    assert len(learner.places) > moved[0] > 3
    assert moved == sorted(moved, reverse=True)
    assert moved[3:] == [3, 3, 3]


def test_the_second_direction_starts_from_what_the_first_read_of_the_unedited_model(tiny_llama, monkeypatch):
    settings = ScaleTraining(max_scales=3, steps=3, conflicts=6, guards=6, budget=0.5)

    def towards_memory(data: ScaleData) -> Tensor:
        learner = GaussNewton(tiny_llama, settings)
        for _ in range(2):
            learner.descend(data.wanted("memory"), data)
        return learner.scales()

    alone = towards_memory(ScaleData(tiny_llama, examples(), TEXTS))
    data = ScaleData(tiny_llama, examples(), TEXTS)
    learner = GaussNewton(tiny_llama, settings)
    for _ in range(2):
        learner.descend(data.wanted("context"), data)
    sizes = []

    def counted(*given: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(given[3]))
        return gradients_by_row(*given)

    monkeypatch.setattr("interventions.fitting.gauss_newton.gradients_by_row", counted)
    assert torch.equal(towards_memory(data), alone)
    assert sizes == [6, 6, 6 + 3 + 3 + 3]  # of the first step the conflicts alone; then all guards too
    # Other guards are read themselves.
    GaussNewton(tiny_llama, replace(settings, guards=4)).descend(data.wanted("context"), data)
    assert sizes[3:] == [6, 4 + 2 + 2 + 2]


@pytest.mark.parametrize("learner", [GaussNewton, HardConcrete])
def test_no_layer_has_more_heads_than_may_move(tiny_llama, learner):
    data = ScaleData(tiny_llama, examples(), TEXTS)
    settings = ScaleTraining(
        max_scales=8, max_heads_per_layer=2, steps=6, conflicts=6, guards=6, budget=0.5, feed_forward=True
    )
    learning = learner(tiny_llama, settings)
    for _ in range(settings.steps):
        learning.descend(data.wanted("context"), data)
    moved = [place for place, scale in zip(learning.places, learning.scales().tolist(), strict=True) if scale != 1]
    heads = Counter(layer for layer, head in moved if head is not None)
    assert len(moved) == 8
    assert max(heads.values()) == 2


def test_all_items_come_once_before_any_comes_again():
    items = list(range(7))
    turns = [_turn(items, 3, step, seed=0) for step in range(7)]
    assert all(len(set(turn)) == 3 for turn in turns)
    assert sorted(item for turn in turns for item in turn) == sorted(items * 3)
    assert _turn(items, 20, 4, seed=0) != items
    assert sorted(_turn(items, 20, 4, seed=0)) == items
