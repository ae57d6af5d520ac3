"""What did the model answer: usage of memory and context, match scores, and the damage an edit does.

``memory_rate`` and ``context_rate`` are shares of all prompts; ``memorisation_ratio`` is
memory / (memory + context), as in MemoTrap and CAD papers (see Longpre et al. 2021, arXiv 2109.05052).
Intervals are bootstrapped by subject.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import torch

from interp.anatomy import transformers_model
from interp.answers import USAGES, Usage, contains_answer, exact_match, token_f1, usage_of
from interp.conflicts import ConflictExample, ConflictSet, ContextKind
from interp.errors import Caution, UserError
from interp.files import assets_directory, write_parquet
from interp.generation import (
    BATCH_SIZE,
    MAX_NEW_TOKENS,
    ReadPrompts,
    continue_greedily,
    tracked,
)
from interp.inputs import first_token_id, padded, prompt_batches
from interp.statistics import Estimate, bootstrap_mean, bootstrap_means

# Fewer answers, or more of them that start as expected, and nothing is said.
_FEWEST_TOLD, _ALMOST_NONE = 10, 0.1

_SCORE_COLUMNS = (
    *(f"{source}_{score}" for source in ("memory", "context") for score in ("exact_match", "span_match", "f1")),
    "logit_difference",
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class UsageReport:
    """One row per prompt: what was asked, what was answered, and which source it used.

    Attributes:
        frame: Columns ``id, subject, relation, template, kind, split, prompt, answer, usage`` (text),
            ``logit_difference`` (first answer tokens, context minus memory, null where one is missing), and
            for each source ``{memory,context}_{exact_match,span_match,f1}``.
    """

    frame: pl.DataFrame

    def select(self, **conditions: Any) -> UsageReport:
        """The rows whose columns have the given values, for example ``select(kind="conflict")``."""
        return UsageReport(self.frame.filter(**conditions))

    def rate(self, usage: Usage, *, seed: int = 0) -> Estimate:
        """Share of all prompts whose answer used ``usage``.

        Raises:
            UserError: If the report is empty.
        """
        return self._mean(self.frame["usage"] == usage, seed)

    def accuracy(self, *, seed: int = 0) -> Estimate:
        """Share of prompts whose answer contains the memory answer (the truth, for kinds other than conflict)."""
        return self._mean(self.frame["memory_span_match"], seed)

    def mean(self, column: str, *, seed: int = 0) -> Estimate:
        """Mean of a numeric column over the rows where it is not null."""
        present = UsageReport(self.frame.drop_nulls(column))
        return present._mean(present.frame[column], seed)

    def memorisation_ratio(self, *, seed: int = 0) -> Estimate:
        """Memory / (memory + context) over all prompts; 0 where neither source is ever used."""
        self._check()
        memory, context = (np.asarray(self.frame["usage"] == u, dtype=float) for u in ("memory", "context"))
        means = bootstrap_means(np.stack([memory, context], axis=1), self.frame["subject"].to_list(), seed=seed)

        def ratio(pair: np.ndarray) -> np.ndarray:
            return pair[..., 0] / np.maximum(pair.sum(-1), 1e-12)

        low, high = np.quantile(ratio(means), [0.025, 0.975])
        value = ratio(np.array([memory.mean(), context.mean()]))
        return Estimate(float(value), float(low), float(high), len(memory))

    def summary(self, by: Sequence[str] = ()) -> pl.DataFrame:
        """Rates, accuracy, memorisation ratio and mean scores with intervals, by combination of the columns ``by``.

        Returns:
            Columns ``by``, ``measure``, ``value``, ``low``, ``high``, ``n``.
        """
        groups: Iterable[tuple[tuple[object, ...], pl.DataFrame]] = (
            self.frame.group_by(list(by), maintain_order=True) if by else [((), self.frame)]
        )
        rows: list[dict[str, Any]] = []
        for key, frame in groups:
            part = UsageReport(frame)
            measures = {f"{usage}_rate": part.rate(usage) for usage in USAGES}
            measures["accuracy"] = part.accuracy()
            measures["memorisation_ratio"] = part.memorisation_ratio()
            measures |= {
                column: part.mean(column) for column in _SCORE_COLUMNS if frame[column].null_count() < len(frame)
            }
            label = dict(zip(by, key, strict=True))
            rows += [{**label, "measure": name, **estimate.to_record()} for name, estimate in measures.items()]
        return pl.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write the rows as Parquet, atomically."""
        write_parquet(path, self.frame)

    def _mean(self, values: pl.Series, seed: int) -> Estimate:
        self._check()
        return bootstrap_mean(values.cast(pl.Float64).to_numpy(), self.frame["subject"].to_list(), seed=seed)

    def _check(self) -> None:
        if self.frame.is_empty():
            raise UserError("There is no prompt to measure; choose a split, kind or template that has examples.")


