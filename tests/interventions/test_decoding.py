"""Rules for the next token, against the released code's values, closed forms and the tokens that they must leave."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interp.errors import UserError
from interventions.decoding import CAD, COIECD, AdaCAD, CKPlug, DecodingRule, jensen_shannon

GOLDEN = load_file(Path(__file__).with_name("decoding_golden.safetensors"))
"""Random logits and what the authors' functions make of them; the file's metadata says how."""
WITH, WITHOUT = GOLDEN["logits_with_context"], GOLDEN["logits_without_context"]
RULES: list[DecodingRule] = [
    *(CAD(1.0), CAD(-0.5), AdaCAD(), AdaCAD(0.3, -1.0), COIECD(1.0), COIECD(0.5, 0.5)),
    *(CKPlug(alpha, gate) for alpha in (0.0, 0.8, None) for gate in ("paper", "released")),
]


def published(name: str, scores: torch.Tensor) -> None:
    torch.testing.assert_close(scores.gather(1, GOLDEN["tokens"].long()), GOLDEN[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cad_is_the_published_one(alpha):
    published(f"cad_log_probs_alpha_{alpha}", CAD(alpha).scores(WITH, WITHOUT).log_softmax(-1))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_adacad_is_the_published_one(threshold):
    torch.testing.assert_close(jensen_shannon(WITH, WITHOUT), GOLDEN["adacad_jsd"], rtol=1e-5, atol=1e-6)
    scores = AdaCAD(threshold).scores(WITH, WITHOUT)
    published(f"adacad_log_probs_threshold_{threshold}", scores.log_softmax(-1))


def test_coiecd_is_the_published_one():
    published("coiecd_scores_alpha_1.0", COIECD(1.0).scores(WITH, WITHOUT))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, None])
def test_ck_plug_with_the_released_gate_is_the_published_one(alpha):
    scores = CKPlug(alpha, "released").scores(WITH, WITHOUT)
    published(f"ckplug_log_probs_alpha_{'adaptive' if alpha is None else alpha}", scores.log_softmax(-1))


def test_ck_plug_with_the_paper_s_gate_is_equations_4_to_8_and_10_token_by_token():
    """Where memory is surer nothing changes; elsewhere tokens that stand out are mixed, and the others left out."""
    for alpha in (0.25, None):
        for row, scores in enumerate(CKPlug(alpha, "paper").scores(WITH, WITHOUT)):
            p_c, p_p = WITH[row].double().softmax(-1), WITHOUT[row].double().softmax(-1)
            h_c, h_p = (-(p * p.log()).sum() for p in (p_c, p_p))
            expected = p_c.log()
            if h_p - h_c < 0:
                a = h_c / (h_p + h_c) if alpha is None else alpha
                expected = a * p_p.log() + (1 - a) * (p_c.log() - p_p.log())
                for token in range(len(expected)):
                    better = [int((p > p[token]).sum()) for p in (p_c, p_p)]
                    near = [bool(p[token] >= 0.01 * p.max()) for p in (p_c, p_p)]
                    if min(better) >= 10 and not any(near):
                        expected[token] = -torch.inf
            torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_coiecd_contrasts_less_in_its_band():
    """With alpha 1 and the whole strength, tokens of the band keep their score, and others get CAD's."""
    log_probs, scores = WITH.log_softmax(-1), COIECD(1.0).scores(WITH, WITHOUT)
    contrasted = CAD(1.0).scores(log_probs, WITHOUT.log_softmax(-1))
    kept = torch.isclose(scores, log_probs, atol=1e-5)
    assert kept.any(-1).all()
    assert (kept | torch.isclose(scores, contrasted, atol=1e-5)).all()
    assert not kept.all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_is_added_to_all_logits_of_a_prompt_changes_no_distribution(rule):
    moved = rule.scores(WITH + 7.0, WITHOUT - 3.0).softmax(-1)
    torch.testing.assert_close(moved, rule.scores(WITH, WITHOUT).softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_row_does_not_depend_on_the_others(rule):
    rows = [rule.scores(one[None], other[None])[0] for one, other in zip(WITH, WITHOUT, strict=True)]
    torch.testing.assert_close(torch.stack(rows), rule.scores(WITH, WITHOUT))


def test_an_alpha_of_0_is_the_model_bit_for_bit():
    for rule in (CAD(0.0), AdaCAD(0.0, 0.0), AdaCAD(0.3, 1.0).scaled(0.0)):
        assert torch.equal(rule.scores(WITH, WITHOUT), WITH)
    assert torch.equal(COIECD(1.0, 0.0).scores(WITH, WITHOUT), WITH.log_softmax(-1))


def test_cad_with_an_alpha_of_minus_1_is_the_model_without_the_context_bit_for_bit():
    assert torch.equal(CAD(-1.0).scores(WITH, WITHOUT), WITHOUT)


def test_adacad_leaves_prompts_without_a_conflict_as_they_are():
    torch.testing.assert_close(AdaCAD().scores(WITH, WITH + 2.0), WITH)


@pytest.mark.parametrize("gate", ["paper", "released"])
def test_ck_plug_with_half_of_each_takes_the_same_token_and_with_all_memory_s(gate):
    """a = 1/2 halves log p_c (an identity of equation 8); a = 1 is log p_p where it acts."""
    assert torch.equal(CKPlug(0.5, gate).scores(WITH, WITHOUT).argmax(-1), WITH.argmax(-1))
    first, scores = WITH.argmax(-1), CKPlug(1.0, gate).scores(WITH, WITHOUT).argmax(-1)
    assert ((scores == first) | (scores == WITHOUT.argmax(-1))).all()
    assert (scores != first).any()


def test_half_as_far_is_half_of_the_change():
    for rule in (CAD(0.8), AdaCAD(0.1), COIECD(0.5)):
        whole, half = (one.scores(WITH, WITHOUT) for one in (rule, rule.scaled(0.5)))
        nothing = rule.scaled(0.0).scores(WITH, WITHOUT)
        torch.testing.assert_close(half, (whole + nothing) / 2, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="CKPlug has no strength"):
        CKPlug(0.2).scaled(0.5)


def test_a_rule_cannot_be_attached(tiny_llama):
    with pytest.raises(UserError, match=r"CAD chooses each next token .* call interventions\.two_streams\.generate"):
        CAD(1.0).attach(tiny_llama)


@pytest.mark.parametrize("make", [lambda x: CAD(x), lambda x: AdaCAD(x), lambda x: COIECD(1.0, x), lambda x: CKPlug(x)])
def test_settings_are_finite(make):
    with pytest.raises(UserError, match="a finite number, not nan"):
        make(float("nan"))


def test_a_gate_of_another_name_is_refused():
    with pytest.raises(UserError, match="no gate 'none'; choose paper or released"):
        replace(CKPlug(), gate="none")
