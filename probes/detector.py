"""Tell of a prompt, before it is answered, whether its context conflicts with memory and which source will win."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp.activations import observations, observe, watching
from interp.anatomy import Anatomy
from interp.answers import Direction
from interp.errors import UserError
from interp.files import read_json, write_json
from interp.generation import BATCH_SIZE
from interp.inputs import padded, prompt_batches
from probes.linear import LinearProbe, ProbeSet, numbered

CONFLICT_CLASSES = ("aligned", "conflict")
SOURCE_CLASSES = ("memory", "context")

_FORMAT = "conflictscope-detector"
_VERSION = 1
_CONFLICT_FILE = "conflict.safetensors"
_SOURCE_FILE = "source.safetensors"


@dataclass(frozen=True)
class Detection:
    """What the residual stream says of one prompt.

    Attributes:
        conflict_probability: That the context disagrees with what the model would answer without it.
        conflict: Whether that is above the detector's threshold.
        context_probability: That the answer will use the context, if there is a conflict; ``None`` without a source
            probe.
        expected_source: ``context`` where that is at least one half, else ``memory``; ``None`` without a source probe.
    """

    conflict_probability: float
    conflict: bool
    context_probability: float | None
    expected_source: Direction | None


@dataclass(frozen=True)
class ConflictDetector:
    """A conflict probe with a threshold, and a source probe.

    Attributes:
        conflict: Tells conflicting from aligned contexts.
        threshold: Conflict probability above which a prompt counts as a conflict.
        source: Tells which source a conflict prompt's answer will use; may be missing.
        settings: How the threshold was chosen and what it gave on the examples that chose it.
    """

    conflict: LinearProbe
    threshold: float
    source: LinearProbe | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_probes(
        cls,
        conflict: ProbeSet,
        features: Mapping[str, Tensor],
        labels: Sequence[str],
        *,
        source: ProbeSet | None = None,
        false_positive_rate: float = 0.05,
    ) -> ConflictDetector:
        """Choose site and threshold on examples of the dev split.

        At each site the threshold is the score that a new aligned prompt exceeds with at most the wanted probability,
        whatever the scores' distribution, if it is exchangeable with those of dev (not so if phrased in a new way):
        the ``ceil((n + 1) * (1 - rate))``-th smallest of the ``n`` aligned ones (Vovk et al. 2005, "Algorithmic
        Learning in a Random World"). The site is the one that finds most conflicts. Both
        were chosen on these examples, so that only others can say what they are worth.

        Args:
            conflict: Probes with the classes ``aligned`` and ``conflict``.
            features: Dev activations by site, ``(n, d)``.
            labels: ``aligned`` or ``conflict`` for each.
            source: Probes with the classes ``memory`` and ``context``; the best on their validation examples is taken.
            false_positive_rate: Share of aligned prompts that may be called conflicts.

        Raises:
            UserError: If the classes or labels are others, or there are too few aligned examples for the rate.
        """
        for probes, wanted in ((conflict, CONFLICT_CLASSES), (source, SOURCE_CLASSES)):
            if probes is not None and probes.classes != wanted:
                needed, given = (" from ".join(classes) for classes in (wanted, probes.classes))
                raise UserError(f"The detector needs a probe that tells {needed}, not {given}.")
        is_conflict = torch.tensor(numbered(labels, CONFLICT_CLASSES)) == 1
        negatives, positives = int((~is_conflict).sum()), int(is_conflict.sum())
        rank = threshold_rank(negatives, positives, false_positive_rate)
        found: dict[str, tuple[float, float, float]] = {}
        for site, probe in conflict.items():
            scores = probe.logits(features[site])[:, 0].cpu()
            border = scores[~is_conflict].sort().values[rank - 1].item()
            hits = (scores[is_conflict] > border).float().mean().item()
            found[site] = (hits, probe.validation_auroc, border)
        chosen = max(found, key=lambda site: found[site][:2])
        hits, _, border = found[chosen]
        best = None if source is None else source.best
        return cls(
            conflict[chosen],
            _probability(border),
            best,
            {
                **conflict.settings,
                "false_positive_rate": false_positive_rate,
                "dev_true_positive_rate": hits,
                "dev_aligned": negatives,
                "dev_conflict": positives,
            },
        )

    def detect(self, model: nn.Module, prompts: Sequence[str], *, batch_size: int = BATCH_SIZE) -> list[Detection]:
        """Judge prompts, each by one forward pass that ends at the deeper of the two probes.

        Args:
            model: The model that the probes were fitted on, or a bridge around it.
            prompts: Full prompts, context and question.
            batch_size: Prompts per batch; the verdicts do not depend on it.

        Raises:
            UserError: If the model lacks a site of the probes, or is of another width.
        """
        where = observations(model, self._sites)
        found: dict[int, Detection] = {}
        for numbers, tokens in prompt_batches(model, prompts, batch_size):
            inputs = padded(model, tokens)
            rows = torch.arange(len(numbers), device=inputs["input_ids"].device)
            # Padding is on the left, so that the last token of every prompt is in the last column.
            columns = torch.full_like(rows, inputs["input_ids"].shape[1] - 1)
            judged = self._judged(observe(model, inputs, rows, columns, where, torch.float32))
            found |= zip(numbers, judged, strict=True)
        return [found[i] for i in range(len(prompts))]

    @contextmanager
    def listening(self, model: Any) -> Iterator[list[Detection]]:
        """Judge the prompts that the model reads anyway, in ``generate`` for instance, for the price of dot products.

        The list fills with one detection for each row of every forward pass over more than one new token, unless that
        pass only reads the prompts judged last again to write one token more, as generation without a cache does. So
        each call of ``generate`` adds one for each prompt of two tokens or more. Batches must be padded on the left.

        Args:
            model: The model, or a bridge around it.
        """
        where = observations(model, self._sites)
        heard: dict[str, Tensor] = {}
        detections: list[Detection] = []
        reading = _Reading()

        def hear(site: str, values: Tensor) -> None:
            if reading.is_new and values.shape[1] > 1:
                heard[site] = values[:, -1]
            if len(heard) == len(where):
                detections.extend(self._judged(heard))
                heard.clear()

        anatomy = Anatomy(model)
        embedding = anatomy.model.get_submodule(anatomy.model_path("embedding"))
        handle = embedding.register_forward_pre_hook(reading.see)
        try:
            with watching(model, where, hear):
                yield detections
        finally:
            handle.remove()

    def save(self, folder: str | Path) -> None:
        """Write the probes and ``detector.json`` to ``folder``, each file atomically."""
        place = Path(folder)
        self.conflict.save(place / _CONFLICT_FILE)
        if self.source is not None:
            self.source.save(place / _SOURCE_FILE)
        record = {"threshold": self.threshold, "source": self.source is not None, "settings": dict(self.settings)}
        write_json(place / "detector.json", {"format": _FORMAT, "version": _VERSION, **record})

    @classmethod
    def load(cls, folder: str | Path) -> ConflictDetector:
        """Read a detector that ``save`` wrote.

        Raises:
            UserError: If a file is missing or broken.
        """
        place = Path(folder)
        record = read_json(place / "detector.json")
        again = "make it again with `conflictscope probe fit`"
        if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (_FORMAT, _VERSION):
            raise UserError(f"{place / 'detector.json'} is not of format {_FORMAT}, version {_VERSION}; {again}.")
        if missing := [key for key in ("threshold", "source", "settings") if key not in record]:
            raise UserError(f"{place / 'detector.json'} lacks {missing[0]!r}; {again}.")
        source = LinearProbe.load(place / _SOURCE_FILE) if record["source"] else None
        return cls(LinearProbe.load(place / _CONFLICT_FILE), record["threshold"], source, record["settings"])

    @property
    def _sites(self) -> list[str]:
        return list(dict.fromkeys([self.conflict.site, *([self.source.site] if self.source else [])]))

    def _judged(self, values: Mapping[str, Tensor]) -> list[Detection]:
        conflict = self.conflict.logits(values[self.conflict.site])[:, 0].tolist()
        source = [None] * len(conflict)
        if self.source is not None:
            source = self.source.logits(values[self.source.site])[:, 0].tolist()
        return [self._detection(c, s) for c, s in zip(conflict, source, strict=True)]

    def _detection(self, conflict: float, source: float | None) -> Detection:
        conflict_probability = _probability(conflict)
        context_probability = None if source is None else _probability(source)
        return Detection(
            conflict_probability,
            conflict_probability > self.threshold,
            context_probability,
            None if context_probability is None else "context" if context_probability >= 0.5 else "memory",
        )


def threshold_rank(negatives: int, positives: int, false_positive_rate: float) -> int:
    """Which of the ``negatives`` aligned examples, by ascending score from 1, is the threshold for the rate.

    Raises:
        UserError: If the rate is none, or there are too few examples for it.
    """
    if not 0 < false_positive_rate < 1:
        raise UserError(f"The false-positive rate must lie between 0 and 1, not {false_positive_rate:g}.")
    rank = math.ceil((negatives + 1) * (1 - false_positive_rate))
    if rank > negatives or not positives:
        raise UserError(
            f"There are {negatives} aligned and {positives} conflict examples to choose a threshold on, too few "
            f"for a false-positive rate of {false_positive_rate:g}; record more, or allow a higher rate."
        )
    return rank


class _Reading:
    """Tells whether a forward pass reads prompts, or reads the last ones again to write one token more."""

    def __init__(self) -> None:
        self.is_new = True
        self._prompts: Tensor | None = None
        self._length = 0

    def see(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Look at the tokens ``(n, n_tokens)`` of a pass; a hook of the embedding, which all else comes after."""
        tokens = given[0]
        old = self._prompts
        self.is_new = (
            old is None
            or tokens.shape != (len(old), self._length + 1)
            or not torch.equal(tokens[:, : old.shape[1]], old)
        )
        if self.is_new:
            self._prompts = tokens
        self._length = tokens.shape[1]


def _probability(log_odds: float) -> float:
    return torch.tensor(log_odds, dtype=torch.float64).sigmoid().item()
