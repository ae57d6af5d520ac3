"""Make sparse autoencoders from nothing: sample text, record it, train, and say on a card how good they are."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.activation_store import ActivationStore
from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.files import atomic_directory, read_json, write_json
from interp.fingerprints import fingerprint
from interp.sae import SparseAutoencoder, load_sae
from probes.sae_data import TrainingText, about_recording, training_rows
from probes.sae_quality import measure_saes
from probes.sae_training import SAETraining, save_trained, settings_record, train_sae

CARD = "card.json"
"""The file beside an autoencoder that says how it was made and how good it is."""


def train_saes(
    model: nn.Module,
    name: str,
    layers: Sequence[int],
    out: Path,
    settings: SAETraining,
    data: TrainingText | ActivationStore,
    *,
    device: str = "auto",
) -> list[SparseAutoencoder]:
    """Train one autoencoder for each layer, and measure it; what an earlier call finished is kept.

    Args:
        model: The model, or a bridge around it.
        name: What the model was loaded by.
        layers: The blocks whose outputs are to be explained.
        out: Folder for ``layer_N/`` (the autoencoder in sae_lens's format, and its card), the sampled ``texts/`` and
            the ``activations/``, which may be deleted afterwards.
        settings: What decides the training.
        data: What to record and train on, or a recording of all tokens. Of one of conflict examples only those of the
            train split are used that are not in the held-out phrasing.
        device: Where to train.

    Returns:
        The autoencoders as they were written, in bfloat16, by layer.

    Raises:
        UserError: If a layer does not exist, the data does not serve, or ``out`` holds autoencoders of other settings
            or data.
    """
    anatomy = Anatomy(model)
    sites = {layer: anatomy.site("block", layer) for layer in layers}
    texts: list[str] = []
    if isinstance(data, TrainingText):
        texts = data.mixture(model, out / "texts")
        about = data.about(texts)
    else:
        about = about_recording(data, model, list(sites.values()))
    dtype = str(anatomy.dtype).removeprefix("torch.")
    made_by = {
        "model": {"name": name, "fingerprint": fingerprint(model), "dtype": dtype},
        "data": about,
        "settings": settings_record(settings),
    }
    missing = [layer for layer in layers if not _finished(out / f"layer_{layer}", made_by)]
    if missing:
        recording = data
        if isinstance(recording, TrainingText):
            recording = ActivationStore.record(
                out / "activations",
                model,
                texts,
                list(sites.values()),
                "all",
                name=name,
                seed=recording.seed,
                dtype=torch.bfloat16,
                progress="Recording",
            )
        for layer in missing:
            trained = train_sae(recording, sites[layer], settings, rows=training_rows(recording), device=device)
            _write(trained, out, layer, made_by, model)
    return [load_sae(out / f"layer_{layer}") for layer in layers]


def _write(trained: Any, out: Path, layer: int, made_by: dict[str, Any], model: nn.Module) -> None:
    """Write a trained autoencoder with its card."""
    with atomic_directory(out / f"layer_{layer}") as folder:
        save_trained(trained, folder)
        # What is measured is what is written: weights in bfloat16.
        qualities = measure_saes(model, [load_sae(folder)], out, seed=made_by["data"]["split_seed"])
        packages = ("conflictscope", "sae-lens", "torch")
        card = {
            **made_by,
            "layer": layer,
            "quality": {part: quality[0].to_record() for part, quality in qualities.items()},
            "versions": {package: importlib.metadata.version(package) for package in packages},
        }
        write_json(folder / CARD, card)


def _finished(folder: Path, made_by: dict[str, Any]) -> bool:
    """Whether ``folder`` holds an autoencoder that was made so."""
    if not folder.exists():
        return False
    card = read_json(folder / CARD) if (folder / CARD).is_file() else {}
    if {key: card.get(key) for key in made_by} != made_by:
        raise UserError(
            f"{folder} holds something else, or an SAE of another model, other settings or data; give another --out, "
            "or the settings it was made with."
        )
    return True
