"""What autoencoders are trained and measured on.

Training text is sampled from the model itself, with a seed, and mixed with conflict prompts about subjects of the
train split, in every phrasing family but the held-out one; their irrelevant contexts may be about any subject.
Quality is measured on text sampled from other starts, and on conflict prompts about subjects of the test split in all
phrasings of the study.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import nn

from interp.activation_store import ActivationStore, texts_digest
from interp.conflicts import ConflictExample, ConflictSet, Split, split_of
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
from interp.sae import SparseAutoencoder

_HELD_OUT_TEXTS = 128
_HELD_OUT_PROMPTS = 128


@dataclass(frozen=True)
class TrainingText:
    """Text to train on, mixed with conflict prompts.

    Attributes:
        texts: Texts; ``None`` samples them from the model.
        n_texts: How many to sample.
        n_prompts: How many conflict prompts to mix with them.
        seed: Decides the split by subject, and what is sampled.
    """

    texts: Sequence[str] | None = None
    n_texts: int = 2048
    n_prompts: int = 6000
    seed: int = 0

    def mixture(self, model: nn.Module, folder: Path) -> list[str]:
        """The texts and conflict prompts of the train split, shuffled together; sampled text is kept in ``folder``.

        Raises:
            UserError: If there are fewer conflict prompts than wanted.
        """
        prompts = [example.prompt for example in _prompts("train", LEARNED_PHRASINGS, self.seed)]
        if len(prompts) < self.n_prompts:
            raise UserError(
                f"There are {len(prompts)} conflict prompts of the train split, fewer than {self.n_prompts}."
            )
        free = self.texts
        if free is None:
            free = sampled_texts(model, self.n_texts, folder, split="train", seed=self.seed, progress="Sampling text")
        rng = random.Random(self.seed)
        mixture = [*free, *rng.sample(prompts, self.n_prompts)]
        rng.shuffle(mixture)
        return mixture

    def about(self, mixture: Sequence[str]) -> dict[str, Any]:
        """What an autoencoder's card says of this data."""
        return {
            "texts": len(mixture) - self.n_prompts,
            "sampled": self.texts is None,
            "conflict_prompts": self.n_prompts,
            "digest": texts_digest(mixture),
            "split_seed": self.seed,
        }


def about_recording(recording: ActivationStore, model: nn.Module, sites: Sequence[str]) -> dict[str, Any]:
    """What an autoencoder's card says of a recording that it is trained on.

    Raises:
        UserError: If it is none of all tokens, of another model, unfinished, or lacks a site.
    """
    if recording.basis["positions"] != "all":
        raise UserError(f"{recording.path} is no recording of all tokens; record with --position all.")
    recording.check(model)
    if unrecorded := [site for site in sites if site not in recording]:
        raise UserError(f"{recording.path} lacks {unrecorded[0]}; it has {', '.join(recording.sites)}.")
    rows = training_rows(recording)
    used = recording.index if rows is None else recording.index.filter(pl.Series(rows.numpy()))
    return {
        "recording": recording.basis["data"]["name"],
        "conflict_prompts": 0 if rows is None else used["prompt"].n_unique(),
        "digest": recording.basis["data"]["digest"],
        "split_seed": recording.basis["seed"],
    }


def training_rows(recording: ActivationStore) -> torch.Tensor | None:
    """Of a recording of conflict examples the rows that may be trained on; ``None`` where it is of texts."""
    if "split" not in recording.index.columns:
        return None
    usable = (pl.col("split") == "train") & (pl.col("template") != HELD_OUT_PHRASING)
    return torch.tensor(recording.index.select(usable.fill_null(False)).to_series().to_list())


def held_out_texts(model: nn.Module, folder: Path, seed: int) -> list[str]:
    """Sampled text that no autoencoder was trained on; it is kept in ``folder``."""
    label = "Sampling held-out text"
    return sampled_texts(model, _HELD_OUT_TEXTS, folder, split="dev", seed=seed, progress=label)


def held_out_prompts(seed: int) -> list[ConflictExample]:
    """Conflict prompts about subjects of the test split, in all phrasings of the study."""
    conflicts = _prompts("test", STUDY_PHRASINGS, seed).select(kind="conflict")
    return random.Random(seed).sample(conflicts.examples, _HELD_OUT_PROMPTS)


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
