"""Methods that decode with and without the context: what competes, how it is measured, and the control."""

import random
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from conflictscope.cli import app
from conflictscope.methods._two_streams import OtherContext, random_contexts
from conflictscope.methods.adacad import AdaptiveContextAwareDecoding
from conflictscope.methods.cad import ContextAwareDecoding
from conflictscope.methods.ck_plug import KnowledgePlug
from conflictscope.methods.coiecd import EntropyConstraintDecoding
from conflictscope.study.choice import tried
from conflictscope.study.condition import Condition
from conflictscope.study.measure import measure
from conflictscope.study.method import Method
from conflictscope.study.run import Study
from interp.answers import Direction
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import measure_usage
from interp.generation import continue_greedily
from interp.inputs import encode
from interventions.config import InterventionFile
from interventions.decoding import CAD, COIECD, AdaCAD, CKPlug, DecodingRule
from tests.conflictscope.methods.labs import measured_from_files, tiny_lab
from tests.interp.two_streams import two_passes_a_token
from tests.tiny import tiny_conflicts

EXAMPLES = tiny_conflicts().examples
METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        ContextAwareDecoding(),
        AdaptiveContextAwareDecoding(),
        EntropyConstraintDecoding(),
        KnowledgePlug(alphas=(0.25,)),
    )
}
WANTED: dict[tuple[str, Direction], list[DecodingRule]] = {
    ("cad", "context"): [CAD(0.5), CAD(1.0)],
    ("cad", "memory"): [CAD(-0.5), CAD(-1.0)],
    ("adacad", "context"): [AdaCAD(0.0), AdaCAD(0.3)],
    ("adacad", "memory"): [AdaCAD(0.0, -1.0), AdaCAD(0.3, -1.0)],
    ("coiecd", "context"): [COIECD(0.5), COIECD(1.0)],
    ("coiecd", "memory"): [COIECD(-0.5), COIECD(-1.0)],
    ("ck_plug", "context"): [CKPlug(a, gate) for gate in ("paper", "released") for a in (0.25, None)],
    ("ck_plug", "memory"): [CKPlug(a, gate) for gate in ("paper", "released") for a in (0.75, None)],
}


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


def answered(model, rule: DecodingRule) -> list[str]:
    prompts, bare = [e.prompt for e in EXAMPLES], [e.bare_prompt for e in EXAMPLES]
    return continue_greedily(model, prompts, without=bare, combined=rule.scores).answers


@pytest.mark.parametrize(
    "rule", [*WANTED["cad", "memory"], AdaCAD(0.3), COIECD(1.0), CKPlug(0.25, "released")], ids=str
)
def test_answers_are_those_of_two_forward_passes_a_token(tiny_llama, tiny_plain, rule):
    expected = [two_passes_a_token(tiny_plain("llama"), e.prompt, e.bare_prompt, rule.scores) for e in EXAMPLES]
    assert answered(tiny_llama, rule) == expected


def test_alpha_0_is_greedy_and_alpha_minus_1_answers_as_without_the_context(tiny_llama):
    assert answered(tiny_llama, CAD(0.0)) == continue_greedily(tiny_llama, [e.prompt for e in EXAMPLES]).answers
    assert answered(tiny_llama, CAD(-1.0)) == continue_greedily(tiny_llama, [e.bare_prompt for e in EXAMPLES]).answers


@pytest.mark.parametrize("rule", [CAD(1.0), COIECD(1.0), CKPlug(0.25, "released")], ids=str)
def test_prompts_without_a_context_are_answered_as_unedited(lab, rule):
    bare = lab.prompts.test.select(kind="none")
    reports = [measure_usage(lab.model, bare, combined=choice).frame for choice in (None, rule.scores)]
    assert reports[0].equals(reports[1])


@pytest.mark.parametrize(("name", "towards"), WANTED, ids="-".join)
def test_the_candidates_lean_to_the_source_and_one_is_chosen(lab, name, towards):
    candidates = METHODS[name].candidates(lab, towards)
    assert [c.decoding for c in candidates] == WANTED[name, towards]
    assert len({c.digest for c in candidates}) == len(candidates)
    assert {(c.method, c.towards) for c in candidates} == {(name, towards)}
    assert lab.chosen(METHODS[name], towards).best.condition.method == name


