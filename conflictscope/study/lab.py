"""Share what methods need: head scores, recorded states, mean outputs, dev's prompts; each made once, on demand."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor, nn

from conflictscope.study.choice import Chosen, Dev, choose
from conflictscope.study.condition import Condition
from conflictscope.study.data import Prompts
from conflictscope.study.measure import Reading
from conflictscope.study.method import Method, Shared
from interp.activation_store import ActivationStore
from interp.activations import record
from interp.anatomy import Anatomy
from interp.answers import Direction
from interp.attribution.examples import phrasing, with_partners
from interp.attribution.path_patching import PATH_PATCHING_VERSION, path_patching
from interp.attribution.scores import HeadScores
from interp.attribution.states import STATES_VERSION, last_token_states
from interp.conflicts import ConflictSet, evenly
from interp.corpus import sampled_texts
from interp.errors import UserError
from interp.generation import MAX_NEW_TOKENS
from interp.precision import rounding
from interp.records import Records
from interp.sae import SparseAutoencoder
from interventions.fitting.scale_data import ScaleData
from interventions.identity import ModelIdentity
from probes.detector import SOURCE_CLASSES

BUDGETS = {"none": 0.02, "neutral": 0.02, "aligned": 0.2, "irrelevant": 0.2}
"""The damage that is allowed on dev: mean nats of KL divergence by guard."""

_SCORED_ON = 96
_QUICK_TRIES, _QUICK_SCORED_ON, _QUICK_TEXTS, _QUICK_TEXT_TOKENS = 2, 24, 3, 16
_TEXTS = {"train": 56, "dev": 24}
_TEXT_TOKENS = 48
_LEARNED_FROM: dict[str, dict[str, int]] = {
    "train": {"conflicts": 720, "guards": 112},
    "dev": {"conflicts": 64, "guards": 48},
}


@dataclass(eq=False)
class Lab:
    """A model and a study's prompts, with what methods make of them; finished steps are kept in ``records``.

    Attributes:
        model: The model, or a bridge around it.
        name: What it was loaded by.
        prompts: The prompts.
        records: Where results are kept.
        seed: Decides what is drawn at random.
        quick: Use little of everything: a check that all runs, not a measurement.
        budgets: The damage that is allowed on dev, by guard.
        saes: Loads autoencoders of the model, for methods that edit features.
        new_tokens: Longest answer on test, in tokens.
        abilities: Whether what edits should leave alone (``interp.abilities``) is asked too.
    """

    model: nn.Module
    name: str
    prompts: Prompts
    records: Records
    _: KW_ONLY
    seed: int = 0
    quick: bool = False
    budgets: Mapping[str, float] = field(default_factory=BUDGETS.copy)
    saes: Callable[[], Sequence[SparseAutoencoder]] | None = None
    new_tokens: int = MAX_NEW_TOKENS
    abilities: bool = False

    def __post_init__(self) -> None:
        self.anatomy = Anatomy(self.model)
        self.reading = Reading(self.model, self.prompts.test, few=self.quick, new_tokens=self.new_tokens)
        self._chosen: dict[tuple[Method, Direction, bool], Chosen] = {}
        self._read: dict[Any, dict[str, Tensor]] = {}

    def read_at(self, sites: Sequence[str], prompts: ConflictSet | Sequence[str]) -> dict[str, Tensor]:
        """What sites hold at the ends of prompts, ``(n, d)`` float32 by site; read once in this process.

        Args:
            sites: The sites.
            prompts: Conflict data or texts.
        """
        key = tuple(sites), prompts.digest if isinstance(prompts, ConflictSet) else tuple(prompts)
        if key not in self._read:
            found = record(self.model, prompts, sites, progress="Recording")
            self._read[key] = {site: found[site].flatten(1).float() for site in sites}
        return self._read[key]

    def on(self, prompts: Prompts) -> Lab:
        """A lab for the same model on other prompts, which keeps its results in the same place."""
        return replace(self, prompts=prompts)

    @property
    def asked(self) -> ConflictSet:
        """Test's prompts."""
        return self.prompts.test

    @cached_property
    def identity(self) -> ModelIdentity:
        """What the model is recognised by."""
        return ModelIdentity.of(self.model, self.name)

    @cached_property
    def dev(self) -> Dev:
        """What candidates compete on."""
        return Dev.of(self.model, self.prompts.dev, self.texts("dev"), seed=self.seed, few=self.quick)

    def chosen(self, method: Method, towards: Direction, *, within_budget: bool = True) -> Chosen:
        """What dev chooses of a method's candidates; ``within_budget`` is that of ``choose``.

        Raises:
            UserError: If the method cannot run, or has no candidate.
        """
        key = (method, towards, within_budget)
        if key not in self._chosen:
            self._chosen[key] = choose(self, self.candidates(method, towards), towards, within_budget=within_budget)
        return self._chosen[key]

    def share(self, name: Shared) -> None:
        """Make what several methods start from, which is then kept.

        Raises:
            UserError: If it cannot be made of these prompts.
        """
        if name == "texts":
            self.texts("train")
        else:
            getattr(self, name)

    def settle(self, method: Method, towards: Direction, chosen: Chosen) -> None:
        """Take as dev's choice of a method what a search found otherwise."""
        self._chosen[method, towards, True] = chosen

    def candidates(self, method: Method, towards: Direction) -> Sequence[Condition]:
        """What a method has to try; in a quick study some of it, evenly.

        Raises:
            UserError: If the method cannot run, or has no candidate.
        """
        candidates = method.candidates(self, towards)
        if not candidates:
            raise UserError(f"{method.name} has nothing to try towards {towards} on this model and these prompts.")
        return candidates[:: -(-len(candidates) // _QUICK_TRIES)] if self.quick else candidates

    def texts(self, split: Literal["train", "dev"]) -> list[str]:
        """Ordinary text that the model writes itself, to be left as it is."""
        count = _QUICK_TEXTS if self.quick else _TEXTS[split]
        return sampled_texts(
            self.model,
            count,
            self.records.folder / "texts",
            split=split,
            seed=self.seed,
            new_tokens=_QUICK_TEXT_TOKENS if self.quick else _TEXT_TOKENS,
            batch_size=count,
            progress=f"Sampling text: {split}",
        )

    @cached_property
    def scored(self) -> ConflictSet:
        """Some conflict prompts of train, those on which heads are scored; each has a partner to be corrupted with."""
        count = _QUICK_SCORED_ON if self.quick else _SCORED_ON
        train = self.prompts.train.select(kind="conflict").examples
        if len({phrasing(example) for example in train}) > count // 2:
            # One of each would have no partner: take fewer phrasings, of which there are two at least.
            train = with_partners(train)
            phrasings = list(dict.fromkeys(phrasing(example) for example in train))
            some = self.rng("scored").sample(phrasings, min(len(phrasings), count // 2))
            train = [example for example in train if phrasing(example) in some]
        return ConflictSet(self.prompts.train.name, tuple(with_partners(evenly(train, count, self.seed))))

    @cached_property
    def head_scores(self) -> dict[str, HeadScores]:
        """Path patching on ``scored``, by metric: ``logit_diff`` and both ``..._probability``.

        Raises:
            UserError: If no prompt has a partner to be corrupted with.
        """
        some = self.scored
        return self.records.head_scores(
            "head_scores",
            [some.digest, self.seed],
            lambda: dict(
                path_patching(
                    self.model,
                    some,
                    name=self.name,
                    metrics=("logit_diff", "memory_probability", "context_probability"),
                    seed=self.seed,
                    progress="Path patching, all heads",
                )
            ),
            version=PATH_PATCHING_VERSION,
        )

    @cached_property
    def mean_outputs(self) -> Tensor:
        """Each head's mean z at the end of train's closed-book prompts, ``(n_layers, n_heads, d_head)``.

        Raises:
            UserError: If the data has no closed-book prompts.
        """
        prompts = [e.prompt for e in evenly(self.prompts.train.select(kind="none"), _SCORED_ON, self.seed)]
        if not prompts:
            raise UserError("A head's mean output needs prompts without a context, which this data does not have.")

        def compute() -> list[Any]:
            return last_token_states(self.model, prompts).z.mean(0).float().cpu().tolist()

        # Kept, since what they decide is kept under their digits, which may differ from run to run.
        return torch.tensor(self.records.json("mean_outputs", prompts, compute, version=STATES_VERSION))

    @cached_property
    def store(self) -> ActivationStore:
        """Residual streams at the ends of train's and dev's conflict prompts, with what each was answered from."""
        parts = [self.prompts.train.select(kind="conflict"), self.prompts.dev.select(kind="conflict")]
        prompts = ConflictSet(self.prompts.train.name, tuple(e for part in parts for e in part))
        sites = [self.anatomy.site("block", layer) for layer in range(self.anatomy.n_layers)]
        return ActivationStore.record(
            self.records.folder / f"recording-{prompts.digest[:12]}",
            self.model,
            prompts,
            sites,
            "last",
            name=self.name,
            seed=self.seed,
            answers=True,
            # Studies that learn from the same prompts share it.
            patience=-1,
            progress="Recording and answering",
        )

    @cached_property
    def answered(self) -> pl.DataFrame:
        """The rows of ``store`` that were answered from one source, with their number as ``row``."""
        return self.store.index.with_row_index("row").filter(pl.col("usage").is_in(SOURCE_CLASSES))

    def train_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Residual streams ``(n, d_model)`` of train after a block, and whether the context was followed, ``(n,)``.

        Raises:
            UserError: If all answers follow one source.
        """
        chosen = self.answered.filter(split="train")
        if (sources := chosen["usage"].n_unique()) < 2:
            raise UserError(
                f"The answers to {chosen.height} prompts of the train split follow {sources} of the two sources; both "
                "sources are needed: give more prompts, other relations, or another model."
            )
        states = self.store.read(self.anatomy.site("block", layer), chosen["row"].to_list())
        return states, torch.tensor((chosen["usage"] == "context").to_list())

    @cached_property
    def scale_data(self) -> dict[Literal["train", "dev"], ScaleData]:
        """Prompts and texts of both splits as tokens, for methods that learn scales.

        Raises:
            UserError: If the data lacks a kind of prompts.
        """
        splits: tuple[Literal["train", "dev"], ...] = ("train", "dev")
        return {
            split: ScaleData(
                self.model,
                self.prompts.part(split).examples,
                self.texts(split),
                conflicts=self.learned_from[split]["conflicts"],
                guards=self.learned_from[split]["guards"],
                seed=self.seed,
                progress=f"Guards: {split}",
            )
            for split in splits
        }

    @property
    def scale_basis(self) -> list[Any]:
        """What ``scale_data`` depends on, for the keys of records: it need not be made to find what was learned."""
        digests = [self.prompts.train.digest, self.prompts.dev.digest]
        return [*digests, self.texts("train"), self.texts("dev"), self.learned_from, self.seed, *rounding(self.model)]

    @property
    def learned_from(self) -> dict[str, dict[str, int]]:
        """How many conflict prompts and guards scales are learned from and checked on, by split."""
        return {split: {"conflicts": 2, "guards": 1} for split in _LEARNED_FROM} if self.quick else _LEARNED_FROM

    @cached_property
    def autoencoders(self) -> Sequence[SparseAutoencoder]:
        """The model's autoencoders.

        Raises:
            UserError: If there are none.
        """
        if self.saes is None:
            raise UserError(f"There are no SAEs of {self.name} to edit features with; train some with `sae train`.")
        return self.saes()

    def rng(self, *parts: object) -> random.Random:
        """A generator that depends on the seed and on what it is for."""
        return random.Random("/".join(map(str, (self.seed, *parts))))
