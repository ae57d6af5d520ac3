"""Fit the linear probes of many sites, at all regularisation strengths, as one batched problem on the device.

``fit_logistic`` minimises, for each problem (site) and each strength ``s``,

    sum_i w_i * cross_entropy(y_i, x_i W + b)  +  s / 2 * |W|^2,        sum_i w_i = 1,

which is scikit-learn's objective with ``C = 1 / (s * n)``. The steps:

1. Rotate each problem's features to their principal axes. The penalty is the same there, and the curvature of the
   cross entropy is bounded by ``e / 4`` (two classes) or ``e / 2`` (more), with ``e`` the variance along an axis
   (Boehning 1992, "Multinomial logistic regression algorithm"). ``1 / (e / 4 + s)`` is therefore a good diagonal
   preconditioner for every strength, from one eigendecomposition.
2. Run preconditioned L-BFGS (Nocedal & Wright 2006, algorithm 7.4) for all problems and strengths in lockstep: one
   matrix product gives the logits of all strengths along their search directions, one their gradients. Because
   logits are linear in the step length, the line search needs no further products.
3. Leave out problems and strengths whose gradient has become smaller than the tolerance; stop when none is left.

``fit_discriminant`` gives the regularised linear discriminant in closed form (Friedman 1989): the within-class
covariance is shrunk by ``s`` in (0, 1] towards a multiple of the identity. At ``s = 1`` its direction is the
difference of the class means.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from interp.errors import UserError

TOLERANCE = 1e-4
MAX_ITERATIONS = 5000

_HISTORY = 10
_LINE_SEARCH_STEPS = 12
_SLOPE_LEFT = 0.3


@dataclass(frozen=True)
class Fits:
    """Fitted weights of ``p`` problems at ``s`` strengths, for features as they were given.

    There is one column of logits for two classes (the log odds of the second), else one for each class.

    Attributes:
        weight: ``(p, s, n_columns, d)``.
        bias: ``(p, s, n_columns)``.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Features ``(p, n, d)`` -> logits ``(p, s, n, n_columns)``."""
        return torch.einsum("pnd,pscd->psnc", features, self.weight) + self.bias[:, :, None]


def log_probabilities(logits: Tensor) -> Tensor:
    """Logits ``(..., n_columns)`` -> log probabilities ``(..., n_classes)``."""
    if logits.shape[-1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], -1)
    return logits.log_softmax(-1)


def balanced_weights(labels: Tensor, n_classes: int) -> Tensor:
    """Weights ``(n,)`` that sum to 1 and give each class the same share."""
    counts = labels.bincount(minlength=n_classes)
    return 1 / (n_classes * counts[labels])


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    strengths: Tensor,
    *,
    n_classes: int,
    tolerance: float = TOLERANCE,
) -> Fits:
    """L2-regularised (multinomial) logistic regression for all problems and strengths, to convergence.

    Args:
        features: ``(p, n, d)`` float32, of similar scale along ``d``.
        labels: ``(n,)`` integers below ``n_classes``.
        weights: ``(n,)``, summing to 1.
        strengths: ``(s,)``, positive.
        n_classes: Number of classes.
        tolerance: Largest norm of the gradient that counts as converged.

    Raises:
        UserError: If a problem does not converge.
    """
    p, n, _ = features.shape
    n_strengths, columns = len(strengths), 1 if n_classes == 2 else n_classes
    centre = weights @ features
    centred = features - centre.unsqueeze(1)
    axes, variance = _principal_axes(centred * weights.sqrt().unsqueeze(-1))
    rotated = torch.cat([centred @ axes, features.new_ones(p, n, 1)], -1)
    # The last coordinate is the bias, which is not penalised.
    penalty = strengths.repeat(variance.shape[1] + 1, 1)
    penalty[-1] = 0
    bound = torch.cat([variance, variance.new_ones(p, 1)], 1).unsqueeze(-1) * (0.25 if columns == 1 else 0.5)
    targets = torch.nn.functional.one_hot(labels, n_classes).to(features.dtype)[:, -columns:]
    state = _State(
        place=torch.arange(p * n_strengths, device=features.device).view(p, n_strengths),
        features=rotated,
        penalty=penalty.expand(p, -1, -1),
        inverse=1 / (bound + penalty),
        solution=features.new_zeros(p, rotated.shape[-1], n_strengths, columns),
        logits=features.new_zeros(p, n, n_strengths, columns),
    )
    solution = _minimised(state, targets, weights, tolerance).view(p, n_strengths, -1, columns)
    weight = torch.einsum("pdr,psrc->pscd", axes, solution[:, :, :-1])
    bias = solution[:, :, -1] - torch.einsum("pscd,pd->psc", weight, centre)
    return Fits(weight, bias)


def fit_discriminant(features: Tensor, labels: Tensor, weights: Tensor, shrinkages: Tensor, *, n_classes: int) -> Fits:
    """Linear discriminants for all problems and shrinkages; arguments as for ``fit_logistic``.

    Scale and bias of the log odds come from a logistic regression on the discriminant scores, because the Gaussian
    model's own are far too sure of themselves where there are few examples for many features.
    """
    p, _, d = features.shape
    member = torch.nn.functional.one_hot(labels, n_classes).to(features.dtype) * weights.unsqueeze(-1)
    means = torch.einsum("nk,pnd->pkd", member, features) / member.sum(0)[:, None]
    within = (features - means[:, labels]) * weights.sqrt().unsqueeze(-1)
    axes, variance = _principal_axes(within)
    isotropic = (variance.sum(1) / d).clamp(min=1e-30)
    spread = means - means.mean(1, keepdim=True)
    if n_classes == 2:
        spread = spread[:, 1:] - spread[:, :1]
    outside = 1 / (shrinkages * isotropic.unsqueeze(-1))
    along = 1 / ((1 - shrinkages) * variance.unsqueeze(-1) + 1 / outside.unsqueeze(1)) - outside.unsqueeze(1)
    directions = torch.einsum("pdr,prs,pkr->pskd", axes, along, spread @ axes) + torch.einsum(
        "ps,pkd->pskd", outside, spread
    )
    directions = directions / directions.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    scores = torch.einsum("pnd,pskd->psnk", features, directions).flatten(0, 1)
    scale = scores.std(1, keepdim=True, correction=0).clamp(min=1e-30)
    little = torch.full_like(shrinkages[:1], 1e-4)
    scaled = fit_logistic(scores / scale, labels, weights, little, n_classes=n_classes)
    stretch = (scaled.weight[:, 0] / scale).unflatten(0, (p, -1))
    return Fits(torch.einsum("psck,pskd->pscd", stretch, directions), scaled.bias[:, 0].unflatten(0, (p, -1)))


def _principal_axes(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors ``(p, d, r)`` and squared singular values ``(p, r)`` of ``(p, n, d)``, r = min(n, d)."""
    n, d = scaled.shape[1:]
    if n >= d:
        variance, axes = torch.linalg.eigh(scaled.mT @ scaled)
        return axes, variance.clamp(min=0)
    variance, left = torch.linalg.eigh(scaled @ scaled.mT)
    # Axes along which nothing varies cannot be told from rounding; they become zero vectors.
    real = variance > variance[:, -1:] * 1e-6
    variance = torch.where(real, variance, 0)
    return (scaled.mT @ left) * torch.where(real, variance, 1).rsqrt().unsqueeze(1) * real.unsqueeze(1), variance


