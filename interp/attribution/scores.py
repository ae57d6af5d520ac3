"""What every attribution method returns: HeadScores, or LayerScores where whole layers are scored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

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


class RankedLayer(NamedTuple):
    """One layer with its mean score and 95 % interval over examples."""

    layer: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """How far each part of a model pushes towards one of the two sources, example by example.

    Sign: **positive pushes towards the context answer, negative towards the memory answer.** Some methods tell how much
    a part has to do with it, not towards which source: their scores have no sign.

    Attributes:
        values: ``(n_examples, *parts)`` float32 on the CPU; a dimension for each of ``axes``.
        example_ids: The examples' ids.
        subjects: The examples' subjects, the clusters of the intervals.
        method: The attribution method.
        metric: What is attributed; with its unit in ``settings["unit"]``.
        model: Name of the model.
        data: Digest of the examples.
        settings: Every other choice that decides the values.
    """

    axes: ClassVar[tuple[str, ...]]

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
    ) -> Self:
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

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """Put scores of different examples of the same data together, in their order.

        Raises:
            UserError: If there are none, or they were not made alike.
        """
        if not parts:
            raise UserError("There are no scores to put together; give some.")
        first = parts[0]
        for other in parts[1:]:
            for name in ("method", "metric", "model", "data", "settings"):
                if getattr(first, name) != getattr(other, name):
                    raise UserError(f"Scores whose {name} differs do not belong together; score all of them alike.")
        ids = tuple(name for part in parts for name in part.example_ids)
        subjects = tuple(subject for part in parts for subject in part.subjects)
        return replace(first, values=torch.cat([part.values for part in parts]), example_ids=ids, subjects=subjects)

    @property
    def signed(self) -> bool:
        """Whether scores tell towards which source a part pushes."""
        return self.settings.get("signed", True)

    def mean(self) -> Tensor:
        """Mean over examples, ``(*parts)``."""
        return self.values.mean(0)

    @cached_property
    def interval(self) -> tuple[Tensor, Tensor]:
        """95 % interval of the mean, resampled by subject: low and high, each ``(*parts)``."""
        means = bootstrap_means(self.values.double().numpy(), self.subjects)
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        return torch.from_numpy(low).float(), torch.from_numpy(high).float()

    def select(self, examples: Sequence[int]) -> Self:
        """The scores of some of the examples, by their numbers."""
        ids, subjects = ([names[i] for i in examples] for names in (self.example_ids, self.subjects))
        return replace(self, values=self.values[list(examples)], example_ids=tuple(ids), subjects=tuple(subjects))

    def rank_correlation(self, other: Scores) -> float:
        """Spearman's correlation of the two mean maps; where one has no sign, the other counts by its size.

        It is NaN where one map is the same everywhere.

        Raises:
            UserError: If the maps have different shapes.
        """
        if self.mean().shape != other.mean().shape:
            raise UserError(
                f"Scores of shape {tuple(self.mean().shape)} and {tuple(other.mean().shape)} cannot be compared; "
                "take both from the same model, and both of heads or of layers."
            )
        means = [scores.mean() if self.signed == other.signed else scores.mean().abs() for scores in (self, other)]
        own, others = (pl.Series(mean.flatten().numpy()).rank().to_numpy() for mean in means)
        with np.errstate(invalid="ignore"):
            return float(np.corrcoef(own, others)[0, 1])

    def to_frame(self) -> pl.DataFrame:
        """One row per example and part: ``example_id, subject, layer``, of heads ``head``, and ``score``."""
        n, *shape = self.values.shape
        places = np.indices(shape, dtype=np.int32).reshape(len(shape), -1)
        return pl.DataFrame(
            {
                "example_id": np.repeat(np.array(self.example_ids, dtype=object), math.prod(shape)),
                "subject": np.repeat(np.array(self.subjects, dtype=object), math.prod(shape)),
                **{axis: np.tile(numbers, n) for axis, numbers in zip(self.axes, places, strict=True)},
                "score": self.values.flatten().numpy(),
            },
            schema_overrides={"example_id": pl.String, "subject": pl.String},
        )

    def save(self, path: str | Path) -> None:
        """Write ``path`` (Parquet, a row per example and part) and a JSON file next to it that says how it was made."""
        path = Path(path)
        write_parquet(path, self.to_frame())
        record = {
            "method": self.method,
            "metric": self.metric,
            "model": self.model,
            "data": self.data,
            "shape": list(self.values.shape),
            "sign": _SIGN if self.signed else f"none: scores do not tell towards which source a {self.axes[-1]} pushes",
            "settings": self.settings,
        }
        write_json(path.with_suffix(".json"), record)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            UserError: If a file is missing, the two do not belong together, or they are scores of something else.
        """
        path = Path(path)
        record = read_json(path.with_suffix(".json"))
        try:
            frame = pl.read_parquet(path, columns=["example_id", "subject", *cls.axes, "score"])
            n, *shape = record["shape"]
            values = torch.from_numpy(frame["score"].to_numpy().copy()).reshape(n, *shape)
            if len(shape) != len(cls.axes):
                raise ValueError(f"they have {len(shape)} dimensions")
            first = frame.gather_every(math.prod(shape))
            return cls(
                values,
                tuple(first["example_id"]),
                tuple(first["subject"]),
                **{name: record[name] for name in ("method", "metric", "model", "data", "settings")},
            )
        except (OSError, pl.exceptions.PolarsError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path} and its JSON file are not {cls.axes[-1]} scores ({error}); run the attribution again."
            ) from error

    def _ranked(self, pushing_towards: Direction) -> Iterator[tuple[tuple[int, ...], float, float, float]]:
        """Place, mean and interval of all parts, those that push hardest towards ``pushing_towards`` first."""
        mean, (low, high) = self.mean(), self.interval
        for index in mean.flatten().argsort(descending=pushing_towards == "context", stable=True).tolist():
            place = tuple(int(number) for number in np.unravel_index(index, mean.shape))
            yield place, mean[place].item(), low[place].item(), high[place].item()


class HeadScores(Scores):
    """How far each head pushes towards one of the two sources, example by example; see ``Scores``.

    Its values are ``(n_examples, n_layers, n_heads)``.
    """

    axes = ("layer", "head")

    def ranked(self, pushing_towards: Direction) -> list[RankedHead]:
        """All heads, those that push hardest towards ``pushing_towards`` first.

        Of scores without a sign ``context`` gives the highest first.
        """
        return [RankedHead(*place, *numbers) for place, *numbers in self._ranked(pushing_towards)]


class LayerScores(Scores):
    """How far each layer pushes towards one of the two sources, example by example; see ``Scores``.

    Its values are ``(n_examples, n_layers)``.
    """

    axes = ("layer",)

    def ranked(self, pushing_towards: Direction) -> list[RankedLayer]:
        """All layers, those that push hardest towards ``pushing_towards`` first.

        Of scores without a sign ``context`` gives the highest first.
        """
        return [RankedLayer(*place, *numbers) for place, *numbers in self._ranked(pushing_towards)]

    def growth(self) -> LayerScores:
        """By how much each layer's score exceeds that of the layer below; layer 0's is its whole score."""
        grown = self.values.diff(dim=1, prepend=torch.zeros_like(self.values[:, :1]))
        return replace(self, values=grown, metric=f"growth of {self.metric}")


def top_heads(ranked: Sequence[RankedHead], k: int) -> list[tuple[int, int]]:
    """Give the first ``k`` heads of a ranking as ``(layer, head)``."""
    return [(head.layer, head.head) for head in ranked[:k]]