def test_dev_weighs_next_tokens_and_what_a_rule_leaves_out_is_damage(lab):
    """Against one pass for each prompt, and sums over the vocabulary."""
    rule = CKPlug(0.25, "released")
    found = tried(lab, Condition("ck_plug", "context", decoding=rule))
    aligned = lab.dev.guards["aligned"]
    divergences = []
    for example in aligned:
        with torch.inference_mode():
            first, second = (
                lab.model.original_model(**encode(lab.model, [text])).logits[:, -1].double()
                for text in (example.prompt, example.bare_prompt)
            )
        p, log_q = first[0].softmax(-1), rule.scores(first, second)[0].log_softmax(-1)
        kept = log_q > -torch.inf
        mass = p[kept].sum()
        p = p[kept] / mass
        divergences.append(float((p * (p.log() - log_q[kept])).sum() - mass.log()))
    assert found.damage["aligned"] == pytest.approx(sum(divergences) / len(aligned), rel=1e-3)
    assert "none" not in found.damage
    assert "neutral" not in found.damage


def test_half_as_far_is_half_the_alpha():
    condition = Condition("cad", "context", {"alpha": 1.0}, decoding=CAD(1.0))
    assert condition.scaled(0.5).digest == Condition("cad", decoding=CAD(0.5)).digest


@pytest.mark.parametrize("rule", [CAD(1.0), CKPlug(None, "released")], ids=str)
def test_a_unit_of_a_rule_or_of_its_control_gives_the_same_from_its_files_alone(lab, tmp_path, rule):
    lab = tiny_lab(lab.model, tmp_path / "here")
    condition = Condition("some", "context", decoding=rule)
    for number, one in enumerate((condition, *random_contexts(lab, condition)[:1])):
        here = measure(lab, one).report.frame
        assert measured_from_files(lab, one, tmp_path / f"there-{number}").report.frame.equals(here)


def test_a_study_writes_the_rule_into_a_file(lab, tmp_path):
    record = Study("compare", "", tmp_path, directions=("context",)).run(lab, [ContextAwareDecoding()])
    best = record.winner("context")
    assert best is not None
    assert best.file is not None
    assert InterventionFile.load(tmp_path / best.file).build() == [CAD(best.settings["alpha"])]
    assert best.does == f"next token by CAD, alpha {best.settings['alpha']:g}"
    assert best.does in CliRunner().invoke(app, ["inspect", str(tmp_path / best.file)]).output
    (control,) = record.controls_of(best)
    assert (control.name, control.draws, control.file) == ("random contexts for cad, towards context", 1, None)


# The control


def test_the_control_asks_the_same_question_after_another_subject_s_context_of_its_kind(lab):
    asked = list(lab.asked)
    exchanged = OtherContext(3).asked(asked)
    bare_prompts = set()
    for old, new in zip(asked, exchanged, strict=True):
        assert replace(new, bare_prompt=old.bare_prompt) == old
        if not old.contexts:
            assert new == old
            continue
        fitting = [
            other
            for other in asked
            if (other.kind, other.template) == (old.kind, old.template) and other.subject != old.subject
        ]
        (own,) = old.contexts
        question = old.prompt[len(own) :]
        shown = [o.prompt[: len(o.contexts[0])] + question for o in fitting]
        assert new.bare_prompt in shown
        bare_prompts.add(new.bare_prompt)
    assert len(bare_prompts) > len(asked) / 2
    assert OtherContext(3).asked(asked) == exchanged
    assert OtherContext(4).asked(asked) != exchanged


def test_controls_are_drawn_apart_and_change_nothing_but_the_second_prompt(lab):
    chosen = Condition("cad", "context", {"alpha": 1.0}, decoding=CAD(1.0))
    controls = random_contexts(lab, chosen)
    assert len({c.digest for c in (chosen, *controls)}) == 3
    assert {(c.decoding, c.control_of, c.method) for c in controls} == {(CAD(1.0), "cad", "random_contexts")}


def test_without_another_subject_or_a_context_that_shows_there_is_no_control(lab):
    alone = [e for e in lab.asked if e.kind == "conflict" and e.subject == lab.asked.subjects[0]]
    with pytest.raises(UserError, match="no context of another subject"):
        OtherContext(0).asked(alone)
    hidden = [replace(e, contexts=("Something else",)) for e in random.Random(0).sample(list(lab.asked), 8)]
    lab = tiny_lab(lab.model, lab.records.folder / "hidden")
    lab.prompts = replace(lab.prompts, test=ConflictSet("hidden", tuple(replace(e, kind="conflict") for e in hidden)))
    with pytest.raises(UserError, match="does not show its context as it is"):
        random_contexts(lab, Condition("cad", "context", decoding=CAD(1.0)))
