"""Sparse autoencoders from nothing: sample text, record it, train, and say on a card how good they are.

Training text is sampled from the model itself, with a seed, and mixed with conflict prompts about subjects of the
train split, in every phrasing family but the held-out one; their irrelevant contexts may be about any subject.
Quality is measured on text sampled from other starts, and on conflict prompts about subjects of the test split in all
phrasings of the study.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import nn

from conflictscope import __version__
from interp.activation_store import ActivationStore, texts_digest
from interp.anatomy import Anatomy
from interp.conflicts import ConflictSet, Split, split_of
from interp.corpus import sampled_texts
from interp.errors import UserError
from interp.facts import (
    HELD_OUT_PHRASING,
    LEARNED_PHRASINGS,
    STUDY_PHRASINGS,
    build_conflicts,
    relations,
    usable_facts,
)
from interp.files import atomic_directory, read_json, write_json
from interp.models import fingerprint
from interp.sae import SparseAutoencoder, load_sae
from probes.sae_quality import SAEQuality, evaluate_saes
from probes.sae_training import SAETraining, save_trained, settings_record, train_sae

CARD = "card.json"

_HELD_OUT_TEXTS = 128
_HELD_OUT_PROMPTS = 128


def train_saes(
    model: nn.Module,
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
        model: The model, or a bridge around it.
        name: What the model was loaded by.
        layers: The blocks whose outputs are to be explained.
        out: Folder for ``layer_N/`` (the autoencoder in sae_lens's format, and its card), the sampled ``texts/`` and
            the ``activations/``, which may be deleted afterwards.
        settings: What decides the training.
        n_texts: How many texts to sample for training.
        n_prompts: How many conflict prompts to mix with them.
        texts: Texts to train on instead of sampled ones.
        recording: A recording of all tokens to train on instead of texts and prompts. Of conflict examples only those
            of the train split that are not in the held-out phrasing are used.
        seed: Decides the split by subject, and what is sampled.
        device: Where to train.

    Returns:
        The autoencoders as they were written, in bfloat16, by layer.

    Raises:
        UserError: If a layer does not exist, or ``out`` holds autoencoders of other settings or data.
    """
    anatomy = Anatomy(model)
    sites = {layer: anatomy.site("block", layer) for layer in layers}
    mixture: list[str] = []
    if recording is None:
        mixture = training_texts(model, out, n_texts=n_texts, n_prompts=n_prompts, texts=texts, seed=seed)
        data: dict[str, Any] = {
            "texts": len(mixture) - n_prompts,
            "sampled": texts is None,
            "conflict_prompts": n_prompts,
            "digest": texts_digest(mixture),
            "split_seed": seed,
        }
    else:
        data = _recorded_data(recording, model, list(sites.values()))
    made_by = {
        "model": {"name": name, "fingerprint": fingerprint(model), "dtype": _dtype(anatomy)},
        "data": data,
        "settings": settings_record(settings),
    }
    missing = [layer for layer in layers if not _finished(out / f"layer_{layer}", made_by)]
    if missing and recording is None:
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
    for layer in missing:
        assert recording is not None
        trained = train_sae(recording, sites[layer], settings, rows=_training_rows(recording), device=device)
        with atomic_directory(out / f"layer_{layer}") as folder:
            save_trained(trained, folder)
            # What is measured is what is written: weights in bfloat16.
            qualities = measure_saes(model, [load_sae(folder)], out, seed=data["split_seed"])
            card = {
                **made_by,
                "layer": layer,
                "quality": {part: quality[0].to_record() for part, quality in qualities.items()},
                "versions": {
                    "conflictscope": __version__,
                    **{package: importlib.metadata.version(package) for package in ("sae-lens", "torch")},
                },
            }
            write_json(folder / CARD, card)
    return [load_sae(out / f"layer_{layer}") for layer in layers]


def _recorded_data(recording: ActivationStore, model: nn.Module, sites: Sequence[str]) -> dict[str, Any]:
    """What the card says about a recording that is trained on; refuses one that does not serve."""
    if recording.basis["positions"] != "all":
        raise UserError(f"{recording.path} is no recording of all tokens; record with --position all.")
    check_recording(recording, model)
    if unrecorded := [site for site in sites if site not in recording]:
        raise UserError(f"{recording.path} lacks {unrecorded[0]}; it has {', '.join(recording.sites)}.")
    rows = _training_rows(recording)
    used = recording.index if rows is None else recording.index.filter(pl.Series(rows.numpy()))
    return {
        "recording": recording.basis["data"]["name"],
        "conflict_prompts": 0 if rows is None else used["prompt"].n_unique(),
        "digest": recording.basis["data"]["digest"],
        "split_seed": recording.basis["seed"],
    }


