"""Edit heads as a ranking says, and as many at random: what methods that scale heads share."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import OPPOSITE, Direction
from interp.attribution.scores import RankedHead, top_heads
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling, ScaledHead

_T = TypeVar("_T")

DRAWS = 2
"""How many times a random control is drawn."""

Heads = tuple[tuple[int, int], ...]


def opponents(lab: Lab, towards: Direction) -> list[RankedHead]:
    """The heads that push the logit difference hardest to the other source, strongest first."""
    return lab.head_scores["logit_diff"].ranked(OPPOSITE[towards])


def obstacles(lab: Lab, towards: Direction) -> list[RankedHead]:
    """The heads without which the wanted answer's probability gains most (PH3's ranking), strongest first."""
    return lab.head_scores[f"{towards}_probability"].ranked(OPPOSITE[towards])


def strongest(ranking: Sequence[RankedHead], count: int) -> Heads:
    """The first ``(layer, head)`` of a ranking, in the order of the model."""
    return tuple(sorted(top_heads(ranking, count)))


def scaling(scales: Mapping[tuple[int, int], float], means: Tensor | None = None) -> HeadScaling:
    """Heads scaled around zero, or around their mean outputs, ``(n_layers, n_heads, d_head)``."""
    around = {place: None if means is None else tuple(means[place].tolist()) for place in scales}
    return HeadScaling(tuple(ScaledHead(*place, scale, around[place]) for place, scale in sorted(scales.items())))


def distinct(conditions: Iterable[Condition]) -> list[Condition]:
    """The conditions without those that do what an earlier one does."""
    return list({condition.digest: condition for condition in reversed(list(conditions))}.values())[::-1]


class HeadMethod(Method):
    """Scale heads, and feed-forward layers too."""

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """As many other heads and feed-forward layers at random, edited alike."""
        return random_heads(lab, chosen)


def random_heads(lab: Lab, chosen: Condition) -> list[Condition]:
    """As many heads and feed-forward layers at random, edited alike, drawn several times.

    None of them is a chosen one, where enough are left. Heads that take the place of ones held at their mean output are
    held at their own.
    """
    parts = [part for edit in chosen.edits for part in edit.settled()]
    heads = [h for part in parts for h in (part if isinstance(part, HeadScaling) else scaling(part.head_scales)).heads]
    layers = dict(pair for part in parts if isinstance(part, FeedForwardScaling) for pair in part.scales)
    means = lab.mean_outputs if any(h.mean is not None for h in heads) else None
    controls = []
    for draw in range(DRAWS):
        rng = lab.rng(chosen.name, draw)
        places = elsewhere(rng, lab.anatomy.heads, [(h.layer, h.head) for h in heads])
        head_scales = dict(zip(places, (h.scale for h in heads), strict=True))
        moved = elsewhere(rng, range(lab.anatomy.n_layers), list(layers))
        layer_scales = FeedForwardScaling(tuple(zip(moved, layers.values(), strict=True)))
        edits = (*scaling(head_scales, means).settled(), *layer_scales.settled())
        name = "random_heads" if heads else "random_layers"
        controls.append(Condition(name, chosen.towards, {"draw": draw}, edits, control_of=chosen.method))
    return controls


def elsewhere(rng: random.Random, places: Sequence[_T], taken: Sequence[_T]) -> list[_T]:
    """As many places as are taken, at random; none of these, where enough are left."""
    free = [place for place in places if place not in taken]
    return rng.sample(free if len(free) >= len(taken) else list(places), len(taken))