def answer_token_ids(model: TransformerBridge, example: ConflictExample) -> tuple[int, int] | None:
    """First-token ids of the (context, memory) answer, or ``None`` where one is missing or they are the same."""
    if not (example.context_answers and example.memory_answers):
        return None
    context, memory = (
        first_token_id(model, example.prompt, answers[0])
        for answers in (example.context_answers, example.memory_answers)
    )
    return None if context == memory else (context, memory)


def check_starts(first_tokens: Sequence[int], watched: Sequence[Sequence[int] | None]) -> None:
    """Say in a ``Caution`` where almost no answer starts as numbers about first tokens assume.

    Args:
        first_tokens: The greedy first token of each answer.
        watched: For each the first tokens of the two answers that are compared; ``None`` where there are none.
    """
    told = [token in pair for token, pair in zip(first_tokens, watched, strict=True) if pair is not None]
    if len(told) >= _FEWEST_TOLD and sum(told) < _ALMOST_NONE * len(told):
        warnings.warn(
            Caution(
                f"Only {sum(told)} of {len(told)} answers start with the first token of either answer, so that numbers "
                "about first tokens (logit differences, head scores, the logit lens) say little here; end the prompts "
                "where the answer itself begins, and write the answers as the model does."
            ),
            stacklevel=3,
        )


