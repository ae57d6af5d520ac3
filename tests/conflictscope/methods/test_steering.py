"""Methods that steer by a vector: actadd, caa, probe_direction, task_vector, context_focus."""

import pytest
import torch

from conflictscope.methods.actadd import ActAdd
from conflictscope.methods.caa import CAA
from conflictscope.methods.context_focus import ContextFocus
from conflictscope.methods.probe_direction import ProbeDirection
from conflictscope.methods.task_vector import TaskVector
from interp.anatomy import transformers_model
from interp.errors import UserError
from interp.inputs import token_ids
from interventions.steering import Steering
from probes.linear import ProbeSet
from tests.conflictscope.methods.answered_lab import answered_lab

METHODS = (ActAdd, CAA, ContextFocus, ProbeDirection, TaskVector)
STRENGTHS = {TaskVector: (0.5, 1.0), ContextFocus: (0.5, 1.0, 2.0, 4.0)}
LAYER = 1


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return answered_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


@torch.no_grad()
def residual(lab, text):
    """The residual stream after the block at every token, by one pass of the transformers model."""
    (ids,) = token_ids(lab.model.tokenizer, [text])
    network = transformers_model(lab.model)
    return network(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]


def states_by_source(lab, split):
    """States at the prompts' ends, ``(n, d_model)`` each: answered from the context, from memory."""
    prompts = {example.id: example.prompt for part in (lab.prompts.train, lab.prompts.dev) for example in part}
    rows = lab.answered.filter(split=split)
    return [
        torch.stack([residual(lab, prompts[name])[-1] for name in rows.filter(usage=source)["id"]])
        for source in ("context", "memory")
    ]


def vector(lab, method, towards):
    (condition, *_) = method(layers=(LAYER,)).candidates(lab, towards)
    (edit,) = condition.edits
    assert isinstance(edit, Steering)
    return edit.vector


@pytest.mark.parametrize("method", METHODS)
def test_every_second_layer_competes_with_every_strength(lab, method):
    candidates = method().candidates(lab, "context")
    strengths = STRENGTHS.get(method, (1.0, 2.0, 4.0, 8.0))
    expected = [(layer, strength) for layer in (0, 2) for strength in strengths]
    assert [(c.settings["layer"], c.settings["strength"]) for c in candidates] == expected
    edits = [edit for condition in candidates for edit in condition.edits if isinstance(edit, Steering)]
    assert [(edit.layer, edit.strength) for edit in edits] == expected
    assert {edit.tokens for edit in edits} == {"answer" if method in (CAA, ContextFocus) else "last_prompt"}
    assert {edit.mode for edit in edits} == {"replace" if method is TaskVector else "add"}


@pytest.mark.parametrize("method", METHODS)
def test_layers_strengths_and_tokens_can_be_chosen(lab, method):
    (condition,) = method(layers=(1,), strengths=(3.0,), tokens="all").candidates(lab, "memory")
    assert condition.settings == {"layer": 1, "strength": 3.0, "tokens": "all"}
    assert condition.towards == "memory"
    with pytest.raises(UserError, match="Layer 3 does not exist"):
        method(layers=(3,)).candidates(lab, "memory")


def test_actadd_adds_the_difference_of_the_means_by_answered_source(lab):
    context, memory = states_by_source(lab, "train")
    difference = context.mean(0) - memory.mean(0)
    torch.testing.assert_close(vector(lab, ActAdd, "context"), difference, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vector(lab, ActAdd, "memory"), -difference, atol=1e-5, rtol=1e-4)


def test_task_vector_puts_the_mean_of_the_source_there(lab):
    for towards, states in zip(("context", "memory"), states_by_source(lab, "train"), strict=True):
        torch.testing.assert_close(vector(lab, TaskVector, towards), states.mean(0), atol=1e-5, rtol=1e-4)


