"""Information of all features of an autoencoder about the source, against scikit-learn's estimator in the same run.

Run ``python -m benchmarks.mutual_information --json``. The features are synthetic, so that their information is known.
The label Y is a fair coin. A feature fires with probability p0 or p1 by label; what fires is uniform on an interval of
length 1, which lies s <= 1 higher for one label than for the other. With h the entropy of a coin and
w = p1 / (p0 + p1), a value in the overlap leaves h(w) open and any other value nothing, so that

    I(Z; Y) = h((p0 + p1) / 2) - (h(p0) + h(p1)) / 2 + (p0 + p1) / 2 * s * h(w)

Half of the features know nothing; a tenth of all are dead and a hundredth always on. scikit-learn runs on a random
sample of the same features, and its time is extrapolated to all of them; both sides have one thread. Errors are those
of single features on finite samples: not of the estimators alone, but the two see the same samples.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any, NamedTuple

import torch
import typer
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor

from probes.information import mutual_information

SEED = 0
LOWEST, HIGHEST = 1e-4, 0.4
DEAD, ALWAYS_ON, KNOWING = 0.1, 0.01, 0.5
CHUNK = 2048


class Population(NamedTuple):
    """What features are drawn from; every tensor is ``(n_features,)``.

    Attributes:
        firing: Probabilities of firing by label, ``(2, n_features)``.
        shift: How much higher active values are with label 1.
        scale: What all values are multiplied by: it bears no information.
    """

    firing: Tensor
    shift: Tensor
    scale: Tensor

    @classmethod
    def draw(cls, n_features: int, generator: torch.Generator) -> Population:
        """Frequencies log-uniform between ``LOWEST`` and ``HIGHEST``, apart from the dead and those always on."""
        kind, knowing, spread, tilt, shift, scale = torch.rand(6, n_features, generator=generator, dtype=torch.double)
        frequency = LOWEST * (HIGHEST / LOWEST) ** spread
        tilt = torch.where(knowing < KNOWING, 2 * tilt - 1, 0)
        firing = torch.stack([frequency * (1 - tilt), frequency * (1 + tilt)])
        firing[:, kind < DEAD] = 0
        firing[:, kind > 1 - ALWAYS_ON] = 1
        return cls(firing, torch.where(knowing < KNOWING, shift, 0), 0.1 + 10 * scale)

    def information(self) -> Tensor:
        """The closed form above, in nats."""
        frequency = self.firing.mean(0)
        weight = torch.where(frequency > 0, self.firing[1] / (2 * frequency), 0)
        presence = _entropy(frequency) - _entropy(self.firing).mean(0)
        return presence + frequency * self.shift * _entropy(weight)

    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Features of prompts with these labels, ``(n, n_features)`` float32."""
        features = torch.empty(len(labels), self.firing.shape[1])
        for start in range(0, features.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            fires = torch.rand(features[:, part].shape, generator=generator) < self.firing.float()[labels, part]
            values = 1 + torch.rand(fires.shape, generator=generator) + self.shift.float()[part] * labels[:, None]
            features[:, part] = fires * values * self.scale.float()[part]
        return features


def _entropy(probability: Tensor) -> Tensor:
    return -torch.xlogy(probability, probability) - torch.xlogy(1 - probability, 1 - probability)


def main(
    features: Annotated[int, typer.Option(help="Features in all.")] = 131_072,
    prompts: Annotated[int, typer.Option(help="Prompts, half of each label.")] = 4_000,
    sample: Annotated[int, typer.Option(help="Features that scikit-learn runs on.")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line last.")] = False,
) -> None:
    """Draw features, estimate both ways, compare with the closed form."""
    # More would serve ours alone: scikit-learn's processes take longer to start than 500 features need.
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    population = Population.draw(features, generator)
    labels = (torch.arange(prompts) % 2)[torch.randperm(prompts, generator=generator)]
    activations = population.sample(labels, generator)
    expected = population.information()

    begin = time.perf_counter()
    found = mutual_information(activations, labels)
    ours = time.perf_counter() - begin

    chosen = torch.randperm(features, generator=generator)[:sample]
    drawn = activations[:, chosen].numpy()
    begin = time.perf_counter()
    reference = torch.from_numpy(mutual_info_classif(drawn, labels.numpy(), random_state=SEED))
    extrapolated = (time.perf_counter() - begin) * features / sample

    error, sample_error = (found - expected).abs(), (found - expected)[chosen].abs()
    reference_error = (reference - expected[chosen]).abs()
    dead = ~(activations != 0).any(0)
    result: dict[str, Any] = {
        "ratio": round(extrapolated / ours, 1),
        "max_absolute_error": round(error.max().item(), 4),
        "mean_absolute_error": round(error.mean().item(), 5),
        "max_absolute_error_sample": round(sample_error.max().item(), 4),
        "mean_absolute_error_sample": round(sample_error.mean().item(), 5),
        "max_absolute_error_sklearn": round(reference_error.max().item(), 4),
        "mean_absolute_error_sklearn": round(reference_error.mean().item(), 5),
        "dead_feature": found[dead].max().item(),
        "dead_feature_sklearn": round(reference[dead[chosen]].mean().item(), 5),
        "seconds": round(ours, 2),
        "sklearn_seconds_extrapolated": round(extrapolated, 1),
        "sklearn_features": len(chosen),
        "features": features,
        "prompts": prompts,
        "share_dead": round(dead.double().mean().item(), 3),
        "share_active": round(activations.count_nonzero().item() / activations.numel(), 4),
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    if not as_json:
        print(f"Ours:         {ours:8.1f} s for {features} features of {prompts} prompts")
        print(f"scikit-learn: {extrapolated:8.1f} s, extrapolated from {sample} features")
        print(f"{result['ratio']} times fewer seconds; largest error {error.max():.4f} nats")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
