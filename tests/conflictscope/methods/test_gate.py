import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import binomtest

from conflictscope.methods import gate as job
from conflictscope.methods.gate import Gate, kept_shares, passing_threshold
from conflictscope.study import lab as study_lab
from conflictscope.study.condition import Condition
from conflictscope.study.measure import measure
from interp.anatomy import transformers_model
from interp.answers import DIRECTIONS
from interp.errors import UserError
from interp.evaluation import UsageReport, neutral_texts
from interp.facts import HELD_OUT_PHRASING
from interp.inputs import encode
from interventions.base import applied
from interventions.dial import DialScale, TrustDial
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from probes.joint import STRENGTHS
from tests.conflictscope.methods.labs import tiny_lab

EDIT = HeadScaling.of([(2, 1), (2, 3)], -3.0)
GATE = Gate((EDIT,), "context", keeps=(0.8,))
OTHERS = ("aligned", "irrelevant", "none")


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def chosen(lab):
    (condition,) = GATE.candidates(lab, "context")
    return condition


@pytest.fixture(scope="module")
def details(lab, chosen):
    with pytest.MonkeyPatch.context() as patch:
        few = neutral_texts()[:4]
        for module in ("interp.evaluation", "conflictscope.study.measure"):
            patch.setattr(f"{module}.neutral_texts", lambda: few)
        return GATE.details(lab, chosen)


def changed(lab, condition, example) -> bool:
    inputs, network = encode(lab.model, [example.prompt]), transformers_model(lab.model)
    with torch.inference_mode():
        before = network(**inputs).logits
        with applied(lab.model, *condition.edits):
            return not torch.equal(network(**inputs).logits, before)


def test_the_candidate_is_the_edit_behind_a_gate_below_it(chosen):
    (gate,) = chosen.edits
    assert isinstance(gate, ConflictGate)
    assert gate.edits == (EDIT,)
    assert gate.layer < 2
    assert (chosen.method, chosen.towards) == ("gate", "context")


def test_what_is_said_to_open_is_what_the_gate_edits(lab, chosen, details):
    """The share of test prompts whose logits are changed, against the share said to be open."""
    (control,) = GATE.controls(lab, chosen)
    for condition, opened in ((chosen, details["opened"]), (control, details["random_opened"])):
        for kind in ("conflict", *OTHERS):
            asked = lab.prompts.test.select(kind=kind)
            differs = {example: changed(lab, condition, example) for example in asked}
            unseen = [found for example, found in differs.items() if example.template == HELD_OUT_PHRASING]
            assert np.mean([*differs.values()]) == pytest.approx(opened[kind]["value"])
            assert np.mean(unseen) == pytest.approx(opened["held_out_phrasing"][kind]["value"])


def test_neither_test_subjects_nor_the_held_out_phrasing_choose_gate_or_control(tiny_llama, tmp_path, monkeypatch):
    seen, real = [], study_lab.record
    monkeypatch.setattr(
        study_lab, "record", lambda model, part, *a, **k: seen.append(part) or real(model, part, *a, **k)
    )
    fresh = tiny_lab(tiny_llama, tmp_path)
    assert GATE.controls(fresh, *GATE.candidates(fresh, "context"))
    # Each is read once, by gate and control alike.
    assert [{e.split for e in part} for part in seen] == [{"train"}, {"dev"}]
    assert all(e.template != HELD_OUT_PHRASING for part in seen for e in part)
    assert {e.kind for e in seen[0]} == {"conflict", *OTHERS}


def test_the_strength_is_the_one_that_ranks_left_out_phrasings_best(lab, monkeypatch):
    """Against fits that may take one strength only; z is read in the middle layers below the edit."""
    train, dev = job._learned_from(lab, "train"), job._learned_from(lab, "dev")
    best = job._fitted(lab, train, dev, 2)
    assert list(best["weights"]) == ["blocks.1.attn.o.hook_in"]
    for strength in STRENGTHS:
        monkeypatch.setattr(job, "STRENGTHS", (strength,))
        assert job._fitted(lab, train, dev, 2)["left_out_auroc"] <= best["left_out_auroc"]


def test_a_gate_reads_no_layer_that_is_edited(lab):
    ((_, gate),) = job.fitted_gates(lab, 2, (0.8,), (EDIT,), soft=True)
    assert {reading.layer for reading in gate.readings} == {1}
    assert gate.soft


