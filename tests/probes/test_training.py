from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from interp.errors import UserError
from probes import training
from probes.training import Fits, balanced_weights, fit_discriminant, fit_logistic, log_probabilities

STRENGTHS = (1e-3, 1e-2, 0.1, 1.0)
TIGHT = 2e-6


def problem(n: int, d: int, *, seed: int = 0, n_classes: int = 2, gap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal features ``(n, d)``, float32, whose class means lie ``gap`` apart in a few coordinates."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    means = gap * rng.normal(size=(n_classes, d)) * (np.arange(d) < 5)
    return (rng.normal(size=(n, d)) + means[labels]).astype(np.float32), labels


def badly_conditioned(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of scale 0.01 to 10 that share one strong component."""
    features, labels = problem(n, d)
    common = np.random.default_rng(1).normal(size=(n, 1))
    return ((features + 3 * common) * np.logspace(-2, 1, d)).astype(np.float32), labels


def with_a_constant(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    features, labels = problem(n, d)
    features[:, 3] = 0.7
    return features, labels


def unbalanced(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    features, labels = problem(4 * n, d)
    kept = np.flatnonzero((labels == 0) | (np.arange(4 * n) % 14 == 1))[:n]
    return features[kept], labels[kept]


def separable(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    return problem(n, d, gap=6.0)


def three_classes(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    return problem(n, d, n_classes=3)


def fitted(
    problems: list[np.ndarray],
    labels: np.ndarray,
    strengths: tuple[float, ...] = STRENGTHS,
    *,
    weights: torch.Tensor | None = None,
    fit: Any = fit_logistic,
    **options: Any,
) -> Fits:
    n_classes = int(labels.max()) + 1
    return fit(
        torch.tensor(np.stack(problems)),
        torch.tensor(labels),
        torch.full((len(labels),), 1 / len(labels)) if weights is None else weights,
        torch.tensor(strengths),
        n_classes=n_classes,
        **options,
    )


def reference(features: np.ndarray, labels: np.ndarray, strength: float, class_weight: str | None = None) -> Any:
    """scikit-learn's solution in float64, by Newton's method."""
    model = LogisticRegression(
        C=1 / (strength * len(labels)), class_weight=class_weight, tol=1e-10, max_iter=500, solver="newton-cholesky"
    )
    return model.fit(features.astype(float), labels)


def assert_like_sklearn(fits: Fits, p: int, s: int, features: np.ndarray, model: Any, tolerance: float = 2e-3) -> None:
    """Weights, bias and logits, each relative to its largest value.

    scikit-learn does not pin down what is added to the biases of all of several classes.
    """

    def pinned(bias: np.ndarray) -> np.ndarray:
        return bias - bias.mean() if len(bias) > 1 else bias

    weight, bias = fits.weight[p, s].double().numpy(), fits.bias[p, s].double().numpy()
    assert weight.shape == model.coef_.shape
    np.testing.assert_allclose(weight, model.coef_, rtol=0, atol=tolerance * np.abs(model.coef_).max())
    logits = features @ model.coef_.T + pinned(model.intercept_)
    np.testing.assert_allclose(pinned(bias), pinned(model.intercept_), rtol=0, atol=tolerance * np.abs(logits).max())
    np.testing.assert_allclose(
        features @ weight.T + pinned(bias), logits, rtol=0, atol=tolerance * np.abs(logits).max()
    )


PROBLEMS = {
    "more examples than features": (problem, 200, 30),
    "fewer examples than features": (problem, 40, 120),
    "scales from 0.01 to 10, strongly correlated": (badly_conditioned, 150, 25),
    "a constant feature": (with_a_constant, 100, 20),
    "a constant feature and few examples": (with_a_constant, 40, 60),
    "perfectly separable": (separable, 80, 20),
    "three classes": (three_classes, 150, 20),
    "three classes, fewer examples than features": (three_classes, 45, 80),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_logistic_regression_is_that_of_scikit_learn_at_every_strength(name):
    make, n, d = PROBLEMS[name]
    features, labels = make(n, d)
    fits = fitted([features], labels, tolerance=TIGHT)
    for s, strength in enumerate(STRENGTHS):
        assert_like_sklearn(fits, 0, s, features, reference(features, labels, strength))


def test_several_problems_with_the_same_labels_are_fitted_at_once():
    labels = problem(90, 20)[1]
    problems = [problem(90, 20, seed=seed, gap=gap)[0] for seed, gap in ((0, 1.0), (1, 0.0), (2, 5.0))]
    fits = fitted(problems, labels, tolerance=TIGHT)
    assert fits.weight.shape == (3, len(STRENGTHS), 1, 20)
    assert fits.bias.shape == (3, len(STRENGTHS), 1)
    for p, features in enumerate(problems):
        for s, strength in enumerate(STRENGTHS):
            assert_like_sklearn(fits, p, s, features, reference(features, labels, strength))


@pytest.mark.parametrize(("n", "d"), [(150, 20), (60, 90)])
def test_balanced_weights_are_balanced_class_weights_of_scikit_learn(n, d):
    features, labels = unbalanced(n, d)
    assert np.bincount(labels).max() > 4 * np.bincount(labels).min()
    fits = fitted([features], labels, weights=balanced_weights(torch.tensor(labels), 2), tolerance=TIGHT)
    for s, strength in enumerate(STRENGTHS):
        assert_like_sklearn(fits, 0, s, features, reference(features, labels, strength, "balanced"))


def objective(
    weight: torch.Tensor, bias: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, strength: float
) -> torch.Tensor:
    """The objective of the module's first lines, for one problem and strength with equal weights."""
    logits = features @ weight.T + bias
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return torch.nn.functional.cross_entropy(logits, labels) + strength / 2 * weight.square().sum()


@pytest.mark.parametrize("name", [n for n in PROBLEMS if "scales" not in n])
def test_the_gradient_of_the_objective_is_below_the_tolerance_at_the_solution(name):
    make, n, d = PROBLEMS[name]
    features, labels = make(n, d)
    fits = fitted([features], labels, tolerance=1e-4)
    centre = torch.tensor(features).double().mean(0)
    for s, strength in enumerate(STRENGTHS):
        weight = fits.weight[0, s].double().requires_grad_()
        # Around the centre, as the solver has it: there weight and bias hardly depend on each other.
        bias = (fits.bias[0, s].double() + fits.weight[0, s].double() @ centre).requires_grad_()
        loss = objective(weight, bias, torch.tensor(features).double() - centre, torch.tensor(labels), strength)
        gradients = torch.autograd.grad(loss, (weight, bias))
        # A tenth more for the rounding of float32.
        assert torch.cat([g.flatten() for g in gradients]).norm() < 1.1e-4


def test_a_problem_has_the_same_solution_alone_and_among_harder_ones():
    """Problems and strengths drop out as they converge; what is left must not be mixed up."""
    easy, labels = problem(80, 20, gap=0.2)
    constant = np.full_like(easy, 0.5)
    hard, _ = badly_conditioned(80, 20)
    wide, _ = separable(80, 20)
    batch = [hard, easy, constant, wide, easy[::-1].copy()]
    together = fitted(batch, labels, tolerance=TIGHT)
    for p, features in enumerate(batch):
        alone = fitted([features], labels, tolerance=TIGHT)
        for s in range(len(STRENGTHS)):
            size = alone.weight[0, s].norm().clamp(min=1e-3)
            assert (together.weight[p, s] - alone.weight[0, s]).norm() < 2e-3 * size
            assert (together.bias[p, s] - alone.bias[0, s]).norm() < 5e-3 * size.clamp(min=1)
    assert together.weight[2].abs().max() < 1e-5


def test_the_order_of_the_strengths_does_not_matter():
    features, labels = problem(80, 20)
    forwards = fitted([features], labels, STRENGTHS, tolerance=TIGHT)
    backwards = fitted([features], labels, STRENGTHS[::-1], tolerance=TIGHT)
    torch.testing.assert_close(backwards.weight.flip(1), forwards.weight, rtol=0, atol=2e-3)


def test_a_problem_that_does_not_converge_is_refused(monkeypatch):
    monkeypatch.setattr(training, "MAX_ITERATIONS", 2)
    features, labels = separable(80, 20)
    with pytest.raises(UserError, match=r"strength 0\.001 did not converge in 2 \w+; leave out such weak"):
        fitted([features], labels, tolerance=TIGHT)


# The discriminant


def parallel(found: torch.Tensor, expected: np.ndarray) -> float:
    """Cosine of the angle between two vectors."""
    vector = found.double().numpy().ravel()
    return float(vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected))


def class_means(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.stack([features[labels == k].astype(float).mean(0) for k in range(labels.max() + 1)])


def within_covariance(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean over the classes of their covariances, in float64."""
    parts = [np.cov(features[labels == k].astype(float).T, bias=True) for k in range(labels.max() + 1)]
    return np.mean(parts, axis=0)


def shrunk(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
    d = len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / d * np.eye(d)


def discriminant(problems: list[np.ndarray], labels: np.ndarray, shrinkages: tuple[float, ...]) -> Fits:
    balanced = balanced_weights(torch.tensor(labels), int(labels.max()) + 1)
    return fitted(problems, labels, shrinkages, weights=balanced, fit=fit_discriminant)


@pytest.mark.parametrize("make", [problem, unbalanced, badly_conditioned])
@pytest.mark.parametrize(("n", "d"), [(150, 20), (40, 90)])
def test_at_shrinkage_one_the_discriminant_is_the_difference_of_the_class_means(make, n, d):
    features, labels = make(n, d)
    first, second = class_means(features, labels)
    assert parallel(discriminant([features], labels, (1.0,)).weight, second - first) > 1 - 1e-6


@pytest.mark.parametrize("make", [problem, unbalanced, badly_conditioned])
@pytest.mark.parametrize(("n", "d"), [(150, 20), (40, 90)])
def test_the_discriminant_solves_the_shrunk_within_class_covariance(make, n, d):
    features, labels = make(n, d)
    other = problem(n, d, seed=7)[0]
    shrinkages = (0.02, 0.3, 0.9)
    fits = discriminant([features, other], labels, shrinkages)
    for p, given in enumerate((features, other)):
        first, second = class_means(given, labels)
        for s, shrinkage in enumerate(shrinkages):
            expected = np.linalg.solve(shrunk(within_covariance(given, labels), shrinkage), second - first)
            assert parallel(fits.weight[p, s], expected) > 1 - 1e-5


@pytest.mark.parametrize(("n", "d"), [(150, 20), (40, 90)])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5])
def test_the_discriminant_of_balanced_classes_points_where_scikit_learns_does(n, d, shrinkage):
    """scikit-learn standardises before it shrinks, so the features are given to both standardised within classes."""
    features, labels = problem(n, d)
    features = (features / np.sqrt(np.diag(within_covariance(features, labels)))).astype(np.float32)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features.astype(float), labels)
    fits = discriminant([features], labels, (shrinkage,))
    assert parallel(fits.weight, model.coef_[0]) > 0.9999


def test_the_discriminant_of_three_classes_has_a_row_for_each_that_solves_the_shrunk_covariance():
    features, labels = three_classes(150, 20)
    means = class_means(features, labels)
    fits = discriminant([features], labels, (0.2,))
    covariance = shrunk(within_covariance(features, labels), 0.2)
    expected = np.linalg.solve(covariance, (means - means.mean(0)).T).T
    assert fits.weight.shape == (1, 1, 3, 20)
    for k in range(3):
        # Each row is a mixture of the three directions: the rows span the same plane.
        row = fits.weight[0, 0, k].double().numpy()
        inside = np.linalg.lstsq(expected.T, row, rcond=None)[0] @ expected
        assert np.linalg.norm(row - inside) < 1e-3 * np.linalg.norm(row)


def test_the_discriminant_of_three_classes_decides_as_scikit_learns():
    features, labels = three_classes(240, 20)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(features.astype(float), labels)
    logits = discriminant([features], labels, (0.2,)).logits(torch.tensor(features)[None])[0, 0]
    expected = model.predict(features.astype(float))
    assert np.mean(expected == labels) > 0.8
    assert (logits.argmax(-1).numpy() == expected).mean() > 0.95


def test_scale_and_bias_of_the_discriminant_are_those_of_a_logistic_regression_on_its_scores():
    features, labels = unbalanced(150, 20)
    fits = discriminant([features], labels, (0.3,))
    direction = (fits.weight[0, 0, 0] / fits.weight[0, 0, 0].norm()).double().numpy()
    score = (features @ direction)[:, None]
    # Hardly penalised, as there.
    expected = reference(score / score.std(), labels, 1e-4, "balanced").decision_function(score / score.std())
    logits = fits.logits(torch.tensor(features)[None])[0, 0, :, 0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.02 * np.abs(expected).max())


# The small parts


@pytest.mark.parametrize("columns", [1, 3])
def test_log_probabilities_are_those_of_the_softmax_with_a_zero_column_for_two_classes(columns):
    logits = torch.tensor([[[0.3, -50.0, 90.0]], [[0.0, 1.0, 2.0]]], dtype=torch.float64)[..., :columns]
    full = np.concatenate([np.zeros((2, 1, 1)), logits.numpy()], -1) if columns == 1 else logits.numpy()
    expected = full - np.log(np.exp(full).sum(-1, keepdims=True))
    np.testing.assert_allclose(log_probabilities(logits).numpy(), expected, rtol=1e-12)


def test_balanced_weights_sum_to_one_and_give_each_class_the_same_share():
    labels = torch.tensor([0, 0, 0, 2, 1, 2])
    weights = balanced_weights(labels, 3)
    expected = [1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 3, 1 / 6]
    assert weights.tolist() == pytest.approx(expected)


def test_the_logits_of_fits_are_one_affine_map_for_each_problem_and_strength():
    rng = np.random.default_rng(0)
    weight, bias, features = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 6, 5))
    found = Fits(torch.tensor(weight), torch.tensor(bias)).logits(torch.tensor(features)).numpy()
    for p, s in np.ndindex(2, 3):
        np.testing.assert_allclose(found[p, s], features[p] @ weight[p, s].T + bias[p, s])