def measure_usage(
    model: TransformerBridge,
    conflicts: ConflictSet,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: str | None = None,
) -> UsageReport:
    """Answer every prompt greedily and say which source each answer used.

    Apply interventions around the call: ``with applied(model, pruning): measure_usage(model, conflicts)``.

    Args:
        model: The bridge.
        conflicts: What to ask.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts per batch.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If there is nothing to ask.
    """
    if not len(conflicts):
        raise UserError("There is no prompt to measure; choose a split, kind or template that has examples.")
    tokens = [answer_token_ids(model, example) for example in conflicts]
    continuations = continue_greedily(
        model,
        [example.prompt for example in conflicts],
        watch=torch.tensor([pair or (0, 0) for pair in tokens]),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    check_starts(continuations.first_tokens.tolist(), tokens)
    differences = (continuations.first_logits[:, 0] - continuations.first_logits[:, 1]).tolist()
    rows = [
        {
            "id": example.id,
            "subject": example.subject,
            "relation": example.relation,
            "template": example.template,
            "kind": example.kind,
            "split": example.split,
            "prompt": example.prompt,
            "answer": answer,
            "usage": usage_of(answer, example.memory_answers, example.context_answers),
            "logit_difference": difference if pair else None,
            **_match_scores("memory", answer, example.memory_answers),
            **_match_scores("context", answer, example.context_answers),
        }
        for example, answer, pair, difference in zip(conflicts, continuations.answers, tokens, differences, strict=True)
    ]
    return UsageReport(pl.DataFrame(rows, schema_overrides={"logit_difference": pl.Float64}))


def answer_starts(
    model: TransformerBridge, conflicts: ConflictSet, *, batch_size: int = BATCH_SIZE, progress: str | None = None
) -> UsageReport:
    """Which source each answer starts to use, by its first token alone: one forward pass, for comparing candidates.

    Returns:
        A report with the columns ``id, subject, template, usage``; ``other`` where the two answers start alike.
    """
    prompts = [example.prompt for example in conflicts]
    first = continue_greedily(model, prompts, max_new_tokens=1, batch_size=batch_size, progress=progress).first_tokens
    watched = [answer_token_ids(model, example) for example in conflicts]
    check_starts(first.tolist(), watched)
    return _starts_report(conflicts, watched, first)


class AnswerStarts:
    """``answer_starts`` for many edits of the last prompt token: the prompts are read once, up to that token.

    Args:
        model: The bridge, unedited.
        conflicts: What to ask.
        batch_size: Prompts per batch.
    """

    def __init__(self, model: TransformerBridge, conflicts: ConflictSet, *, batch_size: int = BATCH_SIZE) -> None:
        self._conflicts = conflicts
        self._tokens = [answer_token_ids(model, example) for example in conflicts]
        self._prompts = ReadPrompts(model, [example.prompt for example in conflicts], batch_size=batch_size)
        check_starts(self._prompts.next_tokens().tolist(), self._tokens)

    def report(self) -> UsageReport:
        """What the answers start with now, under whatever edits are applied."""
        return _starts_report(self._conflicts, self._tokens, self._prompts.next_tokens())


def _starts_report(
    conflicts: ConflictSet, tokens: Sequence[tuple[int, int] | None], first: torch.Tensor
) -> UsageReport:
    usages = [
        "other" if pair is None or token not in pair else "context" if token == pair[0] else "memory"
        for token, pair in zip(first.tolist(), tokens, strict=True)
    ]
    return UsageReport(
        pl.DataFrame(
            {
                "id": [e.id for e in conflicts],
                "subject": [e.subject for e in conflicts],
                "template": [e.template for e in conflicts],
                "usage": usages,
            }
        )
    )


def _match_scores(source: str, answer: str, expected: Sequence[str]) -> dict[str, float]:
    return {
        f"{source}_exact_match": float(exact_match(answer, expected)),
        f"{source}_span_match": float(contains_answer(answer, expected)),
        f"{source}_f1": token_f1(answer, expected),
    }


@dataclass(frozen=True)
class Damage:
    """What an edit costs on prompts that it should leave alone.

    Attributes:
        closed_book_accuracy: Share of right answers without a context.
        aligned_accuracy: Share of right answers with a context that agrees.
        irrelevant_accuracy: Share of right answers with a context about something else.
        neutral_kl: Mean KL divergence (nats) of next-token distributions on neutral text, unedited to edited.
    """

    closed_book_accuracy: Estimate
    aligned_accuracy: Estimate
    irrelevant_accuracy: Estimate
    neutral_kl: Estimate

    @classmethod
    def of(cls, report: UsageReport, divergences: np.ndarray) -> Damage:
        """The guards of a report that holds prompts of kinds none, aligned and irrelevant, and of ``neutral_kl``."""

        def accuracy(kind: ContextKind) -> Estimate:
            return report.select(kind=kind).accuracy()

        return cls(
            accuracy("none"),
            accuracy("aligned"),
            accuracy("irrelevant"),
            bootstrap_mean(divergences, range(len(divergences))),
        )

    def to_record(self) -> dict[str, dict[str, float]]:
        """As plain dictionaries for JSON."""
        return {name: estimate.to_record() for name, estimate in vars(self).items()}


def neutral_texts() -> list[str]:
    """Ordinary text about nothing that the fact tables ask: the guard against general damage."""
    lines = (assets_directory() / "neutral.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


def neutral_kl(
    model: TransformerBridge,
    edit: Callable[[], AbstractContextManager[Any]],
    *,
    texts: Sequence[str] | None = None,
    position: Literal["all", "last"] = "all",
    batch_size: int = BATCH_SIZE,
    progress: str | None = None,
) -> np.ndarray:
    """Mean KL(unedited || edited) in nats of the next-token distributions of neutral texts.

    Both distributions are computed batch by batch, so memory does not grow with the number of texts.

    Args:
        model: The bridge, unedited.
        edit: Makes a context manager that edits the model while it is entered.
        texts: The texts; ``None`` takes ``neutral_texts()``.
        position: Every position of a text, or its last: for edits that act on a prompt's last token alone, which no
            other position could show.
        batch_size: Texts per batch.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        ``(n_texts,)``: for each text the mean over these positions.
    """
    chosen = neutral_texts() if texts is None else list(texts)
    network: Any = transformers_model(model)
    values = torch.zeros(len(chosen))
    for numbers, tokens in tracked(prompt_batches(model, chosen, batch_size), progress):
        inputs = padded(model, tokens)
        with torch.inference_mode():
            clean = network(**inputs).logits.float().log_softmax(-1)
            with edit():
                edited = network(**inputs).logits.float().log_softmax(-1)
            divergence = (clean.exp() * (clean - edited)).sum(-1)
        mask = inputs["attention_mask"].to(divergence.dtype)
        if position == "last":
            mask[:, :-1] = 0
        values[numbers] = ((divergence * mask).sum(-1) / mask.sum(-1)).cpu()
    return values.numpy()
