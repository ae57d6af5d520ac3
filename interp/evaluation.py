"""What did the model answer: usage of memory and context, match scores, and the damage an edit does.

``memory_rate`` and ``context_rate`` are shares of all prompts; ``memorisation_ratio`` is
memory / (memory + context), as in MemoTrap and CAD papers (see Longpre et al. 2021, arXiv 2109.05052).
Intervals are by subject: see ``interp.statistics``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from interp.anatomy import transformers_model
from interp.answers import (
    CHAT_TOKENS,
    COMPLETION_TOKENS,
    USAGES,
    Usage,
    abstains,
    contains_answer,
    exact_match,
    token_f1,
    usage_of,
)
from interp.conflicts import ConflictExample, ConflictSet, ContextKind
from interp.errors import Caution, UserError
from interp.files import assets_directory, write_parquet
from interp.generation import BATCH_SIZE, MAX_NEW_TOKENS, continue_greedily
from interp.inputs import continuation_ids, first_token_id, padded, prompt_batches
from interp.pairs import Combined
from interp.progress import tracked
from interp.reading import Changed, ReadPrompts
from interp.statistics import Difference, Estimate, bootstrap_mean, paired_difference, rate

ANSWERS_VERSION = 1
"""Version of how prompts are answered and answers judged: raise it when the same prompts would get other rows."""

# Fewer answers, or more of them that start as expected, and nothing is said.
_FEWEST_TOLD, _ALMOST_NONE = 10, 0.1
# Tokens, for each of which two distributions over the vocabulary are held.
_UNEMBEDDED_AT_ONCE = 2048

_SCORE_COLUMNS = (
    *(f"{source}_{score}" for source in ("memory", "context") for score in ("exact_match", "span_match", "f1")),
    "logit_difference",
)
_IS_RIGHT = pl.col("memory_span_match") > 0
GUARDS: dict[str, ContextKind] = {
    "closed_book_accuracy": "none",
    "aligned_accuracy": "aligned",
    "irrelevant_accuracy": "irrelevant",
}
"""The accuracies that an edit should not change, with the kind of prompt that each is measured on."""


@dataclass(frozen=True)
class UsageReport:
    """One row per prompt: what was asked, what was answered, and which source it used.

    Attributes:
        frame: Columns ``id, subject, relation, template, kind, split, prompt, answer, usage`` (text),
            ``logit_difference`` (first answer tokens, context minus memory, null where one is missing or may not be
            said), and for each source ``{memory,context}_{exact_match,span_match,f1}``.
    """

    frame: pl.DataFrame

    def select(self, **conditions: Any) -> UsageReport:
        """The rows whose columns have the given values, for example ``select(kind="conflict")``."""
        return UsageReport(self.frame.filter(**conditions))

    def rate(self, usage: Usage) -> Estimate:
        """Share of all prompts whose answer used ``usage``.

        Raises:
            UserError: If the report is empty.
        """
        return self._rate(pl.col("usage") == usage)

    def accuracy(self) -> Estimate:
        """Share of prompts whose answer contains the memory answer (the truth, for kinds other than conflict)."""
        return self._rate(_IS_RIGHT)

    def abstained(self) -> Estimate:
        """Share of prompts whose answer says that there is none to give (``interp.answers.abstains``)."""
        return self._rate(pl.col("answer").map_elements(abstains, return_dtype=pl.Boolean))

    def mean(self, column: str, *, seed: int = 0) -> Estimate:
        """Mean of a numeric column over the rows where it is not null; of one of zeros and ones it is a rate."""
        present = UsageReport(self.frame.drop_nulls(column))
        present._check()
        values, subjects = _numbers(present.frame, pl.col(column)), present.frame["subject"].to_list()
        return rate(values, subjects) if np.isin(values, (0, 1)).all() else bootstrap_mean(values, subjects, seed=seed)

    def memorisation_ratio(self) -> Estimate:
        """Share of memory among the answers that use one of the two sources; undefined where none does."""
        self._check()
        of_one_source = UsageReport(self.frame.filter(pl.col("usage").is_in(["memory", "context"])))
        return of_one_source.rate("memory") if len(of_one_source.frame) else Estimate.undefined()

    def rate_change(self, before: UsageReport, usage: Usage) -> Difference:
        """How the rate of ``usage`` changed, prompt by prompt.

        Args:
            before: Answers to the same prompts before the edit; this report may hold each prompt several times.
            usage: The usage.

        Raises:
            UserError: If the report is empty, or ``before`` lacks one of its prompts.
        """
        return self._change(before, pl.col("usage") == usage)

    def accuracy_change(self, before: UsageReport) -> Difference:
        """How the accuracy changed, prompt by prompt; see ``rate_change``."""
        return self._change(before, _IS_RIGHT)

    def changes(self, before: UsageReport) -> dict[str, Difference]:
        """How the rates on conflict prompts and the accuracies on all other kinds changed; see ``rate_change``.

        Returns:
            By measure, named as in a study's summary; accuracies as far as there are prompts of their kind.
        """
        conflict, guards = self.select(kind="conflict"), {m: self.select(kind=kind) for m, kind in GUARDS.items()}
        return {
            **{f"{usage}_rate": conflict.rate_change(before, usage) for usage in USAGES},
            **{measure: part.accuracy_change(before) for measure, part in guards.items() if len(part.frame)},
        }

    def summary(self, by: Sequence[str] = ()) -> pl.DataFrame:
        """Rates, accuracy, memorisation ratio and mean scores with intervals, by combination of the columns ``by``.

        Returns:
            Columns ``by``, ``measure``, ``value``, ``low``, ``high``, ``n``; null where a measure is undefined.
        """
        groups: Iterable[tuple[tuple[object, ...], pl.DataFrame]] = (
            self.frame.group_by(list(by), maintain_order=True) if by else [((), self.frame)]
        )
        rows: list[dict[str, Any]] = []
        for key, frame in groups:
            part = UsageReport(frame)
            measures = {f"{usage}_rate": part.rate(usage) for usage in USAGES}
            if "answer" in frame.columns:
                measures["abstained_rate"] = part.abstained()
            measures["accuracy"] = part.accuracy()
            measures["memorisation_ratio"] = part.memorisation_ratio()
            measures |= {
                column: part.mean(column) for column in _SCORE_COLUMNS if frame[column].null_count() < len(frame)
            }
            label = dict(zip(by, key, strict=True))
            rows += [{**label, "measure": name, **estimate.to_record()} for name, estimate in measures.items()]
        return pl.DataFrame(rows, infer_schema_length=None)

    def save(self, path: str | Path) -> None:
        """Write the rows as Parquet, atomically."""
        write_parquet(path, self.frame)

    def _rate(self, outcome: pl.Expr) -> Estimate:
        self._check()
        return rate(_numbers(self.frame, outcome), self.frame["subject"].to_list())

    def _change(self, before: UsageReport, outcome: pl.Expr) -> Difference:
        self._check()
        earlier = dict(zip(before.frame["id"], _numbers(before.frame, outcome), strict=True))
        if missing := [name for name in self.frame["id"] if name not in earlier]:
            raise UserError(
                f"The prompt {missing[0]!r} was not asked before the edit; measure both on the same prompts."
            )
        values = [earlier[name] for name in self.frame["id"]]
        return paired_difference(values, _numbers(self.frame, outcome), self.frame["subject"].to_list())

    def _check(self) -> None:
        if self.frame.is_empty():
            raise UserError("There is no prompt to measure; choose a split, kind or template that has examples.")


def _numbers(frame: pl.DataFrame, outcome: pl.Expr) -> np.ndarray:
    return frame.select(outcome.cast(pl.Float64)).to_series().to_numpy()


def answer_token_ids(model: nn.Module, example: ConflictExample) -> tuple[int, int] | None:
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


def room_for_answers(
    model: nn.Module, conflicts: ConflictSet, least: int = COMPLETION_TOKENS, most: int = CHAT_TOKENS
) -> int:
    """Say how many tokens answers may take, so that those of both sources can be told whole.

    Args:
        model: The model, or a bridge around it.
        conflicts: What is asked.
        least: So many at least.
        most: So many at most, however long the longest answer is; above ``least``.
    """
    return min(max([least, *_longer_answers(model, conflicts, least)]), max(least, most))


def answer_length(model: nn.Module, prompt: str, aliases: Sequence[str], enough: int) -> int:
    """Count the tokens of an answer: those of its shortest alias, or of the first that has no more than are enough.

    Args:
        model: The model, or a bridge around it.
        prompt: What the answer continues.
        aliases: Its aliases; without any it takes none.
        enough: A number that need not be told from smaller ones.
    """
    shortest: int | None = None
    for alias in aliases:
        length = len(continuation_ids(model, prompt, alias)[1])
        shortest = length if shortest is None else min(shortest, length)
        if shortest <= enough:
            break
    return shortest or 0


def _longer_answers(model: nn.Module, conflicts: ConflictSet, room: int) -> list[int]:
    """For each prompt with an answer that takes more tokens than there is room for: how many that are."""
    longest = (
        max(answer_length(model, e.prompt, aliases, room) for aliases in (e.memory_answers, e.context_answers))
        for e in conflicts
    )
    return [tokens for tokens in longest if tokens > room]


def measure_usage(
    model: nn.Module,
    conflicts: ConflictSet,
    *,
    combined: Combined | None = None,
    read: tuple[ReadPrompts, Changed] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    whole: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: str | None = None,
) -> UsageReport:
    """Answer every prompt greedily and say which source each answer used.

    Apply interventions around the call: ``with applied(model, pruning): measure_usage(model, conflicts)``.

    Args:
        model: The model, or a bridge around it.
        conflicts: What to ask.
        combined: Chooses the next token from the prompt and the bare prompt; ``None`` reads the prompt alone. What has
            no bare prompt is asked without it.
        read: The same prompts, read before without edits, and what the edits that are applied now change; for a rule
            together with the bare prompts. ``None`` reads them now.
        max_new_tokens: Longest answer, in tokens.
        whole: Judge all that the model says, not only its first sentence; not of prompts that were read before.
        batch_size: Prompts per batch.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If there is nothing to ask.
    """
    if not len(conflicts):
        raise UserError("There is no prompt to measure; choose a split, kind or template that has examples.")
    if longer := _longer_answers(model, conflicts, max_new_tokens):
        warnings.warn(
            Caution(
                f"{len(longer)} of {len(conflicts)} prompts have an answer of more than {max_new_tokens} tokens, which "
                f"is never found in so short a text; let the model say {max(longer)} (max_new_tokens)."
            ),
            stacklevel=2,
        )
    tokens = [answer_token_ids(model, example) for example in conflicts]
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    how["watch"] = torch.tensor([pair or (0, 0) for pair in tokens])
    if read is None:
        bare = None if combined is None else [e.bare_prompt or e.prompt for e in conflicts]
        prompts = [example.prompt for example in conflicts]
        continuations = continue_greedily(
            model, prompts, without=bare, combined=combined, whole=whole, batch_size=batch_size, **how
        )
    else:
        continuations = read[0].continue_greedily(read[1], combined=combined, **how)
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
            "logit_difference": difference if pair and math.isfinite(difference) else None,
            **_match_scores("memory", answer, example.memory_answers),
            **_match_scores("context", answer, example.context_answers),
        }
        for example, answer, pair, difference in zip(conflicts, continuations.answers, tokens, differences, strict=True)
    ]
    return UsageReport(pl.DataFrame(rows, schema_overrides={"logit_difference": pl.Float64}))


def answer_starts(
    model: nn.Module, conflicts: ConflictSet, *, batch_size: int = BATCH_SIZE, progress: str | None = None
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
        accuracies = {measure: report.select(kind=kind).accuracy() for measure, kind in GUARDS.items()}
        return cls(**accuracies, neutral_kl=bootstrap_mean(divergences, range(len(divergences))))

    def to_record(self) -> dict[str, dict[str, Any]]:
        """As plain dictionaries for JSON."""
        return {name: estimate.to_record() for name, estimate in vars(self).items()}


def neutral_texts() -> list[str]:
    """Ordinary text about nothing that the fact tables ask: the guard against general damage."""
    lines = (assets_directory() / "neutral.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


def neutral_kl(
    model: nn.Module,
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
        model: The model, or a bridge around it, unedited.
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
    batches = prompt_batches(model, chosen, batch_size, most_tokens=_UNEMBEDDED_AT_ONCE)
    for numbers, tokens in tracked(batches, progress):
        inputs = padded(model, tokens)
        with torch.inference_mode():
            clean = network(**inputs).logits
            with edit():
                moved = divergence(clean, network(**inputs).logits)
        mask = inputs["attention_mask"].to(moved.dtype)
        if position == "last":
            mask[:, :-1] = 0
        values[numbers] = ((moved * mask).sum(-1) / mask.sum(-1)).cpu()
    return values.numpy()


def divergence(unedited: Tensor, edited: Tensor) -> Tensor:
    """KL(unedited || edited) in nats of next-token distributions, from logits ``(..., d_vocab)`` to ``(...)``.

    Where a rule leaves tokens out, which makes it infinite, it is taken over the others, minus the logarithm of the
    probability that these had together: what is left out costs, the more the likelier it was.
    """
    possible = edited != -torch.inf
    whole = unedited.float().log_softmax(-1)
    left = whole.masked_fill(~possible, -torch.inf).logsumexp(-1, keepdim=True)
    # Exactly all of it, where nothing is left out.
    left = torch.where(possible.all(-1, keepdim=True), 0.0, left)
    clean, changed = whole - left, edited.float().log_softmax(-1)
    return torch.where(possible, clean.exp() * (clean - changed), 0.0).sum(-1) - left[..., 0]
