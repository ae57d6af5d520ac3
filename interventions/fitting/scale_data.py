"""What scales are learned from and checked on: conflict prompts, and guards that are to stay as they are.

Guards are prompts without a context, with one that agrees and one about something else (each followed by the memory
answer), and text, for example sampled from the model. What an edit does to a guard is the KL divergence of the next
token from the unedited model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.answers import Direction
from interp.conflicts import ConflictExample, evenly
from interp.errors import UserError
from interp.teacher_forcing import (
    Continued,
    continued,
    greedily_continued,
    item_residuals,
    predicting_residuals,
    text_tokens,
    token_batches,
)

Guard = Literal["none", "aligned", "irrelevant", "neutral"]
GUARDS: tuple[Guard, ...] = get_args(Guard)
HeadOrLayer = tuple[int, int | None]
"""``(layer, head)`` of what is scaled; head ``None`` is the feed-forward layer."""

_TRIES, _MARGIN, _NEARLY_ALL, _FURTHEST = 8, 0.97, 0.9, 1.5
LONGEST_TEXT = 48
"""Tokens of a text at most."""
SCALE_DATA_VERSION = 1
"""Version of the data and of what is measured on it: raise it when the same scales would get other numbers."""


class Guarded(NamedTuple):
    """A guard's prompt, and the unedited model's final residual stream where its looked-at tokens are predicted."""

    item: Continued
    reference: Tensor


class ScaleData:
    """Conflict prompts and guards of one split, as tokens; what guards are held to is computed here.

    Args:
        model: The model, or a bridge around it, unedited.
        examples: Prompts of kinds conflict, none, aligned and irrelevant.
        texts: Texts about anything.
        conflicts: How many conflict prompts are kept at most; they are drawn evenly from relations and phrasings.
        guards: How many prompts without a context are kept at most; half as many of the other kinds.
        behind_gate: Whether these are the prompts that a gate opens for, so that there may be none of some guard.
        seed: Decides which.
        progress: Label of a progress bar; ``None`` shows none.

    Attributes:
        conflicts: The conflict prompts that were kept.
        guards: For each guard, its prompts or texts.
        unedited_gradients: Guards' gradients before the first step, by what they depend on; the learner of the second
            direction finds those of the first here.

    Raises:
        UserError: If a kind of prompts is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[ConflictExample],
        texts: Sequence[str],
        *,
        conflicts: int = 720,
        guards: int = 96,
        behind_gate: bool = False,
        seed: int = 0,
        progress: str | None = None,
    ) -> None:
        self.model = model
        by_kind = {kind: [e for e in examples if e.kind == kind] for kind in ("conflict", *GUARDS[:3])}
        missing = [kind for kind, found in by_kind.items() if not found and (kind == "conflict" or not behind_gate)]
        if missing:
            raise UserError(f"Scales are learned from prompts of every kind, but there are none of {missing[0]!r}.")
        self.conflicts = evenly(by_kind["conflict"], conflicts, seed)
        kept = {kind: evenly(by_kind[kind], guard_count(kind, guards), seed) for kind in GUARDS[:3]}
        items_of: dict[Guard, list[Continued]] = {
            kind: [continued(model, e.prompt, e.memory_answers[0]) for e in kept[kind]] for kind in GUARDS[:3]
        }
        cut = [text_tokens(model, text, LONGEST_TEXT) for text in texts]
        items_of["neutral"] = [item for item in cut if item.predicted > 0]
        if not items_of["neutral"] and not behind_gate:
            raise UserError("Scales are guarded by ordinary text too, but there is none of two tokens or more.")
        every = [item for items in items_of.values() for item in items]
        references = iter(item_residuals(model, every, roughly=True, progress=progress))
        self.unedited_gradients: dict[Any, dict[Guard, tuple[Tensor, Tensor]]] = {}
        self.guards: dict[Guard, list[Guarded]] = {
            kind: [Guarded(item, next(references)) for item in items] for kind, items in items_of.items()
        }

    def wanted(self, towards: Direction, *, shuffled_by: int | None = None) -> list[Continued]:
        """The conflict prompts with the answers of one source; with a seed, each with another prompt's answer.

        Answers are then drawn among those of the same relation that are none of a prompt's own. A prompt for which
        there is none is left out.
        """
        own = [(e.context_answers[0], e.memory_answers[0]) for e in self.conflicts]
        answers: list[str | None] = [pair[0 if towards == "context" else 1] for pair in own]
        if shuffled_by is not None:
            groups: dict[str, list[str]] = {}
            for example, answer in zip(self.conflicts, answers, strict=True):
                groups.setdefault(example.relation, []).append(str(answer))
            rng = random.Random(shuffled_by)
            others = [
                [answer for answer in groups[example.relation] if answer not in pair]
                for example, pair in zip(self.conflicts, own, strict=True)
            ]
            answers = [rng.choice(some) if some else None for some in others]
        return [
            continued(self.model, example.prompt, answer)
            for example, answer in zip(self.conflicts, answers, strict=True)
            if answer is not None
        ]


