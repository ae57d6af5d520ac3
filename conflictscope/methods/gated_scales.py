"""Learn the scales of heads with a conflict gate in place: what the gate protects needs no budget.

1. A gate is fitted below the upper third of the layers (``conflictscope.methods.gate``).
2. Scales of the heads above it are learned as ``learned_scales`` learns those of all heads, from the conflict prompts
   that the gate opens for. Guards are the prompts that it opens for by mistake, and each guard's budget is that of all
   its prompts, of which a closed gate leaves most as they are.
3. Moved on their line from 1, less far or further, the scales compete behind the gate at several strengths, and at
   thresholds that let fewer conflicts pass, and fewer others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from conflictscope.methods._heads import DRAWS, elsewhere, scaling
from conflictscope.methods.gate import GATE_VERSION, KEEPS, check_keeps, fitted_gates, kept_shares, opens
from conflictscope.methods.learned_scales import ENDS, TRAINING, dial_of, in_lab, learned_from
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.measure import measure
from conflictscope.study.method import Method
from conflictscope.study.record import UNEDITED
from interp.answers import Direction
from interp.conflicts import CONTEXT_KINDS, ConflictSet, evenly
from interventions.dial import TrustDial
from interventions.fitting.scale_data import GUARDS, HeadOrLayer, ScaleData
from interventions.fitting.scale_training import ScaleTraining
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling

_READ = {"train": 400, "dev": 200}
"""How many prompts of each kind the gate is asked about, at most."""


@dataclass(frozen=True)
class GatedScales(Method):
    """Learn the scales of heads behind a conflict gate.

    Attributes:
        training: What decides the learning; budgets and seed are the lab's.
        keeps: The shares of conflicts that the gate is to let pass: the first one while scales are learned, all of them
            where they compete.
        strengths: How far the scales are moved, of what was learned.

    Raises:
        UserError: If one of ``keeps`` is no share.
    """

    name = "gated_scales"
    needs = "learning"
    starts_from = ("texts",)
    training: ScaleTraining = TRAINING
    keeps: tuple[float, ...] = KEEPS
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)

    def __post_init__(self) -> None:
        check_keeps(self.keeps)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """What was learned behind the gate, at each strength and threshold.

        Raises:
            UserError: If the data lacks a kind of prompts, the gate opens for no conflict, or nothing could be moved.
        """
        scales, _ = self._learned(lab, towards)
        end = dial_of({towards: scales}).at(ENDS[towards]).settled()
        return [
            Condition(
                self.name,
                towards,
                {"strength": strength, "keep": keep},
                (replace(gate, edits=tuple(edit.scaled(strength) for edit in end)),),
            )
            for keep, gate in fitted_gates(lab, self._lowest(lab), self.keeps, tuple(end))
            for strength in self.strengths
        ]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """As many other heads of these layers at random, scaled alike, behind the same gate."""
        (gate,) = chosen.edits
        assert isinstance(gate, ConflictGate)
        above = [place for place in lab.anatomy.heads if place[0] >= self._lowest(lab)]
        controls = []
        for draw in range(DRAWS):
            places = elsewhere(lab.rng(chosen.name, draw), above, list(gate.edited_heads))
            heads = scaling(dict(zip(places, gate.head_scales.values(), strict=True)))
            edits = (replace(gate, edits=(heads,)),)
            controls.append(
                Condition("gated_random_heads", chosen.towards, {"draw": draw}, edits, control_of=chosen.method)
            )
        return controls

    def details(self, lab: Lab, chosen: Condition) -> Mapping[str, Any]:
        """What decided the learning, what dev saw of it, and what the gate keeps of what the scales do without one."""
        assert chosen.towards is not None
        settings, shares = self._settings(lab)
        (gate,) = chosen.edits
        assert isinstance(gate, ConflictGate)
        asked = (Condition(UNEDITED), Condition("ungated", chosen.towards, edits=gate.edits), chosen)
        unedited, ungated, gated = (measure(lab, condition).report for condition in asked)
        return {
            "training": asdict(settings),
            "opened": shares,
            "dev": self._learned(lab, chosen.towards)[1],
            "kept": kept_shares(unedited, ungated, gated, chosen.towards),
        }

    def dial(self, lab: Lab) -> ConflictGate:
        """Both directions' scales as one dial at 0, behind the gate.

        Raises:
            UserError: As ``candidates``.
        """
        ends: dict[Direction, Mapping[HeadOrLayer, float]] = {
            towards: self._learned(lab, towards)[0] for towards in ENDS
        }
        dial: TrustDial = dial_of(ends)
        return self._gate(lab, (dial,))

    def _lowest(self, lab: Lab) -> int:
        return max(1, lab.anatomy.n_layers * 2 // 3)

    def _gate(self, lab: Lab, edits: tuple[HeadScaling | TrustDial, ...]) -> ConflictGate:
        ((_, gate),) = fitted_gates(lab, self._lowest(lab), self.keeps[:1], edits)
        return gate

    def _opened(self, lab: Lab, split: Literal["train", "dev"]) -> dict[str, Any]:
        """For which prompts of a split the gate opens, by id, which texts, by number, and which share of each kind."""
        part, texts = lab.prompts.part(split), lab.texts(split)
        some = [e for kind in CONTEXT_KINDS for e in evenly(part.select(kind=kind), _READ[split], lab.seed)]
        gate = self._gate(lab, (scaling({(self._lowest(lab), 0): 0.0}),))

        def compute() -> dict[str, Any]:
            is_open = opens(lab, gate, ConflictSet(part.name, tuple(some))).tolist()
            of_kind = {
                kind: [o for e, o in zip(some, is_open, strict=True) if e.kind == kind] for kind in CONTEXT_KINDS
            }
            of_texts = opens(lab, gate, texts).tolist()
            return {
                "ids": [e.id for e, o in zip(some, is_open, strict=True) if o],
                "texts": [number for number, o in enumerate(of_texts) if o],
                "shares": {kind: sum(o) / max(1, len(o)) for kind, o in {**of_kind, "neutral": of_texts}.items()},
            }

        depends_on = [[e.id for e in some], texts, part.digest, gate.threshold, gate.bias]
        return lab.records.json(f"gate-opens-{split}", depends_on, compute, version=GATE_VERSION)

    def _settings(self, lab: Lab) -> tuple[ScaleTraining, dict[str, float]]:
        """The training in the lab behind the gate, and how often that opens on dev."""
        shares = self._opened(lab, "dev")["shares"]
        open_shares = {kind: shares[kind] for kind in GUARDS}
        return replace(in_lab(lab, self.training), lowest=self._lowest(lab), open_shares=open_shares), shares

    def _learned(self, lab: Lab, towards: Direction) -> tuple[dict[HeadOrLayer, float], dict[str, Any]]:
        settings, shares = self._settings(lab)

        def data() -> dict[Literal["train", "dev"], ScaleData]:
            return {"train": self._data(lab, "train", shares), "dev": self._data(lab, "dev", shares)}

        return learned_from(lab, towards, settings, ["gate", self.keeps[0], GATE_VERSION], data)

    def _data(self, lab: Lab, split: Literal["train", "dev"], shares: Mapping[str, float]) -> ScaleData:
        """The prompts that the gate opens for, of kinds that it opens for on dev: others need no guard."""
        opened = self._opened(lab, split)
        ids, texts = set(opened["ids"]), lab.texts(split)
        return ScaleData(
            lab.model,
            [e for e in lab.prompts.part(split) if e.id in ids and shares[e.kind]],
            [texts[number] for number in opened["texts"] if shares["neutral"]],
            **lab.learned_from[split],
            behind_gate=True,
            seed=lab.seed,
            progress=f"Guards: {split}",
        )
