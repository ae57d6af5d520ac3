"""Choose each next token from what a model says with the context and what it says without.

A rule makes scores, whose softmax is the next token's distribution, from the logits z_c of a prompt and z_p of the same
prompt without its context. With l their log probabilities, H their entropies and D the Jensen-Shannon divergence of the
two distributions, in nats:

    CAD      (1 + a) z_c - a z_p                                   Shi et al. 2023, arXiv 2305.14739
    AdaCAD   the same with a = max(D, threshold)                   Wang et al. 2024, 2409.07394
    COIECD   l_c + a (l_c - l_p), in a band of information         Yuan et al. 2024, 2402.11893
             l_p + a (l_c - l_p)
    CKPlug   a l_p + (1 - a) (l_c - l_p) where the context         Bi et al. 2025, 2503.15888
             makes the model less sure, l_c elsewhere

Rules keep nothing from one token to the next. What is added to all logits of a prompt changes no distribution.
``interventions.two_streams`` generates with them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from interp.anatomy import Blueprint
from interp.errors import UserError
from interventions.base import Acting, Entry, Intervention, Patch, Place, finite_strength
from interventions.fields import Factor
from interventions.identity import ModelIdentity

# Of CK-PLUG's released code: what is kept, at least so many tokens and all that have this share of the best one's.
_KEPT, _SHARE = 10, 0.01
# Of COIECD's released code: how far, as a ratio of probabilities, a token is from the ends of the band.
_RATIO = 4.0


class DecodingRule(Intervention):
    """A rule for the next token, from the logits of a prompt with its context and without. Immutable.

    It changes nothing in the forward pass and needs both prompts, so that it cannot be attached to a model.
    """

    @abstractmethod
    def scores(self, with_context: Tensor, without: Tensor) -> Tensor:
        """Scores of the next token from both prompts' logits, each ``(n, d_vocab)`` float32.

        Tokens that may not be chosen have minus infinity.
        """

    def acting(self, model: nn.Module) -> Acting:
        """The rule, and no patches."""
        del model
        return Acting([], self.scores)

    def patches(self, model: nn.Module) -> list[Patch]:
        """Refuse: forward passes stay as they are.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"{type(self).__name__} chooses each next token from the prompt with and without its context, which a "
            "model's own generate does not get; call interventions.two_streams.generate with both."
        )

    @property
    def edited_layers(self) -> set[int]:
        """None."""
        return set()

    def described(self) -> Iterator[str]:
        """Its name and its settings."""
        settings = asdict(self)  # pyright: ignore[reportArgumentType]
        numbers = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
        said = (f"{name} {value}" for name, value in numbers.items())
        yield ", ".join((f"next token by {type(self).__name__}", *said))