@dataclass
class _State:
    """The problems and strengths that have not converged.

    Attributes:
        place: Where each belongs in the result, ``(p, s)``.
        features: ``(p, n, r)``.
        penalty, inverse: Of each coordinate: the strength, and the preconditioner, ``(p, r, s)``.
        solution: ``(p, r, s, c)``.
        logits: ``(p, n, s, c)``.
    """

    place: Tensor
    features: Tensor
    penalty: Tensor
    inverse: Tensor
    solution: Tensor
    logits: Tensor


def _minimised(state: _State, targets: Tensor, weights: Tensor, tolerance: float) -> Tensor:
    """Solutions ``(p * s, r, c)``."""
    p, r, s, c = state.solution.shape
    result = state.solution.new_zeros(p * s, r, c)
    gradient = _gradient(state, targets, weights)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(MAX_ITERATIONS):
        active = gradient.square().sum((1, 3)).sqrt() > tolerance
        rows, columns = active.any(1), active.any(0)
        if rows.sum() * columns.sum() <= 0.7 * active.numel():
            result[state.place.flatten()] = state.solution.movedim(2, 1).flatten(0, 1)
            if not active.any():
                return result
            state, gradient, history = _narrowed(state, gradient, history, rows, columns)
            active = active[rows][:, columns]
        direction = -_two_loops(gradient, history, state.inverse) * active[:, None, :, None]
        along = _product(state.features, direction)
        step = _step_length(state, direction, along, (gradient * direction).sum((1, 3)), targets, weights)
        move = step[:, None, :, None] * direction
        state.solution = state.solution + move
        state.logits = state.logits + step[:, None, :, None] * along
        previous, gradient = gradient, _gradient(state, targets, weights)
        change = gradient - previous
        curvature = (move * change).sum((1, 3))
        history.append((move, change, torch.where(curvature > 0, 1 / curvature.clamp(min=1e-38), 0)))
        history = history[-_HISTORY:]
    weakest = state.penalty[:, 0].min().item()
    raise UserError(
        f"A probe with regularisation strength {weakest:g} did not converge in {MAX_ITERATIONS} iterations; "
        "leave out such weak strengths, or standardise the features."
    )


