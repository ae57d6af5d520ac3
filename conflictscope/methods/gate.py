"""Put edits behind a gate that opens for conflicts, so that they act nowhere else; a method of this project.

1. Record z, what heads write through, at the ends of prompts of every kind, in the middle third of the layers as far as
   these lie below the lowest edited one, and fit one probe of all of it that tells conflicts from all other kinds on
   train. Lower and higher layers carry over worse to phrasings and relations that a probe did not see.
2. Score each of dev's prompts by a probe that was fitted without the phrasing, or parts of it, that it is in; the
   strength that ranks them best is taken.
3. Set the threshold so that the wanted share of the conflicts of a new phrasing family passes, by these scores, or
   where there are too few families for that, of new prompts, by the scores of the probe itself.
4. What is stranger, where the gate decides, than 99 % of dev's prompts stays closed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from interp.anatomy import located
from interp.answers import Direction
from interp.conflicts import CONTEXT_KINDS, ConflictExample, ConflictSet
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.families import FAMILIES
from interp.statistics import kept_share, rate
from interventions.base import Intervention
from interventions.config import effect_digest
from interventions.gate import ConflictGate, Familiar, GateReading
from probes.joint import STRENGTHS, JointProbe, family_threshold, left_out_scores, ranks

GATE_VERSION = 4
"""Version of how gates are fitted: raise it when the same prompts would get another one."""

KEEPS = (0.95, 0.9, 0.8)
"""The shares of conflicts that a gate is set to let pass where no other ones are wanted."""

_EXAMPLES = {"train": 400, "dev": 200}
"""How many prompts of each kind are recorded at most."""
_FOLDS = 3
_FAMILIAR = 0.99
_ANY = 1e8
"""Log odds beyond all that is read."""


@dataclass(frozen=True, eq=False)
class Gate(Method):
    """Let edits act only where a probe sees a conflict.

    Attributes:
        edits: What is put behind the gate; ``None`` takes the heads that pruning chose.
        towards: The source that the given edits strengthen; ``None`` gates them towards either.
        keeps: The shares of conflicts that the gate is to let pass, which compete on dev.
        soft: Whether edits act in part where the probe is unsure; see ``ConflictGate``.

    Raises:
        UserError: If one of ``keeps`` is no share, or the edits cannot be gated.
    """

    name: ClassVar[str] = "gate"
    needs = "learning"
    starts_from = ("head_scores",)
    follows = ("pruning",)
    edits: tuple[Intervention, ...] | None = None
    towards: Direction | None = None
    keeps: tuple[float, ...] = KEEPS
    soft: bool = False

    def __post_init__(self) -> None:
        check_keeps(self.keeps)
        if self.edits is not None:
            _check(self.edits)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """The edits behind the gate that is fitted for the layers below them, at each threshold.

        Raises:
            UserError: If the edits strengthen the other source or start at layer 0, or there are too few prompts.
        """
        edits = self._edits(lab, towards)
        gates = fitted_gates(lab, _lowest(edits), self.keeps, edits, soft=self.soft)
        return [Condition(self.name, towards, {"keep": keep, "soft": self.soft}, (gate,)) for keep, gate in gates]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """A gate that reads a random direction at the same sites, set to let as many conflicts pass."""
        gate, dev = _gate_of(chosen), _learned_from(lab, "dev")
        generator = torch.Generator().manual_seed(lab.seed)

        def blind(weight: Tensor) -> Tensor:
            return torch.randn(weight.shape, generator=generator) * weight.norm() / len(weight) ** 0.5

        also = tuple(replace(reading, weight=blind(reading.weight)) for reading in gate.also)
        found = replace(gate, weight=blind(gate.weight), also=also, bias=0.0)
        is_conflict = torch.tensor([e.kind == "conflict" for e in dev])
        opened = float((_log_odds(lab, gate, dev)[is_conflict] > gate.threshold).float().mean())
        scores = _log_odds(lab, found, dev)[is_conflict]
        threshold = float(scores.sort().values[round((1 - opened) * len(scores)) - 1]) if opened < 1 else -_ANY
        found = replace(found, threshold=threshold)
        return [Condition("random_gate", chosen.towards, edits=(found,), control_of=chosen.method)]

    def details(self, lab: Lab, chosen: Condition) -> Mapping[str, Any]:
        """Where the gate and its control read, how often they open, and what they keep of gain and damage."""
        gate, (control,) = _gate_of(chosen), self.controls(lab, chosen)
        dev, unseen = _learned_from(lab, "dev"), lab.prompts.held_out
        scores, kinds = _log_odds(lab, gate, dev), np.array([e.kind for e in dev])
        fitted = _kept_fit(lab, _lowest(gate.edits))
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
            "sites": [lab.anatomy.site(reading.part, reading.layer) for reading in gate.readings],
            "threshold": gate.threshold,
            "keep": chosen.settings["keep"],
            "threshold_over": _threshold(fitted, dev, chosen.settings["keep"])[1],
            "dev": {
                "auroc": ranks(scores, kinds == "conflict"),
                "left_out_auroc": fitted["left_out_auroc"],
                "opened": _passing(scores, gate.threshold, kinds),
                "unlike": float((scores < -_ANY / 2).float().mean()),
            },
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


def check_keeps(keeps: Sequence[float]) -> None:
    """See that the shares of conflicts that a gate is to let pass are some.

    Raises:
        UserError: If there is none, or one is no share.
    """
    if not keeps or not all(0 < keep < 1 for keep in keeps):
        given = ", ".join(f"{keep:g}" for keep in keeps) or "nowhere"
        raise UserError(f"The share of conflicts that pass the gate lies between 0 and 1, not at {given}.")


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
    rank = math.floor((len(scores) + 1) * (1 - keep) + 1e-9)
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


def fitted_gates(
    lab: Lab, lowest: int, keeps: Sequence[float], edits: tuple[Intervention, ...], *, soft: bool = False
) -> list[tuple[float, ConflictGate]]:
    """Fit a gate for edits of a layer and those above it, once, and set its threshold to several shares.

    Args:
        lab: The lab, from whose train and dev it is learned.
        lowest: The lowest layer that may be edited.
        keeps: The shares of conflicts that it is to let pass.
        edits: What it lets through.
        soft: Whether it is soft.

    Returns:
        Each share with its gate; a share that there are too few prompts for is left out if another one is not.

    Raises:
        UserError: If there are too few prompts for any.
    """
    found, dev = _kept_fit(lab, lowest), _learned_from(lab, "dev")
    *also, main = (GateReading(*located(site), torch.tensor(weight)) for site, weight in found["weights"].items())
    familiar = found["familiar"]
    if familiar is not None:
        familiar = Familiar(torch.tensor(familiar["center"]), torch.tensor(familiar["scale"]), familiar["limit"])
    gates, refused = [], None
    for keep in keeps:
        try:
            threshold, _ = _threshold(found, dev, keep)
        except UserError as error:
            refused = error
            continue
        probe = (main.part, main.layer, main.weight, found["bias"], threshold)
        gates.append((keep, ConflictGate(*probe, edits, tuple(also), soft, familiar)))
    if refused is not None and not gates:
        raise refused
    return gates


def read_layers(n_layers: int, lowest: int) -> range:
    """The layers that a gate reads below the lowest edited one: the middle third of the model, as far as it lies there.

    Where most of it does not, it is the upper half of the layers below the edit.
    """
    end = min(lowest, 2 * n_layers // 3)
    return range(min(n_layers // 3, end // 2), end)


def opens(lab: Lab, gate: ConflictGate, prompts: ConflictSet | Sequence[str]) -> Tensor:
    """For which prompts a gate opens, boolean ``(n,)``."""
    return _log_odds(lab, gate, prompts) > gate.threshold


def _kept_fit(lab: Lab, lowest: int) -> dict[str, Any]:
    """What was fitted; kept, since what is measured is kept under its digits, which may differ from run to run."""
    learned = {split: _learned_from(lab, split) for split in ("train", "dev")}
    return lab.records.json(
        "gate",
        [*(part.digest for part in learned.values()), lowest],
        lambda: _fitted(lab, learned["train"], learned["dev"], lowest),
        version=GATE_VERSION,
    )


def _fitted(lab: Lab, train: ConflictSet, dev: ConflictSet, lowest: int) -> dict[str, Any]:
    """The probe of the sites below a layer, what dev's conflicts score, and what is familiar to it."""
    sites = [lab.anatomy.site("output_projection", layer) for layer in read_layers(lab.anatomy.n_layers, lowest)]
    recorded = [lab.read_at(sites, part) for part in (train, dev)]
    is_conflict = [[e.kind == "conflict" for e in part] for part in (train, dev)]
    parts = [[_parts(e) for e in part] for part in (train, dev)]
    scores: dict[float, Tensor] = {}
    has_folds = all(len(set(kind)) >= _FOLDS for kind in zip(*parts[0], strict=True))
    for strength in STRENGTHS:
        if has_folds:
            fitted_on, scored = (recorded[0], is_conflict[0], parts[0]), (recorded[1], parts[1])
            scores[strength] = left_out_scores(fitted_on, scored, strength=strength, folds=_FOLDS)
        else:
            scores[strength] = JointProbe.fit(recorded[0], is_conflict[0], strength=strength).log_odds(recorded[1])
    quality = {strength: ranks(found, is_conflict[1]) for strength, found in scores.items()}
    strength = max(quality, key=lambda one: quality[one])
    probe = JointProbe.fit(recorded[0], is_conflict[0], strength=strength)
    conflicts = torch.tensor(is_conflict[1])
    left_out, fitted = scores[strength][conflicts], probe.log_odds(recorded[1])[conflicts]
    return {
        "weights": {site: weight.tolist() for site, weight in probe.weights.items()},
        "bias": probe.bias,
        "strength": strength,
        "left_out": left_out.tolist(),
        "scores": fitted.tolist(),
        "left_out_auroc": quality[strength] if has_folds else None,
        "familiar": _familiar(recorded[0][sites[-1]], recorded[1][sites[-1]]),
    }