@dataclass(frozen=True)
class CAD(DecodingRule):
    """Context-aware decoding: ``(1 + alpha) z_c - alpha z_p``.

    Attributes:
        alpha: 0 is the model with the context, -1 that without; above 0 what it would have said anyway is taken away.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_finite("alpha", self.alpha)

    def scores(self, with_context: Tensor, without: Tensor) -> Tensor:
        """Scores of the next token, ``(n, d_vocab)``."""
        return (1 + self.alpha) * with_context - self.alpha * without

    def scaled(self, strength: float) -> CAD:
        """The same with ``strength`` times the alpha."""
        return CAD(self.alpha * finite_strength(strength))

    def entry(self, name: str, tensors: dict[str, Tensor]) -> CADEntry:
        """Its part of the intervention file; it has no tensors."""
        return CADEntry(**asdict(self))


@dataclass(frozen=True)
class AdaCAD(DecodingRule):
    """CAD whose alpha is, for each token, how far the distributions with and without the context are apart.

    Attributes:
        threshold: The lowest alpha: 0 for questions, 0.3 for summaries, as published.
        strength: Factor on the alpha, which is below 0.7; below 0 towards memory, which the paper does not have.
    """

    threshold: float = 0.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_finite("threshold", self.threshold)
        _check_finite("strength", self.strength)

    def scores(self, with_context: Tensor, without: Tensor) -> Tensor:
        """Scores of the next token, ``(n, d_vocab)``."""
        divergence = jensen_shannon(with_context, without).clamp(min=self.threshold)
        alpha = self.strength * divergence[:, None]
        return (1 + alpha) * with_context - alpha * without

    def scaled(self, strength: float) -> AdaCAD:
        """The same with its strength multiplied."""
        return replace(self, strength=self.strength * finite_strength(strength))

    def entry(self, name: str, tensors: dict[str, Tensor]) -> AdaCADEntry:
        """Its part of the intervention file; it has no tensors."""
        return AdaCADEntry(**asdict(self))


@dataclass(frozen=True)
class COIECD(DecodingRule):
    """Contrast the logits fully for tokens that tell much or little, and by less for those in a band between.

    As the released code does. The information of a token, -l_c - H_p, is normalised over the vocabulary, which cancels
    the entropy. The band is what is farther than a factor of 4 from both its ends; a token that stands alone below it
    belongs to it too. Inside, l_p takes the place of l_c: so all is ``l_c + a (l_c - l_p)`` with an ``a`` that is
    ``alpha`` outside the band and ``alpha - 1`` inside.

    Attributes:
        alpha: 1 as published.
        strength: Factor on all changes; 0 is the model with the context.
    """

    alpha: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_finite("alpha", self.alpha)
        _check_finite("strength", self.strength)

    def scores(self, with_context: Tensor, without: Tensor) -> Tensor:
        """Scores of the next token, ``(n, d_vocab)``."""
        first, second = with_context.log_softmax(-1), without.log_softmax(-1)
        information = (-first).log_softmax(-1)
        below = information < information.amin(-1, keepdim=True) + math.log(_RATIO)
        above = information > information.amax(-1, keepdim=True) - math.log(_RATIO)
        alone = below.sum(-1, keepdim=True) == 1
        in_band = (~below | alone) & ~above
        alpha = self.alpha - in_band.to(first.dtype)
        return first + self.strength * alpha * (first - second)

    def scaled(self, strength: float) -> COIECD:
        """The same with its strength multiplied."""
        return replace(self, strength=self.strength * finite_strength(strength))

    def entry(self, name: str, tensors: dict[str, Tensor]) -> COIECDEntry:
        """Its part of the intervention file; it has no tensors."""
        return COIECDEntry(**asdict(self))


CKPlugGate = Literal["paper", "released"]


@dataclass(frozen=True)
class CKPlug(DecodingRule):
    """Mix what memory says with what the context adds, where the context makes the model less sure.

    Mixed are tokens that stand out with or without the context: the ten best of each, and whatever has a hundredth of
    the best one's probability; the others get none. (Equation 9 takes the best by l_c - l_p instead, which are tokens
    that nobody would say; the released code does not.)

    Attributes:
        alpha: The share of memory; ``None`` finds it for each token from both entropies.
        gate: ``paper``: where H_p < H_c (equations 4 and 7), with H_c / (H_p + H_c) as the alpha that is found (10);
            elsewhere nothing changes. ``released``: where H_p < 2 H_c, entropies of the tokens that stand out, with
            weights 2 H_c and 2 H_p over H_c + n H_p, n = 1 + abs(H_c - H_p) / (H_c + H_p); elsewhere the others get
            no probability either.
    """

    alpha: float | None = None
    gate: CKPlugGate = "paper"

    def __post_init__(self) -> None:
        if self.alpha is not None:
            _check_finite("alpha", self.alpha)
        if self.gate not in ("paper", "released"):
            raise UserError(f"CK-PLUG has no gate {self.gate!r}; choose paper or released.")

    def scores(self, with_context: Tensor, without: Tensor) -> Tensor:
        """Scores of the next token, ``(n, d_vocab)``; minus infinity for tokens that do not stand out."""
        first, second = with_context.log_softmax(-1), without.log_softmax(-1)
        others = ~(_stands_out(first) | _stands_out(second))
        if self.gate == "released":
            first = first.masked_fill(others, -torch.inf).log_softmax(-1)
            second = second.masked_fill(others, -torch.inf).log_softmax(-1)
        sure, before = _entropy(first), _entropy(second)
        memory, context = self._weights(sure, before)
        mixed = memory * second + context * (first - second)
        less_sure = before < (2 * sure if self.gate == "released" else sure)
        return torch.where(less_sure, mixed.masked_fill(others, -torch.inf), first)

    def _weights(self, sure: Tensor, before: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """The weights of memory and of what the context adds, from the entropies with the context and without."""
        if self.alpha is not None:
            return self.alpha, 1 - self.alpha
        if self.gate == "paper":
            return sure / (before + sure), before / (before + sure)
        scale = sure + (1 + (sure - before).abs() / (sure + before)) * before
        return 2 * sure / scale, 2 * before / scale

    def entry(self, name: str, tensors: dict[str, Tensor]) -> CKPlugEntry:
        """Its part of the intervention file; it has no tensors."""
        return CKPlugEntry(**asdict(self))


def told_apart(interventions: Iterable[Intervention]) -> tuple[tuple[Intervention, ...], DecodingRule | None]:
    """Tell the edits of a forward pass from the rule for the next token, if there is one.

    Raises:
        UserError: If there are several rules.
    """
    every = list(interventions)
    rules = [one for one in every if isinstance(one, DecodingRule)]
    if len(rules) > 1:
        raise UserError(f"A next token is chosen by one rule, not by {len(rules)}; give one.")
    return tuple(one for one in every if not isinstance(one, DecodingRule)), next(iter(rules), None)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """The divergence of the distributions of two rows of logits ``(n, d_vocab)``, in nats: ``(n,)``, 0 to ln 2."""
    one, other = first.log_softmax(-1), second.log_softmax(-1)
    middle = torch.logaddexp(one, other) - math.log(2)
    return ((one.exp() * (one - middle)).sum(-1) + (other.exp() * (other - middle)).sum(-1)) / 2


def _stands_out(log_probs: Tensor) -> Tensor:
    """Which tokens are among the best, or not far behind the best one."""
    best = log_probs.topk(min(_KEPT, log_probs.shape[-1])).values
    return log_probs >= torch.minimum(best[:, -1:], best[:, :1] + math.log(_SHARE))


def _entropy(log_probs: Tensor) -> Tensor:
    """In nats, ``(n, 1)``."""
    return torch.special.entr(log_probs.exp()).sum(-1, keepdim=True)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"The {name} of a rule for the next token is a finite number, not {value}.")


class _RuleEntry(Entry):
    """A rule for the next token, which fits every model."""

    rule: ClassVar[type[DecodingRule]]

    def build(self, tensors: Mapping[str, Tensor]) -> DecodingRule:
        """The rule that this entry describes."""
        return self.rule(**{name: value for name, value in self if name != "kind"})

    def places(self, blueprint: Blueprint) -> list[Place]:
        """None: forward passes stay as they are."""
        return []

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """Every model fits it."""


class CADEntry(_RuleEntry):
    """A ``CAD``."""

    rule = CAD
    kind: Literal["cad"] = "cad"
    alpha: Factor


class AdaCADEntry(_RuleEntry):
    """An ``AdaCAD``."""

    rule = AdaCAD
    kind: Literal["adacad"] = "adacad"
    threshold: Factor
    strength: Factor


class COIECDEntry(_RuleEntry):
    """A ``COIECD``."""

    rule = COIECD
    kind: Literal["coiecd"] = "coiecd"
    alpha: Factor
    strength: Factor


class CKPlugEntry(_RuleEntry):
    """A ``CKPlug``; an ``alpha`` of null is found for each token."""

    rule = CKPlug
    kind: Literal["ck_plug"] = "ck_plug"
    alpha: Factor | None
    gate: CKPlugGate
