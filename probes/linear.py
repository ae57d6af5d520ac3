"""Linear probes on recorded activations: one for a site, or a set of them that were fitted together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from interp.errors import UserError
from interp.files import atomic_path, read_json, write_json
from interp.models import resolve_device
from interp.progress import tracked
from probes.quality import ProbeScore, auroc, score_probabilities
from probes.training import Fits, balanced_weights, fit_discriminant, fit_logistic, log_probabilities

Method = Literal["logistic", "discriminant", "mean_difference"]
METHODS: tuple[Method, ...] = get_args(Method)

STRENGTHS: tuple[float, ...] = tuple(np.logspace(-4, 1, 10).tolist())
"""Regularisation strengths of the logistic probe, per example: scikit-learn's ``1 / (C * n)``."""
SHRINKAGES: tuple[float, ...] = tuple(np.logspace(-3, 0, 10).tolist())
"""How far the discriminant's covariance is shrunk towards a multiple of the identity."""

_FORMAT = "conflictscope-probes"
_VERSION = 1
_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class LinearProbe:
    """A linear readout of one site.

    Attributes:
        site: Where it reads.
        classes: What it tells apart.
        weight: In the activations' own units: ``(1, d)`` for two classes (the log odds of the second), else
            ``(n_classes, d)``.
        bias: ``(1,)`` or ``(n_classes,)``.
        strength: The regularisation strength or shrinkage that validation chose.
        validation_auroc: AUROC on the validation examples; with more classes the mean, each against the rest.
    """

    site: str
    classes: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    strength: float
    validation_auroc: float

    @classmethod
    def fit(
        cls,
        site: str,
        features: Tensor,
        labels: Sequence[str],
        *,
        validation: Sequence[bool],
        method: Method = "logistic",
        classes: Sequence[str] | None = None,
    ) -> LinearProbe:
        """Fit one probe: a ``ProbeSet`` of one site."""
        return ProbeSet.fit({site: features}, labels, validation=validation, method=method, classes=classes)[site]

    @property
    def direction(self) -> Tensor:
        """The unit vector along which the last of two classes grows more probable, ``(d,)``.

        Raises:
            UserError: If the probe has more than two classes.
        """
        if len(self.classes) != 2:
            raise UserError(f"A probe of {len(self.classes)} classes has no single direction; take rows of its weight.")
        return self.weight[0] / self.weight[0].norm()

    def logits(self, features: Tensor) -> Tensor:
        """``(n, d)``, or for z ``(n, n_heads, d_head)`` -> ``(n, 1)`` or ``(n, n_classes)``, on the features' device.

        Raises:
            UserError: If the features are not as wide as the probe.
        """
        flat = features.flatten(1).float()
        if flat.shape[1] != self.weight.shape[1]:
            raise UserError(
                f"The probe at {self.site} reads {self.weight.shape[1]} features, but there are {flat.shape[1]}; "
                "take activations of the model and site that it was fitted on."
            )
        return flat @ self.weight.T.to(flat.device) + self.bias.to(flat.device)

    def predict_proba(self, features: Tensor) -> Tensor:
        """Probabilities of the classes, ``(n, n_classes)`` float64; features as in ``logits``."""
        return log_probabilities(self.logits(features).double()).exp()

    def score(
        self, features: Tensor, labels: Sequence[str], clusters: Sequence[Hashable], *, seed: int = 0
    ) -> ProbeScore:
        """The probe's quality; ``clusters`` (subjects) are what the bootstrap resamples together.

        Raises:
            UserError: If a label is none of the classes, or only one of them occurs.
        """
        logits = self.logits(features).double()
        probabilities = log_probabilities(logits).exp().cpu().numpy()
        if len(labels) != len(probabilities) or len(clusters) != len(probabilities):
            raise UserError(
                f"There are {len(probabilities)} rows of features at {self.site} for {len(labels)} labels and "
                f"{len(clusters)} clusters; give as many."
            )
        # Probabilities of 1 and nearly 1 are the same number; log odds still rank them.
        ranking = logits.cpu().numpy()[:, 0] if len(self.classes) == 2 else None
        return score_probabilities(probabilities, numbered(labels, self.classes), clusters, ranking=ranking, seed=seed)

    def save(self, path: str | Path) -> None:
        """Write ``path`` (``.safetensors``) and a JSON file next to it."""
        ProbeSet({self.site: self}).save(path)

    @classmethod
    def load(cls, path: str | Path) -> LinearProbe:
        """Read a probe that ``save`` wrote.

        Raises:
            UserError: If the files do not hold exactly one probe.
        """
        probes = ProbeSet.load(path)
        if len(probes) != 1:
            raise UserError(f"{path} holds {len(probes)} probes; read them with ProbeSet.load.")
        return next(iter(probes.values()))


