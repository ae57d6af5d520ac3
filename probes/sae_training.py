"""Train sparse autoencoders on recorded activations, with sae_lens's own trainer.

sae_lens trains on any iterator of activations. This one reads an ``ActivationStore`` in random order: some shards at a
time, shuffled together. The first token of every text is left out: it is an attention sink with a norm a hundred times
that of the others, and says nothing about the text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from interp.activation_store import ActivationStore
from interp.errors import UserError
from interp.models import resolve_device

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

TrainedArchitecture = Literal["batchtopk", "topk", "jumprelu", "standard"]

_BUFFER_ROWS = 2**19


@dataclass(frozen=True)
class SAETraining:
    """What decides a training.

    Attributes:
        architecture: ``batchtopk`` (Bussmann et al. 2024, arXiv 2412.06410; it ends as a JumpReLU autoencoder),
            ``topk`` (Gao et al. 2024, 2406.04093), ``jumprelu`` (Rajamanoharan et al. 2024, 2407.14435) or
            ``standard`` (ReLU and an L1 penalty; Bricken et al. 2023).
        features: How many features.
        active: How many of them are to be active for a token: exactly (topk), on average (batchtopk), or as the target
            of the sparsity loss (jumprelu). ``standard`` has the penalty ``l1`` instead.
        auxiliary: Weight of the loss that revives silent features of ``topk`` and ``batchtopk``. Gao et al. use 1/32;
            with sae_lens's 1 the error doubles for a while when the first features fall silent.
        l1: Weight of the L1 penalty of ``standard``.
        tokens: Tokens to train on; where there are fewer, they are seen several times.
        batch_size: Tokens per step.
        learning_rate: Adam's, warmed up for 5 % of the steps and let down to nothing over the last 20 %.
        seed: Decides the initial weights and the order.
    """

    architecture: TrainedArchitecture = "batchtopk"
    features: int = 4096
    active: int = 32
    auxiliary: float = 1 / 32
    l1: float = 5.0
    tokens: int = 800_000
    batch_size: int = 2048
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture != "standard" and not 0 < self.active < self.features:
            raise UserError(f"{self.active} active of {self.features} features is no sparse autoencoder; give fewer.")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"The learning rate is a number above 0, not {self.learning_rate:g}.")
        if self.tokens < 20 * self.batch_size:
            raise UserError(f"{self.tokens} tokens are fewer than 20 steps of {self.batch_size}; train on more.")


def shuffled_batches(
    store: ActivationStore, site: str, batch_size: int, seed: int, *, rows: Tensor | None = None
) -> Iterator[Tensor]:
    """Batches ``(batch_size, d)`` float32 of the values of ``site`` without first tokens, in random order, endlessly.

    Args:
        store: A recording of all tokens.
        site: One of its sites.
        batch_size: Tokens per batch.
        seed: Decides the order.
        rows: Which rows of the recording may be used, boolean ``(n_rows,)``; ``None`` means all.

    Raises:
        UserError: If the store has fewer rows than one batch.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    # Memory-mapped: nothing is read yet.
    shards = list(store.shards(site))
    usable = torch.from_numpy(store.index["position"].to_numpy().copy()) > 0
    usable = usable if rows is None else usable & rows
    inner = usable.split([len(values) for values in shards])
    if sum(int(part.sum()) for part in inner) < batch_size:
        raise UserError(f"{store.path} has fewer tokens than one batch of {batch_size}; record more text.")
    left: Tensor | None = None
    while True:
        order = rng.sample(range(len(inner)), len(inner))
        while order:
            parts = [] if left is None else [left]
            while order and sum(map(len, parts)) < _BUFFER_ROWS:
                number = order.pop()
                parts.append(shards[number][inner[number]])
            buffer = torch.cat(parts)
            shuffled = torch.randperm(len(buffer), generator=generator)
            whole = len(buffer) // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield buffer[shuffled[start : start + batch_size]].float()
            left = buffer[shuffled[whole:]]


def train_sae(
    store: ActivationStore, site: str, settings: SAETraining, *, rows: Tensor | None = None, device: str = "auto"
) -> TrainingSAE[Any]:
    """Train one autoencoder on one site of a recording of all tokens; ``rows`` as in ``shuffled_batches``.

    sae_lens scales the activations to an average norm of sqrt(d) while it trains and folds the factor into the weights.

    Raises:
        UserError: If the site was not recorded, or there is too little.
    """
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    where = str(resolve_device(device))
    torch.manual_seed(settings.seed)
    sae = _untrained(settings, next(store.shards(site)).shape[1], store, site, where)
    steps = settings.tokens // settings.batch_size
    return SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * settings.batch_size,
            train_batch_size_samples=settings.batch_size,
            lr=settings.learning_rate,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 5,
            lr_end=0.0,
            device=where,
            # A feature that was silent for so many steps is revived by the auxiliary loss.
            dead_feature_window=max(10, min(200, steps // 5)),
            feature_sampling_window=steps + 1,
            n_batches_for_norm_estimate=min(50, steps),
        ),
        sae,
        shuffled_batches(store, site, settings.batch_size, settings.seed, rows=rows),
    ).fit()


def _untrained(settings: SAETraining, d_in: int, store: ActivationStore, site: str, device: str) -> TrainingSAE[Any]:
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata

    warm_up = settings.tokens // settings.batch_size // 4
    common: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": settings.features,
        "device": device,
        "normalize_activations": "expected_average_only_in",
        "metadata": SAEMetadata(model_name=store.basis["model"]["name"], hook_name=site),
    }
    if settings.architecture in ("batchtopk", "topk"):
        top = {**common, "k": settings.active, "aux_loss_coefficient": settings.auxiliary}
        if settings.architecture == "topk":
            return TopKTrainingSAE(TopKTrainingSAEConfig(**top))
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**top))
    if settings.architecture == "jumprelu":
        return JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                **common,
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=settings.active,
                l0_warm_up_steps=warm_up,
                jumprelu_init_threshold=0.1,
                jumprelu_bandwidth=0.1,
            )
        )
    return StandardTrainingSAE(
        StandardTrainingSAEConfig(**common, l1_coefficient=settings.l1, l1_warm_up_steps=warm_up)
    )


def save_trained(sae: TrainingSAE[Any], folder: Path) -> None:
    """Write what inference needs to ``folder`` in sae_lens's format, in bfloat16."""
    sae.to(torch.bfloat16).save_inference_model(folder)


def settings_record(settings: SAETraining) -> dict[str, Any]:
    """The settings as the card says them, without those that the architecture does not use."""
    unused = {"standard": {"active", "auxiliary"}, "jumprelu": {"l1", "auxiliary"}}.get(settings.architecture, {"l1"})
    return {name: value for name, value in asdict(settings).items() if name not in unused}