def test_caa_adds_the_mean_difference_between_the_tokens_of_either_answer(lab):
    def mean(answers):
        rows = []
        for example, answer in answers:
            start = len(token_ids(lab.model.tokenizer, [example.prompt])[0])
            rows.append(residual(lab, f"{example.prompt} {answer}")[start:])
        return torch.cat(rows).mean(0)

    train = lab.prompts.train.examples
    difference = mean((e, e.context_answers[0]) for e in train) - mean((e, e.memory_answers[0]) for e in train)
    torch.testing.assert_close(vector(lab, CAA, "context"), difference, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vector(lab, CAA, "memory"), -difference, atol=1e-5, rtol=1e-4)


def test_context_focus_adds_what_the_context_changes_at_the_prompts_end(lab):
    train = lab.prompts.train.select(kind="conflict").examples
    difference = torch.stack([residual(lab, e.prompt)[-1] - residual(lab, e.bare_prompt)[-1] for e in train]).mean(0)
    torch.testing.assert_close(vector(lab, ContextFocus, "context"), difference, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vector(lab, ContextFocus, "memory"), -difference, atol=1e-5, rtol=1e-4)


def test_probe_direction_is_the_probes_and_as_long_as_the_difference_of_the_means(lab):
    parts = [(split, states_by_source(lab, split)) for split in ("train", "dev")]
    states = torch.cat([torch.cat(by_source) for _, by_source in parts])
    labels = [s for _, by in parts for s, part in zip(("context", "memory"), by, strict=True) for _ in part]
    validation = [split == "dev" for split, by_source in parts for part in by_source for _ in part]
    probe = ProbeSet.fit({"x": states}, labels, validation=validation, classes=("memory", "context"))["x"]
    context, memory = parts[0][1]
    found = vector(lab, ProbeDirection, "context")
    assert found.norm().item() == pytest.approx((context.mean(0) - memory.mean(0)).norm().item(), rel=1e-4)
    assert torch.cosine_similarity(found, probe.direction, dim=0).item() == pytest.approx(1, abs=1e-4)
    assert (context @ found).min() > (memory @ found).max()
    assert torch.equal(vector(lab, ProbeDirection, "memory"), -found)


def test_vectors_are_learned_once_for_both_directions_and_later_labs(lab, tiny_llama, monkeypatch):
    before = {method: vector(lab, method, "context") for method in METHODS}
    again = answered_lab(tiny_llama, lab.records.folder)
    monkeypatch.setattr("conflictscope.methods.caa.record", None)
    monkeypatch.setattr("conflictscope.methods.context_focus.record", None)
    monkeypatch.setattr("conflictscope.methods.probe_direction.ProbeSet", None)
    monkeypatch.setattr(again, "train_states", None)
    for method in METHODS:
        assert torch.equal(vector(again, method, "context"), before[method])
        vector(again, method, "memory")


@pytest.mark.parametrize("method", METHODS)
def test_controls_are_other_directions_of_the_same_length_in_the_same_place(lab, method):
    chosen = method(layers=(LAYER,)).candidates(lab, "context")[1]
    controls = method().controls(lab, chosen)
    (ours,) = chosen.edits
    theirs = [edit for condition in controls for edit in condition.edits]
    assert {condition.control_of for condition in controls} == {method.name}
    assert len({c.digest for c in (chosen, *controls)}) == 3
    for edit in theirs:
        assert [getattr(edit, name) for name in ("layer", "strength", "tokens", "mode")] == [
            getattr(ours, name) for name in ("layer", "strength", "tokens", "mode")
        ]
        torch.testing.assert_close(edit.vector.norm(), ours.vector.norm())
    again = method().controls(lab, chosen)
    assert [c.digest for c in again] == [c.digest for c in controls]


def test_a_model_that_follows_one_source_alone_is_told_so_except_by_the_contrast_of_answers(tiny_llama, tmp_path):
    lab = answered_lab(tiny_llama, tmp_path)
    lab.answered = lab.answered.filter(usage="context")
    for method in (ActAdd, ProbeDirection, TaskVector):
        with pytest.raises(UserError, match="both sources are needed"):
            method().candidates(lab, "context")
    assert CAA().candidates(lab, "context")