def _product(features: Tensor, coefficients: Tensor) -> Tensor:
    """``(p, n, r)`` and ``(p, r, s, c)`` -> ``(p, n, s, c)`` as one matrix product for each problem."""
    return (features @ coefficients.flatten(2)).unflatten(2, coefficients.shape[2:])


def _probabilities(logits: Tensor) -> Tensor:
    return logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)


def _gradient(state: _State, targets: Tensor, weights: Tensor) -> Tensor:
    residual = (_probabilities(state.logits) - targets[:, None]) * weights[:, None, None]
    return _product(state.features.mT, residual) + state.penalty[..., None] * state.solution


def _two_loops(gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """The inverse Hessian, as L-BFGS knows it, times the gradient; inner products within a problem and strength."""
    result, factors = gradient.clone(), []
    for move, change, inverse_curvature in reversed(history):
        factor = inverse_curvature * (move * result).sum((1, 3))
        result -= factor[:, None, :, None] * change
        factors.append(factor)
    result *= inverse[..., None]
    for (move, change, inverse_curvature), factor in zip(history, reversed(factors), strict=True):
        result += (factor - inverse_curvature * (change * result).sum((1, 3)))[:, None, :, None] * move
    return result


def _step_length(
    state: _State, direction: Tensor, along: Tensor, slope: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """Step lengths ``(p, s)`` at which little is left of the slope: Newton's method, kept inside a bracket."""
    shrink = state.penalty[..., None] * direction
    offset, growth = (shrink * state.solution).sum((1, 3)), (shrink * direction).sum((1, 3))
    weighted = weights[:, None, None] * along
    step, low = torch.ones_like(slope), torch.zeros_like(slope)
    high = torch.full_like(slope, torch.inf)
    for _ in range(_LINE_SEARCH_STEPS):
        probabilities = _probabilities(state.logits + step[:, None, :, None] * along)
        here = ((probabilities - targets[:, None]) * weighted).sum((1, 3)) + offset + step * growth
        done = here.abs() <= _SLOPE_LEFT * slope.abs()
        if done.all():
            break
        mean = (probabilities * along).sum(-1, keepdim=True)
        spread = probabilities * along * (along - mean)
        curvature = (spread * weights[:, None, None]).sum((1, 3)) + growth
        low, high = torch.where(here < 0, step, low), torch.where(here < 0, high, step)
        newton = step - here / curvature.clamp(min=1e-30)
        halfway = torch.where(high.isinf(), 2 * step, (low + high) / 2)
        inside = (newton > low) & (newton < torch.minimum(high, 4 * step))
        step = torch.where(done, step, torch.where(inside, newton, halfway))
    return step


def _narrowed(
    state: _State, gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]], rows: Tensor, columns: Tensor
) -> tuple[_State, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Only some problems and strengths of everything."""

    def kept(tensor: Tensor) -> Tensor:
        return tensor[rows][:, :, columns]

    narrow = {field.name: kept(getattr(state, field.name)) for field in fields(state) if field.name not in _BY_ROW}
    return (
        _State(place=state.place[rows][:, columns], features=state.features[rows], **narrow),
        kept(gradient),
        [(kept(move), kept(change), inverse[rows][:, columns]) for move, change, inverse in history],
    )


_BY_ROW = ("place", "features")
