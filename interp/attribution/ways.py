"""Score heads in any of the ways that need no choices of their own, by name; and say how far ways agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import nn

from interp.attribution.attention_drift import attention_drift
from interp.attribution.attribution_patching import attribution_patching
from interp.attribution.direct_logits import direct_logit_attribution
from interp.attribution.edges import edge_attribution
from interp.attribution.path_patching import PATH_PATCHING_VERSION, path_patching
from interp.attribution.retrieval import RETRIEVAL_VERSION, retrieval_scores
from interp.attribution.scores import HeadScores
from interp.attribution.states import STATES_VERSION
from interp.conflicts import ConflictSet
from interp.errors import UserError

Way = Literal["path-patching", "direct-logits", "attribution-patching", "edges", "retrieval", "attention-drift"]
WAYS: tuple[Way, ...] = get_args(Way)
WAYS_VERSION = (1, PATH_PATCHING_VERSION, RETRIEVAL_VERSION, STATES_VERSION)
"""Version of the scores: raise the first when a way without a version of its own would give other ones."""


def scored(
    way: str, model: nn.Module, conflicts: ConflictSet, *, name: str, seed: int = 0, progress: str | None = None
) -> HeadScores:
    """Score every head in one way.

    Args:
        way: Which one.
        model: The model, or a bridge around it.
        conflicts: Prompts: all ways need conflict prompts, ``attention-drift`` those whose context agrees too.
        name: Name of the model, for the record.
        seed: Decides the corrupted prompts.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If there is no such way, or no example can be scored.
    """
    chosen = conflicts.select(kind="conflict")
    about: dict[str, Any] = {"name": name, "progress": progress}
    match way:
        case "path-patching":
            return path_patching(model, chosen, seed=seed, **about)["logit_diff"]
        case "direct-logits":
            return direct_logit_attribution(model, chosen, **about).heads
        case "attribution-patching":
            return attribution_patching(model, chosen, seed=seed, **about)
        case "edges":
            return edge_attribution(model, chosen, seed=seed, **about).heads
        case "retrieval":
            return retrieval_scores(model, chosen, **about)
        case "attention-drift":
            return attention_drift(model, conflicts, **about)
        case _:
            raise UserError(f"There is no way {way!r} to score heads; choose among {', '.join(WAYS)}.")


def agreement(scores: Mapping[str, HeadScores]) -> dict[str, dict[str, float]]:
    """How far ways to score heads agree: Spearman's correlation of each two mean maps.

    Two ways are compared on the examples that both could score. Where one has no sign, the other counts by its size. A
    way's agreement with itself is that of two halves of its subjects, which shows how far it depends on them.

    Returns:
        ``{way: {way: correlation}}``, without pairs that share no example or of which one scores all heads alike, and
        without a way's agreement with itself where it has one subject.
    """
    found = {
        one: {other: _halves(ours) if one == other else _on_both(ours, theirs) for other, theirs in scores.items()}
        for one, ours in scores.items()
    }
    return {one: {other: rho for other, rho in row.items() if math.isfinite(rho)} for one, row in found.items()}


def _on_both(one: HeadScores, other: HeadScores) -> float:
    common = set(one.example_ids) & set(other.example_ids)
    ours, theirs = (
        scores.select([i for i, id in enumerate(scores.example_ids) if id in common]) for scores in (one, other)
    )
    return ours.rank_correlation(theirs) if common else math.nan


def _halves(scores: HeadScores) -> float:
    """How far the scores on every second subject agree with those on the others."""
    first = set(sorted(set(scores.subjects))[::2])
    halves = [[n for n, subject in enumerate(scores.subjects) if (subject in first) is own] for own in (True, False)]
    ours, theirs = (scores.select(half) for half in halves)
    return ours.rank_correlation(theirs) if all(halves) else math.nan