@dataclass(frozen=True)
class ProbeSet(Mapping[str, LinearProbe]):
    """Probes of several sites that were fitted to the same labels, by site.

    Attributes:
        probes: By site.
        settings: What they were fitted with: method, number of examples, and what the caller adds.
    """

    probes: Mapping[str, LinearProbe]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, site: str) -> LinearProbe:
        if site not in self.probes:
            raise UserError(f"There is no probe at {site!r}; there are probes at {', '.join(self.probes)}.")
        return self.probes[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.probes)

    def __len__(self) -> int:
        return len(self.probes)

    @property
    def best(self) -> LinearProbe:
        """The probe with the highest AUROC on the validation examples."""
        return max(self.probes.values(), key=lambda probe: probe.validation_auroc)

    @property
    def classes(self) -> tuple[str, ...]:
        """What the probes tell apart."""
        return next(iter(self.probes.values())).classes

    @classmethod
    def fit(
        cls,
        features: Mapping[str, Tensor],
        labels: Sequence[str],
        *,
        validation: Sequence[bool],
        method: Method = "logistic",
        classes: Sequence[str] | None = None,
        strengths: Sequence[float] | None = None,
        settings: Mapping[str, Any] | None = None,
        device: str = "auto",
        progress: str | None = None,
    ) -> ProbeSet:
        """Fit a probe for every site.

        Features are standardised on the training examples. Both classes weigh the same in the loss, whatever their
        sizes, and the strength is the one of lowest validation loss; then the probabilities are set right for the
        classes' shares among the training examples (King & Zeng 2001, "Logistic regression in rare events data").

        Args:
            features: By site ``(n, d)``, or for z ``(n, n_heads, d_head)``; a site is read when it is fitted.
            labels: The class of each example.
            validation: Which examples choose the strength; the others train.
            method: ``logistic`` regression, linear ``discriminant``, or ``mean_difference``, whose direction is the
                difference of the class means of the standardised features.
            classes: The classes in order, the "positive" one of two last; ``None`` sorts the labels.
            strengths: Regularisation strengths of the logistic probe, or shrinkages of the discriminant, to choose
                among; ``None`` takes ``STRENGTHS`` or ``SHRINKAGES``.
            settings: To be kept with the probes, for example model, data and seed.
            device: ``auto``, ``cpu``, ``cuda``, ...
            progress: Label of a progress bar; ``None`` shows none.

        Raises:
            UserError: If an argument does not fit, or a class is missing among the training or validation examples.
        """
        if method not in METHODS:
            raise UserError(f"The method {method!r} is not known; known are {', '.join(METHODS)}.")
        order = tuple(sorted(set(labels)) if classes is None else classes)
        numbers = torch.tensor(numbered(labels, order))
        held = torch.tensor(list(validation), dtype=torch.bool)
        if len(held) != len(numbers):
            raise UserError(f"There are {len(held)} validation marks for {len(numbers)} labels; give as many.")
        for name, rows in (("training", ~held), ("validation", held)):
            if missing := [c for k, c in enumerate(order) if not (numbers[rows] == k).any()]:
                raise UserError(
                    f"No {name} example is of the class {missing[0]!r}; record more subjects, relations or phrasings."
                )
        grid = _grid(method, strengths)
        where = resolve_device(device)
        probes: dict[str, LinearProbe] = {}
        chunks = _chunks(features, len(grid) * (1 if len(order) == 2 else len(order)))
        for sites, stacked in tracked(chunks, progress):
            if stacked.shape[1] != len(numbers):
                raise UserError(
                    f"There are {stacked.shape[1]} rows of features at {sites[0]} for {len(numbers)} labels; "
                    "give as many."
                )
            if not stacked.isfinite().all():
                raise UserError(f"There are infinite features or NaN at {', '.join(sites)}; leave those examples out.")
            fitted = _fit(stacked.to(where), numbers.to(where), held.to(where), method, grid, len(order))
            for i, site in enumerate(sites):
                weight, bias, strength, quality = (part[i] for part in fitted)
                probes[site] = LinearProbe(site, order, weight.cpu(), bias.cpu(), grid[int(strength)], float(quality))
        about = {"method": method, "training_examples": int((~held).sum()), "validation_examples": int(held.sum())}
        return cls(probes, {**about, **(settings or {})})

    def predict_proba(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Probabilities of the classes by site, ``(n, n_classes)``."""
        return {site: probe.predict_proba(features[site]) for site, probe in self.probes.items()}

    def score(
        self,
        features: Mapping[str, Tensor],
        labels: Sequence[str],
        clusters: Sequence[Hashable],
        *,
        seed: int = 0,
        progress: str | None = None,
    ) -> dict[str, ProbeScore]:
        """The quality of every probe, by site; see ``LinearProbe.score``."""
        probes = tracked(list(self.probes.items()), progress)
        return {site: probe.score(features[site], labels, clusters, seed=seed) for site, probe in probes}

    def save(self, path: str | Path) -> None:
        """Write ``path`` (``.safetensors``) and a JSON file next to it, each atomically.

        Raises:
            UserError: If the path does not end in ``.safetensors``, or the file system refuses.
        """
        target = _checked_path(path)
        tensors = {}
        for site, probe in self.probes.items():
            tensors |= {f"{site}.weight": probe.weight.contiguous(), f"{site}.bias": probe.bias.contiguous()}
        content = save(tensors)
        with atomic_path(target) as temporary:
            temporary.write_bytes(content)
        about = {
            site: {"strength": probe.strength, "validation_auroc": probe.validation_auroc}
            for site, probe in self.probes.items()
        }
        write_json(
            target.with_suffix(".json"),
            {
                "format": _FORMAT,
                "version": _VERSION,
                "weights_sha256": hashlib.sha256(content).hexdigest(),
                "classes": list(self.classes),
                "settings": dict(self.settings),
                "probes": about,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> ProbeSet:
        """Read probes that ``save`` wrote.

        Raises:
            UserError: If a file is missing, broken, or the two do not belong together.
        """
        target = _checked_path(path)
        record = read_json(target.with_suffix(".json"))
        again = "fit the probes again with `conflictscope probe fit`"
        if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (_FORMAT, _VERSION):
            raise UserError(f"{target.with_suffix('.json')} is not of format {_FORMAT}, version {_VERSION}; {again}.")
        try:
            content = target.read_bytes()
        except OSError as error:
            raise UserError(f"Could not read {target}: {error.strerror or error}; {again}.") from error
        if hashlib.sha256(content).hexdigest() != record.get("weights_sha256"):
            raise UserError(f"{target} is not the file that {target.with_suffix('.json').name} describes; {again}.")
        try:
            tensors = load(content)
            probes = {
                site: LinearProbe(
                    site, tuple(record["classes"]), tensors[f"{site}.weight"], tensors[f"{site}.bias"], **about
                )
                for site, about in record["probes"].items()
            }
            return cls(probes, record["settings"])
        except (SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"{target} and its JSON file do not hold probes ({error}); {again}.") from error


def numbered(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """The place of each label among the classes, ``(n,)``.

    Raises:
        UserError: If a label is none of the classes, or there are fewer than two of these.
    """
    place = {name: k for k, name in enumerate(classes)}
    if len(place) < 2:
        raise UserError(f"All labels are {classes[0]!r}; a probe needs at least two classes." if classes else _EMPTY)
    if unknown := [label for label in labels if label not in place]:
        raise UserError(f"The label {unknown[0]!r} is none of the classes {', '.join(classes)}.")
    return np.array([place[label] for label in labels])


_EMPTY = "There is no example to fit a probe on; choose a split, kind or template that has examples."


def _checked_path(path: str | Path) -> Path:
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UserError(f"Probes are saved as .safetensors with a JSON file next to it; {target.name} ends otherwise.")
    return target


def _grid(method: Method, strengths: Sequence[float] | None) -> tuple[float, ...]:
    if method == "mean_difference":
        if strengths is not None:
            raise UserError("The difference of means has no strength to choose; leave strengths out.")
        return (1.0,)
    grid = tuple(strengths or (STRENGTHS if method == "logistic" else SHRINKAGES))
    if not all(0 < s <= (1 if method == "discriminant" else math.inf) for s in grid):
        allowed = "positive" if method == "logistic" else "above 0 and at most 1"
        raise UserError(f"Strengths of the {method} probe must be {allowed}, not {min(grid):g} to {max(grid):g}.")
    return grid


def _chunks(features: Mapping[str, Tensor], columns: int) -> Iterator[tuple[list[str], Tensor]]:
    """Sites of the same width, stacked, as many as fit into the memory that a chunk may take."""
    sites: list[str] = []
    tensors: list[Tensor] = []
    for site in features:
        tensor = features[site].flatten(1)
        n, d = tensor.shape
        # Features and their rotated copy; logits, search direction and weights; the solver's history.
        needed = 4 * (3 * n * d + 6 * n * columns + 24 * min(n, d) * columns) * (len(sites) + 1)
        if sites and (needed > _CHUNK_BYTES or tensor.shape != tensors[0].shape):
            yield sites, torch.stack(tensors)
            sites, tensors = [], []
        sites.append(site)
        tensors.append(tensor.float())
    if sites:
        yield sites, torch.stack(tensors)


def _fit(
    features: Tensor, labels: Tensor, held: Tensor, method: Method, grid: tuple[float, ...], n_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For ``p`` sites: weights ``(p, c, d)``, biases ``(p, c)``, indices of the strengths and validation AUROCs."""
    train = features[:, ~held]
    centre = train.mean(1, keepdim=True)
    scale = train.std(1, keepdim=True, correction=0)
    # A feature that never changes may seem to by rounding; it is left out.
    varies = scale > 1e-6 * train.abs().amax(1, keepdim=True)
    scale = torch.where(varies, scale, 1)
    fit = fit_logistic if method == "logistic" else fit_discriminant
    strengths = torch.tensor(grid, device=features.device)
    weights = balanced_weights(labels[~held], n_classes)
    fits = fit((train - centre) / scale * varies, labels[~held], weights, strengths, n_classes=n_classes)
    # Back to the activations' own units.
    weight = fits.weight / scale.unsqueeze(1)
    fits = Fits(weight, fits.bias - (weight @ centre.unsqueeze(1).mT).squeeze(-1))
    shares = labels[~held].bincount(minlength=n_classes) / (~held).sum()
    prior = shares.log() if n_classes > 2 else (shares[1] / shares[0]).log().unsqueeze(0)
    unseen = fits.logits(features[:, held])
    loss = torch.nn.functional.nll_loss(
        log_probabilities(unseen).flatten(0, 2),
        labels[held].repeat(unseen.shape[0] * unseen.shape[1]),
        reduction="none",
    ).unflatten(0, unseen.shape[:3])
    best = (loss @ balanced_weights(labels[held], n_classes)).argmin(1)
    rows = torch.arange(len(features), device=features.device)
    quality = _validation_auroc(log_probabilities(unseen[rows, best].double()), labels[held])
    return fits.weight[rows, best], fits.bias[rows, best] + prior, best, quality


def _validation_auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean AUROC of ``(p, n, n_classes)`` over the classes, each against the rest: ``(p,)``."""
    values, right = scores.cpu().numpy(), labels.cpu().numpy()
    ones = np.ones((1, len(right)))
    judged = [1] if values.shape[2] == 2 else np.unique(right).tolist()
    return torch.tensor([np.mean([auroc(v[:, c], right == c, ones)[0] for c in judged]) for v in values])
