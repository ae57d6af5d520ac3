"""Which examples an attribution can score, and what each is corrupted with."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.answers import contains_answer
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.evaluation import answer_token_ids, check_starts

_ROWS_AT_ONCE = 64

Alike = Callable[[ConflictExample], Hashable]
"""What an example and the one that it is corrupted with have in common."""


def scorable(model: nn.Module, conflicts: ConflictSet) -> tuple[list[ConflictExample], Tensor]:
    """The examples whose two answers start with different tokens, and these tokens ``(n, 2)``: (context, memory).

    Raises:
        UserError: If there is none.
    """
    pairs = [(example, ids) for example in conflicts if (ids := answer_token_ids(model, example)) is not None]
    if not pairs:
        raise UserError(
            "No example can be attributed: give conflict prompts whose two answers start with different tokens."
        )
    return [example for example, _ in pairs], torch.tensor([ids for _, ids in pairs], device=Anatomy(model).device)


def check_attributed(anatomy: Anatomy, final: Tensor, token_ids: Tensor) -> None:
    """Say in a ``Caution`` where almost no answer starts with one of the tokens whose logits are attributed.

    Args:
        anatomy: The model's anatomy.
        final: The final residual stream at the end of each prompt, ``(n, d_model)``.
        token_ids: First tokens of the (context, memory) answers, ``(n, 2)``.
    """
    with torch.inference_mode():
        first = [anatomy.logits(rows).argmax(-1) for rows in final.split(_ROWS_AT_ONCE)]
    check_starts(torch.cat(first).tolist(), token_ids.tolist())


def phrasing(example: ConflictExample) -> Hashable:
    """What prompts that are corrupted with one another share."""
    return example.relation, example.template


def with_partners(examples: Sequence[ConflictExample], alike: Alike = phrasing) -> list[ConflictExample]:
    """The examples that ``corrupted_partners`` finds a partner for among themselves."""
    kept = list(examples)
    while kept:
        groups = _groups(kept, alike)
        left = [e for e in kept if any(differ(e, kept[j]) for j in groups[alike(e)])]
        if len(left) == len(kept):
            break
        kept = left
    return kept


def corrupted_partners(examples: Sequence[ConflictExample], seed: int, alike: Alike = phrasing) -> list[int]:
    """For each example the index of another that is alike, whose subject and answers are all others.

    Args:
        examples: The examples.
        seed: Decides among several.
        alike: What an example and its partner share: by default template and relation.

    Raises:
        UserError: If an example has no such partner.
    """
    rng = random.Random(seed)
    groups = _groups(examples, alike)
    partners = []
    for example in examples:
        candidates = [j for j in groups[alike(example)] if differ(example, examples[j])]
        if not candidates:
            raise UserError(
                f"The example {example.id} has no other with the same phrasing and different answers to be corrupted "
                "with; give more examples or use the zero or mean baseline."
            )
        partners.append(rng.choice(candidates))
    return partners


def _groups(examples: Sequence[ConflictExample], alike: Alike) -> dict[Hashable, list[int]]:
    """Indices of the examples that are alike."""
    groups: dict[Hashable, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(alike(example), []).append(index)
    return groups


def differ(one: ConflictExample, other: ConflictExample) -> bool:
    """Whether two examples are about different subjects and share no answer."""
    ours, theirs = (example.memory_answers + example.context_answers for example in (one, other))
    return one.subject != other.subject and not any(contains_answer(answer, ours) for answer in theirs)