def guard_count(kind: Guard, count: int) -> int:
    """How many prompts of a guard go with ``count`` without a context: half as many, of every other kind."""
    return count if kind == "none" else -(-count // 2)


def finite(gradients: Tensor) -> Tensor:
    """The gradients.

    Raises:
        UserError: If they left the range of the model's dtype, or attention has none where prompts are padded, as
            PyTorch's fused attention in bfloat16 on CUDA.
    """
    if not gradients.isfinite().all():
        raise UserError(
            "The scales' gradients are not finite; load the model in float32, or in bfloat16 with eager attention."
        )
    return gradients


def scale_places(model: nn.Module, *, feed_forward: bool, lowest: int = 0) -> list[HeadOrLayer]:
    """Everything of a model that can have a scale, from a layer on."""
    anatomy = Anatomy(model)
    every = [*anatomy.heads, *((layer, None) for layer in range(anatomy.n_layers) if feed_forward)]
    return [place for place in every if place[0] >= lowest]


@contextmanager
def scaled(model: nn.Module, places: Sequence[HeadOrLayer], scales: Tensor) -> Iterator[None]:
    """Scale heads and feed-forward layers for the length of a ``with`` block, with a gradient to ``scales``.

    Args:
        model: The model, or a bridge around it.
        places: What has a scale.
        scales: ``(n_scales,)``, or ``(batch, n_scales)`` for scales of each row's own.
    """
    anatomy = Anatomy(model)
    part = anatomy.writing_part("mlp")
    scales = scales.to(anatomy.device)
    heads_of: dict[int, list[int]] = {}
    for index, (layer, head) in enumerate(places):
        if head is not None:
            heads_of.setdefault(layer, []).append(index)

    def scale_heads(indices: list[int]) -> Any:
        heads = torch.tensor([places[i][1] for i in indices], device=scales.device)

        def hook(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = inputs[0].unflatten(-1, (anatomy.n_heads, anatomy.d_head))
            others = torch.ones(*scales.shape[:-1], anatomy.n_heads, device=scales.device)
            factor = others.index_copy(-1, heads, scales[..., indices]).to(z.device, z.dtype)
            return ((z * factor[..., None, :, None]).flatten(-2), *inputs[1:])

        return hook

    def scale_output(index: int) -> Any:
        return lambda output: output * scales[..., index, None, None].to(output.device, output.dtype)

    with ExitStack() as stack:
        for layer, indices in heads_of.items():
            module = anatomy.module("output_projection", layer)
            stack.callback(module.register_forward_pre_hook(scale_heads(indices)).remove)
        for index, (layer, head) in enumerate(places):
            if head is None:
                stack.callback(anatomy.on_output(part, layer, scale_output(index)).remove)
        yield


def log_probabilities(model: nn.Module, items: Sequence[Continued], *, roughly: bool = False) -> Tensor:
    """The model's log-probabilities where the items' looked-at tokens are predicted, ``(sum of predicted, d_vocab)``.

    Args:
        model: The model, or a bridge around it.
        items: Items that fit into one batch.
        roughly: Whether ``interp.precision.rough`` numbers are enough.
    """
    return Anatomy(model).logits(predicting_residuals(model, items, roughly=roughly)).float().log_softmax(-1)


def answer_losses(log_p: Tensor, items: Sequence[Continued]) -> Tensor:
    """-log p of each item's answer in nats, ``(n_items,)``, from ``log_probabilities``."""
    answers = torch.tensor([token for item in items for token in item.answer], device=log_p.device)
    return summed(-log_p.gather(1, answers[:, None]).squeeze(1), items)


def divergences(model: nn.Module, log_p: Tensor, guarded: Sequence[Guarded]) -> Tensor:
    """Each item's mean KL(unedited || edited) over its looked-at tokens in nats, ``(n_items,)``.

    Args:
        model: The model, or a bridge around it.
        log_p: The edited model's ``log_probabilities`` of the items.
        guarded: The items.
    """
    with torch.no_grad():
        references = torch.cat([reference for _, reference in guarded])
        log_q = Anatomy(model).logits(references).float().log_softmax(-1)
    items = [item for item, _ in guarded]
    total = summed((log_q.exp() * (log_q - log_p)).sum(-1), items)
    return total / torch.tensor([item.predicted for item in items], device=total.device)


def summed(values: Tensor, items: Sequence[Continued]) -> Tensor:
    """Values of looked-at tokens, ``(sum of predicted,)``, summed by item, ``(n_items,)``."""
    counts = torch.tensor([item.predicted for item in items], device=values.device)
    owner = torch.arange(len(items), device=values.device).repeat_interleave(counts)
    return torch.zeros(len(items), device=values.device).index_add(0, owner, values)


@dataclass(frozen=True)
class Checked:
    """What scales do.

    Attributes:
        rate: Share of conflict prompts that are answered from the wanted source, token by token.
        divergence: For each guard the mean KL divergence from the unedited model, nats.
        right: For each guard but neutral text the share of prompts that are answered right, token by token.
    """

    rate: float
    divergence: Mapping[str, float]
    right: Mapping[str, float]

    def spent(self, budgets: Mapping[Guard, float]) -> float:
        """The largest share of a guard's budget that is used; infinite if a divergence is no number."""
        # Behind a gate that is never open for a guard the budget is infinite.
        shares = [self.divergence[kind] / budgets[kind] for kind in GUARDS]
        return max(math.inf if math.isnan(share) else share for share in shares)


def check_scales(
    model: nn.Module,
    data: ScaleData,
    wanted: Sequence[Continued],
    places: Sequence[HeadOrLayer],
    scales: Tensor,
    *,
    within: Mapping[Guard, float] | None = None,
) -> Checked:
    """Measure scales on the prompts of ``data``, of which those about conflicts are to be answered as ``wanted``.

    With budgets given as ``within``, the conflict prompts are not asked if a guard breaks its own: the rate is then 0.
    """
    divergence: dict[str, float] = {}
    right: dict[str, float] = {}
    with torch.no_grad(), scaled(model, places, scales):
        for kind, guarded in data.guards.items():
            items = [item for item, _ in guarded]
            if not items:
                divergence[kind] = 0.0
                continue
            total, hits = 0.0, 0
            for batch in token_batches(model, items):
                chosen = [items[i] for i in batch]
                log_p = log_probabilities(model, chosen, roughly=True)
                total += float(divergences(model, log_p, [guarded[i] for i in batch]).sum())
                tokens = log_p.argmax(-1).cpu().split([item.predicted for item in chosen])
                hits += sum(tuple(t.tolist()) == item.answer for t, item in zip(tokens, chosen, strict=True))
            divergence[kind] = total / len(items)
            if kind != "neutral":
                right[kind] = hits / len(items)
        damage = Checked(0.0, divergence, right)
        if within is not None and damage.spent(within) > 1:
            return damage
        return Checked(sum(greedily_continued(model, wanted, roughly=True)) / len(wanted), divergence, right)


def to_budget(
    model: nn.Module,
    data: ScaleData,
    wanted: Sequence[Continued],
    places: Sequence[HeadOrLayer],
    scales: Tensor,
    budgets: Mapping[Guard, float],
) -> tuple[Tensor, Checked]:
    """Move scales on their line from 1 to about where a guard of ``data`` uses up its budget, and measure them there.

    They go back as far as the budgets demand, or further by half at most, where there is room and that does not lower
    the rate. Divergence grows about with the square of the way, so that one or two tries are enough.
    """
    way, best = 1.0, None
    for tries_left in reversed(range(_TRIES)):
        tried = 1 + way * (scales - 1)
        checked = check_scales(model, data, wanted, places, tried, within=budgets)
        spent = checked.spent(budgets)
        if spent <= 1:
            if best is not None or spent > _NEARLY_ALL or way in (0.0, _FURTHEST):
                return (tried, checked) if best is None or checked.rate >= best[1].rate else best
            best = tried, checked
        elif best is not None:
            return best
        elif not tries_left:
            return tried, checked
        way = min(_FURTHEST, way * _MARGIN / math.sqrt(max(spent, 1e-9))) if tries_left > 1 else 0.0
    raise AssertionError("the last try returns")
