"""Score detectors of unsupported words against what people marked."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from interp.errors import UserError
from interp.spans import MarkedSpan, marked_tokens
from interp.statistics import Estimate
from probes.quality import pooled_auroc


def score_spans(
    offsets: Sequence[Sequence[tuple[int, int]]],
    scores: Sequence[Sequence[float]],
    spans: Sequence[Sequence[MarkedSpan]],
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Estimate:
    """Measure how well a score of tokens finds marked spans: AUROC over the tokens of all answers.

    Args:
        offsets: For each answer, for each of its tokens, the first character in the answer and the one after the last.
        scores: For each answer, for each of its tokens: the higher, the more likely marked. Of a gain of the context
            (``interp.reliance``) that is its negative.
        spans: For each answer what is marked in it.
        clusters: What is resampled together, one for each answer, for example what it was written from; ``None``
            takes each answer alone.
        seed: Seed of the bootstrap.

    Returns:
        The probability that a marked token scores above one that is not, ties counting half, with its interval.

    Raises:
        UserError: If there are not as many of each, or all tokens, or none, are marked.
    """
    named = range(len(offsets)) if clusters is None else clusters
    if not len(offsets) == len(scores) == len(spans) == len(named):
        raise UserError(
            f"Got offsets of {len(offsets)} answers, scores of {len(scores)}, spans of {len(spans)} and "
            f"{len(named)} clusters; give one of each for every answer."
        )
    for number, (places, values) in enumerate(zip(offsets, scores, strict=True)):
        if len(places) != len(values):
            raise UserError(
                f"Answer {number} has {len(places)} tokens, but {len(values)} scores; give one score a token."
            )
    marked = np.array([one for pair in zip(offsets, spans, strict=True) for one in marked_tokens(*pair)], dtype=bool)
    if marked.all() or not marked.any():
        raise UserError(
            f"Of {len(marked)} tokens {marked.sum()} are marked, so nothing can be told apart; give answers with "
            "marked words and with others."
        )
    flat = np.array([value for values in scores for value in values], dtype=float)
    if np.isnan(flat).any():
        raise UserError(f"{np.isnan(flat).sum()} of {len(flat)} scores are NaN; leave those tokens out.")
    owners = [name for name, values in zip(named, scores, strict=True) for _ in values]
    return pooled_auroc([flat], marked, owners, seed=seed)
