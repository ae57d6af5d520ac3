"""Make conflict detectors from what was recorded of train, dev and test: each reads something else.

What has many weights is fitted on train, with a strength that is chosen on dev in phrasings that a fold was not fitted
on. What reads a few numbers (two passes, head lens, number of tokens) is fitted on dev, as are the ensembles. Nothing
is chosen on test.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.activations import sites_of
from interp.anatomy import Anatomy
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.families import FAMILIES, variant_of
from interp.inputs import token_ids, tokenizer_of
from probes.conflict_detectors import (
    HEAD_LENS,
    NAMED_TOKENS,
    TWO_PASSES,
    NearestSubspaces,
    PhrasingDirections,
    agreement,
    cross_validated,
    ensemble,
    family_curve,
    head_lens_features,
    named_token_features,
    shuffled_within,
    two_pass_features,
)
from probes.joint import STRENGTHS, JointProbe, family_threshold, left_out_scores, ranks
from probes.linear import ProbeSet

DETECTORS_VERSION = 2
"""Version of the detectors: raise it when the same prompts would get other scores."""

_RANKS = (0, 4, 16, 64)
_NARROW_STRENGTH = 1e-3
_SHUFFLES = 3
JOINT, _UPPER = "z, middle layers", "z, middle and upper layers"
_LENS, _TWO_PASSES = "head lens: ", f"two passes: all {len(TWO_PASSES)}"
_NAMED = f"two passes: named tokens, all {len(NAMED_TOKENS)}"
_ROWS_AT_ONCE = 64

Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Part:
    """Prompts of one part, with what the model holds at their last tokens.

    Attributes:
        prompts: The prompts.
        states: By site, a row for each prompt: ``(n, d)``, for z also ``(n, n_heads, d_head)``.
        bare: The final residual stream of each prompt's bare question, ``(n, d_model)``; ``None`` for train.
    """

    prompts: ConflictSet
    states: Mapping[str, Tensor]
    bare: Tensor | None = None

    @cached_property
    def is_conflict(self) -> list[bool]:
        """What each prompt is."""
        return [example.kind == "conflict" for example in self.prompts]

    @cached_property
    def variants(self) -> list[str]:
        """The variant of each prompt."""
        return [variant_of(example) for example in self.prompts]

    @cached_property
    def phrasings(self) -> list[tuple[str, str]]:
        """Layout and telling of each prompt."""
        return [(f.layout, f.telling) for f in (FAMILIES[example.template] for example in self.prompts)]

    @cached_property
    def subjects(self) -> list[str]:
        """The subject of each prompt."""
        return [example.subject for example in self.prompts]

    def at(self, sites: Sequence[str]) -> dict[str, Tensor]:
        """The values at some sites."""
        return {site: self.states[site] for site in sites}


@dataclass(frozen=True, eq=False)
class Detector:
    """What one detector says of every prompt.

    Attributes:
        name: What it is called.
        passes: What it costs, in forward passes of the prompt; one that reads lower layers needs part of one.
        scores: Log odds of a conflict by part, ``(n,)`` each; of train there are none.
        about: What was chosen, and where.
    """

    name: str
    passes: float
    scores: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Detecting:
    """Make all detectors from recorded parts.

    Attributes:
        model: The model, or a bridge around it.
        parts: ``train``, ``dev`` and those of ``TESTED``.
        memory_heads: The heads that push most towards memory.
        context_heads: Those that push most towards the context.
        seed: Decides what is drawn at random.
        strengths: Regularisation strengths of probes, to choose among.
    """

    model: nn.Module
    parts: Mapping[str, Part]
    memory_heads: Sequence[Head]
    context_heads: Sequence[Head]
    seed: int = 0
    strengths: Sequence[float] = STRENGTHS

    def __post_init__(self) -> None:
        self.anatomy = Anatomy(self.model)
        self._scored = [name for name in self.parts if name != "train"]
        self._chosen: dict[tuple[str, ...], float] = {}

    @property
    def makers(self) -> dict[str, Callable[[], list[Detector]]]:
        """What makes the detectors, group by group; each group may be made alone."""
        return {
            "floor": self.floor,
            "shuffled": self.shuffled,
            "one-site": self.one_site,
            "joint": self.joint,
            "heads": self.found_heads,
            "lens": self.head_lens,
            "two-passes": self.two_passes,
            "named-tokens": self.named_tokens,
            "invariant": self.invariant,
        }

    @property
    def z_sites(self) -> list[str]:
        """Every head's z in the middle third of the layers, below what edits change."""
        return sites_of(self.model, ["z"], middle_layers(self.anatomy))

    @property
    def residual_sites(self) -> list[str]:
        """The residual stream after the same layers."""
        return sites_of(self.model, ["residual"], middle_layers(self.anatomy))

    @property
    def upper_sites(self) -> list[str]:
        """Every head's z in all layers but the lowest third."""
        return sites_of(self.model, ["z"], range(middle_layers(self.anatomy).start, self.anatomy.n_layers))

    def floor(self) -> list[Detector]:
        """How many tokens a prompt has."""
        tokenizer = tokenizer_of(self.model)

        def lengths(part: Part) -> Tensor:
            ids = token_ids(tokenizer, [example.prompt for example in part.prompts])
            return torch.tensor([[float(len(one))] for one in ids])

        return [self._narrow("floor: number of tokens", 0, lengths)]

    def shuffled(self) -> list[Detector]:
        """The probe of several layers on labels shuffled within relation and layout, several times."""
        train = self.parts["train"]
        relations = [example.relation for example in train.prompts]
        strata = [(relation, layout) for relation, (layout, _) in zip(relations, train.phrasings, strict=True)]
        return [
            self._wide(
                f"control: shuffled labels {number}",
                self.z_sites,
                labels=shuffled_within(train.is_conflict, strata, seed=self.seed + number),
            )
            for number in range(1, _SHUFFLES + 1)
        ]

    def one_site(self) -> list[Detector]:
        """A probe at one site, the best on dev of the middle third's."""
        train, dev, sites = self.parts["train"], self.parts["dev"], [*self.z_sites, *self.residual_sites]
        labels = ["conflict" if one else "other" for one in (*train.is_conflict, *dev.is_conflict)]
        best = ProbeSet.fit(
            {s: torch.cat([p.states[s].flatten(1).float() for p in (train, dev)]) for s in sites},
            labels,
            validation=[False] * len(train.prompts) + [True] * len(dev.prompts),
            classes=("other", "conflict"),
            device="cpu",
        ).best
        scores = {n: best.logits(self.parts[n].states[best.site])[:, 0] for n in self._scored}
        about = {"site": best.site, "strength": best.strength}
        return [Detector("one site", self._passes([best.site]), scores, about)]

    def joint(self) -> list[Detector]:
        """Probes on several sites at once."""
        return [
            self._wide(JOINT, self.z_sites),
            self._wide("z and residual, middle layers", [*self.z_sites, *self.residual_sites]),
            self._wide(_UPPER, self.upper_sites),
        ]

    def found_heads(self) -> list[Detector]:
        """A probe on the z of the found heads alone."""
        heads = sorted({*self.memory_heads, *self.context_heads})
        sites = [self._z_site(layer) for layer, _ in heads]
        values = {n: {f"{layer}.{h}": self._z(p, layer)[:, h] for layer, h in heads} for n, p in self.parts.items()}
        return [self._wide("z of the found heads", sites, values=values)]

    def head_lens(self) -> list[Detector]:
        """What the found heads write, read through the unembedding, and the same of random heads."""
        alike = f"head lens, as many random heads: all {len(HEAD_LENS)}"
        rng, heads = random.Random(f"{self.seed}/random heads"), self.anatomy.heads
        recorded = [h for h in heads if self._z_site(h[0]) in self.parts["dev"].states]
        taken = {*self.memory_heads, *self.context_heads}
        others = [head for head in recorded if head not in taken] or recorded
        count = min(len(self.memory_heads), max(1, len(others) // 2))
        drawn = rng.sample(others, min(2 * count, len(others)))
        found = {n: self._lens(self.parts[n], self.memory_heads, self.context_heads) for n in self._scored}
        blind = {n: self._lens(self.parts[n], drawn[:count], drawn[count:] or drawn) for n in self._scored}
        return [
            self._narrow_of(f"{_LENS}divergence", 1, {n: f[:, :1] for n, f in found.items()}),
            self._narrow_of(f"{_LENS}top tokens differ", 1, {n: f[:, 1:2] for n, f in found.items()}),
            self._narrow_of(f"{_LENS}all {len(HEAD_LENS)}", 1, found),
            self._narrow_of(alike, 1, blind),
        ]

    def two_passes(self) -> list[Detector]:
        """What the context changes in the next-token distribution."""
        features = {name: self._two_passes(self.parts[name]) for name in self._scored}
        return [
            self._narrow_of("two passes: divergence", 2, {n: f[:, :1] for n, f in features.items()}),
            self._narrow_of("two passes: confidence gain", 2, {n: f[:, 1:2] for n, f in features.items()}),
            self._narrow_of(_TWO_PASSES, 2, features),
        ]

    def named_tokens(self) -> list[Detector]:
        """What the context changes for the tokens that it names."""
        features = {name: self._named_tokens(self.parts[name]) for name in self._scored}
        return [self._narrow_of(_NAMED, 2, features)]

    def invariant(self) -> list[Detector]:
        """Probe and nearest subspace without the directions in which phrasings differ."""
        train = self.parts["train"]
        side_by_side = {n: _side_by_side(p.at(self.z_sites)) for n, p in self.parts.items()}
        directions = PhrasingDirections.fit(side_by_side["train"], train.phrasings, train.variants, count=1000)
        removed = {n: directions.removed(values) for n, values in side_by_side.items()}
        about = {"phrasing_directions": len(directions.directions)}
        values = {n: {"removed": v} for n, v in removed.items()}
        probe = self._wide("z without phrasing directions", self.z_sites, values=values)
        spaces = NearestSubspaces.fit(removed["train"], train.variants, rank=max(_RANKS))
        dev = self.parts["dev"].is_conflict
        rank = max(_RANKS, key=lambda rank: ranks(spaces.scores(removed["dev"], rank=rank), dev))
        near = {n: spaces.scores(removed[n], rank=rank)[:, None] for n in self._scored}
        nearest = self._narrow_of("nearest subspace", self._passes(self.z_sites), near, {**about, "rank": rank})
        return [Detector(probe.name, probe.passes, probe.scores, {**probe.about, **about}), nearest]

    def ensembles(self, made: Sequence[Detector]) -> list[Detector]:
        """Means of some detectors' standardised log odds, or the lowest; dev chooses which head lens takes part."""
        dev, by_name = self.parts["dev"].is_conflict, {detector.name: detector for detector in made}
        lenses = [detector for name, detector in by_name.items() if name.startswith(_LENS)]
        lens = max(lenses, key=lambda one: ranks(one.scores["dev"], dev))
        joint, two_passes = by_name[JOINT], by_name[_TWO_PASSES]
        ensembles = []
        for name, combine, some in (
            ("ensemble: z, head lens", ensemble, (joint, lens)),
            ("ensemble: z, head lens, two passes", ensemble, (joint, lens, two_passes)),
            ("both: z, named tokens", agreement, (joint, by_name[_NAMED])),
        ):
            on = [member.scores["dev"] for member in some]
            together = {n: combine([m.scores[n] for m in some], on)[:, None] for n in self._scored}
            about = {"members": [member.name for member in some]}
            ensembles.append(self._narrow_of(name, max(member.passes for member in some), together, about))
        return ensembles

    def curve(self, counts: Sequence[int]) -> list[dict[str, Any]]:
        """What the probe of several layers is worth in unseen phrasings by the number of families it was fitted on.

        Args:
            counts: How many families; all are added.
        """
        train, test = self.parts["train"], self.parts["unseen_families"]
        points = family_curve(
            (train.at(self.z_sites), train.is_conflict, train.phrasings),
            (test.at(self.z_sites), test.is_conflict),
            [*counts, len(set(train.phrasings))],
            strength=self._strength(self.z_sites),
            seed=self.seed,
        )
        return [point._asdict() for point in points]

    def thresholds(self, keeps: Sequence[float]) -> dict[str, float]:
        """The log odds of the probe of several layers that a gate would open at, by the share of conflicts to keep.

        As for a gate they are conformal over families of dev, each scored by a probe that saw no part of it; a share
        that there are too few families for is left out.
        """
        train, dev = self.parts["train"], self.parts["dev"]
        learned = (train.at(self.z_sites), train.is_conflict, train.phrasings)
        asked, strength = (dev.at(self.z_sites), dev.phrasings), self._strength(self.z_sites)
        scores = left_out_scores(learned, asked, strength=strength)[torch.tensor(dev.is_conflict)]
        families = [example.template for example in dev.prompts if example.kind == "conflict"]
        found = {}
        for keep in keeps:
            with suppress(UserError):
                found[f"{keep:g}"] = family_threshold(scores, families, keep)
        return found

    def ceiling(self) -> list[Detector]:
        """What probes reach that are fitted on the unseen families themselves, on other subjects.

        The best strength on these very prompts is taken: it is what there is to reach at most.
        """
        part, found = "unseen_families", []
        test = self.parts[part]
        for name, sites in {JOINT: self.z_sites, _UPPER: self.upper_sites}.items():
            folds = partial(cross_validated, test.at(sites), test.is_conflict, test.subjects, seed=self.seed)
            tried = {strength: folds(strength=strength) for strength in self.strengths}
            best = max(tried, key=lambda strength: ranks(tried[strength], test.is_conflict))
            found.append(Detector(name, self._passes(sites), {part: tried[best]}, {"strength": best}))
        return found

    def _strength(self, sites: Sequence[str], values: Mapping[str, Mapping[str, Tensor]] | None = None) -> float:
        """The strength that ranks best on dev's phrasings, each scored without its parts."""
        if len(self.strengths) == 1:
            return self.strengths[0]
        if (key := tuple(sites)) not in self._chosen or values is not None:
            train, dev = self.parts["train"], self.parts["dev"]
            first, last = (values[n] if values else self.parts[n].at(sites) for n in ("train", "dev"))
            learned, asked = (first, train.is_conflict, train.phrasings), (last, dev.phrasings)
            worth = {s: ranks(left_out_scores(learned, asked, strength=s), dev.is_conflict) for s in self.strengths}
            best = max(worth, key=worth.__getitem__)
            if values is not None:
                return best
            self._chosen[key] = best
        return self._chosen[key]

    def _wide(
        self,
        name: str,
        sites: Sequence[str],
        *,
        values: Mapping[str, Mapping[str, Tensor]] | None = None,
        labels: Sequence[bool] | None = None,
    ) -> Detector:
        """A probe with many weights, fitted on train: of the values given, which come from these sites."""
        train, strength = self.parts["train"], self._strength(sites, values)
        features = {n: values[n] if values else part.at(sites) for n, part in self.parts.items()}
        probe = JointProbe.fit(features["train"], train.is_conflict if labels is None else labels, strength=strength)
        scores = {n: probe.log_odds(features[n]) for n in self._scored}
        return Detector(name, self._passes(sites), scores, {"strength": strength})

    def _narrow(self, name: str, passes: float, features: Callable[[Part], Tensor]) -> Detector:
        return self._narrow_of(name, passes, {n: features(self.parts[n]) for n in self._scored})

    def _narrow_of(
        self, name: str, passes: float, features: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
    ) -> Detector:
        """A probe on a few numbers, fitted on dev."""
        labels = self.parts["dev"].is_conflict
        probe = JointProbe.fit({"numbers": features["dev"]}, labels, strength=_NARROW_STRENGTH)
        return Detector(name, passes, {n: probe.log_odds({"numbers": f}) for n, f in features.items()}, about or {})

    def _passes(self, sites: Sequence[str]) -> float:
        layers = [int(site.split(".")[1]) for site in sites]
        return round((max(layers) + 1) / self.anatomy.n_layers, 3)

    def _z_site(self, layer: int) -> str:
        return self.anatomy.site("output_projection", layer)

    def _z(self, part: Part, layer: int) -> Tensor:
        values = part.states[self._z_site(layer)]
        return values.reshape(len(values), self.anatomy.n_heads, -1)

    @property
    def _last_site(self) -> str:
        return self.anatomy.site("block", self.anatomy.n_layers - 1)

    def _here(self, values: Tensor) -> Tensor:
        return values.to(self.anatomy.device, self.anatomy.dtype)

    def _lens(self, part: Part, memory: Sequence[Head], context: Sequence[Head]) -> Tensor:
        """``head_lens_features`` of two groups of heads."""
        writes = [self._written(part, heads) for heads in (memory, context)]
        rows = []
        with torch.inference_mode():
            for *both, residual in zip(*(w.split(_ROWS_AT_ONCE) for w in (*writes, self._final(part))), strict=True):
                residual = self._here(residual)
                first, second = (self.anatomy.written_logits(self._here(one), residual) for one in both)
                rows.append(head_lens_features(first, second).cpu())
        return torch.cat(rows)

    def _written(self, part: Part, heads: Sequence[Head]) -> Tensor:
        """The sum of what some heads add to the residual stream, ``(n, d_model)``."""
        total = torch.zeros(())
        with torch.inference_mode():
            for layer in sorted({layer for layer, _ in heads}):
                own = [head for at, head in heads if at == layer]
                writes = [
                    self.anatomy.head_writes(layer, self._here(some))[0][:, own].sum(1).float().cpu()
                    for some in self._z(part, layer).split(_ROWS_AT_ONCE)
                ]
                total = total + torch.cat(writes)
        return total

    def _final(self, part: Part) -> Tensor:
        return part.states[self._last_site]

    def _two_passes(self, part: Part) -> Tensor:
        return self._compared(part, lambda with_context, without, _: two_pass_features(with_context, without))

    def _named_tokens(self, part: Part) -> Tensor:
        named = self._named(part)

        def features(with_context: Tensor, without: Tensor, rows: slice) -> Tensor:
            mask = torch.zeros(with_context.shape, dtype=torch.bool)
            for row, ids in zip(mask, named[rows], strict=True):
                row[ids] = True
            return named_token_features(with_context, without, mask.to(with_context.device))

        return self._compared(part, features)

    def _compared(self, part: Part, features: Callable[[Tensor, Tensor, slice], Tensor]) -> Tensor:
        """Features of the next-token logits of prompts and of their bare questions, and of which rows these are."""
        assert part.bare is not None
        found = []
        with torch.inference_mode():
            for start in range(0, len(part.prompts), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                told, bare = (self.anatomy.logits(self._here(some[rows])) for some in (self._final(part), part.bare))
                found.append(features(told, bare, rows).cpu())
        return torch.cat(found)

    def _named(self, part: Part) -> list[list[int]]:
        """All tokens that spell a word, or a piece of one, which stands in a prompt but not in its bare question."""
        tokenizer = tokenizer_of(self.model)
        prompts, bare = (
            token_ids(tokenizer, [getattr(example, name) for example in part.prompts])
            for name in ("prompt", "bare_prompt")
        )
        words, spelled = self._words, self._spelled
        told = (
            {words[i] for i in whole} - {words[i] for i in alone} for whole, alone in zip(prompts, bare, strict=True)
        )
        return [[i for word in some for i in spelled.get(word, ())] for some in told]

    @cached_property
    def _words(self) -> list[str]:
        """What each token spells, without spaces and capitals."""
        tokenizer = tokenizer_of(self.model)
        return [text.strip().lower() for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]

    @cached_property
    def _spelled(self) -> dict[str, list[int]]:
        """The tokens by what they spell, but for those that spell no letter and no digit."""
        found: dict[str, list[int]] = {}
        for token, word in enumerate(self._words):
            if any(map(str.isalnum, word)):
                found.setdefault(word, []).append(token)
        return found


def middle_layers(anatomy: Anatomy) -> range:
    """The middle third of the layers."""
    third = anatomy.n_layers // 3
    return range(third, max(anatomy.n_layers - third, third + 1))


def _side_by_side(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([one.flatten(1) for one in values.values()], 1)
