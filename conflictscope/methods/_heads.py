"""Edit heads as a ranking says, and as many at random: what methods that scale heads share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from interp.answers import OPPOSITE, Direction
from interp.attribution.scores import RankedHead, top_heads
from interventions.heads import HeadScaling, ScaledHead

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


def scaling(scales: Mapping[tuple[int, int], float]) -> HeadScaling:
    """Heads scaled around zero."""
    return HeadScaling(tuple(ScaledHead(*place, scale) for place, scale in sorted(scales.items())))


def distinct(conditions: Iterable[Condition]) -> list[Condition]:
    """The conditions without those that do what an earlier one does."""
    return list({condition.digest: condition for condition in reversed(list(conditions))}.values())[::-1]


def random_heads(lab: Lab, chosen: Condition) -> list[Condition]:
    """As many heads at random, edited alike, drawn several times; none of the chosen ones, where enough are left."""
    (edit,) = chosen.edits
    if not isinstance(edit, HeadScaling):
        edit = scaling(edit.head_scales)
    taken = set(edit.edited_heads)
    free = [place for place in lab.places if place not in taken]
    places = free if len(free) >= len(edit.heads) else lab.places
    controls = []
    for draw in range(DRAWS):
        drawn = lab.rng(chosen.name, draw).sample(places, len(edit.heads))
        moved = (replace(h, layer=layer, head=head) for h, (layer, head) in zip(edit.heads, drawn, strict=True))
        controls.append(
            Condition(
                "random_heads", chosen.towards, {"draw": draw}, (HeadScaling(tuple(moved)),), control_of=chosen.method
            )
        )
    return controls
