"""Put edits behind a gate that opens for conflicts, so that they act nowhere else; a method of this project.

1. Record what residual stream, attention and MLP hold at the ends of prompts of every kind, in all layers below the
   lowest edited one, and fit a probe at every site that tells conflicts from all other kinds on train.
2. On dev, set each probe's threshold so that the wanted share of conflicts passes; of all sites take the one that lets
   fewest of the others through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.measure import measure
from conflictscope.study.method import Method, method_named
from conflictscope.study.record import UNEDITED
from interp.activations import record, sites_of
from interp.anatomy import located
from interp.answers import Direction
from interp.conflicts import CONTEXT_KINDS, ConflictSet
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.statistics import kept_share, rate
from interventions.base import Intervention
from interventions.config import effect_digest
from interventions.gate import ConflictGate
from probes.linear import ProbeSet
from probes.quality import auroc

GATE_VERSION = 1
"""Version of how gates are fitted: raise it when the same prompts would get another one."""

_EXAMPLES = {"train": 180, "dev": 120}
"""How many prompts of each kind are recorded at most."""


@dataclass(frozen=True, eq=False)
class Gate(Method):
    """Let edits act only where a probe sees a conflict.

    Attributes:
        edits: What is put behind the gate; ``None`` takes the heads that pruning chose.
        towards: The source that the given edits strengthen; ``None`` gates them towards either.
        keep: The share of dev's conflicts that the gate is to let pass.

    Raises:
        UserError: If ``keep`` is no share, or the edits cannot be gated.
    """

    name: ClassVar[str] = "gate"
    needs = "learning"
    starts_from = ("head_scores",)
    follows = ("pruning",)
    edits: tuple[Intervention, ...] | None = None
    towards: Direction | None = None
    keep: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise UserError(f"The share of conflicts that pass the gate lies between 0 and 1, not at {self.keep:g}.")
        if self.edits is not None:
            _check(self.edits)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """The one gate of all sites that lets fewest others through.

        Raises:
            UserError: If the edits strengthen the other source or start at layer 0, or there are too few prompts.
        """
        edits = self._edits(lab, towards)
        lowest = _lowest(edits)
        learned = {split: _learned_from(lab, split) for split in ("train", "dev")}
        # Kept, since what is measured is kept under the gate's digits, which may differ from run to run.
        found = lab.records.json(
            "gate",
            [*(part.digest for part in learned.values()), lowest, self.keep],
            lambda: _fitted(lab, learned["train"], learned["dev"], lowest, self.keep),
            version=GATE_VERSION,
        )
        part, layer = located(found["site"])
        gate = ConflictGate(part, layer, torch.tensor(found["weight"]), found["bias"], found["threshold"], edits)
        return [Condition(self.name, towards, {"site": found["site"], "keep": self.keep}, (gate,))]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """A gate that reads a random direction at the same site, set to let as many conflicts pass."""
        gate, dev = _gate_of(chosen), _learned_from(lab, "dev")
        generator = torch.Generator().manual_seed(lab.seed)
        weight = torch.randn(gate.weight.shape, generator=generator) * gate.weight.norm() / len(gate.weight) ** 0.5
        blind = replace(gate, weight=weight, bias=0.0)
        scores = _log_odds(lab, blind, dev)[[e.kind == "conflict" for e in dev]]
        blind = replace(blind, threshold=passing_threshold(scores, self.keep))
        return [Condition("random_gate", chosen.towards, edits=(blind,), control_of=chosen.method)]

    def details(self, lab: Lab, chosen: Condition) -> Mapping[str, Any]:
        """Where the gate and its control read, how often they open, and what they keep of gain and damage."""
        gate, (control,) = _gate_of(chosen), self.controls(lab, chosen)
        dev, unseen = _learned_from(lab, "dev"), lab.prompts.held_out
        scores, kinds = _log_odds(lab, gate, dev), np.array([e.kind for e in dev])
        ranked = auroc(scores.double().numpy(), kinds == "conflict", np.ones((1, len(kinds))))
        ungated = Condition("ungated", chosen.towards, edits=gate.edits)
        unedited, ungated, gated, blind = (
            measure(lab, condition).report for condition in (Condition(UNEDITED), ungated, chosen, control)
        )

        def kept(report: UsageReport) -> dict[str, Any]:
            shares = kept_shares(unedited, ungated, report, chosen.towards)
            if not unseen:
                return shares
            first, second, third = (r.select(template=unseen) for r in (unedited, ungated, report))
            return {**shares, "held_out_phrasing": kept_shares(first, second, third, chosen.towards)}

        return {
            "site": lab.anatomy.site(gate.part, gate.layer),
            "threshold": gate.threshold,
            "dev": {"auroc": float(ranked[0]), "opened": _passing(scores, gate.threshold, kinds)},
            "opened": _opened(lab, gate),
            "random_opened": _opened(lab, _gate_of(control)),
            "kept": kept(gated),
            "random_kept": kept(blind),
        }

    def _edits(self, lab: Lab, towards: Direction) -> tuple[Intervention, ...]:
        if self.edits is None:
            return lab.chosen(method_named("pruning"), towards).best.condition.edits
        if self.towards not in (None, towards):
            raise UserError(f"The given edits strengthen {self.towards}, so that no gate of them is towards {towards}.")
        return self.edits


def passing_threshold(scores: Tensor, keep: float) -> float:
    """The threshold that a new score exceeds with probability ``keep`` at least, if it is exchangeable with these.

    It is the ``floor((n + 1) * (1 - keep))``-th smallest of the ``n`` scores (Vovk et al. 2005, "Algorithmic Learning
    in a Random World").

    Args:
        scores: Of prompts that should pass, ``(n,)``.
        keep: The share that should, between 0 and 1.

    Raises:
        UserError: If there are too few scores for it.
    """
    rank = math.floor((len(scores) + 1) * (1 - keep))
    if rank < 1:
        raise UserError(
            f"There are {len(scores)} conflict prompts to set the gate's threshold on, too few to let {keep:g} of them "
            "pass; choose more relations or subjects, or a smaller share."
        )
    return float(scores.sort().values[rank - 1])


def kept_shares(
    unedited: UsageReport, ungated: UsageReport, gated: UsageReport, towards: Direction | None
) -> dict[str, dict[str, Any]]:
    """Which share of the ungated edit's gain and damage is left behind a gate, with intervals by subject.

    Args:
        unedited: The unedited model's answers.
        ungated: Answers to the same prompts under the edit.
        gated: The same behind the gate.
        towards: The source whose rate is the gain; ``None`` has damage only.

    Returns:
        ``gain``, and the losses of accuracy ``none``, ``aligned``, ``irrelevant``, as far as there are such prompts.
        Of what the ungated edit does not change the share is undefined.
    """
    shares: dict[str, dict[str, Any]] = {}
    for kind in CONTEXT_KINDS:
        if kind == "conflict" and towards is None:
            continue
        hit = pl.col("usage") == towards if kind == "conflict" else pl.col("memory_span_match")
        frames = [report.select(kind=kind).frame for report in (unedited, ungated, gated)]
        if len(frames[0]):
            hits = [frame.select(hit.cast(pl.Float64)).to_series().to_numpy() for frame in frames]
            share = kept_share(np.stack(hits, axis=1), frames[0]["subject"].to_list())
            shares["gain" if kind == "conflict" else kind] = share.to_record()
    return shares


def _check(edits: Sequence[Intervention]) -> None:
    if any(isinstance(edit, ConflictGate) for edit in edits):
        raise UserError("The edits have a gate already; give those that it was made from.")
    if effect_digest(edits) is None:
        raise UserError("The edits change nothing, so that there is nothing to gate; a dial at 0 needs a trust.")
    _lowest(edits)


def _lowest(edits: Sequence[Intervention]) -> int:
    """The lowest edited layer."""
    # A dial may be turned later, wherever it stands.
    turned = [edit.turned(trust) for edit in edits for trust in (-1.0, 1.0)]
    layers = [layer for edit in turned for layer in edit.edited_layers]
    if not layers:
        raise UserError("No layer is edited, so that a gate has nothing to lie below; take an edit of layers.")
    if (lowest := min(layers)) == 0:
        raise UserError("Layer 0 is edited, so that no gate can lie below it; take an edit of higher layers.")
    return lowest


def _gate_of(condition: Condition) -> ConflictGate:
    (gate,) = condition.edits
    assert isinstance(gate, ConflictGate)
    return gate


def _learned_from(lab: Lab, split: Literal["train", "dev"]) -> ConflictSet:
    """As many prompts of each kind at random, where there are enough: subjects matter more than phrasings of one."""
    part, rng = lab.prompts.part(split), lab.rng("gate", split)
    kinds = [part.select(kind=kind).examples for kind in CONTEXT_KINDS]
    return ConflictSet(
        part.name, tuple(e for some in kinds for e in rng.sample(some, min(_EXAMPLES[split], len(some))))
    )


def _fitted(lab: Lab, train: ConflictSet, dev: ConflictSet, lowest: int, keep: float) -> dict[str, Any]:
    """The probe and its threshold: of all sites below the lowest edited layer, the one that opens least for others."""
    sites = sites_of(lab.model, layers=range(lowest))
    recorded = [
        record(lab.model, part, sites, progress=f"Recording: {part.examples[0].split}") for part in (train, dev)
    ]
    probes = ProbeSet.fit(
        {site: torch.cat([values[site] for values in recorded]) for site in sites},
        ["conflict" if e.kind == "conflict" else "other" for e in (*train, *dev)],
        validation=[False] * len(train) + [True] * len(dev),
        classes=("other", "conflict"),
        device=str(lab.anatomy.device),
        progress="Probes",
    )
    kinds = np.array([e.kind for e in dev])
    found = []
    for site, probe in probes.items():
        scores = recorded[1][site] @ probe.weight[0] + probe.bias[0]
        threshold = passing_threshold(scores[kinds == "conflict"], keep)
        others = sum(share for kind, share in _passing(scores, threshold, kinds).items() if kind != "conflict")
        found.append((others, site, threshold))
    _, site, threshold = min(found, key=lambda one: one[0])
    weight, bias = probes[site].weight[0].tolist(), float(probes[site].bias[0])
    return {"site": site, "weight": weight, "bias": bias, "threshold": threshold}


def _log_odds(lab: Lab, gate: ConflictGate, prompts: ConflictSet) -> Tensor:
    """What the gate reads at the end of each prompt, ``(n,)``."""
    site = lab.anatomy.site(gate.part, gate.layer)
    values = record(lab.model, prompts, [site], progress="Recording: what a gate reads")[site]
    return values @ gate.weight + gate.bias


def _passing(scores: Tensor, threshold: float, kinds: np.ndarray) -> dict[str, float]:
    """The share of each kind's prompts that pass."""
    is_open = (scores > threshold).numpy()
    return {kind: float(is_open[kinds == kind].mean()) for kind in CONTEXT_KINDS if (kinds == kind).any()}


def _opened(lab: Lab, gate: ConflictGate) -> dict[str, Any]:
    """The share of test's prompts of each kind for which the gate opens, in all phrasings and in the unseen one."""
    columns = {name: [getattr(e, name) for e in lab.asked] for name in ("kind", "subject", "template")}
    is_open = (_log_odds(lab, gate, lab.asked) > gate.threshold).double().numpy()
    frame = pl.DataFrame({**columns, "open": is_open})

    def shares(frame: pl.DataFrame) -> dict[str, Any]:
        parts = {kind: frame.filter(kind=kind) for kind in CONTEXT_KINDS}
        return {
            kind: rate(part["open"].to_numpy(), part["subject"].to_list()).to_record()
            for kind, part in parts.items()
            if len(part)
        }

    unseen = lab.prompts.held_out
    return {**shares(frame), **({"held_out_phrasing": shares(frame.filter(template=unseen))} if unseen else {})}
