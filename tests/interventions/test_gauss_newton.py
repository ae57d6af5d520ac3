import numpy as np
import pytest
import torch
from scipy.optimize import NonlinearConstraint, minimize

from interp.teacher_forcing import continued
from interventions.gate_data import GateData, answer_losses, gate_places, log_probabilities, scaled
from interventions.gate_training import GateTraining
from interventions.gauss_newton import GaussNewton, Quadratic, _scores, _turn, constrained_step, gradients_by_row
from tests.interventions.test_gate_data import TEXTS, examples
from tests.tiny import tiny_conflicts


def random_curvature(size, seed):
    half = torch.randn(size, size, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    return half @ half.T / size


def some_scales(places):
    return 1 + 0.3 * torch.randn(len(places), generator=torch.Generator().manual_seed(0))


def test_each_row_s_gradient_is_that_of_its_prompt_alone(tiny_bridge):
    items = [continued(tiny_bridge, e.prompt, e.context_answers[0]) for e in tiny_conflicts()]
    places = gate_places(tiny_bridge, feed_forward=True)
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


@pytest.mark.parametrize("draws", [1, 2])
def test_drawn_scores_average_to_the_curvature_of_the_divergence(tiny_llama, draws):
    """The Hessian of KL(p(s) || p(s + d)) at d = 0, by autograd, is the Fisher information."""
    item = continued(tiny_llama, next(iter(tiny_conflicts())).prompt, "Rome is old and")
    places = [(0, 0), (1, 2)]
    scales = torch.tensor([0.8, 1.3])

    def log_p(at):
        with scaled(tiny_llama, places, at):
            return log_probabilities(tiny_llama, [item])

    fixed = log_p(scales).detach()
    exact = torch.autograd.functional.hessian(lambda at: (fixed.exp() * (fixed - log_p(at))).sum(-1).mean(), scales)
    generator = torch.Generator().manual_seed(0)
    many = [item] * 4000
    _, gradients = gradients_by_row(
        tiny_llama,
        places,
        scales,
        many,
        lambda log_p, batch: _scores(log_p, [many[i] for i in batch], draws, generator),
    )
    scores = gradients.flatten(0, 1)
    torch.testing.assert_close(
        scores.T @ scores / len(many), exact, rtol=0.1, atol=0.05 * exact.diagonal().max().item()
    )


@pytest.mark.parametrize("tight", [0.05, 0.5])
def test_a_step_is_the_one_that_scipy_finds(tight):
    """A quadratic objective under quadratic constraints, some gates closed, against SLSQP."""
    size = 8
    gradient = torch.randn(size, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    curvature = random_curvature(size, 0)
    constraints = [
        (
            0.02,
            0.1 * torch.randn(size, dtype=torch.double, generator=torch.Generator().manual_seed(4)),
            random_curvature(size, 1),
        ),
        (0.0, torch.zeros(size, dtype=torch.double), random_curvature(size, 2)),
    ]
    present = some_scales(range(size))
    opened = torch.ones(size, dtype=torch.bool)
    opened[[1, 5]] = False
    found = constrained_step((gradient, curvature), constraints, [tight, 0.1], present, opened)
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


def test_the_gate_that_is_closed_first_is_the_one_whose_closing_costs_least():
    """Against closing each gate in turn and solving again; the budgets and the length are out of reach."""
    size = 6
    learner = GaussNewton.__new__(GaussNewton)
    learner._open = torch.ones(size, dtype=torch.bool)
    gradient = 0.3 * torch.randn(size, dtype=torch.double, generator=torch.Generator().manual_seed(5))
    curvature = random_curvature(size, 6) + torch.eye(size, dtype=torch.double)
    constraints = [(0.0, torch.zeros(size, dtype=torch.double), 1e-6 * torch.eye(size, dtype=torch.double))]
    present = torch.ones(size)

    def least(opened):
        way = (constrained_step((gradient, curvature), constraints, [1e3], present, opened).scales - present).double()
        return float(gradient @ way + way @ curvature @ way / 2)

    costs = []
    for gate in range(size):
        opened = torch.ones(size, dtype=torch.bool)
        opened[gate] = False
        costs.append(least(opened))
    learner._close(constrained_step((gradient, curvature), constraints, [1e3], present, learner._open), 1)
    assert learner._open.tolist().index(False) == int(np.argmin(costs))


def test_a_quadratic_that_moves_stays_the_same_function():
    quadratic = Quadratic(3)
    slope, bend = torch.tensor([1.0, -2.0, 0.5]), random_curvature(3, 7).float()
    quadratic.add(torch.tensor(0.7), slope, bend)
    first, then = torch.tensor([0.3, 0.1, -0.2]), torch.tensor([-0.5, 0.2, 0.4])
    quadratic.move(first)
    value, gradient, _ = quadratic.average()
    # The curvature that comes out is shrunk; the one inside is not.
    inside = quadratic.curvature / quadratic.weight
    both = first + then
    found = value + float(gradient.float() @ then + then @ inside @ then / 2)
    assert found == pytest.approx(float(0.7 + slope @ both + both @ bend @ both / 2), rel=1e-4)


def test_gates_close_down_to_the_wanted_number(tiny_llama):
    data = GateData(tiny_llama, examples(), TEXTS)
    settings = GateTraining(max_gates=3, steps=6, conflicts=6, guards=6, budget=0.5)
    learner = GaussNewton(tiny_llama, settings)
    moved = []
    for _ in range(settings.steps):
        learner.descend(tiny_llama, data.wanted("context"), data.guards)
        moved.append(int((learner.scales() != 1).sum()))
    assert len(learner.places) > moved[0] > 3
    assert moved == sorted(moved, reverse=True)
    assert moved[3:] == [3, 3, 3]


def test_all_items_come_once_before_any_comes_again():
    items = list(range(7))
    turns = [_turn(items, 3, step, seed=0) for step in range(7)]
    assert all(len(set(turn)) == 3 for turn in turns)
    assert sorted(item for turn in turns for item in turn) == sorted(items * 3)
    assert _turn(items, 20, 4, seed=0) != items
    assert sorted(_turn(items, 20, 4, seed=0)) == items