def _training_rows(recording: ActivationStore) -> torch.Tensor | None:
    """Of a recording of conflict examples the rows that may be trained on; ``None`` where it is of texts."""
    if "split" not in recording.index.columns:
        return None
    usable = (pl.col("split") == "train") & (pl.col("template") != HELD_OUT_PHRASING)
    return torch.tensor(recording.index.select(usable.fill_null(False)).to_series().to_list())


def check_recording(recording: ActivationStore, model: nn.Module) -> None:
    """Refuse a recording that has not finished, or is of another model.

    Raises:
        UserError: If it is one.
    """
    if not recording.complete:
        raise UserError(f"The recording in {recording.path} has not finished; run the command that made it again.")
    if recording.basis["model"]["fingerprint"] != fingerprint(model):
        raise UserError(
            f"{recording.path} is a recording of {recording.basis['model']['name']} with other weights or in another "
            "dtype; record this model."
        )


def training_texts(
    model: nn.Module, out: Path, *, n_texts: int, n_prompts: int, texts: Sequence[str] | None, seed: int
) -> list[str]:
    """Sampled (or given) texts and conflict prompts of the train split, shuffled together."""
    prompts = [example.prompt for example in _prompts("train", LEARNED_PHRASINGS, seed)]
    if len(prompts) < n_prompts:
        raise UserError(f"There are {len(prompts)} conflict prompts of the train split, fewer than {n_prompts}.")
    free = texts
    if free is None:
        free = sampled_texts(model, n_texts, out / "texts", split="train", seed=seed, progress="Sampling text")
    rng = random.Random(seed)
    mixture = [*free, *rng.sample(prompts, n_prompts)]
    rng.shuffle(mixture)
    return mixture


def measure_saes(
    model: nn.Module, saes: Sequence[SparseAutoencoder], folder: Path, *, seed: int = 0
) -> dict[str, list[SAEQuality]]:
    """Measure autoencoders on text that nobody trained on: sampled, and conflict prompts about held-out subjects.

    Args:
        model: The model, or a bridge around it.
        saes: The autoencoders.
        folder: Where sampled texts are kept.
        seed: Decides the split and what is sampled.

    Returns:
        For ``text`` and for ``conflict_prompts`` the quality of each.
    """
    text = sampled_texts(
        model, _HELD_OUT_TEXTS, folder / "texts", split="dev", seed=seed, progress="Sampling held-out text"
    )
    conflicts = _prompts("test", STUDY_PHRASINGS, seed).select(kind="conflict")
    asked = random.Random(seed).sample(conflicts.examples, _HELD_OUT_PROMPTS)
    return {
        "text": evaluate_saes(model, saes, text, progress="Measuring on text"),
        "conflict_prompts": evaluate_saes(
            model,
            saes,
            [example.prompt for example in asked],
            clusters=[example.subject for example in asked],
            progress="Measuring on conflict prompts",
        ),
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


def check_unseen(saes: Sequence[SparseAutoencoder], held_out: Iterable[str]) -> None:
    """Refuse autoencoders that were trained on conflict prompts about subjects that are held out now.

    Args:
        saes: The autoencoders.
        held_out: Subjects of the dev and test split.

    Raises:
        UserError: If one was.
    """
    subjects = set(held_out)
    for sae in saes:
        data = sae.card.get("data", {})
        trained_with = data.get("split_seed")
        seen = [subject for subject in sorted(subjects) if split_of(subject, trained_with or 0) == "train"]
        if data.get("conflict_prompts") and seen:
            raise UserError(
                f"The SAE {sae.name} was trained on prompts about {len(seen)} of the subjects that are held out here, "
                f"{seen[0]} for one; use data of --seed {trained_with}, or train SAEs with the seed of these."
            )


def test_subjects(seed: int) -> list[str]:
    """The subjects of the fact tables that ``seed`` keeps for the test."""
    return _prompts("test", STUDY_PHRASINGS, seed).subjects


def _prompts(split: Split, phrasings: Sequence[str], seed: int) -> ConflictSet:
    """Prompts of every kind about all usable facts of one split."""
    facts = {
        name: [fact for fact in usable_facts(name) if split_of(fact.subject, seed) == split] for name in relations()
    }
    return build_conflicts(facts, seed=seed, phrasings=phrasings)


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


def _dtype(anatomy: Anatomy) -> str:
    return str(anatomy.dtype).removeprefix("torch.")
