"""Find the layers in which a contradiction shows: where prompts stop looking alike to the model.

Safety Layers (Li et al. 2024, arXiv 2408.17003) compares layers so, with malicious questions in the place of
contradictions. At the prompt's last token after every layer, with a and b two prompts whose contexts agree with memory
and c one whose context contradicts it, all three in the same words about different subjects:

    gap = angle(a, c) - angle(a, b)

Layers below its rise do not tell contradictions apart; those in which it grows do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interp.activations import record
from interp.anatomy import Anatomy
from interp.attribution.examples import differ, phrasing
from interp.attribution.scores import LayerScores
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError


def representation_gap(
    model: nn.Module, conflicts: ConflictSet, *, name: str, seed: int = 0, progress: str | None = None
) -> LayerScores:
    """Score every layer by how much further a contradiction is from agreement than agreement from itself, in degrees.

    Args:
        model: The model, or a bridge around it.
        conflicts: Prompts of the kinds ``conflict`` and ``aligned``. Conflict prompts are left out where there are no
            two aligned ones of the same phrasing about other subjects with other answers.
        name: Name of the model, for the record.
        seed: Decides which two.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        The gap after each layer; ``growth`` of it tells what each layer adds.

    Raises:
        UserError: If there is no such triple.
    """
    triples = _triples(conflicts, random.Random(seed))
    if not triples:
        raise UserError(
            "No conflict prompt comes with two prompts of the same phrasing whose contexts agree; give both kinds, of "
            "several subjects."
        )
    anatomy = Anatomy(model)
    sites = [anatomy.site("block", layer) for layer in range(anatomy.n_layers)]
    asked = {example.id: example for triple in triples for example in triple}
    recorded = record(model, [example.prompt for example in asked.values()], sites, progress=progress)
    rows = {id: row for row, id in enumerate(asked)}
    a, b, c = (torch.tensor([rows[triple[i].id] for triple in triples]) for i in range(3))
    gaps = [angle(recorded[s][a], recorded[s][c]) - angle(recorded[s][a], recorded[s][b]) for s in sites]
    return LayerScores.of(
        torch.stack(gaps, 1),
        [conflict for _, _, conflict in triples],
        conflicts.select(kind="conflict"),
        method="representation_gap",
        metric="gap",
        model=name,
        settings={"unit": "degrees", "signed": False, "seed": seed},
    )


def angle(one: Tensor, other: Tensor) -> Tensor:
    """The angle between rows of two matrices ``(n, d)``, ``(n,)`` float32 in degrees."""
    cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)
    return cosine.clamp(-1, 1).acos().rad2deg().float()


def _triples(
    conflicts: ConflictSet, rng: random.Random
) -> list[tuple[ConflictExample, ConflictExample, ConflictExample]]:
    """Two prompts that agree, and one that contradicts, for each conflict prompt that has two."""
    agreeing: dict[object, list[ConflictExample]] = {}
    for example in conflicts.select(kind="aligned"):
        agreeing.setdefault(phrasing(example), []).append(example)
    triples = []
    for conflict in conflicts.select(kind="conflict"):
        candidates = [e for e in agreeing.get(phrasing(conflict), []) if differ(e, conflict)]
        if pair := _pair(candidates, rng):
            triples.append((*pair, conflict))
    return triples


def _pair(candidates: Sequence[ConflictExample], rng: random.Random) -> tuple[ConflictExample, ConflictExample] | None:
    """Two at random that differ from one another."""
    for one in rng.sample(candidates, len(candidates)):
        if others := [other for other in candidates if differ(one, other)]:
            return one, rng.choice(others)
    return None
