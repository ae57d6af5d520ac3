import math
from types import SimpleNamespace

import pytest
import torch

from conflictscope.methods import gated_scales as job
from conflictscope.methods.gated_scales import GatedScales
from interp.anatomy import transformers_model
from interp.answers import DIRECTIONS
from interp.conflicts import CONTEXT_KINDS
from interp.errors import UserError
from interp.inputs import encode
from interventions.base import applied
from interventions.config import effect_digest
from interventions.fitting.scale_data import GUARDS
from interventions.fitting.scale_training import ScaleTraining
from interventions.gate import ConflictGate
from tests.conflictscope.methods.labs import tiny_lab

TRAINING = ScaleTraining(steps=3, conflicts=8, guards=4, max_scales=3)
METHOD = GatedScales(TRAINING, keeps=(0.8,), strengths=(1.0, 2.0))


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def candidates(lab):
    return {towards: METHOD.candidates(lab, towards) for towards in DIRECTIONS}


def test_what_is_learned_lies_above_what_the_gate_reads(lab, candidates):
    lowest = lab.anatomy.n_layers * 2 // 3
    for some in candidates.values():
        for condition in some:
            (gate,) = condition.edits
            assert isinstance(gate, ConflictGate)
            assert min(gate.edited_layers) >= lowest > max(reading.layer for reading in gate.readings)
            assert 0 < gate.n_moved <= 3
    first, second = (condition.edits[0].head_scales for condition in candidates["context"])
    assert {place: 1 + 2 * (scale - 1) for place, scale in first.items()} == pytest.approx(second)


def test_it_is_learned_from_the_prompts_that_the_gate_lets_change(lab, candidates):
    (gate,) = candidates["context"][0].edits
    network = transformers_model(lab.model)

    def differs(example) -> bool:
        inputs = encode(lab.model, [example.prompt])
        with torch.inference_mode():
            before = network(**inputs).logits
            with applied(lab.model, gate):
                return not torch.equal(network(**inputs).logits, before)

    found, dev = METHOD._opened(lab, "dev"), lab.prompts.dev
    asked = {e.id for e in dev if differs(e)}
    assert set(found["ids"]) <= asked
    assert 0 < len(asked) < len(dev)
    for kind in CONTEXT_KINDS:
        of_kind = dev.select(kind=kind)
        assert len(of_kind) <= 200
        assert found["shares"][kind] == pytest.approx(sum(e.id in asked for e in of_kind) / len(of_kind))


def test_a_share_that_is_none_is_refused():
    with pytest.raises(UserError, match="between 0 and 1, not at 2"):
        GatedScales(keeps=(2,))


def test_a_guard_that_the_gate_protects_needs_no_budget():
    shares = dict(zip(GUARDS, (0.5, 1.0, 0.25, 0.0), strict=True))
    budgets = ScaleTraining(budget=0.02, context_budget=0.2, open_shares=shares).budgets
    assert budgets == pytest.approx(dict(zip(GUARDS, (0.04, 0.2, 0.8, math.inf), strict=True)))
    assert ScaleTraining().budgets == pytest.approx(dict(zip(GUARDS, (0.02, 0.2, 0.2, 0.02), strict=True)))


def test_the_dial_does_at_its_ends_what_was_learned(lab, candidates):
    dial = METHOD.dial(lab)
    for towards, trust in (("context", 1.0), ("memory", -1.0)):
        assert effect_digest([dial.turned(trust)]) == candidates[towards][0].digest


def test_controls_scale_as_many_other_heads_alike_behind_the_same_gate(lab, candidates):
    chosen = candidates["memory"][0]
    (gate,) = chosen.edits
    for control in METHOD.controls(lab, chosen):
        (blind,) = control.edits
        assert isinstance(blind, ConflictGate)
        assert sorted(blind.head_scales.values()) == pytest.approx(sorted(gate.head_scales.values()))
        assert blind.threshold == gate.threshold
        assert min(blind.edited_layers) >= lab.anatomy.n_layers * 2 // 3
        assert control.control_of == "gated_scales"


def test_the_details_say_how_often_the_gate_opens(lab, candidates):
    details = METHOD.details(lab, candidates["context"][0])
    assert set(details["opened"]) == {"conflict", *GUARDS}
    assert details["training"]["open_shares"] == {kind: details["opened"][kind] for kind in GUARDS}


def test_what_the_gate_keeps_is_told_against_the_same_scales_without_it(lab, candidates, monkeypatch):
    chosen = candidates["context"][1]
    (gate,) = chosen.edits
    monkeypatch.setattr(job, "measure", lambda _, condition: SimpleNamespace(report=condition.edits))
    monkeypatch.setattr(job, "kept_shares", lambda *told: told)
    assert METHOD.details(lab, chosen)["kept"] == ((), gate.edits, chosen.edits, "context")
