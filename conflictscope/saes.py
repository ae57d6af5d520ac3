"""Sparse autoencoders from nothing: sample text, record it, train, and say on a card how good they are.

Training text is sampled from the model itself, with a seed, and mixed with conflict prompts about subjects of the train
split, in every phrasing family but the held-out one. Quality is measured on text sampled from other starts, and on
conflict prompts about subjects of the test split in all phrasings of the study.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from conflictscope import __version__
from interp.activation_store import ActivationStore
from interp.anatomy import Anatomy
from interp.conflicts import ConflictSet, Split, split_of
from interp.corpus import sampled_texts
from interp.errors import UserError
from interp.facts import HELD_OUT_PHRASING, PHRASINGS, STUDY_PHRASINGS, build_conflicts, relations, usable_facts
from interp.files import atomic_directory, read_json, write_json
from interp.models import fingerprint
from interp.sae import SparseAutoencoder, load_sae
from probes.sae_quality import SAEQuality, evaluate_saes
from probes.sae_training import SAETraining, save_trained, settings_record, train_sae

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

CARD = "card.json"

_HELD_OUT_TEXTS = 128
_HELD_OUT_PROMPTS = 128


def train_saes(
    model: TransformerBridge,
    name: str,
    layers: Sequence[int],
    out: Path,
    settings: SAETraining,
    *,
    n_texts: int = 2048,
    n_prompts: int = 6000,
    texts: Sequence[str] | None = None,
    recording: ActivationStore | None = None,
    seed: int = 0,
    device: str = "auto",
) -> list[SparseAutoencoder]:
    """Train one autoencoder for each layer, and measure it; what an earlier call finished is kept.

    Args:
        model: The bridge.
        name: What the model was loaded by.
        layers: The blocks whose outputs are to be explained.
        out: Folder for ``layer_N/`` (the autoencoder in sae_lens's format, and its card), the sampled ``texts/`` and
            the ``activations/``, which may be deleted afterwards.
        settings: What decides the training.
        n_texts: How many texts to sample for training.
        n_prompts: How many conflict prompts to mix with them.
        texts: Texts to train on instead of sampled ones.
        recording: A recording of all tokens to train on instead of texts and prompts.
        seed: Decides the split by subject, and what is sampled.
        device: Where to train.

    Returns:
        The autoencoders as they were written, in bfloat16, by layer.

    Raises:
        UserError: If a layer does not exist, or ``out`` holds autoencoders of other settings or data.
    """
    anatomy = Anatomy(model)
    sites = {layer: anatomy.site("block", layer) for layer in layers}
    if recording is None:
        mixture = training_texts(model, out, n_texts=n_texts, n_prompts=n_prompts, texts=texts, seed=seed)
        recording = ActivationStore.record(
            out / "activations",
            model,
            mixture,
            list(sites.values()),
            "all",
            name=name,
            seed=seed,
            dtype=torch.bfloat16,
            progress="Recording",
        )
        data = {"texts": len(mixture) - n_prompts, "sampled": texts is None, "conflict_prompts": n_prompts}
    else:
        if recording.basis["positions"] != "all" or not recording.complete:
            raise UserError(
                f"{recording.path} is no finished recording of all tokens; record with --position all, to the end."
            )
        if recording.basis["model"]["fingerprint"] != fingerprint(model):
            raise UserError(f"{recording.path} is a recording of another model; record this one.")
        data = {"recording": recording.basis["data"]["name"]}
    data |= {"digest": recording.basis["data"]["digest"], "tokens": recording.index.height, "split_seed": seed}
    made_by = {"data": data, "settings": settings_record(settings)}
    missing = [layer for layer in layers if not _finished(out / f"layer_{layer}", made_by)]
    for layer in missing:
        trained = train_sae(recording, sites[layer], settings, device=device)
        with atomic_directory(out / f"layer_{layer}") as folder:
            save_trained(trained, folder)
            # What is measured is what is written: weights in bfloat16.
            qualities = measure_saes(model, [load_sae(folder)], out, seed=seed)
            card = {
                "model": {"name": name, "fingerprint": fingerprint(model), "dtype": _dtype(anatomy)},
                "layer": layer,
                **made_by,
                "quality": {part: quality[0].to_record() for part, quality in qualities.items()},
                "versions": {
                    "conflictscope": __version__,
                    **{package: importlib.metadata.version(package) for package in ("sae-lens", "torch")},
                },
            }
            write_json(folder / CARD, card)
    return [load_sae(out / f"layer_{layer}") for layer in layers]


def training_texts(
    model: TransformerBridge, out: Path, *, n_texts: int, n_prompts: int, texts: Sequence[str] | None, seed: int
) -> list[str]:
    """Sampled (or given) texts and conflict prompts of the train split, shuffled together."""
    free = texts
    if free is None:
        free = sampled_texts(
            model, n_texts, out / "texts" / "train", split="train", seed=seed, progress="Sampling text"
        )
    known = tuple(phrasing for phrasing in PHRASINGS if phrasing != HELD_OUT_PHRASING)
    prompts = [example.prompt for example in _prompts("train", known, seed)]
    if len(prompts) < n_prompts:
        raise UserError(f"There are {len(prompts)} conflict prompts of the train split, fewer than {n_prompts}.")
    rng = random.Random(seed)
    mixture = [*free, *rng.sample(prompts, n_prompts)]
    rng.shuffle(mixture)
    return mixture


def measure_saes(
    model: TransformerBridge, saes: Sequence[SparseAutoencoder], folder: Path, *, seed: int = 0
) -> dict[str, list[SAEQuality]]:
    """Measure autoencoders on text that nobody trained on: sampled, and conflict prompts about held-out subjects.

    Args:
        model: The bridge.
        saes: The autoencoders.
        folder: Where sampled texts are kept.
        seed: Decides the split and what is sampled.

    Returns:
        For ``text`` and for ``conflict_prompts`` the quality of each.
    """
    text = sampled_texts(
        model, _HELD_OUT_TEXTS, folder / "texts" / "dev", split="dev", seed=seed, progress="Sampling held-out text"
    )
    conflicts = _prompts("test", STUDY_PHRASINGS, seed).select(kind="conflict")
    prompts = random.Random(seed).sample([example.prompt for example in conflicts], _HELD_OUT_PROMPTS)
    return {
        "text": evaluate_saes(model, saes, text, progress="Measuring on text"),
        "conflict_prompts": evaluate_saes(model, saes, prompts, progress="Measuring on conflict prompts"),
    }


def sae_table(saes: Sequence[SparseAutoencoder]) -> pl.DataFrame:
    """What the cards say about quality, a row for each autoencoder and kind of text."""
    parts = ("text", "conflict_prompts")
    records = {part: [sae.card["quality"][part] for sae in saes] for part in parts}
    return quality_table([sae.layer for sae in saes], records)


def quality_table(layers: Sequence[int], records: Mapping[str, Sequence[Mapping[str, Any]]]) -> pl.DataFrame:
    """Records of quality by kind of text, a row for each layer and kind."""
    return pl.DataFrame(
        [
            {
                "layer": layer,
                "on": part.replace("_", " "),
                "active": f"{record['active']:.1f}",
                "explained variance": f"{record['explained_variance']:.3f}",
                "loss recovered": f"{record['loss_recovered']:.3f}",
                "loss increase": "{value:.3f} [{low:.3f}, {high:.3f}]".format(**record["loss_increase"]),
                "same next token": "{value:.2f} [{low:.2f}, {high:.2f}]".format(**record["same_next_token"]),
                "dead": record["dead_features"],
            }
            for part, found in records.items()
            for layer, record in zip(layers, found, strict=True)
        ]
    )


def check_unseen(saes: Sequence[SparseAutoencoder], seed: int) -> None:
    """Refuse autoencoders that were trained on conflict prompts about subjects that ``seed`` keeps for dev and test.

    Raises:
        UserError: If one was.
    """
    for sae in saes:
        data = sae.card.get("data", {})
        trained_with = data.get("split_seed")
        if data.get("conflict_prompts") and trained_with != seed:
            raise UserError(
                f"The SAE {sae.name} was trained on subjects of the train split of seed {trained_with}, some of which "
                f"seed {seed} keeps for the test; use --seed {trained_with}, or train SAEs with --seed {seed}."
            )


def _prompts(split: Split, phrasings: Sequence[str], seed: int) -> ConflictSet:
    """Prompts of every kind about all usable facts of one split."""
    facts = {
        name: [fact for fact in usable_facts(name) if split_of(fact.subject, seed) == split] for name in relations()
    }
    return build_conflicts(facts, seed=seed, phrasings=phrasings)


def _finished(folder: Path, made_by: dict[str, Any]) -> bool:
    """Whether ``folder`` holds an autoencoder that was made so."""
    if not (folder / CARD).is_file():
        return False
    card = read_json(folder / CARD)
    found = {key: card.get(key) for key in made_by}
    if found != made_by:
        raise UserError(
            f"{folder} holds an SAE of other settings or data; give another --out, or the settings it was made with."
        )
    return True


def _dtype(anatomy: Anatomy) -> str:
    return str(anatomy.dtype).removeprefix("torch.")
