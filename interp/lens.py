"""The logit lens on the two answers: what the model would say if it stopped after a layer.

1. Record the residual stream after every block at the last prompt token, with whatever edits are applied.
2. Read each with the model's own final norm and unembedding (nostalgebraist 2020, "interpreting GPT: the logit lens").
3. Keep the log probabilities of the first token of the context answer and of the memory answer.

After the last block this is exactly what the model says; before it, it is how far the answer has come.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from interp.activations import record, sites_of
from interp.anatomy import Anatomy
from interp.answers import DIRECTIONS, Direction
from interp.attribution.examples import check_attributed, scorable
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.generation import BATCH_SIZE
from interp.statistics import Estimate, bootstrap_mean

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class LogitLens:
    """How probable each layer's residual stream makes the two answers, example by example.

    Attributes:
        log_probabilities: ``(n_examples, n_layers, 2)`` float32 on the CPU, nats: of the first token of the context
            answer and of the memory answer.
        example_ids: The examples' ids.
        subjects: The examples' subjects, the clusters of the intervals.
    """

    log_probabilities: Tensor
    example_ids: tuple[str, ...]
    subjects: tuple[str, ...]

    def probability(self, answer: Direction) -> list[Estimate]:
        """Mean probability of an answer's first token after each layer, with 95 % intervals by subject."""
        return self._by_layer(self.log_probabilities[..., DIRECTIONS.index(answer)].exp())

    def difference(self) -> list[Estimate]:
        """Mean logit difference, context minus memory, after each layer, with 95 % intervals by subject."""
        return self._by_layer(self.log_probabilities[..., 0] - self.log_probabilities[..., 1])

    def select(self, example_ids: Collection[str]) -> LogitLens:
        """The lens on some of the examples, for example those whose answers used memory.

        Raises:
            UserError: If none of them is among the examples.
        """
        wanted = set(example_ids)
        kept = [i for i, own in enumerate(self.example_ids) if own in wanted]
        if not kept:
            raise UserError("None of these ids is of an example that the lens was put on; give ids of its examples.")
        ids, subjects = (tuple(names[i] for i in kept) for names in (self.example_ids, self.subjects))
        return replace(self, log_probabilities=self.log_probabilities[kept], example_ids=ids, subjects=subjects)

    def _by_layer(self, values: Tensor) -> list[Estimate]:
        return [bootstrap_mean(column.numpy(), self.subjects) for column in values.double().unbind(1)]


def logit_lens(
    model: nn.Module, conflicts: ConflictSet, *, batch_size: int = BATCH_SIZE, progress: str | None = None
) -> LogitLens:
    """Put the logit lens on every example's two answers.

    Apply interventions around the call to see what they change.

    Args:
        model: The model, or a bridge around it.
        conflicts: Conflict prompts. Those whose two answers start with the same token are left out.
        batch_size: Prompts per batch.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If no example has two answers that start with different tokens.
    """
    examples, token_ids = scorable(model, conflicts)
    anatomy = Anatomy(model)
    sites = sites_of(model, ["residual"])
    prompts = [example.prompt for example in examples]
    recorded = record(model, prompts, sites, dtype=anatomy.dtype, batch_size=batch_size, progress=progress)
    check_attributed(anatomy, recorded[sites[-1]].to(anatomy.device), token_ids)
    with torch.inference_mode():
        by_layer = [
            anatomy.log_probabilities(
                recorded[site].to(anatomy.device).unsqueeze(1), token_ids, rows_at_once=_ROWS_AT_ONCE
            )
            for site in sites
        ]
    return LogitLens(
        torch.cat(by_layer, 1).cpu(),
        tuple(example.id for example in examples),
        tuple(example.subject for example in examples),
    )