def test_what_is_stranger_than_nearly_all_of_dev_is_unfamiliar():
    train, dev = (torch.randn(400, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = job._familiar(train, dev)
    assert found is not None
    strangeness = (((dev - train.mean(0)) / train.std(0)) ** 2).mean(1)
    assert int((strangeness > found["limit"]).sum()) == 401 - np.ceil(401 * 0.99) - 1
    assert job._familiar(train, dev[:50]) is None


def test_the_control_reads_another_direction_at_the_same_site_and_lets_as_many_conflicts_pass(lab, chosen):
    (control,) = GATE.controls(lab, chosen)
    gate, blind = job._gate_of(chosen), job._gate_of(control)
    assert (blind.part, blind.layer, blind.edits) == (gate.part, gate.layer, gate.edits)
    assert abs(torch.cosine_similarity(blind.weight, gate.weight, dim=0)) < 0.6
    assert (control.method, control.control_of) == ("random_gate", "gate")
    dev = [e for e in job._learned_from(lab, "dev") if e.kind == "conflict"]
    opened, by_chance = (np.mean([changed(lab, one, example) for example in dev]) for one in (chosen, control))
    # The threshold is the score of one of them, for which rounding decides.
    assert by_chance == pytest.approx(opened, abs=1.01 / len(dev))
    assert GATE.controls(lab, chosen)[0].digest == control.digest


def test_the_details_are_json_and_rank_dev_as_pairs_do(lab, chosen, details):
    assert json.loads(json.dumps(details)) == details
    gate, dev = job._gate_of(chosen), job._learned_from(lab, "dev")
    scores = job._log_odds(lab, gate, dev).tolist()
    conflicts, others = (
        [score for score, e in zip(scores, dev, strict=True) if (e.kind == "conflict") == is_conflict]
        for is_conflict in (True, False)
    )
    won = np.mean([(a > b) + 0.5 * (a == b) for a in conflicts for b in others])
    assert details["dev"]["auroc"] == pytest.approx(won)


def test_the_shares_that_are_kept_are_those_of_the_measured_answers(lab, chosen, details):
    reports = [measure(lab, c).report for c in (Condition("unedited"), Condition("edit", edits=(EDIT,)), chosen)]
    rates = [report.select(kind="conflict").rate("context").value for report in reports]
    assert None not in rates
    changes = [float(after or 0) - float(rates[0] or 0) for after in rates[1:]]
    if changes[0]:
        assert details["kept"]["gain"]["value"] == pytest.approx(changes[1] / changes[0])
    assert set(details["kept"]) == {"gain", *OTHERS, "held_out_phrasing"}


def test_without_edits_what_pruning_chose_is_gated(lab, monkeypatch):
    pruned = Condition("pruning", "memory", edits=(EDIT,))
    found = SimpleNamespace(best=SimpleNamespace(condition=pruned))
    monkeypatch.setattr(lab, "chosen", lambda method, towards: {("pruning", "memory"): found}[method.name, towards])
    (condition,) = Gate(keeps=(0.8,)).candidates(lab, "memory")
    assert job._gate_of(condition).edits == (EDIT,)


def test_a_gate_is_fitted_once(lab, chosen, monkeypatch):
    monkeypatch.setattr(job, "_fitted", lambda *_, **__: pytest.fail("fitted again"))
    assert GATE.candidates(lab, "context")[0].digest == chosen.digest


# Thresholds and shares


@pytest.mark.parametrize(("n", "keep"), [(19, 0.95), (100, 0.9), (9, 0.5), (1000, 0.99)])
def test_a_new_score_passes_with_the_wanted_probability(n, keep):
    """The coverage of a conformal threshold lies between the wanted share and one rank more, by counting ranks."""
    scores = torch.randperm(n).float()
    passed = int((scores > passing_threshold(scores, keep)).sum())
    # A new score is equally likely to fall into each of the n + 1 gaps; it passes in those above the threshold.
    assert keep - 1e-9 <= (passed + 1) / (n + 1) < keep + 1 / (n + 1) + 1e-9


def report(kind: str, usage: list[str], right: list[float]) -> pl.DataFrame:
    subjects = [str(i) for i in range(len(usage))]
    return pl.DataFrame({"kind": [kind] * len(usage), "subject": subjects, "usage": usage, "memory_span_match": right})


def test_kept_shares_by_hand():
    def answers(context: int, right: int) -> UsageReport:
        usage = ["context"] * context + ["memory"] * (10 - context)
        known = [1.0] * right + [0.0] * (10 - right)
        return UsageReport(pl.concat([report("conflict", usage, known), report("none", usage, known)]))

    reports = answers(2, 9), answers(8, 4), answers(5, 8)
    shares = kept_shares(*reports, "context")
    assert shares["gain"]["value"] == pytest.approx(0.5)
    assert shares["none"]["value"] == pytest.approx(0.2)
    assert shares["gain"]["low"] <= 0.5 <= shares["gain"]["high"]
    # Every prompt that the edit turned right to wrong is right behind the gate, or it is not.
    expected = binomtest(1, 5).proportion_ci(method="wilson")
    assert (shares["none"]["low"], shares["none"]["high"]) == pytest.approx((expected.low, expected.high))
    assert "irrelevant" not in shares
    assert "gain" not in kept_shares(*reports, None)


def test_a_share_of_a_change_that_there_is_not_is_undefined():
    def answers(right: list[float]) -> UsageReport:
        return UsageReport(report("aligned", ["memory"] * 10, right))

    same = answers([1.0] * 9 + [0.0])
    shares = kept_shares(same, same, answers([1.0] * 8 + [0.0] * 2), None)
    assert shares == {"aligned": {"value": None, "low": None, "high": None, "n": 10}}


def test_a_share_of_all_is_as_sure_as_the_prompts_that_changed():
    plain, moved = ["memory"] * 20, ["context"] * 3 + ["memory"] * 17
    before, after = (UsageReport(report("conflict", usage, [1.0] * 20)) for usage in (plain, moved))
    gain = kept_shares(before, after, after, "context")["gain"]
    expected = binomtest(3, 3).proportion_ci(method="wilson")
    assert (gain["value"], gain["n"]) == (1, 3)
    assert (gain["low"], gain["high"]) == pytest.approx((expected.low, expected.high))


# What is refused


def test_edits_that_cannot_be_gated_are_refused():
    with pytest.raises(UserError, match="no gate can lie below it"):
        Gate((HeadScaling.of([(0, 1)], 0.0),))
    with pytest.raises(UserError, match="have a gate already"):
        Gate((ConflictGate("block", 0, torch.ones(32), 0.0, 0.0, (EDIT,)),))
    with pytest.raises(UserError, match="change nothing"):
        Gate((TrustDial((DialScale(1, 1, 0.0, 2.0),)),))


def test_the_other_source_too_few_conflicts_or_no_share_are_refused(lab):
    with pytest.raises(UserError, match="strengthen context, so that no gate of them is towards memory"):
        GATE.candidates(lab, "memory")
    with pytest.raises(UserError, match=r"too few to let 0\.999 of them pass"):
        Gate((EDIT,), keeps=(0.999,)).candidates(lab, "context")
    with pytest.raises(UserError, match="between 0 and 1"):
        Gate(keeps=(0.9, 1.0))


def test_edits_of_no_stated_source_are_gated_towards_both(lab, chosen):
    both = Gate((EDIT,), keeps=(0.8,))
    assert [both.candidates(lab, source)[0].digest for source in DIRECTIONS] == [chosen.digest] * 2


def test_a_gate_reads_the_middle_layers_that_lie_below_the_edit():
    assert [*job.read_layers(30, 23)] == [*range(10, 20)]
    assert [*job.read_layers(30, 12)] == [*range(6, 12)]
    assert [*job.read_layers(30, 1)] == [0]
    assert [*job.read_layers(3, 2)] == [1]


def test_thresholds_for_several_shares_are_of_one_probe_and_compete(lab, chosen):
    """A share that there are too few prompts for is left out."""
    found = Gate((EDIT,), "context", keeps=(0.999, 0.8, 0.5)).candidates(lab, "context")
    assert [one.settings["keep"] for one in found] == [0.8, 0.5]
    gates = [job._gate_of(one) for one in found]
    assert found[0].digest == chosen.digest
    assert gates[0].threshold < gates[1].threshold
    assert torch.equal(gates[0].weight, gates[1].weight)
    with pytest.raises(UserError, match="lies between 0 and 1, not at nowhere"):
        Gate(keeps=())
