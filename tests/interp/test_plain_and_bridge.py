"""A model and a bridge around it give the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.activations import record, sites_of
from interp.attribution.attribution_patching import attribution_patching
from interp.attribution.direct_logits import direct_logit_attribution
from interp.attribution.path_patching import path_patching
from interp.bridges import load_bridge
from interp.evaluation import answer_starts, measure_usage, neutral_kl
from interp.facts import known_facts, usable_facts
from interp.generation import answer_steps, continue_greedily, gathered_logits, next_logits
from interp.known import ClosedBook, are_known
from interp.lens import logit_lens
from interp.models import load_model
from interp.reading import ALL_LAYERS_AT_END, ReadPrompts
from interp.teacher_forcing import continued, greedily_continued, item_residuals
from interventions.base import applied
from interventions.heads import HeadScaling
from tests.tiny import tiny_conflicts

CONFLICTS = tiny_conflicts()
PROMPTS = [example.prompt for example in CONFLICTS]


@pytest.fixture(scope="module", params=["gemma2", "gpt-neox", "mistral"])
def pair(request, tiny_directories) -> tuple[Any, Any]:
    """A model, and a bridge around another copy of it."""
    folder = str(tiny_directories[request.param])
    return load_model(folder, device="cpu"), load_bridge(folder, device="cpu")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_answers_and_what_they_used(pair):
    plain, bridged = (measure_usage(model, CONFLICTS).frame for model in pair)
    assert plain.drop("logit_difference").equals(bridged.drop("logit_difference"))
    same(*(frame["logit_difference"].to_torch() for frame in (plain, bridged)))


def test_answers_of_two_prompts_read_side_by_side(pair):
    bare = [example.bare_prompt for example in CONFLICTS]
    plain, bridged = (
        continue_greedily(model, PROMPTS, without=bare, combined=lambda one, other: 2 * one - other).answers
        for model in pair
    )
    assert plain == bridged


def test_steps_of_an_answer(pair):
    plain, bridged = (answer_steps(model, PROMPTS[0]) for model in pair)
    assert [step.token for step in plain] == [step.token for step in bridged]
    assert np.allclose([step.probability for step in plain], [step.probability for step in bridged], rtol=1e-4)


def test_first_tokens_of_answers(pair):
    plain, bridged = (answer_starts(model, CONFLICTS).frame for model in pair)
    assert plain.equals(bridged)


@pytest.mark.parametrize("changed", [ALL_LAYERS_AT_END, 1, "whole"])
def test_prompts_that_were_read_once(pair, changed):
    edits = [] if changed == ALL_LAYERS_AT_END else [HeadScaling.of([(1, 2), (2, 0)], 3.0)]
    read = [ReadPrompts(model, PROMPTS) for model in pair]
    logits, answers = [], []
    for model, prompts in zip(pair, read, strict=True):
        with applied(model, *edits):
            logits.append(gathered_logits(prompts.next_logits(changed), len(PROMPTS)))
            answers.append(prompts.continue_greedily(changed).answers)
            whole = gathered_logits(next_logits(model, PROMPTS), len(PROMPTS))
        torch.testing.assert_close(logits[-1], whole, rtol=1e-4, atol=1e-4)
    same(*logits)
    assert answers[0] == answers[1]


def test_facts_that_are_known(pair):
    facts = usable_facts("capital")[:12]
    said = continue_greedily(pair[0], [f"The capital of {fact.subject} is" for fact in facts]).answers
    asked = [
        ClosedBook([f"The capital of {fact.subject} is"], [answer if i % 3 else "nothing of it"])
        for i, (fact, answer) in enumerate(zip(facts, said, strict=True))
    ]
    known = [are_known(model, asked) for model in pair]
    assert known[0] == known[1]
    assert set(known[0]) == {False, True}
    assert known_facts(pair[0], "capital", among=facts) == known_facts(pair[1], "capital", among=facts)


@pytest.mark.parametrize("baseline", ["corrupted", "zero", "mean"])
def test_path_patching(pair, baseline):
    metrics: Any = ("logit_diff", "memory_probability", "context_probability")
    plain, bridged = (path_patching(m, CONFLICTS, name="m", baseline=baseline, metrics=metrics) for m in pair)
    for metric in metrics:
        same(plain[metric].values, bridged[metric].values)


def test_direct_logits(pair):
    plain, bridged = (direct_logit_attribution(model, CONFLICTS, name="m") for model in pair)
    same(plain.heads.values, bridged.heads.values)
    same(plain.mlps, bridged.mlps)
    same(plain.total, bridged.total)


def test_attribution_patching(pair):
    same(*(attribution_patching(model, CONFLICTS, name="m").values for model in pair))


def test_logit_lens(pair):
    same(*(logit_lens(model, CONFLICTS).log_probabilities for model in pair))


def test_recorded_activations(pair):
    sites = sites_of(pair[0], ["residual", "attention", "mlp", "z"])
    assert sites == sites_of(pair[1], ["residual", "attention", "mlp", "z"])
    plain, bridged = (record(model, CONFLICTS, sites, "memory_answer") for model in pair)
    for site in sites:
        same(plain[site], bridged[site])


def test_forced_answers(pair):
    items = [[continued(model, prompt, " Rome") for prompt in PROMPTS] for model in pair]
    assert items[0] == items[1]
    assert greedily_continued(pair[0], items[0]) == greedily_continued(pair[1], items[1])
    same(*(torch.cat(item_residuals(model, items[0])) for model in pair))


def test_what_an_edit_changes(pair):
    edit = HeadScaling.of([(1, 2), (2, 0)], 3.0)
    logits = []
    for model in pair:
        with applied(model, edit):
            parts = list(next_logits(model, PROMPTS))
            logits.append(torch.cat([values for _, values in parts]))
    same(*logits)
    damage = [neutral_kl(model, lambda model=model: applied(model, edit), texts=PROMPTS) for model in pair]
    assert damage[0].max() > 1e-3
    assert np.allclose(*damage, rtol=1e-3, atol=1e-6)