def _threshold(found: Mapping[str, Any], dev: ConflictSet, keep: float) -> tuple[float, str]:
    """The threshold, and whether it holds for new families or, where there are too few of them, for new prompts."""
    with suppress(UserError):
        return family_threshold(
            torch.tensor(found["left_out"]), [e.template for e in dev if e.kind == "conflict"], keep
        ), "families"
    return passing_threshold(torch.tensor(found["scores"]), keep), "prompts"


def _familiar(train: Tensor, dev: Tensor) -> dict[str, Any] | None:
    """What is familiar: nearly all of dev is; ``None`` where dev is too small to say so."""
    center, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    strangeness = Familiar(center, scale, 1.0).strangeness(dev).sort().values
    rank = math.ceil((len(dev) + 1) * _FAMILIAR)
    if rank > len(dev):
        return None
    return {"center": center.tolist(), "scale": scale.tolist(), "limit": float(strangeness[rank - 1])}


def _parts(example: ConflictExample) -> tuple[str, ...]:
    """What a prompt's words are made of, of which some are left out: its layout and its telling, or its phrasing."""
    family = FAMILIES.get(example.template)
    return (example.template,) if family is None else (family.layout, family.telling)


def _log_odds(lab: Lab, gate: ConflictGate, prompts: ConflictSet | Sequence[str]) -> Tensor:
    """What the gate reads at the end of each prompt, ``(n,)``; very low where that is unlike what it was fitted on."""
    sites = [lab.anatomy.site(reading.part, reading.layer) for reading in gate.readings]
    values = lab.read_at(sites, prompts)
    read = sum((values[s] @ r.weight for s, r in zip(sites, gate.readings, strict=True)), torch.zeros(())) + gate.bias
    if gate.familiar is None:
        return read
    return read.where(gate.familiar.strangeness(values[sites[-1]]) <= gate.familiar.limit, -_ANY)


def _passing(scores: Tensor, threshold: float, kinds: np.ndarray) -> dict[str, float]:
    """The share of each kind's prompts that pass."""
    is_open = (scores > threshold).numpy()
    return {kind: float(is_open[kinds == kind].mean()) for kind in CONTEXT_KINDS if (kinds == kind).any()}


def _opened(lab: Lab, gate: ConflictGate) -> dict[str, Any]:
    """The share of test's prompts of each kind for which the gate opens, in all phrasings and in the unseen one."""
    columns = {name: [getattr(e, name) for e in lab.asked] for name in ("kind", "subject", "template")}
    is_open = opens(lab, gate, lab.asked).double().numpy()
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
