"""Edit the features of sparse autoencoders that tell the source of an answer (SpARE).

Zhao et al. 2024 (arXiv 2410.15999). The formulas are in ``interventions.features``, the selection of features in
``probes.feature_selection``.

1. On train: each feature's mutual information with the source, and its mean activation with either source.
2. For each share of the information: the features that hold it, those of the other source to be removed, those of the
   wanted one to be added.
3. All runs of neighbouring autoencoders compete, with every share and every alpha.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conflictscope.methods._heads import DRAWS
from conflictscope.methods._steering import kept
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interp.errors import UserError
from interp.sae import SparseAutoencoder
from interventions.features import AlphaForm, EditedFeatures, FeatureEdit
from interventions.tokens import Tokens
from probes.feature_selection import FeatureStatistics, matched_random_features, select_features
from probes.sae_data import check_unseen

SHARES = (0.1, 0.3, 0.5)
"""The shares of the information that compete: the published K."""

ALPHAS = (1.0, 2.0, 4.0)
"""How far the edits that compete go."""

_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Spare(Method):
    """Remove the other source's features, and add those of the wanted one.

    Attributes:
        shares: The shares of the information that compete.
        alphas: How far the edits that compete go.
        alpha_form: What alpha multiplies.
        tokens: The tokens whose features are edited.
        layers: The layers whose autoencoders compete; ``None`` takes all that there are.
    """

    shares: tuple[float, ...] = SHARES
    alphas: tuple[float, ...] = ALPHAS
    alpha_form: AlphaForm = "targets"
    tokens: Tokens = "last_prompt"
    layers: tuple[int, ...] | None = None

    name = "spare"
    needs = "autoencoders"
    starts_from = ("store",)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Each run of neighbouring autoencoders, with every share and every alpha.

        Raises:
            UserError: If an autoencoder does not fit the model, or was trained on subjects that are held out here.
        """
        saes = self._saes(lab)
        edited = {
            (sae.layer, share): _selected(sae, self.statistics(lab, sae), share, towards)
            for sae in saes
            for share in self.shares
        }
        digests = {sae.layer: sae.digest[:12] for sae in saes}
        layers = list(digests)
        runs = [layers[i:j] for i in range(len(layers)) for j in range(i + 1, len(layers) + 1)]
        return [
            Condition(
                self.name,
                towards,
                {
                    "layers": run,
                    "share": share,
                    "alpha": alpha,
                    "alpha_form": self.alpha_form,
                    "tokens": self.tokens,
                    "saes": [digests[layer] for layer in run],
                },
                (FeatureEdit(tuple(edited[layer, share] for layer in run), alpha, self.alpha_form, self.tokens),),
            )
            for run, share, alpha in itertools.product(runs, self.shares, self.alphas)
        ]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """As many other features that fire as often."""
        (edit,) = chosen.edits
        assert isinstance(edit, FeatureEdit)
        saes = {sae.layer: sae for sae in self._saes(lab)}
        controls = []
        for draw in range(DRAWS):
            seed = lab.rng(chosen.name, draw).getrandbits(32)
            layers = []
            for layer in edit.layers:
                sae, removed = saes[layer.sae.layer], int((~layer.added).sum())
                statistics = self.statistics(lab, sae)
                drawn = matched_random_features(statistics, list(layer.sae.kept or ()), seed)
                layers.append(_edited(sae, statistics, drawn[:removed], drawn[removed:], chosen.towards))
            moved = replace(edit, layers=tuple(layers))
            controls.append(
                Condition("random_features", chosen.towards, {"draw": draw}, (moved,), control_of=chosen.method)
            )
        return controls

    def statistics(self, lab: Lab, sae: SparseAutoencoder) -> FeatureStatistics:
        """What the features of an autoencoder have to do with the source.

        Raises:
            UserError: If train's prompts do not tell.
        """
        return feature_statistics(lab, sae)

    def _saes(self, lab: Lab) -> list[SparseAutoencoder]:
        there = [sae.layer for sae in lab.autoencoders]
        if absent := [layer for layer in self.layers or () if layer not in there]:
            raise UserError(f"There is no SAE of layer {absent[0]}; there are SAEs of layers {str(there)[1:-1]}.")
        saes = [sae for sae in lab.autoencoders if self.layers is None or sae.layer in self.layers]
        if repeated := [sae.layer for sae in saes if there.count(sae.layer) > 1]:
            raise UserError(f"There are several SAEs of layer {repeated[0]}; give one for each layer.")
        for sae in saes:
            sae.check(lab.model, lab.name)
        check_unseen(saes, (e.subject for part in (lab.prompts.dev, lab.prompts.test) for e in part))
        return sorted(saes, key=lambda sae: sae.layer)


def feature_statistics(lab: Lab, sae: SparseAutoencoder) -> FeatureStatistics:
    """What the features of an autoencoder have to do with the source, on train, computed once.

    Raises:
        UserError: If all answers follow one source.
    """

    def compute() -> Tensor:
        states, follows = lab.train_states(sae.layer)
        device = lab.anatomy.device
        there = sae.to(device)
        encoded = torch.cat([there.encode(part.to(device)) for part in states.split(_ROWS_AT_ONCE)])
        found = FeatureStatistics.of(encoded, follows)
        parts = (found.information, found.context_mean, found.memory_mean, found.frequency)
        return torch.stack([part.double() for part in parts])

    return FeatureStatistics(*kept(lab, "feature_statistics", sae.digest, compute, torch.float64))


def _selected(sae: SparseAutoencoder, found: FeatureStatistics, share: float, towards: Direction) -> EditedFeatures:
    context, memory = select_features(found.information, found.expectation, share)
    removed, added = (memory, context) if towards == "context" else (context, memory)
    return _edited(sae, found, removed, added, towards)


def _edited(
    sae: SparseAutoencoder,
    found: FeatureStatistics,
    removed: Sequence[int],
    added: Sequence[int],
    towards: Direction | None,
) -> EditedFeatures:
    means = (found.memory_mean, found.context_mean)
    away, to = means if towards == "context" else reversed(means)
    return EditedFeatures.of(sae, removed, away[list(removed)], added, to[list(added)])
