"""HeadScores: what every attribution method returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from interp.answers import Direction
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.files import read_json, write_json, write_parquet
from interp.statistics import bootstrap_means

_SIGN = "positive pushes towards the context answer, negative towards the memory answer"


class RankedHead(NamedTuple):
    """One head with its mean score and 95 % interval over examples."""

    layer: int
    head: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class HeadScores:
    """How far each head pushes towards one of the two sources, example by example.

    Sign: **positive pushes towards the context answer, negative towards the memory answer.** Some methods tell how much
    a head has to do with it, not towards which source: their scores have no sign.

    Attributes:
        values: ``(n_examples, n_layers, n_heads)`` float32 on the CPU.
        example_ids: The examples' ids.
        subjects: The examples' subjects, the clusters of the intervals.
        method: The attribution method.
        metric: What is attributed; with its unit in ``settings["unit"]``.
        model: Name of the model.
        data: Digest of the examples.
        settings: Every other choice that decides the values.
    """

    values: Tensor
    example_ids: tuple[str, ...]
    subjects: tuple[str, ...]
    method: str
    metric: str
    model: str
    data: str
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        values: Tensor,
        examples: Sequence[ConflictExample],
        conflicts: ConflictSet,
        *,
        method: str,
        metric: str,
        model: str,
        settings: dict[str, Any],
    ) -> HeadScores:
        """The scores of ``examples``, those of ``conflicts`` that could be scored."""
        return cls(
            values,
            tuple(example.id for example in examples),
            tuple(example.subject for example in examples),
            method,
            metric,
            model,
            conflicts.digest,
            {**settings, "left_out": len(conflicts) - len(examples)},
        )

    @property
    def signed(self) -> bool:
        """Whether scores tell towards which source a head pushes."""
        return self.settings.get("signed", True)

    def mean(self) -> Tensor:
        """Mean over examples, ``(n_layers, n_heads)``."""
        return self.values.mean(0)

    @cached_property
    def interval(self) -> tuple[Tensor, Tensor]:
        """95 % interval of the mean, resampled by subject: low and high, each ``(n_layers, n_heads)``."""
        means = bootstrap_means(self.values.double().numpy(), self.subjects)
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        return torch.from_numpy(low).float(), torch.from_numpy(high).float()

    def select(self, examples: Sequence[int]) -> HeadScores:
        """The scores of some of the examples, by their numbers."""
        ids, subjects = ([names[i] for i in examples] for names in (self.example_ids, self.subjects))
        return replace(self, values=self.values[list(examples)], example_ids=tuple(ids), subjects=tuple(subjects))

    def ranked(self, pushing_towards: Direction) -> list[RankedHead]:
        """All heads, those that push hardest towards ``pushing_towards`` first.

        Of scores without a sign ``context`` gives the highest first.
        """
        mean, (low, high) = self.mean(), self.interval
        order = mean.flatten().argsort(descending=pushing_towards == "context", stable=True).tolist()
        n_heads = mean.shape[1]

        def head(index: int) -> RankedHead:
            at = divmod(index, n_heads)
            return RankedHead(*at, mean[at].item(), low[at].item(), high[at].item())

        return [head(index) for index in order]

    def rank_correlation(self, other: HeadScores) -> float:
        """Spearman's correlation of the two mean maps.

        Raises:
            UserError: If the maps have different shapes.
        """
        if self.mean().shape != other.mean().shape:
            raise UserError(
                f"Head scores of shape {tuple(self.mean().shape)} and {tuple(other.mean().shape)} cannot be compared; "
                "take both from the same model."
            )
        own, others = (pl.Series(scores.mean().flatten().numpy()).rank().to_numpy() for scores in (self, other))
        return float(np.corrcoef(own, others)[0, 1])

    def to_frame(self) -> pl.DataFrame:
        """One row per example and head: ``example_id, subject, layer, head, score``."""
        n, n_layers, n_heads = self.values.shape
        return pl.DataFrame(
            {
                "example_id": np.repeat(np.array(self.example_ids, dtype=object), n_layers * n_heads),
                "subject": np.repeat(np.array(self.subjects, dtype=object), n_layers * n_heads),
                "layer": np.tile(np.repeat(np.arange(n_layers, dtype=np.int32), n_heads), n),
                "head": np.tile(np.arange(n_heads, dtype=np.int32), n * n_layers),
                "score": self.values.flatten().numpy(),
            },
            schema_overrides={"example_id": pl.String, "subject": pl.String},
        )

    def save(self, path: str | Path) -> None:
        """Write ``path`` (Parquet, a row per example and head) and a JSON file next to it that says how it was made."""
        path = Path(path)
        write_parquet(path, self.to_frame())
        record = {
            "method": self.method,
            "metric": self.metric,
            "model": self.model,
            "data": self.data,
            "shape": list(self.values.shape),
            "sign": _SIGN if self.signed else "none: scores do not tell towards which source a head pushes",
            "settings": self.settings,
        }
        write_json(path.with_suffix(".json"), record)

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what ``save`` wrote.

        Raises:
            UserError: If a file is missing or the two do not belong together.
        """
        path = Path(path)
        record = read_json(path.with_suffix(".json"))
        try:
            frame = pl.read_parquet(path)
            n, n_layers, n_heads = record["shape"]
            values = torch.from_numpy(frame["score"].to_numpy().copy()).reshape(n, n_layers, n_heads)
            first = frame.gather_every(n_layers * n_heads)
            return cls(
                values,
                tuple(first["example_id"]),
                tuple(first["subject"]),
                **{name: record[name] for name in ("method", "metric", "model", "data", "settings")},
            )
        except (OSError, pl.exceptions.PolarsError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path} and its JSON file are not head scores ({error}); run the attribution again."
            ) from error


def top_heads(ranked: Sequence[RankedHead], k: int) -> list[tuple[int, int]]:
    """Give the first ``k`` heads of a ranking as ``(layer, head)``."""
    return [(head.layer, head.head) for head in ranked[:k]]
